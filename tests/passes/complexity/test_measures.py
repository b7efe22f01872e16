"""What holds for every measure of images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity import (
    MEASURES,
    by_scale,
    edge_information,
    feature_congestion,
    jpeg_complexity,
    keypoints,
    signal_energy,
    subband_entropy,
)

from .conftest import Image

FUNCTIONS: dict[str, Callable[..., float]] = {
    "jpeg": jpeg_complexity,
    "energy": signal_energy,
    "edges": edge_information,
    "keypoints": keypoints,
    "congestion": feature_congestion,
    "subbands": subband_entropy,
}
NAMES = sorted(FUNCTIONS)


def test_every_measure_without_masks_is_a_function_too() -> None:
    assert {name for name, each in MEASURES.items() if not each.needs_masks} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_more_complex_than_a_slope_and_that_no_less_than_one_colour(
    name: str, noise: Image, smooth: Image, constant: Image
) -> None:
    measure = FUNCTIONS[name]
    assert measure(noise) > measure(smooth) >= measure(constant)


@pytest.mark.parametrize("name", ["energy", "edges", "keypoints", "subbands"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_constant_image_has_no_complexity(name: str, dtype: type, constant: Image) -> None:
    assert FUNCTIONS[name](constant.astype(dtype)) == 0
    colours = np.repeat(constant[..., None], 3, axis=2)
    assert FUNCTIONS[name](colours.astype(dtype)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_way_an_image_is_stored_does_not_count(name: str, noise: Image) -> None:
    measure = FUNCTIONS[name]
    expected = measure(noise)
    assert measure(noise.astype(np.uint16) * 257) == expected
    assert measure(noise / 255, value_range=(0, 1)) == pytest.approx(expected, rel=1e-6)
    spread = noise.copy()
    spread[0, :2] = 0, 255  # so that the image's own range is all of it
    assert measure(spread.astype(np.float64)) == pytest.approx(measure(spread), rel=1e-12)
    assert measure(spread.astype(np.int32) * 3 - 500) == pytest.approx(measure(spread), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_colours_are_measured(name: str, coloured: Image, constant: Image) -> None:
    flat = np.repeat(constant[..., None], 3, axis=2)
    assert FUNCTIONS[name](coloured) > FUNCTIONS[name](flat)
    assert FUNCTIONS[name](coloured.astype(np.uint16) * 257) == FUNCTIONS[name](coloured)


@pytest.mark.parametrize("name", NAMES)
def test_a_volume_has_the_mean_of_its_slices(name: str, scan: Image) -> None:
    measure = FUNCTIONS[name]
    slices = [measure(part) for part in scan]
    assert measure(scan, axis=0) == pytest.approx(np.mean(slices), rel=1e-12)
    assert measure(np.moveaxis(scan, 0, 1), axis=1) == measure(scan, axis=0)
    two = np.moveaxis(scan[:2], 0, 2)
    assert measure(two) == pytest.approx(np.mean(slices[:2]), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_layer_wise_the_first_scale_is_the_plain_measure(name: str, noise: Image) -> None:
    values = by_scale(name, noise, scales=4)
    assert values.shape == (4,)
    assert values[0] == FUNCTIONS[name](noise)
    assert by_scale(name, noise, scales=1).tolist() == [values[0]]


@pytest.mark.parametrize("name", NAMES)
def test_coarser_scales_of_a_natural_spectrum_are_less_complex(name: str, clouds: Image) -> None:
    values = by_scale(name, clouds, scales=4)
    if name == "subbands":  # it sees the shape of a band's histogram, not its strength
        assert values[0] > values[2] > values[3]
    else:
        assert (np.diff(values) < 0).all(), values


@pytest.mark.parametrize("name", NAMES)
def test_measuring_twice_gives_the_same(name: str, coloured: Image) -> None:
    assert FUNCTIONS[name](coloured) == FUNCTIONS[name](coloured.copy())


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_empty_images_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="1 of the 64 values of the image are NaN"):
        FUNCTIONS[name](_hole())
    with pytest.raises(InputError, match="the image is empty"):
        FUNCTIONS[name](np.zeros((0, 8), dtype=np.uint8))


def _hole() -> Image:
    image = np.zeros((8, 8))
    image[3, 4] = np.nan
    return image


def test_options_reach_the_measure_and_wrong_ones_are_told(noise: Image, clouds: Image) -> None:
    fine, coarse = by_scale("jpeg", noise, 1, quality=90), by_scale("jpeg", noise, 1, quality=10)
    assert fine > coarse
    with pytest.raises(OptionError) as caught:
        by_scale("jpeg", noise, qualty=3)
    assert str(caught.value) == (
        "jpeg: unknown option 'qualty'. Did you mean 'quality'? Options of jpeg: quality"
    )
    assert by_scale("congestion", clouds, 1, levels=1) < by_scale("congestion", clouds, 1)
    with pytest.raises(OptionError, match=r"congestion: unknown option 'x'. Options of.*: levels"):
        by_scale("congestion", noise, x=1)


def test_unknown_measures_and_those_of_masks_are_refused(noise: Image) -> None:
    with pytest.raises(OptionError, match=r"no measure is called 'jpg'\. Did you mean 'jpeg'"):
        by_scale("jpg", noise)
    with pytest.raises(InputError, match="jb needs masks: use measure_dataset"):
        by_scale("jb", noise)


def test_a_function_of_planes_is_a_measure(noise: Image) -> None:
    def spread(plane: Image) -> float:
        return float(np.ptp(plane))

    values = by_scale(spread, noise, 3)
    assert values[0] == 255
    assert values[0] > values[1] > values[2] > 0


def test_numpys_whole_numbers_count_too(noise: Image) -> None:
    assert by_scale("energy", noise, np.int64(2)).shape == (2,)


@pytest.mark.parametrize("scales", [0, -1, 2.5, True])
def test_a_number_of_scales_that_is_none_is_refused(scales: int, noise: Image) -> None:
    with pytest.raises(OptionError, match="scales: expected a whole number from 1 on"):
        by_scale("jpeg", noise, scales)


def test_an_image_too_small_for_the_scales_says_how_many_it_has() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 40), dtype=np.uint8)
    assert by_scale("energy", image, scales=4).shape == (4,)
    with pytest.raises(InputError) as caught:
        by_scale("energy", image, scales=5)
    assert str(caught.value) == (
        "an image of 9 x 40 has no scale 1/16; the coarsest is 1/8: ask for at most 4 scales"
    )
