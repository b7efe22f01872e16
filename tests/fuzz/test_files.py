"""Files that are damaged or made to harm: read rightly, or refused with an error of ours."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from pocketize import load, rewrite, save
from pocketize.artifact import load_weights
from pocketize.engine.pipeline import history
from pocketize.errors import ArtifactError, InputError, PlanningError, RecipeError, ReportError
from pocketize.passes import Patchwise
from pocketize.passes.planning.runner import PointCache, Trained, TrainedKey
from pocketize.plugin.recipe import load_recipe
from pocketize.reading import read_image
from pocketize.report import Comparison, Measurement, compare
from tests.fuzz.mutations import changed_bytes, changed_json, seeded


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )


def written(path: Path, *passes: Any) -> tuple[dict[str, torch.Tensor], Any]:
    torch.manual_seed(0)
    save(rewrite(net(), *passes, inputs="1x1x8x8"), path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return load_file(path), json.loads(header["__metadata__"]["pocketize"])


def with_header(path: Path, header: str, data: bytes) -> None:
    text = header.encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, in which nothing but ``x.*`` may have been written at the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert {path.stem for path in tmp_path.iterdir()} <= {"x"}


PASSES = {
    "recompute": ("recompute:min_bytes=1",),
    "widths": ("pocket:width=2",),
    "tiles": (Patchwise(size=4, keep="disk", output="disk", progress=False),),
    "several": ("width:scale=0.5", "bottleneck", "in-place-norm"),
    "execution": ("amp", "checkpoint:only=0", "offload:to=disk,min_bytes=1B"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PASSES)
def test_the_recipe_of_a_saved_model(alone: Path, case: str) -> None:
    path = alone / "x.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some passes change nothing in so small a net
        tensors, recipe = written(path, *PASSES[case])
    read = 0
    for text in changed_json(recipe, seeded(case), 60):
        save_file(tensors, path, {"pocketize": text.encode("utf-8", "replace").decode()})
        try:
            made = load(path, net)
        except ArtifactError:
            continue
        read += 1
        for record in history(made):  # what is told can be shown and saved again
            json.dumps(record.to_json())
            assert str(record)
        assert made.eval()(torch.zeros(1, 1, 8, 8)).shape[:2] == (1, 2)
    assert read  # some changes do no harm, so that this has not tried the same error all the time


@pytest.mark.slow
def test_the_header_of_safetensors(alone: Path) -> None:
    path = alone / "x.safetensors"
    written(path, "pocket:width=2")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for text in changed_json(header, seeded("header"), 300):
        with_header(path, text, data)
        for read in (lambda: load(path, net), lambda: load_weights(net(), path)):
            with contextlib.suppress(ArtifactError):
                read()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_bytes_of_weights(alone: Path, name: str) -> None:
    path = alone / name
    if name == "x.pt":
        torch.save(net().state_dict(), path)
    else:
        save_file(net().state_dict(), path)
    for content in changed_bytes(path.read_bytes(), seeded(name), 300):
        path.write_bytes(content)
        model = net()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            load_weights(model, path)
        except ArtifactError:
            after = model.state_dict()
            assert all(torch.equal(value, after[key]) for key, value in before.items())


RECIPE = """
[[pass]]
name = "width"
scale = 0.5
keep = ["0", "3.*"]

[[pass]]
name = "patchwise"
size = [4, 4]
overlap = 0.25
mode = "window"
"""


@pytest.mark.slow
def test_recipes(alone: Path) -> None:
    path = alone / "x.toml"
    rng = seeded("recipe")
    hostile = [f"a = {'[' * n}" for n in (100, 5000)] + ["a = " + "9" * 5000, "a = nan"]
    hostile += ["a." * 3000 + "a = 1", "a = 1979-05-27", "a = 1e999", 'a = "\\u001b"']
    hostile += [f"a = {'{a=' * 3000}", "name = 'pocket'", "scale = inf", "size = " + "9" * 400]
    texts = [f"{RECIPE}{line}\n" for line in hostile]
    texts += [RECIPE.replace("0.5", line.partition("= ")[2]) for line in hostile]
    contents = [text.encode() for text in texts]
    for content in [*contents, *changed_bytes(RECIPE.encode(), rng, 300)]:
        path.write_bytes(content)
        with contextlib.suppress(RecipeError):
            load_recipe(path)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("kind", [Comparison, Measurement])
def test_reports(kind: type[Comparison] | type[Measurement]) -> None:
    model = net()
    comparison = compare(model, model, "1x1x8x8", estimate=True).with_limits("peak 2% 1MiB")
    text = (comparison if kind is Comparison else comparison.before).to_json()
    for changed in changed_json(json.loads(text), seeded("report"), 150):
        try:
            report = kind.from_json(changed)
        except ReportError:
            continue
        for drawn in (str(report), repr(report), report.to_markdown(), report.to_html()):
            assert "\x1b" not in drawn


def test_caches_of_trained_points(alone: Path) -> None:
    path = alone / "x.jsonl"
    PointCache(path).add(TrainedKey("m", "d", 0.5, 1), Trained(7, 0.5, 1.0))
    header, point = path.read_text().splitlines()
    rng = seeded("cache")
    lines = [f"{header}\n{line}\n" for line in changed_json(json.loads(point), rng, 200)]
    contents = [line.encode("utf-8", "surrogatepass") for line in lines]
    for content in [*contents, *changed_bytes(path.read_bytes(), rng, 200)]:
        path.write_bytes(content)
        with contextlib.suppress(PlanningError):
            PointCache(path).get(TrainedKey("m", "d", 0.5, 1))


@pytest.mark.slow
def test_images(alone: Path) -> None:
    rng = seeded("images")
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for suffix in (".png", ".jpg", ".tif", ".gif", ".bmp"):
        Image.fromarray(pixels).save(alone / f"x{suffix}")
    np.save(alone / "x.npy", pixels)
    nibabel.save(nibabel.Nifti1Image(pixels.astype(np.int16), np.eye(4)), alone / "x.nii")
    for path in sorted(alone.iterdir()):
        for content in changed_bytes(path.read_bytes(), rng, 60):
            path.write_bytes(content)
            with contextlib.suppress(InputError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what these packages have to say of such files
                assert read_image(path).image.size
