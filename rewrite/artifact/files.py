"""Read files with errors that name them; write a file completely or not at all."""

from __future__ import annotations

__all__ = ["atomic_folder", "atomic_write", "open_for_torch", "reading"]

import contextlib
import hashlib
import io
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pocketize.errors import ArtifactError


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in an error of the system.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, and rename it to ``path`` at the end.

    The data is on the disk before the rename. If the block raises, nothing remains. The next writer
    of the same file removes what a killed process left. A symbolic link is followed.

    Raises:
        ArtifactError: the file exists and ``overwrite`` is false, also where another process was
            faster; it is no regular file; or it cannot be written.
    """
    target = Path(os.path.realpath(path))
    _check(target, path, overwrite)
    temporary = _temporary(target)
    try:
        # opened here and not by tempfile, so that the file gets the rights that the umask says
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        rights = temporary.stat().st_mode
        yield temporary
        temporary.chmod(rights)  # the writer may have made a file of its own in its place
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        _place(temporary, target, overwrite=overwrite)
        _sync_folder(target.parent)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a new folder next to ``path``, and rename it to ``path`` at the end.

    As :func:`atomic_write`, but the data is not flushed to the disk.

    Raises:
        ArtifactError: there is something at ``path`` and ``overwrite`` is false, or it cannot be
            written.
    """
    target = Path(os.path.realpath(path))
    _check(target, path, overwrite, folder=True)
    temporary, before = _temporary(target), _temporary(target)
    try:
        temporary.mkdir()
        yield temporary
        if os.path.exists(target) and not overwrite:
            raise _exists(path)
        if os.path.exists(target):
            target.rename(before)
        try:
            temporary.rename(target)
        except OSError:
            if before.exists():
                before.rename(target)
            raise
        _sync_folder(target.parent)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        _remove(temporary)
        _remove(before)


def _temporary(target: Path) -> Path:
    """Return a name next to a file, and remove what killed processes left under such names."""
    # a digest of the target's name, as a longer name might be too long
    ours = f".pocketize-{_digest(target.name)}-{_digest(platform.node())}"
    _remove_left(target.parent, ours)
    return target.with_name(f"{ours}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _place(temporary: Path, target: Path, *, overwrite: bool) -> None:
    """Rename a file; without ``overwrite``, FileExistsError if another process was faster."""
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # not every file system has links: reserve the name, then fill it
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)


def _remove_left(folder: Path, ours: str) -> None:
    """Remove the files that processes of this machine left behind when they were killed."""
    if os.name != "posix":  # where os.kill(process, 0) ends the process
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            found = re.fullmatch(rf"{re.escape(ours)}-(\d+)-[0-9a-f]+\.tmp", name)
            if found and not _is_alive(int(found[1])):
                _remove(folder / name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of somebody else
        return True
    return True


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


class _ForTorch(io.FileIO):
    """Keeps the first error and continues, as torch's writers end the process on an error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self.error is None and done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.error = error
        return len(view)


@contextlib.contextmanager
def open_for_torch(path: str | os.PathLike[str]) -> Iterator[io.FileIO]:
    """Open a file that torch writes to.

    Raises:
        OSError: something could not be written, such as on a full disk; torch's own writers raise
            other errors then, or end the process.
    """
    with _ForTorch(path, "wb") as file:
        try:
            yield file
        except Exception:
            if file.error is None:
                raise
        if file.error is not None:
            raise file.error


def _check(
    target: Path, path: str | os.PathLike[str], overwrite: bool, *, folder: bool = False
) -> None:
    # not the methods of paths, which raise where a name is too long
    if os.path.isdir(target) and not folder:
        raise ArtifactError(f"cannot write {path}: it is a folder")
    if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        # a rename would put a file in the place of, say, /dev/null
        raise ArtifactError(f"cannot write {path}: it is a device, a pipe or a socket")
    if os.path.exists(target) and not overwrite:
        raise _exists(path)
    if not os.path.isdir(target.parent):
        raise ArtifactError(f"cannot write {path}: there is no folder {target.parent}")


def _exists(path: str | os.PathLike[str]) -> ArtifactError:
    return ArtifactError(f"{path} exists already; choose another name or ask to overwrite it")


def _sync_folder(folder: Path) -> None:
    # a rename is durable when its folder is; not every platform lets a folder be opened
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
