from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity import (
    Complexity,
    by_scale,
    complexity_of,
    foreground_density,
    jb,
    jpeg_complexity,
    measure_dataset,
)

from .conftest import Image


@pytest.fixture
def folder(tmp_path: Path, noise: Image, smooth: Image, coloured: Image, scan: Image) -> Path:
    """One image of each kind of file."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    PillowImage.fromarray(noise).save(folder / "1.png")
    PillowImage.fromarray(noise.astype(np.uint16) * 257).save(folder / "2.tif")
    PillowImage.fromarray(coloured).save(folder / "3.bmp")
    np.save(folder / "4.npy", smooth)
    values = np.moveaxis(scan, 0, 2).astype(np.float32)
    values[0, :2, 0] = 0, 255
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "5.nii.gz")
    (folder / "read.me").write_text("no image")
    return folder


def test_a_folder_of_mixed_formats_is_measured_image_by_image(
    folder: Path, noise: Image, smooth: Image, coloured: Image
) -> None:
    result = measure_dataset(folder, scales=3)
    assert result.names == ("1.png", "2.tif", "3.bmp", "4.npy", "5.nii.gz")
    assert result.values.shape == (5, 3)
    for row, image in ((0, noise), (1, noise), (2, coloured), (3, smooth)):
        np.testing.assert_array_equal(result.values[row], by_scale("jpeg", image, 3))
    volume = nibabel.load(folder / "5.nii.gz").get_fdata(dtype=np.float32)
    expected = np.mean([by_scale("jpeg", part.astype(np.uint8), 3) for part in volume.T], axis=0)
    transposed = by_scale("jpeg", volume, 3, axis=-1)
    np.testing.assert_allclose(result.values[4], transposed)
    np.testing.assert_allclose(transposed, expected, rtol=0.05)
    np.testing.assert_allclose(result.mean, result.values.mean(axis=0))
    np.testing.assert_array_equal(complexity_of(folder, scales=3), result.mean)


def test_arrays_paths_and_one_array_are_images_too(folder: Path, noise: Image) -> None:
    result = measure_dataset([folder / "1.png", str(folder / "2.tif"), noise], "energy", scales=2)
    assert result.names == ("1.png", "2.tif", "image 2")
    np.testing.assert_array_equal(result.values[0], result.values[2])
    np.testing.assert_array_equal(complexity_of(noise, "energy", 2), result.values[0])
    np.testing.assert_array_equal(complexity_of(folder / "1.png", "energy", 2), result.values[0])
    assert measure_dataset((image for image in [noise, noise]), "energy").values.shape == (2, 5)


def test_over_the_file_each_image_counts_with_its_own(folder: Path, noise: Image) -> None:
    result = measure_dataset(folder, scales=2, size="file", pattern="[12].*")
    sizes = [(folder / name).stat().st_size for name in ("1.png", "2.tif")]
    expected = [jpeg_complexity(noise, size="file", file_bytes=size) for size in sizes]
    assert result.values[:, 0].tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[0] != expected[1]


def test_an_array_has_no_file(noise: Image) -> None:
    with pytest.raises(OptionError, match=r"size='file' needs the size of the file .* got None"):
        measure_dataset([noise], size="file")
    with pytest.raises(OptionError, match="size='file' is for jpeg and jb; edges is not over a si"):
        measure_dataset([noise], "edges", size="file")
    with pytest.raises(OptionError, match="size: expected 'raw' or 'file', got 'zip'"):
        measure_dataset([noise], size="zip")  # type: ignore[arg-type]


def test_options_and_the_range_of_values_reach_every_image(noise: Image) -> None:
    dark = noise // 8
    bright = measure_dataset([dark], scales=2, quality=80, value_range=(0, 31))
    expected = by_scale("jpeg", dark, 2, quality=80, value_range=(0, 31))
    np.testing.assert_array_equal(bright.values[0], expected)
    assert bright.settings == {"quality": 80, "over": "raw size", "value range": [0, 31]}


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    folder = tmp_path / "masks"
    folder.mkdir()
    for number in (1, 2):
        mask = np.zeros((64, 80), dtype=np.uint8)
        mask[:, : 20 * number] = 255
        PillowImage.fromarray(mask).save(folder / f"{number}.png")
    return folder


def test_foreground_and_jb_come_from_masks_paired_by_name(
    folder: Path, masks: Path, noise: Image
) -> None:
    settings = {"masks": masks, "pattern": "[12].*", "scales": 3}
    result = measure_dataset(folder, "foreground", **settings)
    np.testing.assert_array_equal(result.values, [[0.25] * 3, [0.5] * 3])
    assert result.settings["masks paired by"] == "name"
    both = measure_dataset(folder, "jb", w="ucunet", **settings)
    j = by_scale("jpeg", noise, 3)
    np.testing.assert_allclose(both.values, [jb(j, 0.25, 0.95), jb(j, 0.5, 0.95)])
    assert both.settings["w"] == 0.95
    assert measure_dataset(folder, "jb", **settings).settings["w"] == 0.7  # the U-Net's
    black = measure_dataset(folder, "foreground", foreground=0, **settings)
    np.testing.assert_array_equal(black.mean, [0.625] * 3)


def test_masks_may_be_arrays_in_order_and_volumes(noise: Image, scan: Image) -> None:
    mask, volume = noise > 200, scan > 100
    result = measure_dataset([noise, scan], "foreground", masks=[mask, volume], scales=1, axis=0)
    expected = [[foreground_density(mask)], [foreground_density(volume)]]
    np.testing.assert_array_equal(result.values, expected)
    assert result.settings["masks paired by"] == "order"


def test_a_mask_in_colour_has_foreground_where_it_is_not_black(noise: Image) -> None:
    mask = np.zeros((64, 80, 3), dtype=np.uint8)
    mask[:16, :, 2] = 9
    values = measure_dataset([noise], "foreground", masks=[mask], scales=1).values
    np.testing.assert_array_equal(values, [[0.25]])
    with pytest.raises(InputError, match="image 0: its mask the mask of image 0 is in colour"):
        measure_dataset([noise], "foreground", masks=[mask], foreground=9)


def test_masks_that_do_not_fit_are_refused(folder: Path, masks: Path, noise: Image) -> None:
    with pytest.raises(OptionError, match="jb needs masks: give masks=, a folder or one per image"):
        measure_dataset(folder, "jb")
    with pytest.raises(InputError, match="expected one mask per image: 2 images, 1 masks"):
        measure_dataset([noise, noise], "jb", masks=[noise])
    PillowImage.fromarray(noise[:, :79]).save(masks / "2.png")
    with pytest.raises(InputError) as caught:
        measure_dataset(folder, "jb", masks=masks, pattern="[12].*")
    assert str(caught.value) == (
        "2.tif: its mask 2.png has the size 64 x 79, the image 64 x 80; they must be the same"
    )
    with pytest.raises(OptionError, match=r"called 'unett'\. Did you mean 'unet'"):
        measure_dataset(folder, "jb", masks=masks, w="unett")


def test_what_is_wrong_with_an_image_is_told_with_its_name(folder: Path, noise: Image) -> None:
    np.save(folder / "6.npy", np.array([[np.nan, 1.0]]))
    with pytest.raises(InputError, match=r"^6\.npy: 1 of the 2 values of the image are NaN"):
        measure_dataset(folder)
    with pytest.raises(InputError, match=r"^image 1: an image of 4 x 80 has no scale 1/8; .* 3 sc"):
        measure_dataset([noise, noise[:4]], scales=4)
    with pytest.raises(InputError, match=r"^image 0: expected a numpy array \(channels last\) or"):
        measure_dataset([torch.zeros(3, 4, 4)])  # type: ignore[list-item]
    with pytest.raises(InputError, match="there are no images: the sequence is empty"):
        measure_dataset([])


def test_a_function_of_planes_measures_a_set(noise: Image) -> None:
    def largest(plane: Image) -> float:
        return float(plane.max())

    result = measure_dataset([noise], largest, scales=2)
    assert (result.measure, result.values[0, 0]) == ("largest", 255)


def test_the_result_is_a_table_and_json_and_cannot_be_changed(noise: Image) -> None:
    result = Complexity(
        "jpeg",
        ("a.png", "b.png"),
        np.array([[0.5, 0.25], [0.25, 0.00001]]),
        {"quality": 25, "w": 0.7},
    )
    assert repr(result) == (
        "jpeg of 2 images, quality 25, w 0.7\n"
        "\n"
        "scale      mean    deviation        min     max\n"
        "-------  ------  -----------  ---------  ------\n"
        "1        0.3750       0.1250     0.2500  0.5000\n"
        "1/2      0.1250       0.1250  1.000e-05  0.2500"
    )
    assert result.to_markdown().splitlines()[2] == (
        "| scale   |   mean |   deviation |       min |    max |"
    )
    assert json.loads(result.to_json()) == {
        "measure": "jpeg",
        "settings": {"quality": 25, "w": 0.7},
        "scales": ["1", "1/2"],
        "mean": [0.375, 0.125005],
        "images": [
            {"name": "a.png", "values": [0.5, 0.25]},
            {"name": "b.png", "values": [0.25, 1e-05]},
        ],
    }
    with pytest.raises(ValueError, match="read-only"):
        measure_dataset([noise], scales=1).values[0, 0] = 3


def test_progress_is_on_stderr_and_only_where_it_is_wanted(
    noise: Image, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_dataset([noise, noise], "energy", scales=1)
    assert capsys.readouterr() == ("", "")
    measure_dataset([noise, noise], "energy", scales=1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "energy" in err
    assert "0/2" in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    measure_dataset([noise, noise], "energy", scales=1)
    assert "energy" in capsys.readouterr().err
    measure_dataset([noise, noise], "energy", scales=1, progress=False)
    assert capsys.readouterr().err == ""
