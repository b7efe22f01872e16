from __future__ import annotations

from collections.abc import Callable

import pytest

from pocketize import zoo
from pocketize.cli import listing
from pocketize.plugin.base import Guarantee, OptionInfo
from pocketize.plugin.registry import PassInfo

from .conftest import Ran

Run = Callable[..., Ran]


def test_passes_are_listed_with_guarantee_and_options(run: Run) -> None:
    code, out, err = run("passes")
    assert (code, err) == (0, "")
    assert "pocket (APPROXIMATE)\n  Clamp all widths" in out
    assert "\n    width: int or none; default none\n        the most channels" in out
    assert "\n    weights: 'slice' or 'reset'; default slice\n" in out
    assert "RETRAIN the shapes" in out


def test_one_pass_is_told_about(run: Run) -> None:
    code, out, _ = run("passes", "pocket")
    assert code == 0
    assert out.startswith("pocket (APPROXIMATE)\n")
    assert "RETRAIN the shapes" not in out
    code, out, err = run("passes", "pockt")
    assert (code, out) == (2, "")
    assert "Did you mean 'pocket'?" in err


def test_foreign_broken_and_optionless_passes_are_listed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    required = OptionInfo("size", "int", None, "")
    empty = OptionInfo("note", "str", "", "what to write.")
    infos = [
        PassInfo("halve", "Halve all", Guarantee.EXACT, "halving 1.0", (required, empty)),
        PassInfo("hurt", "", None, "hurting 2.0", (), error="pass 'hurt' cannot be imported"),
        PassInfo("maybe", "May be", None, "pocketize 0.1", ()),
    ]
    monkeypatch.setattr(listing, "list_passes", lambda: infos)
    code, out, _ = run("passes")
    assert code == 0
    assert out.startswith(
        "halve (EXACT)\n"
        "  Halve all\n"
        "  from halving 1.0\n"
        "    size: int; required\n"
        "    note: str; default ''\n"
        "        what to write.\n"
        "\n"
        "hurt (BROKEN)\n"
        "  pass 'hurt' cannot be imported\n"
        "\n"
        "maybe (depends on its options)\n"
        "  May be\n"
    )


def test_networks_are_listed_by_pattern(run: Run) -> None:
    code, out, err = run("zoo")
    assert (code, err) == (0, "")
    for name in zoo.list_models():
        assert f"zoo:{name} " in out
    code, out, _ = run("zoo", "*encoder2d")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["zoo:pocketnet_encoder2d"]
    assert "1,178,994  1x1x256x256" in out


def test_one_network_is_told_about_in_full(run: Run) -> None:
    code, out, _ = run("zoo", "pocketnet_unet3d")
    assert code == 0
    assert out.startswith("zoo:pocketnet_unet3d  ")
    assert "Celaya et al." in out
    assert "\npocket        False\n" in out


def test_a_layer_is_explained(run: Run) -> None:
    code, out, err = run("explain", "my_nets:Net", "wide", "--input", "1x1x8x8")
    assert (code, err) == (0, "")
    assert "wide.weight axis 0 (16): free" in out
    assert "head.weight" in out
    code, out, _ = run("explain", "my_nets:Net", "head")
    assert "frozen: it reaches the model's output" in out
