from __future__ import annotations

import numpy as np
import pytest

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity import feature_congestion, subband_entropy

from .conftest import Image


def test_an_image_of_one_colour_has_the_congestion_of_the_least_noticeable_differences() -> None:
    colour = (0.0007 * 0.1 * 0.05) ** (1 / 3)
    orientation = 0.001 ** (1 / 2)
    expected = colour / 0.2088 + orientation / 0.0269
    for value in (0, 77, 255):
        image = np.full((32, 48, 3), value, dtype=np.uint8)
        assert feature_congestion(image) == pytest.approx(expected, rel=1e-3)


def test_every_kind_of_variety_congests(constant: Image) -> None:
    generator = np.random.default_rng(0)
    plain = np.full((64, 64, 3), 128, dtype=np.uint8)
    colours = plain.copy()
    # red and green of nearly one lightness, in patches
    patches = np.kron(generator.integers(0, 2, (16, 16)), np.ones((4, 4))).astype(bool)
    colours[patches] = (200, 100, 120)
    stripes = np.tile(np.where(np.arange(64) // 4 % 2, 160, 96).astype(np.uint8), (64, 1))
    crossed = stripes.copy()
    crossed[:, 32:] = stripes.T[:, 32:]
    values = [feature_congestion(image) for image in (plain, stripes, crossed)]
    assert values[0] < values[1] < values[2]
    assert feature_congestion(colours) > values[0]


def test_a_grey_image_has_the_congestion_of_its_colour_copy(noise: Image) -> None:
    copy = np.repeat(noise[..., None], 3, axis=2)
    assert feature_congestion(copy) == pytest.approx(feature_congestion(noise), rel=1e-9)


def test_congestion_does_not_depend_on_reflection(clouds: Image) -> None:
    expected = feature_congestion(clouds)
    # subsampling begins at the other end, so not to the last digit
    assert feature_congestion(clouds[::-1]) == pytest.approx(expected, rel=0.02)
    assert feature_congestion(clouds.T) == pytest.approx(expected, rel=1e-9)


def test_the_entropy_of_bands_of_two_values_is_small_and_that_of_noise_large(noise: Image) -> None:
    board = (np.kron(np.indices((4, 4)).sum(axis=0) % 2, np.ones((16, 16))) * 255).astype(np.uint8)
    assert 0 < subband_entropy(board) < subband_entropy(noise) < np.log(np.ceil(np.sqrt(64 * 80)))


def test_entropy_counts_the_shape_of_a_band_and_not_its_strength(noise: Image) -> None:
    # L of Lab is no straight line of the pixels, so not to the last digit
    assert subband_entropy(noise // 2) == pytest.approx(subband_entropy(noise), rel=0.05)


def test_chroma_has_its_weight(noise: Image, coloured: Image) -> None:
    copy = np.repeat(noise[..., None], 3, axis=2)
    assert subband_entropy(copy) == pytest.approx(subband_entropy(noise) / (1 + 2 * 0.0625))
    assert subband_entropy(copy, chroma_weight=0) == subband_entropy(noise)
    assert subband_entropy(coloured, chroma_weight=1) > subband_entropy(copy, chroma_weight=1)


def test_odd_sizes_are_measured_without_a_warning(noise: Image) -> None:
    assert subband_entropy(noise[:63, :79]) > 2
    assert feature_congestion(noise[:63, :79]) > 5


def test_images_too_small_are_refused(noise: Image) -> None:
    assert subband_entropy(noise[:8, :8]) > 0
    with pytest.raises(InputError, match="sub-band entropy takes images of 8 x 8 and more, got 7"):
        subband_entropy(noise[:7, :9])
    assert feature_congestion(noise[:4, :4]) > 0
    with pytest.raises(InputError, match="at 3 levels takes images of 4 x 4 and more, got 4 x 3"):
        feature_congestion(noise[:4, :3])
    assert feature_congestion(noise[:4, :3], levels=2) > 0


def test_more_levels_find_no_less_congestion(clouds: Image) -> None:
    one, two, three = (feature_congestion(clouds, levels=levels) for levels in (1, 2, 3))
    assert one < two < three
    with pytest.raises(OptionError, match="levels: expected a whole number from 1 on, got 0"):
        feature_congestion(clouds, levels=0)


def test_a_negative_weight_is_refused(noise: Image) -> None:
    with pytest.raises(OptionError, match="chroma_weight: expected 0 or more, got -1"):
        subband_entropy(noise, chroma_weight=-1)
