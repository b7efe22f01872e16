from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from pocketize.errors import OptionError, RegistryError
from pocketize.plugin.base import Guarantee
from pocketize.plugin.registry import get_pass, list_passes, parse_pass

HALVE = """
    from dataclasses import dataclass
    from typing import ClassVar
    from pocketize.plugin.base import Guarantee, Pass, Proposal

    @dataclass(frozen=True, kw_only=True)
    class Halve(Pass):
        '''Halve.

        Attributes:
            width: the most channels.
        '''
        name: ClassVar[str] = "halve"
        summary: ClassVar[str] = "Halve every width"
        width: int | None = None
        keep: tuple[str, ...] = ()

        @property
        def guarantee(self) -> Guarantee:
            return Guarantee.RETRAIN

        def propose(self, target) -> Proposal:
            return Proposal()
"""


class Shelf:
    """Distributions that exist as metadata and modules on sys.path only."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.modules: list[str] = []

    def add(
        self, dist: str, source: str, *entries: str, module: str = "", folder: str = ""
    ) -> None:
        folder = folder or dist
        module = module or dist.replace("-", "_")
        site = self.root / folder
        info = site / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[pocketize.passes]", *entries]) + "\n")
        (site / f"{module}.py").write_text(dedent(source))
        self.modules.append(module)
        self.monkeypatch.syspath_prepend(str(site))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    # without the built-in ones, whose dependencies are none of this test's business
    real = importlib.metadata.entry_points

    def only_ours(**selection: str) -> list[importlib.metadata.EntryPoint]:
        return [e for e in real(**selection) if e.dist is not None and e.dist.name != "pocketize"]

    monkeypatch.setattr(importlib.metadata, "entry_points", only_ours)
    made = Shelf(tmp_path, monkeypatch)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


def test_a_strangers_pass_is_found_by_name_and_described(shelf: Shelf) -> None:
    shelf.add("halving", HALVE, "halve = halving:Halve")
    assert get_pass("halve").name == "halve"
    (info,) = list_passes()
    assert (info.name, info.summary, info.distribution) == (
        "halve",
        "Halve every width",
        "halving 1.0",
    )
    assert info.guarantee is Guarantee.RETRAIN
    assert [option.name for option in info.options] == ["width", "keep"]
    assert info.error is None


def test_nothing_is_imported_until_it_is_asked_for(shelf: Shelf) -> None:
    shelf.add("halving", HALVE, "halve = halving:Halve")
    shelf.add("other", HALVE.replace('"halve"', '"other"'), "other = other:Halve")
    get_pass("other")
    assert "other" in sys.modules
    assert "halving" not in sys.modules


def test_an_unknown_name_gets_the_nearest_known_one(shelf: Shelf) -> None:
    shelf.add("halving", HALVE, "halve = halving:Halve")
    with pytest.raises(RegistryError) as caught:
        get_pass("halv")
    assert str(caught.value) == "no pass is called 'halv'. Did you mean 'halve'? Passes: halve"


def test_with_no_pass_at_all_the_error_asks_whether_pocketize_is_installed(shelf: Shelf) -> None:
    assert list_passes() == []
    with pytest.raises(RegistryError, match="Passes: none; is pocketize installed"):
        get_pass("pocket")


BROKEN = {
    "import-error": (
        "import no_such_module_anywhere",
        "broken:Halve",
        "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    "syntax-error": ("def :", "broken:Halve", "cannot be imported: SyntaxError"),
    "any-error": ("1 / 0", "broken:Halve", "cannot be imported: ZeroDivisionError"),
    "exit": ("raise SystemExit(3)", "broken:Halve", "cannot be imported: SystemExit: 3"),
    "no-such-class": (HALVE, "broken:Halves", "cannot be imported: AttributeError"),
    "not-a-pass": ("Halve = 3", "broken:Halve", "is not a subclass of pocketize.Pass but 3"),
    "other-name": (
        HALVE.replace('"halve"', '"double"'),
        "broken:Halve",
        "calls itself 'double'; both names must be the same",
    ),
    "no-decorator": (
        HALVE.replace("@dataclass(frozen=True, kw_only=True)", ""),
        "broken:Halve",
        "is not declared as a pass should be: Halve is a pass and must be decorated",
    ),
    "no-summary": (
        HALVE.replace("summary:", "other:"),
        "broken:Halve",
        "is not declared as a pass should be: Halve is a pass without a 'summary'",
    ),
    "odd-option": (
        HALVE.replace("int | None", "object"),
        "broken:Halve",
        "cannot be the type of an option",
    ),
    "abstract": (
        HALVE.replace("def propose", "def proposes"),
        "broken:Halve",
        "not define propose",
    ),
    "unmakeable": (
        HALVE.replace("return Guarantee.RETRAIN", "raise ValueError('no')"),
        "broken:Halve",
        "cannot be made with its defaults: no",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_pass_is_listed_and_hurts_nobody(shelf: Shelf, kind: str) -> None:
    source, value, message = BROKEN[kind]
    shelf.add("broken", source, f"halve = {value}")
    shelf.add("fine", HALVE.replace('"halve"', '"fine"'), "fine = fine:Halve")

    assert get_pass("fine")().guarantee is Guarantee.RETRAIN
    fine, broken = list_passes()
    assert (fine.name, fine.error) == ("fine", None)
    assert (broken.name, broken.summary, broken.options) == ("halve", "", ())
    assert broken.distribution == "broken 1.0"
    assert broken.error is not None
    assert message in broken.error
    if kind != "unmakeable":  # one whose defaults do not go together may still be made
        with pytest.raises(RegistryError) as caught:
            get_pass("halve")
        assert str(caught.value) == broken.error
        assert str(caught.value).startswith("pass 'halve' of broken 1.0 (broken:Halve")


def test_a_pass_with_a_required_option_is_listed_without_a_guarantee(shelf: Shelf) -> None:
    shelf.add("halving", HALVE.replace("int | None = None", "int"), "halve = halving:Halve")
    (info,) = list_passes()
    assert (info.guarantee, info.error) == (None, None)
    assert info.options[0].default is None


def test_two_distributions_with_one_name_raise_and_are_both_named(shelf: Shelf) -> None:
    shelf.add("halving", HALVE, "halve = halving:Halve")
    shelf.add("copycat", HALVE, "halve = copycat:Halve")
    shelf.add("fine", HALVE.replace('"halve"', '"fine"'), "fine = fine:Halve")
    message = "two distributions register a pass called 'halve': copycat 1.0 and halving 1.0"
    with pytest.raises(RegistryError, match=message):
        get_pass("halve")
    with pytest.raises(RegistryError, match=message):
        list_passes()
    assert get_pass("fine").name == "fine"


def test_one_distribution_found_twice_is_no_duplicate(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.add("halving", HALVE, "halve = halving:Halve", folder="wheel")
    shelf.add("Halving", HALVE, "halve = halving:Halve", module="halving", folder="editable")
    # importlib.metadata drops one of two equal names by itself, but only if their case agrees
    every = [
        entry
        for dist in importlib.metadata.distributions()
        for entry in dist.entry_points
        if entry.group == "pocketize.passes" and entry.name == "halve"
    ]
    assert len(every) == 2
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: every)
    assert get_pass("halve").name == "halve"
    assert len(list_passes()) == 1


def test_a_spec_is_read_as_the_command_line_writes_it(shelf: Shelf) -> None:
    shelf.add("halving", HALVE, "halve = halving:Halve")
    halve = get_pass("halve")
    assert parse_pass("halve") == parse_pass("halve:") == halve()
    made = parse_pass("halve:width=16,keep=enc*|dec.0")
    assert made.options() == {"width": 16, "keep": ["enc*", "dec.0"]}
    assert parse_pass('halve:keep=["enc*","dec.0"], width=16') == made
    assert parse_pass(str(made)) == made


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("halve:16", "'16' is not of the form option=value (in 'halve:16')"),
        (
            "halve:wdith=16",
            "halve: unknown option 'wdith'. Did you mean 'width'? Options of halve: width, keep "
            "(in 'halve:wdith=16')",
        ),
        (
            "halve:width=x",
            "halve: option 'width': expected int or none, got 'x' (in 'halve:width=x')",
        ),
    ],
)
def test_an_error_in_a_spec_quotes_it(shelf: Shelf, spec: str, message: str) -> None:
    shelf.add("halving", HALVE, "halve = halving:Halve")
    with pytest.raises(OptionError) as caught:
        parse_pass(spec)
    assert str(caught.value) == message
