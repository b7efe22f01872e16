from __future__ import annotations

import numpy as np
import pytest

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity.planes import grey, planes_of, to_8_bit

from .conftest import Image


def test_8_bit_values_are_taken_as_they_are(noise: Image) -> None:
    (plane,) = planes_of(noise)
    np.testing.assert_array_equal(plane, noise.astype(np.float64))
    np.testing.assert_array_equal(to_8_bit(plane), noise)


def test_16_bit_bool_and_ranged_copies_become_the_same_plane(noise: Image) -> None:
    (plane,) = planes_of(noise)
    (wide,) = planes_of(noise.astype(np.uint16) * 257)
    np.testing.assert_array_equal(wide, plane)
    (ranged,) = planes_of(noise / 255, value_range=(0, 1))
    np.testing.assert_allclose(ranged, plane, atol=1e-10)
    (bits,) = planes_of(noise > 127)
    np.testing.assert_array_equal(np.unique(bits), [0, 255])


def test_16_bit_values_keep_their_darkness() -> None:
    (plane,) = planes_of(np.full((4, 4), 257 * 3, dtype=np.uint16))
    np.testing.assert_array_equal(plane, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.int16, np.int64, np.uint32])
def test_other_types_are_scaled_from_their_own_range(dtype: type) -> None:
    image = np.array([[0, 100], [50, 25]], dtype=dtype)
    (plane,) = planes_of(image)
    np.testing.assert_allclose(plane, [[0, 255], [127.5, 63.75]])


def test_the_range_of_narrow_integers_does_not_wrap_around() -> None:
    (plane,) = planes_of(np.array([[-128, 127]], dtype=np.int8))
    np.testing.assert_allclose(plane, [[0, 255]])


def test_floats_that_are_all_the_same_become_black() -> None:
    (plane,) = planes_of(np.full((3, 3), 1e6))
    np.testing.assert_array_equal(plane, 0)


def test_a_difference_too_small_to_be_scaled_is_as_good_as_none() -> None:
    (plane,) = planes_of(np.array([[0, 5e-324]]))
    assert 0 <= plane.max() < 1e-300


def test_values_outside_the_range_are_clipped() -> None:
    (plane,) = planes_of(np.array([[-1000.0, 0, 400, 3000]]), value_range=(-200, 600))
    np.testing.assert_allclose(plane, [[0, 63.75, 191.25, 255]])


def test_a_volume_is_scaled_whole_and_cut_along_the_last_axis_or_the_one_named() -> None:
    volume = np.arange(24.0).reshape(2, 3, 4) * 255 / 23
    planes = list(planes_of(volume[..., [0, 1]]))
    assert [plane.shape for plane in planes] == [(2, 3), (2, 3)]
    by_first = list(planes_of(volume, axis=0))
    assert [plane.shape for plane in by_first] == [(3, 4), (3, 4)]
    np.testing.assert_allclose(by_first[1], volume[1])
    np.testing.assert_allclose(list(planes_of(volume, axis=-2))[2], volume[:, 2])


def test_three_dimensions_of_which_the_last_is_3_are_colours_unless_an_axis_is_named(
    coloured: Image,
) -> None:
    (plane,) = planes_of(coloured)
    assert plane.shape == (64, 80, 3)
    assert len(list(planes_of(coloured, axis=-1))) == 3


def test_channels_of_a_volume_are_scaled_each_for_itself() -> None:
    volume = np.random.default_rng(0).random((5, 6, 2, 2))
    together = np.stack([volume[..., 0] * 1000, volume[..., 1]], axis=3)
    planes = list(planes_of(together))
    assert len(planes) == 4
    assert all(plane.max() > 200 for plane in planes)


def test_grey_is_the_luma_of_colours() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]], dtype=np.uint8)
    (plane,) = planes_of(colours)
    np.testing.assert_allclose(grey(plane), [[76.245, 149.685, 29.07, 9]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[1, 2]], "expected a numpy array (channels last) or a path, got list"),
        (np.zeros(3), "got an array of shape (3,)"),
        (np.zeros((0, 5)), "the image is empty: its shape is (0, 5)"),
        (np.zeros((2, 2), dtype=complex), "expected an image of numbers, got an array of complex"),
        (np.array([[0, np.nan], [np.inf, 1]]), "2 of the 4 values of the image are NaN or infi"),
        (np.array([[-1e308, 1e308]]), "the values of the image, -1e+308 to 1e+308, are too far a"),
        (np.zeros((5, 5, 4)), "may be an image with an alpha channel or a volume of four slices"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(image: Image, message: str) -> None:
    with pytest.raises(InputError) as caught:
        list(planes_of(image))
    assert message in str(caught.value)


def test_wrong_options_are_refused(scan: Image) -> None:
    with pytest.raises(OptionError, match=r"expected \(low, high\) with low < high, got \(3, 3\)"):
        list(planes_of(scan, value_range=(3, 3)))
    with pytest.raises(OptionError, match=r"cut along 0, 1 or 2 \(or -1, -2, -3\), got 3"):
        list(planes_of(scan, axis=3))
