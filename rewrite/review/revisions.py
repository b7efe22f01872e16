"""Git revisions as folders, for a while, without a trace in the user's repository."""

from __future__ import annotations

__all__ = ["Repository", "Revision"]

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketize.cli.common import UsageError

_MAIN = ("origin/HEAD", "origin/main", "origin/master", "main", "master")
_FOLDER = "pocketize-diff-"
#: What git tells its hooks of the user's index and folders; a new worktree would use them too.
_HOOKS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")
#: Signals that end a process; Windows has no SIGHUP.
_ENDING = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@dataclass(frozen=True)
class Revision:
    """One side of a comparison; ``commit`` is a full hash, or ``None`` for the working tree."""

    label: str
    commit: str | None


class Repository:
    """The git repository that a folder is in.

    Raises:
        UsageError: it is in none, or git is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.root = Path(self.git("rev-parse", "--show-toplevel")).resolve()
        self.folder = folder.resolve().relative_to(self.root)

    def git(self, *words: str) -> str:
        """Run git, without the user's hooks and locks, and return what it prints.

        Raises:
            UsageError: it fails, with its own error.
        """
        try:
            done = subprocess.run(
                ("git", "--no-optional-locks", "-c", f"core.hooksPath={os.devnull}", *words),
                cwd=self.root,
                env={name: value for name, value in os.environ.items() if name not in _HOOKS},
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError as error:
            raise UsageError("git is not installed") from error
        if done.returncode:
            raise UsageError(f"git {words[0]}: {done.stderr.strip() or 'failed'}")
        return done.stdout.strip()

    def revisions(self, base: str | None, head: str | None) -> tuple[Revision, Revision]:
        """Find the two sides.

        Args:
            base: a revision; ``A...`` stands for the merge base of ``A`` and ``head``. By default
                the merge base with the main branch.
            head: a revision; by default the working tree.

        Raises:
            UsageError: a revision is unknown, or the two have no common ancestor here.
        """
        tip = self._commit(head or "HEAD")
        named = (base or next(filter(self._find, _MAIN), "")).removesuffix("...")
        if not named:
            raise UsageError(f"found no main branch ({', '.join(_MAIN)}): name BASE")
        old = self._commit(named)
        if base is None or base != named:
            old = self._find(named, tip)
            if not old:
                raise UsageError(f"{named} and {head or 'HEAD'} have no common ancestor{_SHALLOW}")
        tree = "working tree" if self.git("status", "--porcelain") else tip[:10]
        return (
            Revision(_label(named, old), old),
            Revision(_label(head, tip), tip) if head else Revision(tree, None),
        )

    def _commit(self, name: str) -> str:
        found = self._find(name)
        if not found:
            raise UsageError(f"there is no revision {name!r}{_SHALLOW}")
        return found

    def _find(self, name: str, other: str | None = None) -> str:
        """Return the hash of a revision, or of its merge base with another, or ``""``."""
        words = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        try:
            return self.git(*words) if other is None else self.git("merge-base", name, other)
        except UsageError:
            return ""

    @contextlib.contextmanager
    def checkouts(self, revisions: Sequence[Revision]) -> Iterator[tuple[Path, list[Path]]]:
        """Check revisions out, each into a detached worktree; the working tree stays where it is.

        All is removed at the end, also after Ctrl-C and SIGTERM. What a killed process left is
        removed by the next one.

        Returns:
            A temporary folder, and the folder of each revision.
        """
        for path in self._worktrees():
            found = re.match(rf"{_FOLDER}(\d+)-", path.parent.name)
            if found and not _runs(int(found[1])):
                self._remove(path.parent)
        with _handling(_leave):
            scratch = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-")).resolve()
            roots = []
            try:
                for number, each in enumerate(revisions):
                    roots.append(scratch / f"revision-{number}" if each.commit else self.root)
                    if each.commit:
                        words = ("--quiet", "--detach", str(roots[-1]), each.commit)
                        self.git("worktree", "add", *words)
                yield scratch, roots
            finally:
                with _handling(signal.SIG_IGN):
                    self._remove(scratch)

    def _worktrees(self) -> list[Path]:
        listed = self.git("worktree", "list", "--porcelain")
        return [Path(path) for path in re.findall(r"^worktree (.+)$", listed, re.MULTILINE)]

    def _remove(self, scratch: Path) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        for path in self._worktrees():
            if path.parent == scratch:
                with contextlib.suppress(UsageError):  # what stays, `git worktree prune` removes
                    self.git("worktree", "remove", "--force", "--force", str(path))


_SHALLOW = " in this repository; a CI may have fetched one commit only (fetch-depth: 0 fetches all)"


def _label(name: str, commit: str) -> str:
    return commit[:10] if commit.startswith(name) else f"{name} ({commit[:10]})"


def _runs(process: int) -> bool:
    if os.name == "posix":  # elsewhere signal 0 would end it
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return True


def _leave(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _handling(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    """Handle the signals that end a process; those that it ignores stay ignored."""
    main = threading.current_thread() is threading.main_thread()  # only there it is possible
    ours = [each for each in _ENDING if main and signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, handler) for each in ours}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)
