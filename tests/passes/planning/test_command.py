"""``pocketize widths``: the plan on stdout, the recipe that ``apply`` takes, and the errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from pocketize import plan, zoo
from pocketize.artifact import load
from pocketize.cli import main
from pocketize.passes.complexity import complexity_of
from pocketize.passes.planning import Degradation, fit_degradation, level_scales, plan_widths
from pocketize.plugin.recipe import load_recipe, parse_recipe
from pocketize.zoo.complexity import conv_weights
from tests.passes.planning.nets import LYMPH, parameters

NET = ("zoo:complexity_unet2d", "--input", "1x1x32x32")
SMALL = (*NET, "--kwargs", '{"widths": [4, 8, 12, 16, 20], "norm": false}')
COMPLEXITY = ("--complexity", ",".join(map(str, LYMPH)), "--architecture", "unet")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ran:
        with torch.random.fork_rng(devices=[]):
            code = main(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


Run = Callable[..., Ran]


@pytest.mark.slow
def test_the_papers_plan_is_planned_written_and_applied(run: Run, tmp_path: Path) -> None:
    ran = run(
        "widths", *NET, "--max-bytes", "1MB", "--dtype", "float64", *COMPLEXITY, "-o", "r.toml"
    )
    assert (ran.code, ran.err) == (0, "")
    assert "64 -> 20" in ran.out
    assert "123,154" in ran.out
    assert ran.out.endswith("recipe: r.toml; apply it with `pocketize apply --recipe`\n")
    (width,) = load_recipe(tmp_path / "r.toml")
    assert width.options() == {"levels": [20, 19, 25, 29, 33]}
    assert run("apply", *NET, "--recipe", "r.toml", "-o", "small.safetensors").code == 0
    small = load(tmp_path / "small.safetensors", lambda: zoo.build("complexity_unet2d"))
    assert conv_weights(small) == 123_154


@pytest.mark.slow
def test_without_an_output_the_recipe_is_printed(run: Run) -> None:
    ran = run("widths", *SMALL, "--max-parameters", "5k", "--reset")
    assert ran.code == 0
    recipe = ran.out[ran.out.index("[[pass]]") :]
    (width,) = parse_recipe(recipe)
    assert width.options()["weights"] == "reset"
    net = zoo.build("complexity_unet2d", widths=(4, 8, 12, 16, 20), norm=False)
    small = plan(net, width, inputs="1x1x32x32").apply()
    assert parameters(small) <= 5000


@pytest.mark.slow
def test_json_has_the_plan_and_the_recipe(run: Run) -> None:
    ran = run("widths", *SMALL, "--max-parameters", "5000", *COMPLEXITY, "--format", "json")
    data = json.loads(ran.out)
    assert data["after"]["parameters"] <= 5000
    assert data["layerwise"] is True
    assert [level["complexity"] for level in data["levels"]] == list(LYMPH)
    assert parse_recipe(data["recipe"])[0].options()


@pytest.mark.slow
def test_markdown_has_tables_and_a_fenced_recipe(run: Run) -> None:
    ran = run("widths", *SMALL, "--max-parameters", "5k", "--format", "markdown")
    assert ran.out.startswith("### uniform widths of UNet2d for at most 5,000 parameters\n")
    assert "| level" in ran.out
    assert "```toml\n[[pass]]" in ran.out


@pytest.mark.slow
def test_a_peak_and_a_drop_are_planned_for(run: Run) -> None:
    peak = run("widths", *SMALL, "--max-peak", "150KiB", "--mode", "infer")
    assert peak.code == 0
    assert "peak, estimated (inference, 1x1x32x32 float32)" in peak.out
    drop = run("widths", *SMALL, "--max-drop", "0.05", *COMPLEXITY, "--rounding", "shared")
    assert drop.code == 0
    assert "drop / k_i (eq. 17)" in drop.out


def _images(folder: Path, count: int = 2) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
def test_complexity_is_measured_at_the_scales_of_the_levels(run: Run, tmp_path: Path) -> None:
    images = _images(tmp_path / "images")
    options = ("--images", str(images), "--architecture", "unet", "--format", "json")
    data = json.loads(run("widths", *SMALL, "--max-parameters", "5k", *options).out)
    expected = complexity_of(images, "jpeg", scales=5)
    assert [level["complexity"] for level in data["levels"]] == pytest.approx(list(expected))
    assert data["complexity_of"].startswith("jpeg of 2 images")
    uniform = json.loads(run("widths", *SMALL, "--max-parameters", "5k", *options, "--uniform").out)
    assert [level["complexity"] for level in uniform["levels"]] == pytest.approx([expected[0]] * 5)
    assert uniform["layerwise"] is False


@pytest.mark.slow
def test_levels_that_skip_a_scale_have_the_scale_they_work_at() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, stride=4, padding=1),
        torch.nn.Conv2d(8, 8, 3, stride=2, padding=1),
        torch.nn.Conv2d(8, 2, 1),
    )
    assert level_scales(net, "1x1x32x32") == (2, 3)
    assert level_scales(zoo.build("complexity_unet2d"), "1x1x32x32") == (0, 1, 2, 3, 4)
    anisotropic = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1),
        torch.nn.MaxPool3d((1, 2, 2)),
        torch.nn.Conv3d(4, 2, 1),
    )
    assert level_scales(anisotropic, "1x1x4x16x16") == (0, 1)


@pytest.mark.slow
def test_a_fit_of_ones_own_takes_the_place_of_the_architecture(run: Run, tmp_path: Path) -> None:
    made = Degradation(0.5, 0.02)
    points = [
        (name, c, 10 ** (5 - d), 0.8 * (1 - made.relative_drop(c, d)))
        for name, c in (("a", 0.1), ("b", 0.3))
        for d in (0, 1, 2)
    ]
    fit = fit_degradation(points)
    (tmp_path / "fit.json").write_text(json.dumps(fit.to_json()), encoding="utf-8")
    complexity = ("--complexity", ",".join(map(str, LYMPH)))
    ran = run(
        "widths",
        *SMALL,
        "--max-parameters",
        "5k",
        *complexity,
        "--fit",
        "fit.json",
        "--format",
        "json",
    )
    net = zoo.build("complexity_unet2d", widths=(4, 8, 12, 16, 20), norm=False)
    expected = plan_widths(
        net, inputs="1x1x32x32", max_parameters=5000, complexity=LYMPH, degradation=fit
    )
    assert json.loads(ran.out)["options"] == expected.options
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    ran = run("widths", *SMALL, "--max-parameters", "5k", *complexity, "--fit", "bad.json")
    assert ran.code == 2
    assert "--fit bad.json: not the JSON of a degradation's fit" in ran.err


def test_an_infeasible_budget_is_a_failed_check_that_tells_the_smallest(run: Run) -> None:
    code, out, err = run("widths", *SMALL, "--max-bytes", "10")
    assert (code, out) == (1, "")
    assert "with all widths at their minimum (1) it has" in err
    assert "(--max-parameters " in err
    assert "lower --minimum or --round-to, or leave less out with --keep" in err


BAD: list[tuple[tuple[str, ...], str]] = [
    ((), "say --max-bytes, --max-parameters, --max-peak, or --max-drop\n"),
    (("--max-drop", "0.1"), "the complexity of the images: --complexity, which"),
    (("--max-bytes", "1 stone"), "--max-bytes: expected a number, or one with a unit"),
    (("--max-bytes", "5k", "--architecture", "unet"), "a degradation needs a complexity"),
    (("--max-parameters", "5k", "--complexity", "0.1"), "add --architecture (unet, "),
    (("--max-parameters", "5k", "--complexity", "a,b", "--architecture", "unet"), "with commas"),
    (
        ("--max-parameters", "5k", "--complexity", "0.1,0.2", "--architecture", "unet"),
        "2 complexities are given, and UNet2d has 5 resolution levels",
    ),
    (("--max-parameters", "5k", *COMPLEXITY, "--images", "x"), "give one of them"),
    (("--max-parameters", "5k", "--metric", "iu"), "--metric goes with --architecture"),
    (("--max-parameters", "5k", *COMPLEXITY, "--fit", "x.json"), "leave out --architecture"),
    (("--max-parameters", "5k", "--keep", "none.*"), "matches no module"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_what_is_asked_wrongly_is_told(run: Run, arguments: tuple[Any, ...], message: str) -> None:
    code, out, err = run("widths", *SMALL, *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.slow
def test_a_recipe_that_is_there_is_not_replaced_without_force(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("mine", encoding="utf-8")
    asked = ("widths", *SMALL, "--max-parameters", "5k", "-o", "r.toml")
    assert run(*asked).code == 2
    assert (tmp_path / "r.toml").read_text(encoding="utf-8") == "mine"
    assert run(*asked, "--force").code == 0
    assert load_recipe(tmp_path / "r.toml")
