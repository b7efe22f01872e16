from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import ArtifactError, RewriteError
from pocketize.inputs import Inputs
from pocketize.pt2 import _is_shape, module_of, read_exported, write_exported

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


def test_a_written_program_computes_what_the_model_does_in_eval_mode(tmp_path: Path) -> None:
    model = Net()
    model(torch.randn(4, 3, 8, 8))
    path = tmp_path / "net.pt2"
    write_exported(model, INPUTS, path)
    again = module_of(read_exported(path))
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(again(x), model.eval()(x))
    assert sorted(again.state_dict()) == sorted(model.state_dict())


def test_a_module_of_a_program_can_be_written_again(exported: Path, tmp_path: Path) -> None:
    module = module_of(read_exported(exported))
    write_exported(module, INPUTS, tmp_path / "again.pt2")
    x = torch.randn(1, 3, 8, 8)
    again = module_of(read_exported(tmp_path / "again.pt2"))
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
    module = module_of(read_exported(tmp_path / "net.pt2"))
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


def test_a_pickle_in_place_of_example_inputs_does_not_go_off(
    exported: Path, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    torch.save(Bomb(tmp_path / "boom"), buffer)
    edit(
        exported,
        lambda name, content: buffer.getvalue() if "sample_inputs" in name else content,
    )
    with pytest.raises(ArtifactError, match=r"cannot be read as an exported program: .*Unpickling"):
        read_exported(exported)
    assert not (tmp_path / "boom").exists()
    with pytest.raises(
        ArtifactError
    ):  # opened as torch does, it goes off, and is no program either
        read_exported(exported, trust=True)
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["opaque_obj_0", "custom_obj_0"])
def test_a_pickled_constant_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    config = {"config": {"bomb": {"path_name": name, "is_param": False, "use_pickle": True}}}

    def change(member: str, content: bytes) -> bytes:
        return json.dumps(config).encode() if "constants_config" in member else content

    edit(exported, change)
    with zipfile.ZipFile(exported, "a") as archive:
        archive.writestr(f"archive/data/constants/{name}", pickle.dumps(Bomb(tmp_path / "boom")))
    message = f"holds the pickled object '{name}', which can run any code .* add --trust-pickle"
    with pytest.raises(ArtifactError, match=message):
        read_exported(exported)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0', positive=True, integer=True)",
        "Add(Mul(Integer(2), FloorDiv(Add(Symbol('s53'), Integer(-1)), Integer(2))), Integer(2))",
        "2*s0 + 1",
    ],
)
def test_arithmetic_on_sizes_is_let_through(text: str) -> None:
    assert _is_shape(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "exec(chr(112))",
        "Integer(1).__class__",
        "Symbol('__import__(1)')",
        "S('exec')",
        "(lambda: 1)()",
        "[1 for s0 in (1,)]",
        "Add(",
        "s0 if s1 else s2",
    ],
)
def test_any_other_expression_is_refused(text: str) -> None:
    assert not _is_shape(text)


def test_code_in_place_of_a_shape_is_refused(exported: Path) -> None:
    code = {"as_expr": {"expr_str": "exec('1')", "hint": None}}
    edit(
        exported,
        lambda name, content: (
            content.replace(b'{"as_int": 3}', json.dumps(code).encode(), 1)
            if "models/" in name
            else content
        ),
    )
    with zipfile.ZipFile(exported) as archive:
        assert any(b"exec" in archive.read(name) for name in archive.namelist())
    with pytest.raises(ArtifactError, match=r"holds a shape that is no arithmetic: .*exec"):
        read_exported(exported)


def test_the_environment_is_as_before(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    read_exported(exported)
    assert dict(os.environ) == before


def test_a_foreign_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with pytest.raises(ArtifactError, match=re.escape(f"cannot read {path}: No such file")):
        read_exported(path)
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ArtifactError, match="is not an exported program: it is no zip archive"):
        read_exported(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.txt", "no")
    with pytest.raises(ArtifactError, match="cannot be read as an exported program: "):
        read_exported(path)
