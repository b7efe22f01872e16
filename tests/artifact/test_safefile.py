from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pocketize.artifact.safefile import read_header
from pocketize.errors import ArtifactError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.tensor(1)}, path, {"who": "me"})
    return path


def test_shapes_and_metadata_are_read(saved: Path) -> None:
    header = read_header(saved)
    assert header.shapes == {"a": (2, 3), "b": ()}
    assert header.metadata == {"who": "me"}


@pytest.mark.parametrize("lost", [1, 24, 100])
def test_a_truncated_file_is_told_from_a_foreign_one(saved: Path, lost: int) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-lost])
    sizes = rf"truncated: it has {len(whole) - lost} of \d+ bytes. Copy or save it again"
    with pytest.raises(ArtifactError, match=sizes):
        read_header(saved)


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (b"", ": it is empty"),
        (b"\x01", ""),
        (b"PK\x03\x04" + b"\0" * 50, ": it looks like one that torch.save wrote"),
        (b"version https://git-lfs", ": it looks like a pointer of Git LFS; run git lfs pull"),
        (b"\x02\0\0\0\0\0\0\0[]", ""),
        (b"\x08\0\0\0\0\0\0\0" + b'{"a": 1}', ""),
        (b"\x02\0\0\0\0\0\0\0{\xff", ""),
    ],
)
def test_a_foreign_file_is_named_as_such(tmp_path: Path, content: bytes, guess: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        read_header(path)
    assert str(caught.value) == f"{path} is not a safetensors file{guess}"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.safetensors"
    message = re.escape(f"cannot read {path}: No such file or directory")
    with pytest.raises(ArtifactError, match=message):
        read_header(path)
