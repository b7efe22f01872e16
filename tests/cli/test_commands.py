"""Commands of other distributions: found by name, imported late, harmless where broken."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from pocketize.cli.commands import command_names, load_command
from pocketize.errors import RegistryError

from .conftest import Ran

Run = Callable[..., Ran]

COUNT = """
    from pocketize.cli.common import UsageError, show

    class Count:
        summary = "count to 100% of what you say"

        def add_arguments(self, parser):
            parser.add_argument("word")
            parser.add_argument("--most", type=int, default=9)

        def run(self, args):
            if args.most < 0:
                raise UsageError("--most must not be negative")
            show(f"{args.word} {min(args.most, len(args.word))}")
            return 1 if args.verbose else 0

    count = Count()
"""


class Shelf:
    """Distributions that exist as metadata and modules on sys.path only."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.modules: list[str] = []

    def add(self, name: str, source: str, *entries: str) -> None:
        info = self.root / name / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[pocketize.commands]", *entries]) + "\n")
        (self.root / name / f"{name}.py").write_text(dedent(source))
        self.modules.append(name)
        self.monkeypatch.syspath_prepend(str(self.root / name))


@pytest.fixture
def shelf(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shelf]:
    made = Shelf(tmp_path_factory.mktemp("shelf"), monkeypatch)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


@pytest.mark.parametrize("value", ["counting:Count", "counting:count"], ids=["class", "object"])
def test_a_strangers_command_runs_like_the_engines_own(shelf: Shelf, run: Run, value: str) -> None:
    shelf.add("counting", COUNT, f"count = {value}")
    assert run("count", "three") == (0, "three 5\n", "")
    assert run("count", "three", "--most", "2", "-v") == (1, "three 2\n", "")
    code, out, err = run("count", "three", "--most", "-1")
    assert (code, out, err) == (2, "", "pocketize: error: --most must not be negative\n")
    code, _, err = run("count")
    assert code == 2
    assert "the following arguments are required: word" in err


def test_a_strangers_command_is_in_the_help_and_explains_itself(shelf: Shelf, run: Run) -> None:
    shelf.add("counting", COUNT, "count = counting:Count")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "\ncount count to 100% of what you say\n" in "\n".join(
        " ".join(line.split()) for line in out.splitlines()
    )
    assert "cannot be used" not in out
    code, out, _ = run("count", "--help")
    assert code == 0
    assert "\nCount to 100% of what you say.\n" in out
    assert "--most MOST" in out


def test_commands_are_imported_only_when_they_are_asked_for(shelf: Shelf, run: Run) -> None:
    shelf.add("counting", COUNT, "count = counting:Count")
    shelf.add("other", COUNT, "other = other:Count")
    assert {"count", "other"} <= set(command_names())
    assert run("zoo", "*encoder2d").code == 0
    assert run("--version").code == 0
    assert "counting" not in sys.modules
    assert run("count", "one").code == 0
    assert ("counting" in sys.modules, "other" in sys.modules) == (True, False)


def test_a_word_that_is_no_command_is_told_the_commands(shelf: Shelf, run: Run) -> None:
    shelf.add("counting", COUNT, "count = counting:Count")
    code, out, err = run("cuont", "three")
    assert (code, out) == (2, "")
    assert "invalid choice: 'cuont'" in err
    assert "count" in err.split("choose from")[1]
    assert "counting" not in sys.modules


BROKEN = {
    "import-error": ("import no_such_module", "broken:Count", "cannot be imported: ModuleNotFou"),
    "exit": ("raise SystemExit(3)", "broken:Count", "cannot be imported: SystemExit: 3"),
    "no-such-class": (COUNT, "broken:Counts", "cannot be imported: AttributeError"),
    "needs-an-argument": (
        COUNT.replace("count = Count()", "").replace("def run(", "def __init__("),
        "broken:Count",
        "cannot be made: TypeError",
    ),
    "no-run": (COUNT.replace("def run", "def runs"), "broken:Count", "is no command: expected a t"),
    "no-summary": (COUNT.replace("summary =", "other ="), "broken:Count", "is no command: expec"),
    "odd-summary": (COUNT.replace('"count to', 'b"count to'), "broken:Count", "is no command: ex"),
    "a-function": ("def count(args): ...", "broken:count", "is no command: expected a text"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_command_is_told_and_hurts_nobody(shelf: Shelf, run: Run, kind: str) -> None:
    source, value, message = BROKEN[kind]
    shelf.add("broken", source, f"hurt = {value}")
    shelf.add("counting", COUNT, "count = counting:Count")

    code, out, err = run("hurt", "three", "--most", "2")
    assert (code, out) == (2, "")
    assert err.startswith(f"pocketize: error: command 'hurt' of broken 1.0 ({value}) {message}")
    assert len(err.splitlines()) == 1
    assert "Traceback" in run("hurt", "--debug").err

    assert run("count", "three") == (0, "three 5\n", "")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "\n    hurt " not in out
    assert "\n    count " in out
    told = " ".join(out.split("commands that cannot be used:")[1].split())
    assert told.startswith(f"command 'hurt' of broken 1.0 ({value}) {message[:20]}")


def test_clashing_arguments_are_the_commands_own_trouble(shelf: Shelf, run: Run) -> None:
    shelf.add("broken", COUNT.replace("--most", "--debug"), "hurt = broken:Count")
    code, out, err = run("hurt", "three")
    assert (code, out) == (2, "")
    assert err.startswith("pocketize: error: command 'hurt' cannot declare its arguments: Argument")
    assert run("--help").code == 0


def test_the_engines_own_names_cannot_be_taken(shelf: Shelf, run: Run) -> None:
    shelf.add("counting", COUNT, "zoo = counting:Count")
    assert "pocketnet_encoder2d" in run("zoo", "*encoder2d").out
    assert "counting" not in sys.modules
    _, out, _ = run("--help")
    assert out.count("\n    zoo ") == 1
    told = " ".join(out.split("commands that cannot be used:")[1].split())
    assert told.startswith("command 'zoo' of counting 1.0 (counting:Count) has the name of one of")


def test_two_distributions_with_one_name_are_both_named(shelf: Shelf, run: Run) -> None:
    shelf.add("counting", COUNT, "count = counting:Count")
    shelf.add("copycat", COUNT, "count = copycat:Count")
    message = "two distributions register a command called 'count': copycat 1.0 and counting 1.0"
    with pytest.raises(RegistryError, match=message):
        load_command("count")
    code, _, err = run("count", "three")
    assert (code, message in err) == (2, True)
    assert message in " ".join(run("--help").out.split())


@pytest.mark.slow
def test_a_process_with_a_broken_command_still_lists_passes(shelf: Shelf) -> None:
    shelf.add("broken", "1 / 0", "hurt = broken:Count")
    done = subprocess.run(
        [sys.executable, "-m", "pocketize", "passes", "pocket"],
        env={"PYTHONPATH": str(shelf.root / "broken"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout[:6], done.stderr) == ("pocket", "")


def test_what_pocketize_registers_itself_can_be_loaded() -> None:
    ours = [
        entry.name
        for entry in importlib.metadata.entry_points(group="pocketize.commands")
        if entry.dist is not None and entry.dist.name == "pocketize"
    ]
    for name in ours:
        assert load_command(name).summary
