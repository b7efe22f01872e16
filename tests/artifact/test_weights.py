from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
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


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "network_weights", "x"])
def test_the_state_dict_of_a_checkpoint_is_found(tmp_path: Path, key: str) -> None:
    source, model, path = nn.Linear(2, 3), nn.Linear(2, 3), tmp_path / "best.pth"
    optimizer = torch.optim.Adam(source.parameters()).state_dict()
    torch.save({"epoch": 3, key: source.state_dict(), "optimizer": optimizer}, path)
    load_weights(model, path)
    assert_loaded(model, source)


def test_of_several_state_dicts_the_caller_says_which(tmp_path: Path) -> None:
    source, model, path = nn.Linear(2, 3), nn.Linear(2, 3), tmp_path / "best.pth"
    torch.save({"net": nn.Linear(2, 3).state_dict(), "ema": source.state_dict()}, path)
    with pytest.raises(ArtifactError, match=r"state_dicts: net, ema\. Say which, as .*:net"):
        load_weights(model, path)
    with pytest.raises(ArtifactError, match=r"holds no 'emma', but 'net', 'ema'\. Did you mean"):
        load_weights(model, path, key="emma")
    load_weights(model, path, key="ema")
    assert_loaded(model, source)


@pytest.mark.parametrize("prefix", ["module.", "model.", "net._orig_mod.", "module.module."])
def test_names_of_wrappers_are_taken_off(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, model, path = nn.Linear(2, 3), nn.Linear(2, 3), tmp_path / "best.pt"
    torch.save({f"{prefix}{key}": value for key, value in source.state_dict().items()}, path)
    load_weights(model, path)
    assert_loaded(model, source)
    assert caplog.messages == [f"{path}: the names of its weights were read without {prefix!r}"]


def test_names_that_fit_stay_and_others_are_listed_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "best.pt"
    source = nn.Sequential(OrderedDict(model=nn.Linear(2, 3)))
    model = nn.Sequential(OrderedDict(model=nn.Linear(2, 3)))
    torch.save(source.state_dict(), path)
    load_weights(model, path)
    assert_loaded(model, source)
    with pytest.raises(ArtifactError, match=r"not in the model: model\.bias, model\.weight"):
        load_weights(nn.Linear(2, 4), path)
    assert not caplog.messages
    compiled = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    state = {f"{k[0]}._orig_mod{k[1:]}": value for k, value in compiled.state_dict().items()}
    torch.save(state, path)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    load_weights(model, path)
    assert_loaded(model, compiled)


class Settings:
    """Something that a checkpoint holds beside weights, and that runs when it is unpickled."""

    ran: ClassVar[list[str]] = []

    def __reduce__(self) -> Any:
        return _ran, ("unpickled",)


def _ran(text: str) -> None:
    Settings.ran.append(text)


def test_a_checkpoint_is_read_without_running_what_is_beside_its_weights(tmp_path: Path) -> None:
    model, path = nn.Linear(2, 3), tmp_path / "best.pt"
    source = nn.Linear(2, 3)
    content = {
        "network_weights": source.state_dict(),
        "logging": {"dice": [np.float64(0.5)], "place": tmp_path, "class": nn.Conv3d},
        "settings": Settings(),
    }
    torch.save(content, path)
    load_weights(model, path)
    assert_loaded(model, source)
    assert Settings.ran == []
    load_weights(model, path, trust=True)
    assert Settings.ran == ["unpickled"]


def test_a_whole_module_and_blocked_names_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    message = r"(?s)cannot be read with weights_only=True: .* run any code .* add --trust-pickle"
    torch.save(nn.Linear(2, 3), path)
    with pytest.raises(ArtifactError, match=message):
        load_weights(nn.Linear(2, 3), path)
    torch.save({"state_dict": nn.Linear(2, 3).state_dict(), "run": os.system}, path)
    with pytest.raises(ArtifactError, match=message):
        load_weights(nn.Linear(2, 3), path)


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
    message = f"cannot read {path}: it is damaged, incomplete or no file of torch.save (EOFError)"
    with pytest.raises(ArtifactError, match=re.escape(message)):
        load_weights(model, path)
    with pytest.raises(ArtifactError, match=r"cannot tell what best\.onnx holds: expected \.safet"):
        load_weights(model, "best.onnx")
