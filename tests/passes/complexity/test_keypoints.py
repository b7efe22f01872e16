from __future__ import annotations

import numpy as np
import pytest

from pocketize.errors import OptionError
from pocketize.passes.complexity import keypoints

from .conftest import Image


def _dots(count: int) -> Image:
    """So many soft dots far from each other, on 128 x 128 pixels."""
    y, x = np.indices((128, 128))
    image = np.zeros((128, 128))
    for number in range(count):
        row, column = divmod(number, 4)
        squared = (y - 20 - 28 * row) ** 2 + (x - 20 - 28 * column) ** 2
        image += 200 * np.exp(-squared / (2 * 3.0**2))
    return np.rint(image).astype(np.uint8)


def test_sift_counts_per_thousand_pixels() -> None:
    dots = _dots(4)
    density = keypoints(dots)
    count = density * dots.size / 1000
    assert count == pytest.approx(round(count))
    assert count >= 4
    framed = np.pad(dots, ((0, 384), (0, 0)))  # the same dots on four times the pixels
    assert keypoints(framed) == pytest.approx(density / 4)


def test_more_dots_are_more_keypoints_and_more_strength() -> None:
    for by in ("count", "strength"):
        one, four, nine = (keypoints(_dots(count), by=by) for count in (1, 4, 9))
        assert 0 < one < four < nine


def test_dim_dots_are_weaker_than_bright_ones() -> None:
    dim, bright = (keypoints(_dots(4) // part, by="strength") for part in (2, 1))
    assert 0 < dim < bright


def test_orb_finds_corners_and_more_than_five_hundred_of_them() -> None:
    corners = np.kron(np.random.default_rng(0).integers(0, 2, (64, 64)), np.ones((6, 6))) * 255
    image = corners.astype(np.uint8)
    found = keypoints(image, detector="orb") * image.size / 1000
    assert found > 1000
    assert keypoints(image, detector="orb", by="strength") > 0
    assert keypoints(np.zeros((64, 64), dtype=np.uint8), detector="orb") == 0


def test_wrong_options_are_refused_and_surf_is_explained(noise: Image) -> None:
    with pytest.raises(OptionError, match="'sift' or 'orb', got 'surf': SURF is patented"):
        keypoints(noise, detector="surf")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="by: expected 'count' or 'strength', got 'size'"):
        keypoints(noise, by="size")  # type: ignore[arg-type]
