"""Crops of images are what the network takes: its channels, its size, scaled as asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketize.cli.common import UsageError
from pocketize.cli.crops import crops_of
from pocketize.errors import InputError
from pocketize.graph.inputs import Inputs

from .conftest import Ran

Run = Callable[..., Ran]


def inputs(*shape: int) -> Inputs:
    return Inputs((torch.zeros(shape),))


def test_values_are_scaled_cut_and_padded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(60, dtype=np.float32).reshape(6, 10))
    (crop,) = crops_of(str(tmp_path), inputs(2, 1, 8, 4), 8, "none", 0)
    assert crop.shape == (1, 1, 8, 4)
    assert not crop[0, 0, 0].any()
    assert not crop[0, 0, -1].any()
    inner = crop[0, 0, 1:7]
    assert torch.equal(inner[0].diff(), torch.ones(3))
    assert torch.equal(inner[:, 0].diff(), torch.full((5,), 10.0))
    (whole,) = crops_of(str(tmp_path), inputs(1, 1, 6, 10), 1, "standard", 0)
    assert abs(float(whole.mean())) < 1e-6
    assert abs(float(whole.std(correction=0)) - 1) < 1e-6
    (unit,) = crops_of(str(tmp_path), inputs(1, 1, 6, 10), 1, "unit", 0)
    assert (float(unit.min()), float(unit.max())) == (0, 1)


def test_colours_are_the_first_axis_and_images_are_spread_over_the_folder(tmp_path: Path) -> None:
    for value in range(6):
        pixels = np.zeros((5, 7, 3), np.uint8)
        pixels[..., 1] = value
        Image.fromarray(pixels).save(tmp_path / f"{value}.png")
    crops = crops_of(str(tmp_path), inputs(1, 3, 5, 7), 3, "none", 0)
    assert [tuple(crop.shape) for crop in crops] == [(1, 3, 5, 7)] * 3
    assert [float(crop[0, 1].mean()) for crop in crops] == [0, 2, 4]
    assert not crops[2][0, 0].any()


@pytest.mark.parametrize(
    ("array", "shape", "error", "text"),
    [
        (np.zeros((3, 6, 6), np.float32), (1, 2, 6, 6), InputError, "takes 2 channels of 2 axes"),
        (np.full((6, 6), np.nan, np.float32), (1, 1, 6, 6), InputError, "not finite"),
        (np.zeros((6, 6), np.float32), (1, 6), UsageError, "take one image, not 1x6 float32"),
    ],
)
def test_what_does_not_suit_is_refused(
    tmp_path: Path, array: np.ndarray, shape: tuple[int, ...], error: type[Exception], text: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(error, match=text):
        crops_of(str(tmp_path), inputs(*shape), 8, "standard", 0)


@pytest.mark.slow
def test_apply_calibrates(run: Run, folder: Path) -> None:
    images = folder / "images"
    images.mkdir()
    draw = np.random.default_rng(0)
    for number in range(3):
        np.save(images / f"{number}.npy", draw.normal(size=(12, 12)))
    command = (
        "apply",
        "my_nets:Net",
        "--pass",
        "width:scale=0.5",
        "--input",
        "1x1x8x8",
        "--seed",
        "3",
    )
    code, out, err = run(*command, "--calibrate", "images", "-o", "small.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith("calibrated on 3 images: outputs differ by ")
    assert "wide     " in out
    report = run("report", "my_nets:Net", "small.safetensors", "--estimate")
    assert "calibrated on 3 images" in report.out
    reset = ("--pass", "width:scale=0.5,weights=reset", *command[4:], "--calibrate", "images")
    code, _, err = run("apply", "my_nets:Net", *reset, "-o", "b.pt")
    assert code == 2
    assert "weights='reset' draws weights anew" in err
    exact = ("--pass", "recompute", *command[4:], "--calibrate", "images")
    code, out, err = run(*command[:2], *exact, "-o", "lean.safetensors")
    assert (code, "nothing is calibrated: the passes keep what" in err) == (0, True)
    assert "calibrated on" not in out
    code, _, err = run(*command, "--calibrate", "images", "--crops", "0", "-o", "b.pt")
    assert (code, "--crops must be at least 1" in err) == (2, True)
    code, _, err = run(*command, "--scale", "unit", "-o", "b.pt")
    assert (code, "--scale are for --calibrate DIR" in err) == (2, True)
