from __future__ import annotations

import gzip
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as PillowImage

from pocketize.errors import InputError
from pocketize.reading import list_images, pair_masks, read_image

from .conftest import Image


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_a_folder_is_listed_sorted_without_hidden_and_other_files(tmp_path: Path) -> None:
    _touch(tmp_path, "b.PNG", "a.nii.gz", "c.tif", "._a.nii.gz", "notes.txt", "deep/d.jpg", "gz.gz")
    names = [path.name for path in list_images(tmp_path)]
    assert names == ["a.nii.gz", "b.PNG", "c.tif"]
    deep = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path, "**/*")]
    assert deep == ["a.nii.gz", "b.PNG", "c.tif", "deep/d.jpg"]
    assert [path.name for path in list_images(str(tmp_path), "*.tif")] == ["c.tif"]
    assert list_images(tmp_path / "c.tif") == [tmp_path / "c.tif"]


def test_a_folder_that_is_not_there_gets_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    with pytest.raises(InputError) as caught:
        list_images(tmp_path / "trainin")
    assert str(caught.value).endswith(
        "there is no folder or file " + str(tmp_path / "trainin") + ". Did you mean 'training'?"
    )


def test_a_folder_without_images_tells_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no image that can be read \(it holds no files\)"):
        list_images(tmp_path)
    _touch(tmp_path, "deep/a.png")
    with pytest.raises(
        InputError, match=re.escape("its 1 folders are searched with the pattern '**/*'")
    ):
        list_images(tmp_path)
    _touch(tmp_path, "a.dcm", "b.dcm", "LICENSE")
    with pytest.raises(InputError) as caught:
        list_images(tmp_path)
    assert "(files that match: 2 .dcm, 1 without an ending; read are: .png .jpg" in str(
        caught.value
    )
    with pytest.raises(InputError) as caught:
        list_images(tmp_path, "*.png")
    assert "*.png: no image" in str(caught.value)
    assert "(files there, which do not match: 2 .dcm, 1 without an ending;" in str(caught.value)
    with pytest.raises(InputError, match=r"LICENSE is no image that can be read; read are: \.png"):
        list_images(tmp_path / "LICENSE")
    with pytest.raises(InputError, match="'/x' is no pattern of paths within"):
        list_images(tmp_path, "/x")


@pytest.mark.parametrize("ending", ["png", "tif", "bmp", "gif"])
def test_grey_and_colour_pixels_come_back(
    tmp_path: Path, ending: str, noise: Image, coloured: Image
) -> None:
    path = tmp_path / f"image.{ending}"
    PillowImage.fromarray(noise).save(path)
    picture = read_image(path)
    np.testing.assert_array_equal(picture.image, noise)
    assert picture.image.dtype == np.uint8
    assert (picture.name, picture.axis) == (path.name, None)
    assert picture.file_bytes == path.stat().st_size
    if ending != "gif":
        PillowImage.fromarray(coloured).save(path)
        np.testing.assert_array_equal(read_image(path, axis=0).image, coloured)
        assert read_image(path, axis=0).axis is None  # colours are no slices


def test_jpeg_is_read_as_it_was_saved(tmp_path: Path, coloured: Image, noise: Image) -> None:
    PillowImage.fromarray(coloured).save(tmp_path / "a.jpeg", quality=95)
    assert read_image(tmp_path / "a.jpeg").image.shape == (64, 80, 3)
    PillowImage.fromarray(noise).save(tmp_path / "a.jpg", quality=100)
    grey = read_image(tmp_path / "a.jpg").image
    assert grey.shape == (64, 80)
    assert np.abs(grey.astype(int) - noise).max() < 8


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_are_kept(tmp_path: Path, ending: str) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    PillowImage.fromarray(values).save(tmp_path / f"wide.{ending}")
    read = read_image(tmp_path / f"wide.{ending}").image
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, values)


