from __future__ import annotations

import os
from pathlib import Path

import pytest

from pocketize.errors import ArtifactError
from pocketize.files import atomic_write


def test_the_file_appears_in_full_and_alone(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
        assert temporary.parent == tmp_path
        assert not (tmp_path / "a.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_the_file_has_the_rights_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.txt"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_nothing_remains_after_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")

    def interrupted() -> None:
        with atomic_write(tmp_path / "a.txt", overwrite=True) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_an_existing_file_is_only_replaced_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with (
        pytest.raises(ArtifactError, match=r"a\.txt exists already; choose another name or ask to"),
        atomic_write(path),
    ):
        pytest.fail("the block must not run")
    with atomic_write(path, overwrite=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def overtaken() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("ours")
            path.write_text("theirs")

    with pytest.raises(ArtifactError, match="exists already"):
        overtaken()
    assert path.read_text() == "theirs"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_write(tmp_path / "link.txt", overwrite=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_missing_folder_and_a_folder_in_the_way_are_explained(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*a\.txt: there is no folder .*missing"),
        atomic_write(tmp_path / "missing" / "a.txt"),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(ArtifactError, match="it is a folder"), atomic_write(tmp_path):
        pytest.fail("the block must not run")


def test_an_error_of_the_file_system_is_told_in_its_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*a\.txt: No space left on device"),
        atomic_write(tmp_path / "a.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
