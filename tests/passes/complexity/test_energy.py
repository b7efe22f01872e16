from __future__ import annotations

import numpy as np
import pytest

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity import edge_information, signal_energy

from .conftest import Image


def test_by_parseval_the_energy_is_the_variance_of_the_pixels(noise: Image, smooth: Image) -> None:
    for image in (noise, smooth):
        assert signal_energy(image) == pytest.approx(np.var(image / 255), rel=1e-12)


def test_to_the_letter_it_is_the_sum_over_all_coefficients(noise: Image) -> None:
    coefficients = np.fft.fft2(noise / 255)
    expected = (np.abs(coefficients) ** 2).sum()
    literal = signal_energy(noise, per_pixel=False, constant_term=True)
    assert literal == pytest.approx(expected, rel=1e-12)
    assert literal == pytest.approx(noise.size * ((noise / 255) ** 2).sum(), rel=1e-12)
    without = signal_energy(noise, per_pixel=False)
    assert literal - without == pytest.approx(np.abs(coefficients[0, 0]) ** 2, rel=1e-9)


def test_black_and_white_in_equal_parts_have_the_most_energy() -> None:
    board = np.indices((8, 8)).sum(axis=0) % 2 * 255
    assert signal_energy(board.astype(np.uint8)) == pytest.approx(0.25)


def test_energy_ignores_brightness_place_and_sign(noise: Image) -> None:
    dim = (noise // 2).astype(np.uint8)
    expected = signal_energy(dim)
    for same in (dim + 100, np.roll(dim, (5, 9), axis=(0, 1)), 255 - dim, dim.T):
        assert signal_energy(same.astype(np.uint8)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("operator", ["sobel", "scharr"])
def test_a_slope_of_one_direction_has_its_gradient_squared(operator: str) -> None:
    # 2 grey values a pixel across, on every scale twice as many a pixel
    ramp = np.tile(np.arange(0, 128, 2, dtype=np.uint8), (64, 1))
    inner = edge_information(ramp, operator=operator, edge_scales=1)
    # the derivative at the two mirrored columns of the border is half of it
    assert inner == pytest.approx((2 / 255) ** 2 * (62 + 2 / 4) / 64)
    assert edge_information(ramp.T, operator=operator, edge_scales=1) == pytest.approx(inner)
    second = (4 / 255) ** 2 * (30 + 2 / 4) / 32
    both = edge_information(ramp, operator=operator, edge_scales=2)
    assert both == pytest.approx((inner + second) / 2)


def test_edges_of_a_checkerboard_grow_with_the_number_of_its_squares() -> None:
    boards = [
        np.kron(np.indices((n, n)).sum(axis=0) % 2, np.ones((64 // n, 64 // n))) for n in (2, 4, 8)
    ]
    values = [edge_information((board * 255).astype(np.uint8)) for board in boards]
    assert values[0] < values[1] < values[2]


def test_edges_ignore_brightness_and_reflection(noise: Image) -> None:
    dim = (noise // 2).astype(np.uint8)
    for same in (dim + 100, dim[::-1], dim[:, ::-1], dim.T):
        expected = edge_information(dim)
        assert edge_information(same.astype(np.uint8)) == pytest.approx(expected, rel=1e-9)


def test_the_scales_of_edges_end_where_the_image_does(noise: Image) -> None:
    assert edge_information(noise[:8, :8], edge_scales=3) > 0
    with pytest.raises(InputError, match="an image of 8 x 7 is too small for edges at 3 scales"):
        edge_information(noise[:8, :7])
    assert edge_information(noise[:8, :7], edge_scales=2) > 0


def test_wrong_options_of_edges_are_refused(noise: Image) -> None:
    with pytest.raises(OptionError, match="expected 'sobel' or 'scharr', got 'prewitt'"):
        edge_information(noise, operator="prewitt")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="edge_scales: expected a whole number from 1 on, got 0"):
        edge_information(noise, edge_scales=0)
