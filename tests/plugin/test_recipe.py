from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketize.errors import RecipeError, RegistryError
from pocketize.plugin import recipe
from pocketize.plugin.base import Guarantee, Pass, Proposal, Target
from pocketize.plugin.recipe import dump_recipe, load_recipe, parse_recipe


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "Halve every width"
    width: int | None = 64
    factor: float = 0.5
    keep: tuple[str, ...] = ()
    fine: bool = False
    note: str | None = ""
    widths: dict[str, int] | None = None

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.RETRAIN

    def propose(self, target: Target) -> Proposal:
        return Proposal()


@pytest.fixture(autouse=True)
def only_halve(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_pass(name: str) -> type[Pass]:
        if name != "halve":
            raise RegistryError(f"no pass is called {name!r}")
        return Halve

    monkeypatch.setattr(recipe, "get_pass", get_pass)


def test_passes_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lean.toml"
    path.write_text(
        """
        # what we ship
        [[pass]]
        name = "halve"
        width = "none"
        keep = ["enc*", "dec.0"]

        [[pass]]
        name = "halve"
        factor = 1
        fine = true
        widths = {enc = 3}
        """
    )
    assert load_recipe(path) == [
        Halve(width=None, keep=("enc*", "dec.0")),
        Halve(factor=1.0, fine=True, widths={"enc": 3}),
    ]


passes = st.builds(
    Halve,
    width=st.none() | st.integers(),
    factor=st.floats(allow_nan=False, allow_infinity=False),
    keep=st.lists(st.text()).map(tuple),
    fine=st.booleans(),
    note=st.text(),
    widths=st.none() | st.dictionaries(st.text(), st.integers()),
)


@given(st.lists(passes, min_size=1, max_size=3))
def test_a_written_recipe_is_read_back(written: list[Pass]) -> None:
    assert parse_recipe(dump_recipe(written)) == written


def test_a_written_recipe_is_readable() -> None:
    assert dump_recipe([Halve(width=16, keep=("enc*",)), Halve(fine=True)]) == (
        '[[pass]]\nname = "halve"\nwidth = 16\nkeep = ["enc*"]\n'
        "\n"
        '[[pass]]\nname = "halve"\nfine = true\n'
    )


def test_no_value_for_an_option_that_takes_text_is_refused_rather_than_written_as_text() -> None:
    assert parse_recipe(dump_recipe([Halve(note="none")])) == [Halve(note="none")]
    with pytest.raises(
        RecipeError, match="halve:note=none cannot be written as a recipe: read back"
    ):
        dump_recipe([Halve(note=None)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[pass]\n", "lean.toml is not TOML: "),
        ("", "lean.toml has no [[pass]]: there is nothing to do"),
        ("passs = 1", "lean.toml: unknown key 'passs'. Did you mean 'pass'? A recipe is a list of"),
        ("[pass]\nname = 'halve'", "lean.toml: write [[pass]], in double brackets, once for each"),
        ("pass = [1]", "lean.toml: write [[pass]], in double brackets, once for each"),
        (
            "[[pass]]\nnmae = 'halve'",
            'lean.toml, pass 1: expected a name such as name = "pocket", got None. '
            "Did you mean 'nmae'?",
        ),
        ("[[pass]]\nname = 3", 'pass 1: expected a name such as name = "pocket", got 3'),
        (
            "[[pass]]\nname = 'halve'\n[[pass]]\nname = 'halve'\nwdith = 3",
            "lean.toml, pass 2: halve: unknown option 'wdith'. Did you mean 'width'?",
        ),
        (
            "[[pass]]\nname = 'halve'\nwidth = 1.5",
            "lean.toml, pass 1: halve: option 'width': expected int or none, got 1.5 (float)",
        ),
        (
            "[[pass]]\nname = 'halve'\nkeep = 2021-01-01",
            "lean.toml, pass 1: halve: option 'keep': expected list of str, got datetime.date",
        ),
        ("[[pass]]\nname = 'double'", "lean.toml, pass 1: no pass is called 'double'"),
    ],
)
def test_a_wrong_recipe_is_explained(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="lean.toml")
    assert message in str(caught.value)


def test_an_unreadable_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*: No such file or directory"):
        load_recipe(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not a recipe: it is not text in UTF-8"):
        load_recipe(tmp_path / "binary.toml")
