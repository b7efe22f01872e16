from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pocketize import save
from pocketize.artifact.files import atomic_folder, atomic_write, open_for_torch
from pocketize.artifact.pt2 import write_exported
from pocketize.errors import ArtifactError
from pocketize.graph.inputs import Inputs


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_a_file_that_is_not_regular_is_left_alone(
    tmp_path: Path, write: Any, overwrite: bool, linked: bool
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = tmp_path / "link" if linked else pipe
    if linked:
        path.symlink_to(pipe)
    with (
        pytest.raises(ArtifactError, match="it is a device, a pipe or a socket"),
        write(path, overwrite=overwrite),
    ):
        pass
    assert pipe.is_fifo()


def test_an_error_of_the_file_system_is_told_in_its_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*a\.txt: No space left on device"),
        atomic_write(tmp_path / "a.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def saves(path: Path, queue: Any, number: int, start: Any) -> None:
    with atomic_write_or_told(queue, path) as temporary:
        temporary.write_text(str(number))
        start.wait(60)


@contextlib.contextmanager
def atomic_write_or_told(queue: Any, path: Path) -> Iterator[Path]:
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except ArtifactError as error:
        queue.put(str(error))
    else:
        queue.put("")


def test_of_processes_that_may_not_overwrite_one_wins_and_others_are_told(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue, start = context.Queue(), context.Barrier(4)
    path = tmp_path / "a.txt"
    started = [context.Process(target=saves, args=(path, queue, n, start)) for n in range(4)]
    for process in started:
        process.start()
    told = sorted(queue.get(timeout=60) for _ in started)
    for process in started:
        process.join()
    assert told[0] == ""
    assert all("exists already" in text for text in told[1:])
    assert path.read_text() in "0123"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_system_without_links_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    (tmp_path / "b").mkdir()
    test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path / "b")


def killed_while_writing(path: Path) -> None:
    with atomic_write(path, overwrite=True) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    process = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(path,))
    process.start()
    process.join()
    assert len(list(tmp_path.iterdir())) == 2
    assert path.read_text() == "old"
    with atomic_write(tmp_path / "b.txt"), atomic_write(path, overwrite=True) as other:
        # neither what another file's writer left, nor what is being written
        with atomic_write(path, overwrite=True) as temporary:
            temporary.write_text("new")
        assert other.exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_the_longest_names_are_written(tmp_path: Path) -> None:
    with atomic_write(tmp_path / ("n" * 251 + ".txt")) as temporary:
        temporary.write_text("whole")
    with (
        pytest.raises(ArtifactError, match="File name too long"),
        atomic_write(tmp_path / ("n" * 300)) as temporary,
    ):
        temporary.write_text("whole")
    assert len(list(tmp_path.iterdir())) == 1


def limited(path: Path, write: Callable[[Path], None], queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write(path)
    except ArtifactError as error:
        queue.put(str(error))


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3))


def to_pt2(path: Path) -> None:
    with atomic_write(path) as temporary:
        write_exported(net(), Inputs((torch.zeros(1, 1, 8, 8),)), temporary)


def to_pt(path: Path) -> None:
    with atomic_write(path) as temporary, open_for_torch(temporary) as file:
        torch.save(net().state_dict(), file)


@pytest.mark.parametrize("write", [to_pt2, to_pt, lambda path: save(net(), path)])
def test_a_full_disk_is_told(tmp_path: Path, write: Callable[[Path], None]) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=limited, args=(tmp_path / "x", write, queue))
    process.start()
    assert re.search("cannot write .*x: .*File too large", queue.get(timeout=120))
    process.join()
    assert process.exitcode == 0
    assert not list(tmp_path.iterdir())
