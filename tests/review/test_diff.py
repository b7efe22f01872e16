from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pocketize.cli import main
from pocketize.cli.common import UsageError
from pocketize.review import child
from pocketize.review import diff as module
from pocketize.review.diff import RevisionDiff, diff
from pocketize.review.revisions import Repository

from .conftest import NET, commit, git


def _in_this_process(command: list[str], *, env: dict[str, str], **_: Any) -> None:
    """Answer as the child does, without the seconds that importing torch takes."""
    request = json.loads(Path(command[-1]).read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", env.get("PYTHONDONTWRITEBYTECODE") == "1")
        for path in reversed(request["path"]):
            patch.syspath_prepend(path)
        patch.chdir(request["folder"])
        try:
            Path(request["answer"]).write_text(json.dumps(child.answer(request)))
        finally:
            for name in [name for name in sys.modules if name.startswith("watched_nets")]:
                del sys.modules[name]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run_child", _in_this_process)


def _diff(folder: Path, base: str | None, head: str | None = None, **options: Any) -> RevisionDiff:
    repository = Repository(folder)
    return diff(repository, repository.revisions(base, head), **options)


def _worktrees(folder: Path) -> list[str]:
    return git(folder, "worktree", "list").splitlines()[1:]


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_each_model_gets_its_verdict(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _diff(repository, "before", "main")
    assert {model.name: model.status for model in found.models} == {
        "same": "ok",
        "wide": "over the limit",
        "new": "added",
        "mended": "not compared",
        "broken": "broken",
        "gone": "removed",
    }
    verdicts = {model.name: model.verdict for model in found.models}
    assert "No module named 'missing'" in verdicts["mended"]
    assert "KeyError: 'no such setting'" in verdicts["broken"]
    assert "(watched_nets/broken.py:7: raise KeyError" in verdicts["broken"]
    assert not any(model.said for model in found.models)
    failed = {model.name for model in found.models if model.failed}
    assert failed == {"wide", "broken"}
    assert _worktrees(repository) == []
    for drawn in (found.to_markdown(), found.to_html(), found.to_json(), str(found)):
        assert "peak 2%" in drawn
        assert "/tmp" not in drawn
    assert "<details>" in found.to_markdown()
    monkeypatch.setattr(module, "_LONGEST", 1000)
    assert "What the peaks consist of" not in found.to_markdown()


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_an_installed_copy_never_stands_for_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tmp_path, "old")
    commit(tmp_path, "new", net=NET)
    shutil.copytree(tmp_path / "watched_nets", tmp_path / "installed" / "watched_nets")
    git(tmp_path, "rm", "-r", "-q", "--cached", "watched_nets")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    # the package itself came with the second commit: the first has none to import
    git(tmp_path, "commit", "-q", "--amend", "--allow-empty", "-m", "no package at all")
    git(tmp_path, "tag", "none")
    (found,) = _diff(tmp_path, "none", "new").models
    assert (found.status, found.said) == ("added", ())

    class InstalledFirst:
        """As the finders of some editable installs."""

        @staticmethod
        def find_spec(name: str, *_: object) -> Any:
            if name == "watched_nets":
                folder = tmp_path / "installed" / name
                return importlib.util.spec_from_file_location(
                    name, folder / "__init__.py", submodule_search_locations=[str(folder)]
                )
            return None

    monkeypatch.setattr(sys, "meta_path", [InstalledFirst(), *sys.meta_path])
    (found,) = _diff(tmp_path, "new", "new").models
    assert found.status == "broken"
    assert "was imported from" in found.verdict


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_the_working_tree_is_compared_as_it_is(tmp_path: Path) -> None:
    commit(tmp_path, "old", net=NET)
    (tmp_path / "watched_nets" / "net.py").write_text(NET.replace("=4", "=5"))
    (tmp_path / "inner").mkdir()
    found = _diff(tmp_path / "inner", None, limits=("parameters 100%",))
    assert (found.base[:6], found.head) == ("main (", "working tree")
    (net,) = found.models
    assert net.after is not None
    assert [net.status, net.after.profiles[0].parameters] == ["over the limit", 62]
    assert net.limits == ("peak 2%", "parameters 0%", "parameters 100%")
    assert list((tmp_path / "watched_nets").glob("__pycache__")) == []


def test_the_index_and_the_hooks_are_not_used(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = repository / ".git" / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {repository}/ran\n")
    hook.chmod(0o755)
    index = repository / ".git" / "index"
    before = index.read_bytes()
    monkeypatch.setenv("GIT_INDEX_FILE", str(index))
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    made = Repository(repository)
    with made.checkouts(made.revisions("before", "after")) as (_, roots):
        assert [(root / "watched_nets" / "gone.py").exists() for root in roots] == [True, False]
    assert index.read_bytes() == before
    assert not (repository / "ran").exists()
    hook.unlink()


def test_what_a_killed_run_left_is_removed_by_the_next(repository: Path, tmp_path: Path) -> None:
    dead = tmp_path / "pocketize-diff-999999999-x"
    other = tmp_path / "mine" / "revision-0"
    for path in (dead / "revision-0", other):
        git(repository, "worktree", "add", "--detach", str(path), "before")
    made = Repository(repository)
    with made.checkouts(made.revisions("before", "after")):
        pass
    assert not dead.exists()
    assert [line.split()[0] for line in _worktrees(repository)] == [str(other)]
    git(repository, "worktree", "remove", str(other))


@pytest.mark.slow
def test_nothing_is_left_after_a_killed_child_and_an_interrupt(
    repository: Path, tmp_path: Path
) -> None:
    scratch, started, sleeper = tmp_path / "scratch", tmp_path / "started", tmp_path / "python"
    scratch.mkdir()
    sleeper.write_text(f"#!/bin/sh\necho $$ >>{started}\nexec sleep 60\n")
    sleeper.chmod(0o755)
    # a shell without job control has its background processes ignore the signal
    run = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pocketize.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", run, "diff", "--python", str(sleeper), "before"],
        cwd=repository,
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    )

    def child_number(number: int) -> int:
        for _ in range(600):
            pids = started.read_text().split() if started.exists() else []
            if len(pids) > number:
                return int(pids[number])
            time.sleep(0.1)
        raise AssertionError("no child was started")

    os.kill(child_number(0), signal.SIGKILL)
    last = child_number(1)
    assert len(_worktrees(repository)) == 1  # the other revision is the working tree
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert len(said.splitlines()) == 3, said  # both sides of the first model, and "interrupted"
    assert _worktrees(repository) == []
    assert list(scratch.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no revision 'nowhere'"),
        (["--format", "json", "before", "after", "--fail-over", "time 5%"], "add --measure"),
        (["before", "--python", "/nowhere/python"], "cannot run /nowhere/python"),
        (["before", "--fail-over", "peek 5%"], "Did you mean 'peak'?"),
    ],
)
def test_what_cannot_be_done_is_wrong_usage(
    words: list[str],
    message: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    assert main(["diff", *words]) == 2
    assert message in capsys.readouterr().err
    assert _worktrees(repository) == []


def test_a_repository_with_models_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a git repository"):
        Repository(tmp_path)
    commit(tmp_path, "empty")
    with pytest.raises(
        UsageError, match=r"add to pyproject.toml:\n\n\[\[tool.pocketize.models\]\]"
    ):
        _diff(tmp_path, None)
