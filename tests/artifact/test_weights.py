from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pocketize.artifact.weights import load_weights
from pocketize.errors import ArtifactError


def assert_loaded(model: nn.Module, like: nn.Module) -> None:
    for key, value in like.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_state_dict_is_loaded(tmp_path: Path, suffix: str, nested: bool) -> None:
    source, model, path = nn.Linear(2, 3), nn.Linear(2, 3), tmp_path / f"best{suffix}"
    state = source.state_dict()
    torch.save({"epoch": 3, "state_dict": state} if nested else state, path)
    load_weights(model, path)
    assert_loaded(model, source)


def test_safetensors_are_loaded(tmp_path: Path) -> None:
    source, model, path = nn.Linear(2, 3), nn.Linear(2, 3), tmp_path / "best.safetensors"
    save_file(source.state_dict(), path)
    load_weights(model, path)
    assert_loaded(model, source)


def test_what_does_not_fit_is_listed_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save({"weight": torch.zeros(4, 2), "gain": torch.zeros(1)}, path)
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(ArtifactError) as caught:
        load_weights(model, path)
    assert str(caught.value) == (
        f"{path} does not fit Linear:\n"
        "  not in the file: bias\n"
        "  not in the model: gain\n"
        "  other shapes: weight (4x2 in the file, 3x2 in the model)"
    )
    assert torch.equal(model.weight, before)


def test_weights_of_a_wrapped_model_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save({"module.weight": torch.zeros(3, 2), "module.bias": torch.zeros(3)}, path)
    with pytest.raises(
        ArtifactError, match=r"begins with 'module\.': save model\.module of a Data"
    ):
        load_weights(nn.Linear(2, 3), path)


class Settings:
    """Something that a checkpoint should not hold."""


def test_a_checkpoint_with_more_than_weights_is_not_opened(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 3), tmp_path / "best.pt"
    source = nn.Linear(2, 3)
    torch.save({"state_dict": source.state_dict(), "settings": Settings()}, path)
    message = r"(?s)cannot be read with weights_only=True: .* run any code .* add --trust-pickle"
    with pytest.raises(ArtifactError, match=message):
        load_weights(model, path)
    load_weights(model, path, trust=True)
    assert_loaded(model, source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": 1}, "epoch": 3}, "holds a dict with 'model', 'epoch', not a state_dict"),
        ([torch.zeros(2)], "holds a list, not a state_dict. Save the weights alone"),
    ],
)
def test_a_file_without_a_state_dict_is_explained(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "best.pt"
    torch.save(content, path)
    with pytest.raises(ArtifactError, match=message):
        load_weights(nn.Linear(2, 3), path)


def test_files_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 3), tmp_path / "best.pt"
    with pytest.raises(ArtifactError, match=re.escape(f"cannot read {path}: No such file or dir")):
        load_weights(model, path)
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=re.escape(f"cannot read {path}: ")):
        load_weights(model, path)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=re.escape(f"cannot read {path}: ")):
        load_weights(model, path)
    with pytest.raises(ArtifactError, match=r"cannot tell what best\.onnx holds: expected \.safet"):
        load_weights(model, "best.onnx")
