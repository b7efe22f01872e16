from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.artifact.models import resolve
from pocketize.artifact.pt2 import module_of, read_exported, write_exported
from pocketize.errors import ArtifactError, RewriteError
from pocketize.graph.inputs import Inputs

INPUTS = Inputs((torch.zeros(1, 3, 8, 8),))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    write_exported(Net(), INPUTS, path)
    return path


def edit(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Rewrite the members of an archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


@pytest.mark.slow
def test_a_written_program_computes_what_the_model_does_in_eval_mode(tmp_path: Path) -> None:
    model = Net()
    model(torch.randn(4, 3, 8, 8))
    path = tmp_path / "net.pt2"
    write_exported(model, INPUTS, path)
    again = module_of(read_exported(path, trust=True))
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(again(x), model.eval()(x))
    assert sorted(again.state_dict()) == sorted(model.state_dict())


def test_a_module_of_a_program_can_be_written_again(exported: Path, tmp_path: Path) -> None:
    module = module_of(read_exported(exported, trust=True))
    write_exported(module, INPUTS, tmp_path / "again.pt2")
    x = torch.randn(1, 3, 8, 8)
    again = module_of(read_exported(tmp_path / "again.pt2", trust=True))
    torch.testing.assert_close(again(x), module(x))


def test_a_program_with_symbolic_shapes_is_read(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        nn.Sequential(nn.Flatten(0, 1), nn.ReLU()),
        (torch.zeros(4, 3, 2),),
        dynamic_shapes=({0: batch},),
        strict=False,
    )
    with open(tmp_path / "net.pt2", "wb") as file:
        torch.export.save(program, file)
    module = module_of(read_exported(tmp_path / "net.pt2", trust=True))
    assert module(torch.zeros(5, 3, 2)).shape == (15, 2)


def test_a_model_that_cannot_be_exported_is_explained(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(
        RewriteError, match=r"torch\.export cannot export Branching: .*Save as \.saf"
    ):
        write_exported(Branching(), INPUTS, tmp_path / "net.pt2")


class Bomb:
    """Goes off when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_program_is_opened_only_where_it_is_trusted(exported: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Bomb(tmp_path / "boom"), buffer)
    edit(
        exported,
        lambda name, content: buffer.getvalue() if "_inputs" in name else content,
    )
    message = "can run any code it contains.* add --trust-pickle .*trust=True.*--weights FILE"
    with pytest.raises(ArtifactError, match=message):
        read_exported(exported)
    assert not (tmp_path / "boom").exists()


def test_torch_is_not_asked_to_open_what_is_not_trusted(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("it was opened"))
    with pytest.raises(ArtifactError, match="trust=True"):
        read_exported(exported)
    with pytest.raises(ArtifactError, match="trust-pickle"):
        resolve(str(exported))


def test_a_foreign_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    for trust in (False, True):
        with pytest.raises(ArtifactError, match=re.escape(f"cannot read {path}: No such file")):
            read_exported(path, trust=trust)
    for content in (b"", b"PK\x03\x04 nothing"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="cannot be read as an exported program: "):
            read_exported(path, trust=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.txt", "no")
    with pytest.raises(ArtifactError, match="cannot be read as an exported program: "):
        read_exported(path, trust=True)