def test_floats_of_tiff_are_kept(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    PillowImage.fromarray(values).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tiff").image, values)


def test_one_bit_alpha_and_tables_become_grey_or_colours(
    tmp_path: Path, noise: Image, coloured: Image
) -> None:
    picture = PillowImage.fromarray(noise)
    PillowImage.fromarray(noise > 99).save(tmp_path / "bits.png")
    bits = read_image(tmp_path / "bits.png").image
    assert bits.dtype == bool
    np.testing.assert_array_equal(bits, noise > 99)

    picture.convert("LA").save(tmp_path / "grey-alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey-alpha.png").image, noise)
    alpha = PillowImage.fromarray(coloured)
    alpha.putalpha(PillowImage.fromarray(noise))
    alpha.save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png").image, coloured)

    table = PillowImage.fromarray(noise // 128)
    table.putpalette([0, 0, 0, 255, 255, 255])
    table.save(tmp_path / "greys.png")
    np.testing.assert_array_equal(read_image(tmp_path / "greys.png").image, noise // 128 * 255)
    table.putpalette([0, 0, 0, 255, 0, 9])
    table.save(tmp_path / "colours.png")
    read = read_image(tmp_path / "colours.png").image
    assert read.shape == (64, 80, 3)
    np.testing.assert_array_equal(read[..., 2], noise // 128 * 9)


def test_cmyk_becomes_colours(tmp_path: Path, coloured: Image) -> None:
    PillowImage.fromarray(coloured).convert("CMYK").save(tmp_path / "print.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "print.tif").image, coloured)


def test_pages_of_tiff_are_the_slices_of_a_volume(tmp_path: Path, scan: Image) -> None:
    pages = [PillowImage.fromarray(part) for part in scan]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    picture = read_image(tmp_path / "stack.tif")
    np.testing.assert_array_equal(picture.image, np.moveaxis(scan, 0, 2))
    assert picture.axis == -1
    assert read_image(tmp_path / "stack.tif", axis=1).axis == 1
    other = [pages[0], PillowImage.fromarray(scan[0, :9])]
    other[0].save(tmp_path / "odd.tif", save_all=True, append_images=other[1:])
    with pytest.raises(InputError, match=r"odd\.tif cannot be read: it has 2 pages of the shapes"):
        read_image(tmp_path / "odd.tif")


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_nifti_is_read_in_the_scanners_units(tmp_path: Path, ending: str) -> None:
    units = np.linspace(-1000, 2000, 3 * 4 * 5).reshape(3, 4, 5)
    path = tmp_path / f"scan.{ending}"
    image = nibabel.Nifti1Image(units, np.eye(4))
    image.set_data_dtype(np.int16)  # stored as whole numbers, with a slope and an intercept
    nibabel.save(image, path)
    picture = read_image(path)
    np.testing.assert_allclose(picture.image, units, atol=3000 / 2**16)
    assert (picture.image.dtype, picture.axis) == (np.float32, -1)
    assert read_image(path, axis=0).axis == 0
    assert picture.file_bytes == path.stat().st_size


def test_arrays_of_numpy_are_read_without_pickle(tmp_path: Path, noise: Image) -> None:
    np.save(tmp_path / "a.npy", noise)
    picture = read_image(tmp_path / "a.npy", axis=2)
    np.testing.assert_array_equal(picture.image, noise)
    assert picture.axis == 2
    np.save(tmp_path / "b.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"b\.npy cannot be read: .*Python objects"):
        read_image(tmp_path / "b.npy")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.nii", "a.nii.gz", "a.npy"])
@pytest.mark.parametrize("content", [b"", b"these bytes are no image at all, whatever the name"])
def test_files_that_are_not_what_they_say_are_named(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name} cannot be read: ")
    assert len(str(caught.value)) > len(f"{tmp_path / name} cannot be read: ")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.nii.gz", "a.npy"])
def test_files_cut_short_are_named(tmp_path: Path, name: str, noise: Image) -> None:
    path = tmp_path / name
    if name.endswith(".nii.gz"):
        nibabel.save(nibabel.Nifti1Image(np.stack([noise] * 3, axis=2), np.eye(4)), path)
    elif name.endswith(".npy"):
        np.save(path, noise)
    else:
        PillowImage.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-800])
    with pytest.raises(InputError, match=re.escape(f"{path} cannot be read: ")):
        read_image(path)


def _paths(folder: Path, *names: str) -> list[Path]:
    _touch(folder, *names)
    return [folder / name for name in names]


def test_masks_are_paired_by_equal_names(tmp_path: Path) -> None:
    images = _paths(tmp_path / "images", "1.png", "10.png", "2.nii.gz")
    masks = _paths(tmp_path / "masks", "1.png", "10.gif", "2.png", "unused.png")
    assert pair_masks(images, tmp_path / "masks") == (masks[:3], "name")


def test_masks_are_paired_by_names_that_go_on_after_a_separator(tmp_path: Path) -> None:
    images = _paths(tmp_path, "Image_1L.jpg", "Image_1R.jpg", "Image_11L.jpg")
    masks = _paths(tmp_path, "Image_1L_HO.png", "Image_1R_HO.png", "Image_11L_HO.png")
    assert pair_masks(images, tmp_path, "*.png") == (masks, "name")
    # the folder holds the images, too
    assert pair_masks(images, tmp_path) == (masks, "name")


def test_masks_of_other_names_are_paired_in_order(tmp_path: Path) -> None:
    images = _paths(tmp_path / "images", "21_training.tif", "22_training.tif")
    masks = _paths(tmp_path / "masks", "21_manual1.gif", "22_manual1.gif")
    assert pair_masks(images, tmp_path / "masks") == (masks, "order")


def test_masks_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    images = _paths(tmp_path / "images", "a.png", "b.png")
    _touch(tmp_path / "masks", "a.png")
    with pytest.raises(InputError) as caught:
        pair_masks(images, tmp_path / "masks")
    assert str(caught.value) == (
        f"2 images and 1 masks in {tmp_path / 'masks'} cannot be paired: no one mask is called "
        "like b.png. Give masks the names of their images, or narrow both down with patterns"
    )
    with pytest.raises(InputError, match="there is no folder or file"):
        pair_masks(images, tmp_path / "labels")


def _png(width: int, height: int) -> bytes:
    """A header, and pixels that are not there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        told = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + told

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _npy(shape: str, kind: str = "<f8") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


def _nii(*shape: int) -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    return bytes(header.binaryblock) + bytes(4 + 100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", _png(9400, 9400), "bytes become 618,520,000: it was made to fill memory"),
        ("a.png", _png(13_000, 13_000), "13000 x 13000 pixels .*MAX_IMAGE_PIXELS sets the limit"),
        ("a.png", _png(2**31 - 1, 2**31 - 1), "MAX_IMAGE_PIXELS sets the limit"),
        ("a.npy", _npy("(1000000, 1000000)"), "cannot be read"),
        ("a.npy", _npy(f"({10**30},)"), "cannot be read"),
        ("a.npy", _npy("(-1, 5)"), "cannot be read"),
        ("a.npy", _npy("(0, 5)"), "it has no pixels"),
        ("a.nii", _nii(8, 8, 0), "it has no pixels"),
        ("a.npy", _npy("(3,)", "|O"), "cannot be read"),
        ("a.npy", _npy("(" * 5000), "cannot be read"),
        ("a.nii", _nii(30_000, 30_000, 300), "GiB of pixels, more than 8 GiB"),
        ("a.nii", _nii(300, 300, 300), "its header says 54,000,000 bytes, and the file has 452"),
        ("a.nii.gz", gzip.compress(_nii(30_000, 30_000, 300), mtime=0), "more than 8 GiB"),
        ("a.nii.gz", gzip.compress(_nii(30, 30, 30), mtime=0), "cannot be read"),
    ],
)
def test_a_header_that_says_more_than_there_is_takes_no_memory(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            read_image(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
