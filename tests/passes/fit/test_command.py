"""``pocketize fit``: what it prints and writes, and what it does with wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketize import load, measure, rewrite
from pocketize.cli import main
from pocketize.plugin.recipe import load_recipe
from tests.passes.fit.conftest import INPUT, UNet3d

pytestmark = pytest.mark.xdist_group("fit")
MODEL = "tests.passes.fit.conftest:UNet3d"


@pytest.mark.slow
def test_model_recipe_and_report_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = int(0.75 * measure(UNet3d(), INPUT, estimate=True).peak)
    model, recipe, report = (
        tmp_path / "lean.safetensors",
        tmp_path / "fit.toml",
        tmp_path / "r.json",
    )
    arguments = ["fit", MODEL, "--input", INPUT, "--memory", f"{budget}B", "--format", "json"]
    arguments += ["-o", str(model), "--recipe", str(recipe), "--report", str(report)]
    assert main([*arguments, "--no-proof"]) == 0
    found = json.loads(report.read_text())
    assert found["chosen"]["peak"] <= budget
    again = rewrite(UNet3d(), *load_recipe(recipe), inputs=INPUT)
    assert measure(again, INPUT, estimate=True).peak == found["chosen"]["peak"]
    assert measure(load(model, UNet3d), INPUT, estimate=True).peak == found["chosen"]["peak"]
    assert main([*arguments, "--no-proof"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--memory", "1kB"], 1, "Weights, optimizer state and inputs alone take"),
        (["--memory", "much"], 2, "'much' is no size; write a number above 0 and a unit (B, KiB"),
        (["--memory", "8"], 2, "'8' is no size"),
        (["--memory", "1GiB", "--max-time", "0"], 2, "--max-time must be a number above 0"),
        (["--memory", "1GiB", "--input", "1x1x33x33"], 3, "1x1x33x33"),
        (["--memory", "1GiB", "--largest-input"], 2, "no N"),
        (["--memory", "1GiB", "--device", "gpu"], 3, "is none that torch knows"),
        (["--memory", "1GiB", "--recipe", "none.toml"], 0, "none.toml is not written"),
    ],
)
def test_wrong_arguments_say_what_to_do(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--input" in arguments else ["--input", INPUT]
    assert main(["fit", MODEL, *given, *arguments, "--no-proof"]) == code
    assert says in capsys.readouterr().err
