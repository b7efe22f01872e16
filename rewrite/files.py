"""Writing a file so that it is there in full or not at all."""

from __future__ import annotations

__all__ = ["atomic_write"]

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from pocketize.errors import ArtifactError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary path in the folder of ``path``, and rename it to ``path`` at the end.

    The data is on the disk before the name is. Where the block raises, nothing remains. A symbolic
    link is followed, so it stays a link.

    Raises:
        ArtifactError: the file exists and ``overwrite`` is false, or it cannot be written.
    """
    target = Path(os.path.realpath(path))
    _check(target, path, overwrite)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        # opened here and not by tempfile, so that the file gets the rights that the umask says
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        rights = temporary.stat().st_mode
        yield temporary
        temporary.chmod(rights)  # the writer may have made a file of its own in its place
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        _check(target, path, overwrite)  # somebody may have been faster
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check(target: Path, path: str | os.PathLike[str], overwrite: bool) -> None:
    if target.is_dir():
        raise ArtifactError(f"cannot write {path}: it is a folder")
    if target.exists() and not overwrite:
        raise ArtifactError(f"{path} exists already; choose another name or ask to overwrite it")
    if not target.parent.is_dir():
        raise ArtifactError(f"cannot write {path}: there is no folder {target.parent}")


def _sync_folder(folder: Path) -> None:
    # a rename is durable when its folder is; not every platform lets a folder be opened
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
