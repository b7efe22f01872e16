from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from pocketize.cli import main
from pocketize.passes.complexity import MEASURES, measure_dataset
from tests.cli.conftest import Ran

from .conftest import Image

Run = Callable[..., Ran]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clouds: Image,
    noise: Image,
) -> Run:
    """Run ``pocketize complexity`` in a folder with images and masks."""
    for name, values in (("images/a.png", clouds), ("images/b.png", noise)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        PillowImage.fromarray(values).save(path)
        mask = tmp_path / name.replace("images/", "masks/first_")
        mask.parent.mkdir(exist_ok=True)
        PillowImage.fromarray(np.where(values > 150, 255, 0).astype(np.uint8)).save(mask)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ran:
        code = main(("complexity", *arguments))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def test_the_table_of_jpeg_complexity_is_the_default(run: Run) -> None:
    code, out, err = run("images")
    assert (code, err) == (0, "")
    assert out == f"{measure_dataset('images')!r}\n"
    lines = out.splitlines()
    assert lines[0] == "jpeg of 2 images, quality 25, over raw size"
    assert [line.split()[0] for line in lines[4:]] == ["1", "1/2", "1/4", "1/8", "1/16"]


def test_one_file_markdown_and_fewer_scales(run: Run) -> None:
    code, out, err = run("images/a.png", "--scales", "2", "--format", "markdown", "--size", "file")
    assert (code, err) == (0, "")
    expected = measure_dataset("images/a.png", scales=2, size="file").to_markdown()
    assert out == f"{expected}\n"
    assert out.startswith("jpeg of 1 image, quality 25, over file size\n\n| scale   |")


def test_several_measures_are_one_table_of_means(run: Run) -> None:
    code, out, err = run("images", "--measure", "energy", "--measure", "jpeg", "--scales", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == ["energy of 2 images", "jpeg of 2 images, quality 25, over raw size"]
    assert lines[3].split() == ["measure", "1", "1/2"]
    energy = measure_dataset("images", "energy", scales=2).mean
    assert lines[5].split() == ["energy", *(f"{value:#.4g}" for value in energy)]
    assert run("images", "--measure", "energy", "--measure", "energy", "--scales", "2").out == (
        run("images", "--measure", "energy", "--scales", "2").out
    )


def test_all_measures_and_json(run: Run) -> None:
    code, out, err = run("images", "--measure", "all", "--scales", "1", "--format", "json")
    assert (code, err) == (0, "")
    results = json.loads(out)
    without_masks = [name for name, each in MEASURES.items() if not each.needs_masks]
    assert [result["measure"] for result in results] == without_masks
    assert results[0] == measure_dataset("images", scales=1).to_dict()
    assert [image["name"] for image in results[0]["images"]] == ["a.png", "b.png"]


def test_masks_give_foreground_and_jb_and_pairing_by_order_is_told(run: Run) -> None:
    code, out, err = run("images", "--masks", "masks", "--measure", "jb", "-w", "0.5")
    assert code == 0
    told = "masks and images have other names, and were paired in the order of their names"
    assert err == f"pocketize: {told}\n"
    assert out.startswith("jb of 2 images, quality 25, w 0.5, over raw size, masks paired by order")
    with_masks = run("images", "--masks", "masks", "--measure", "all", "--scales", "1")
    assert with_masks.out.splitlines()[-2].split()[0] == "foreground"
    assert with_masks.out.splitlines()[-1].split()[0] == "jb"
    black = run("images", "--masks", "masks", "--measure", "foreground", "--foreground", "0")
    expected = measure_dataset("images", "foreground", masks="masks", foreground=0)
    assert black.out == f"{expected!r}\n"


def test_patterns_range_and_quality_are_handed_on(run: Run) -> None:
    out = run("images", "--pattern", "b*", "--range=-10,300", "--quality", "60").out
    expected = measure_dataset("images", pattern="b*", value_range=(-10, 300), quality=60)
    assert out == f"{expected!r}\n"
    assert "quality 60, over raw size, value range -10 to 300" in out


def test_the_axis_of_volumes_is_handed_on(run: Run, scan: Image) -> None:
    np.save("scan.npy", scan)
    out = run("scan.npy", "--axis", "0", "--scales", "2").out
    assert out == f"{measure_dataset('scan.npy', axis=0, scales=2)!r}\n"
    assert out != run("scan.npy", "--axis", "1", "--scales", "2").out


def test_the_result_goes_to_a_file_that_is_not_overwritten(run: Run) -> None:
    code, out, err = run("images", "-o", "c.json", "--format", "json", "--scales", "1")
    assert (code, out, err) == (0, "", "")
    assert json.loads(Path("c.json").read_text())[0]["measure"] == "jpeg"
    code, out, err = run("images", "-o", "c.json")
    assert (code, out) == (2, "")
    assert "c.json exists already; choose another name or add --force" in err
    assert run("images", "-o", "c.json", "--force").code == 0
    assert Path("c.json").read_text().startswith("jpeg of 2 images")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imges",), "there is no folder or file imges. Did you mean 'images'?"),
        (("images", "--pattern", "*.tif"), "no image that can be read (files there, which do not"),
        (("images", "--measure", "jpg"), "invalid choice: 'jpg'"),
        (("images", "--measure", "jb"), "jb needs masks: add --masks DIR"),
        (("images", "--masks", "masks"), "--masks is for foreground and jb, not for jpeg"),
        (("images", "--measure", "edges", "--size", "file"), "--size is an option of jpeg and jb"),
        (("images", "--measure", "edges", "--quality", "3"), "--quality is no option of edges"),
        (("images", "-w", "unet"), "-w is no option of jpeg"),
        (("images", "--measure", "jb", "--masks", "masks", "-w", "unt"), "Did you mean 'unet'?"),
        (("images", "--quality", "0"), "quality: expected a whole number from 1 on, got 0"),
        (("images", "--scales", "0"), "scales: expected a whole number from 1 on, got 0"),
        (("images", "--scales", "8"), "b.png: an image of 64 x 80 has no scale 1/128"),
        (("images", "--range", "3"), "--range: expected LOW,HIGH, such as 0,4095, got '3'"),
        (("images", "--range", "3,2"), "value_range: expected (low, high) with low < high"),
        (("images", "-o", "images"), "images is a folder; name a file"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
