from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as PillowImage

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity import by_scale, jpeg_complexity
from pocketize.passes.complexity.planes import degrade, resize, subsample

from .conftest import Image


def _jpeg(image: Image, quality: int = 25) -> bytes:
    file = io.BytesIO()
    picture = PillowImage.fromarray(image)
    picture.save(file, "JPEG", quality=quality, subsampling=2, optimize=True)
    return file.getvalue()


def test_it_is_the_size_of_the_jpeg_over_one_byte_a_pixel_and_colour(
    noise: Image, coloured: Image
) -> None:
    assert jpeg_complexity(noise) == len(_jpeg(noise)) / (64 * 80)
    assert jpeg_complexity(coloured) == len(_jpeg(coloured)) / (64 * 80 * 3)
    assert jpeg_complexity(noise, quality=80) == len(_jpeg(noise, 80)) / (64 * 80)


def test_over_the_file_it_is_the_size_of_the_jpeg_over_that_of_the_file(coloured: Image) -> None:
    value = jpeg_complexity(coloured, size="file", file_bytes=12345)
    assert value == pytest.approx(len(_jpeg(coloured)) / 12345, rel=1e-12)


def test_all_slices_of_a_volume_share_its_file(scan: Image) -> None:
    value = jpeg_complexity(scan, axis=0, size="file", file_bytes=3000)
    assert value == pytest.approx(sum(len(_jpeg(part)) for part in scan) / 3000, rel=1e-12)


def test_a_scale_is_compressed_small_and_once_more_at_full_size(clouds: Image) -> None:
    small = subsample(clouds.astype(np.float64), 2)
    assert small.shape == (32, 32)
    decoded = np.asarray(PillowImage.open(io.BytesIO(_jpeg(np.rint(small).astype(np.uint8)))))
    large = np.rint(resize(decoded.astype(np.float64), (128, 128))).astype(np.uint8)
    assert jpeg_complexity(clouds, scale=2) == len(_jpeg(large)) / clouds.size
    assert by_scale("jpeg", clouds, 3)[2] == jpeg_complexity(clouds, scale=2)


def test_a_constant_image_costs_what_headers_cost(constant: Image) -> None:
    assert 0 < jpeg_complexity(constant) * constant.size < 400


def test_bytes_of_16_bit_images_count_as_those_of_the_8_bit_image_that_is_compressed(
    noise: Image,
) -> None:
    wide = noise.astype(np.uint16) * 257
    assert jpeg_complexity(wide, scale=1) == jpeg_complexity(noise, scale=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 0}, "quality: expected a whole number from 1 on, got 0"),
        ({"quality": 25.5}, "quality: expected a whole number from 1 on, got 25.5"),
        ({"quality": 101}, "quality: JPEG ends at 100, got 101"),
        ({"scale": -1}, "scale: expected a whole number from 0 on, got -1"),
        ({"size": "disk"}, "size: expected 'raw' or 'file', got 'disk'"),
        ({"size": "file"}, "size='file' needs the size of the file that the image came in, got N"),
    ],
)
def test_wrong_options_are_refused(noise: Image, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        jpeg_complexity(noise, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_an_image_that_jpeg_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="an image of 1 x 65501 is too large for JPEG"):
        jpeg_complexity(np.zeros((1, 65501), dtype=np.uint8))


def test_subsampling_takes_the_pixels_in_the_middle_without_antialiasing() -> None:
    image = np.arange(64.0).reshape(8, 8)
    small = subsample(image, 2)  # the middle of a block of 4 x 4 lies between four pixels
    expected = [[image[r : r + 2, c : c + 2].mean() for c in (1, 5)] for r in (1, 5)]
    np.testing.assert_allclose(small, expected)
    assert subsample(np.zeros((9, 7)), 1).shape == (4, 3)


def test_degrading_keeps_size_and_colours(coloured: Image) -> None:
    plane = coloured.astype(np.float64)
    degraded = degrade(plane, 2)
    assert degraded.shape == plane.shape
    for channel in range(3):
        np.testing.assert_array_equal(degraded[..., channel], degrade(plane[..., channel], 2))
    assert degrade(plane, 0) is plane
