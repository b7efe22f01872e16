"""``pocketize run``: volumes in files, and what becomes of them."""

from __future__ import annotations

import gzip
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn

from pocketize.artifact.files import atomic_folder
from pocketize.cli import main
from pocketize.errors import ArtifactError, InputError
from pocketize.passes.tiling.volume_files import create_volume, open_volumes, suffix_of
from tests.passes.tiling.nets import unet

SHAPE = (11, 12, 14)
AFFINE = np.array(
    [[-0.75, 0, 0, 10], [0, 0.75, 0, -5], [0, 0.125, 2.5, 3], [0, 0, 0, 1]], np.float64
)
NET = "tests.passes.tiling.test_run_command:build"


def build(channels: int = 1, classes: int = 3) -> nn.Module:
    return unet(3, channels=channels, classes=classes)


def double_it(x: Tensor) -> Tensor:
    return x * 2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A CT in a compressed NIfTI file, in the current folder, where nothing else is left."""
    monkeypatch.chdir(tmp_path)
    values = (np.random.default_rng(0).normal(size=SHAPE) * 500).astype(np.int16)
    image = nibabel.Nifti1Image(values, AFFINE)
    image.header["descrip"] = b"a CT"
    image.header.set_xyzt_units("mm", "sec")
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"by hand"))
    nibabel.save(image, "in.nii.gz")
    yield tmp_path
    # also hidden files
    left = {name for name in os.listdir(tmp_path) if not name.startswith(("in", "out"))}
    assert left <= {"ct.zarr"}


def run(*words: str) -> int:
    return main(["run", NET, *words])


def scaled() -> Tensor:
    values = np.asarray(nibabel.load("in.nii.gz").dataobj).astype(np.float32)
    x = torch.from_numpy(values)
    return (x.clamp(-1000, 400) + 1000) / 1400


def whole(x: Tensor, channels: int = 1) -> Tensor:
    x = x if channels > 1 else x[None]
    with torch.no_grad():
        made: Tensor = build(channels)(x[None])[0]
    return made


def read(path: str) -> Any:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.mark.slow
def test_labels_of_a_nifti_file_have_its_affine_and_header() -> None:
    words = ["in.nii.gz", "-o", "out.nii.gz", "--size", "6x7x8", "--window", "-1000", "400"]
    assert run(*words, "--argmax") == 0
    labels = whole(scaled()).argmax(0).numpy()
    made, given = nibabel.load("out.nii.gz"), nibabel.load("in.nii.gz")
    assert made.get_data_dtype() == np.uint8
    assert np.array_equal(made.dataobj, labels)
    # what nibabel itself would write
    header = given.header.copy()
    header.set_data_dtype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.uint8), None, header), "in-like.nii.gz")
    like = nibabel.load("in-like.nii.gz")
    assert np.array_equal(made.affine, like.affine)
    assert made.header == like.header
    assert [e.get_content() for e in made.header.extensions] == [b"by hand"]
    before = Path("out.nii.gz").read_bytes()
    assert run(*words, "--argmax") == 2  # it is there already
    assert Path("out.nii.gz").read_bytes() == before
    assert run(*words, "--argmax", "--force") == 0
    assert Path("out.nii.gz").read_bytes() == before


@pytest.mark.slow
def test_all_formats_hold_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    window = ("--window", "-1000", "400")
    expected = whole(scaled())
    assert run("in.nii.gz", "-o", "out.npy", "--size", "8", *window) == 0
    made = np.load("out.npy")
    assert made.dtype == np.float32
    assert np.abs(made - expected.numpy()).max() < 1e-5
    np.save("in.npy", read("in.nii.gz"))
    size = ("--size", "5x12x7")
    assert run("in.npy", "-o", "out.zarr", *size, "--softmax", *window, "--keep", "device") == 0
    stored = zarr.open("out.zarr", mode="r")
    assert stored.dtype == np.float16
    assert stored.chunks == (1, 4, 12, 7)
    probabilities = expected.softmax(0).numpy()
    assert np.abs(stored[:] - probabilities).max() < 1e-3
    assert run("in.nii.gz", "-o", "out.nii", *size, "--softmax", *window) == 0
    assert np.abs(read("out.nii") - probabilities.transpose(1, 2, 3, 0)).max() < 1e-6
    # zarr is read, too, and its folder replaced
    grey = zarr.open_array(store="in.zarr", mode="w", shape=SHAPE, chunks=(4, 4, 4), dtype="i2")
    grey[:] = np.load("in.npy")
    again = ("in.zarr", "-o", "out.zarr", *size, "--argmax", *window)
    assert run(*again) == 2
    assert run(*again, "--force") == 0
    assert np.array_equal(zarr.open("out.zarr", mode="r")[:], expected.argmax(0).numpy())
    # the network may have the axes in another order
    order = ("--axes", "2,1,0", "--size", "7x12x5", "--argmax", *window)
    assert run("in.nii.gz", "-o", "out-turned.nii.gz", *order) == 0
    turned = whole(scaled().permute(2, 1, 0)).argmax(0).permute(2, 1, 0).numpy()
    assert np.array_equal(read("out-turned.nii.gz"), turned)
    assert not np.array_equal(turned, expected.argmax(0).numpy())
    one = ("--kwargs", '{"classes": 1}', "--size", "8", "--binary")
    assert run("in.nii.gz", "-o", "out-one.nii", *one) == 0
    x = torch.from_numpy(read("in.nii.gz").astype(np.float32))
    with torch.no_grad():
        logits = build(classes=1)(x[None, None])[0, 0]
    assert np.array_equal(read("out-one.nii"), (logits > 0).numpy())
    capsys.readouterr()
    assert run("in.nii.gz", "-o", "out-dry.npy", "--max-peak", "600KiB", "--dry-run") == 0
    assert "live tensors on the device: " in capsys.readouterr().out
    assert not Path("out-dry.npy").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("move", "told"), [(0.05, False), (2.0, True)])
def test_channels_that_lie_elsewhere_are_told(
    move: float, told: bool, recwarn: pytest.WarningsRecorder
) -> None:
    values = np.zeros(SHAPE, np.float32)
    for name, shift in (("in1.nii", 0.0), ("in2.nii", move)):
        affine = AFFINE.copy()
        affine[0, 3] += shift
        nibabel.save(nibabel.Nifti1Image(values, affine), name)
    with open_volumes(["in1.nii", "in2.nii"]):
        pass
    text = "in2.nii is up to 2 mm away from in1.nii"
    assert [text in str(each.message) for each in recwarn] == [True] * told


def test_several_files_and_a_fourth_axis_are_channels() -> None:
    values = read("in.nii.gz")
    second = nibabel.Nifti1Image(values[::-1].copy(), AFFINE)
    second.header.set_slope_inter(2.0, 1.0)
    nibabel.save(second, "in2.nii")
    both = np.stack([values, read("in2.nii")], -1)
    nibabel.save(nibabel.Nifti1Image(both.astype(np.float32), AFFINE), "in4.nii.gz")
    expected = whole(torch.from_numpy(both.astype(np.float32)).permute(3, 0, 1, 2) * 2 / 100, 2)
    for given in (["in.nii.gz", "in2.nii"], ["in4.nii.gz"]):
        words = [*given, "-o", "out.nii", "--size", "6x7x8", "--kwargs", '{"channels": 2}']
        words += ["--normalise", "0", "100", "--argmax", "--force"]
        assert run(*words, "--prepare", "tests.passes.tiling.test_run_command:double_it") == 0
        assert np.array_equal(read("out.nii"), expected.argmax(0).numpy())
        assert nibabel.load("out.nii").header["dim"][0] == 3


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """As at a terminal: what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_only_what_resume_needs(
    monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    from pocketize.passes.tiling.sources import VolumeSource

    monkeypatch.setattr("pocketize.passes.tiling.resume.INTERVAL", 0.0)
    plain, count = VolumeSource.read, 0
    limit = 6

    def interrupted(self: Any, box: Any) -> Tensor:
        nonlocal count
        count += 1
        if count > limit:
            os.kill(os.getpid(), kind)
            raise AssertionError
        return plain(self, box)

    monkeypatch.setattr(VolumeSource, "read", interrupted)
    words = ["in.nii.gz", "-o", "out.nii.gz", "--size", "4", "--argmax"]
    count, limit = 0, 2
    assert run(*words) == 130
    assert os.listdir() == ["in.nii.gz"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    count, limit = 0, 6
    assert run(*words, "--resume") == 130
    (state,) = {*os.listdir()} - {"in.nii.gz"}
    assert state.startswith("pocketize-")
    count, limit = 0, 6  # four to recognise the volume, two that are left
    assert run(*words, "--resume") == 0
    assert sorted(os.listdir()) == ["in.nii.gz", "out.nii.gz"]
    x = torch.from_numpy(read("in.nii.gz").astype(np.float32))
    assert np.array_equal(read("out.nii.gz"), whole(x).argmax(0).numpy())


@pytest.mark.slow
def test_what_cannot_be_run_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(text: str, *words: str, code: int = 2, size: str = "8") -> None:
        capsys.readouterr()
        assert run(*words, "--size", size) == code
        assert text in capsys.readouterr().err

    ok = ("in.nii.gz", "-o", "out.npy")
    told("there is no file nowhere.nii", "nowhere.nii", "-o", "out.npy")
    program = torch.export.export(build().eval(), (torch.zeros(1, 1, *SHAPE),))
    torch.export.save(program, "in.pt2")
    assert main(["run", "in.pt2", "--trust-pickle", *ok, "--size", "8"]) == 2
    assert "in.pt2 is a program for the sizes that it was exported with" in capsys.readouterr().err
    told("cannot tell the format of in.mha", "in.mha", "-o", "out.npy")
    told("to write to 'out.mha': expected .nii, .nii.gz, .npy, .zarr", "in.nii.gz", "-o", "out.mha")
    told("there is no folder nowhere", "in.nii.gz", "-o", "nowhere/out.npy")
    told("to have 2 channels, but got 1", *ok, "--kwargs", '{"channels": 2}')
    told("1x11x12x14 float32 (2 spatial axes; the first is that of channels)", *ok, size="8x8")
    told("'8,8': expected whole numbers joined by 'x'", *ok, size="8,8")
    told("a tile has at least 1 voxel", *ok, size="0")
    told("--window LO HI: LO is below HI", *ok, "--window", "5", "-5")
    told("--input is for other commands", *ok, "--input", "1x1x8x8x8")
    told("axes [0, 0, 1] is no order", *ok, "--axes", "0,0,1")
    told("out.zarr", "in.nii.gz", "-o", "out.zarr/labels")
    Path("in-broken.nii.gz").write_bytes(Path("in.nii.gz").read_bytes()[:900])
    told("cannot read in-broken.nii.gz", "in-broken.nii.gz", "-o", "out.npy")
    with gzip.open("in-text.nii.gz", "wb") as file:
        file.write(b"not an image" * 99)
    told("cannot read in-text.nii.gz", "in-text.nii.gz", "-o", "out.npy")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told("several processes write one zarr array", *ok)
    monkeypatch.delenv("WORLD_SIZE")

    def full(file: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pocketize.passes.tiling.volume_files.reserve", full)
    for name in ("out.npy", "out.nii", "out.nii.gz"):
        told("No space left on device", "in.nii.gz", "-o", name, "--argmax", code=3)
    assert not list(Path().glob("out*"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(InputError, match=r"package nibabel: pip install 'pocketize\[volumes\]'"):
        open_volumes(["in.nii.gz"]).__enter__()
    with open_volumes(["in.npy"]) if Path("in.npy").exists() else _npy() as files:
        made = create_volume("out.zarr", SHAPE, np.uint8, SHAPE, like=files)
        with pytest.raises(InputError, match="package zarr"):
            made.__enter__()


def _npy() -> Any:
    np.save("in.npy", np.zeros(SHAPE, np.int16))
    return open_volumes(["in.npy"])


def test_a_folder_replaces_another_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.zarr"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(ArtifactError, match="exists already"), atomic_folder(target):
        raise AssertionError
    with pytest.raises(ZeroDivisionError), atomic_folder(target, overwrite=True) as temporary:
        (temporary / "b").write_text(str(1 / 0))
    assert os.listdir(target) == ["a"]
    with atomic_folder(target, overwrite=True) as temporary:
        (temporary / "b").write_text("2")
    assert os.listdir(target) == ["b"]


def test_the_suffix_tells_the_format() -> None:
    names = {"a.NII.gz": ".nii.gz", "a.nii": ".nii", "x.zarr/0": ".zarr", "x.zarr/": ".zarr"}
    for name, suffix in {**names, "a.npy": ".npy", "a.gz": "", "zarr": ""}.items():
        assert suffix_of(name) == suffix


@pytest.mark.slow
def test_a_level_of_ome_zarr_is_found() -> None:
    group = zarr.open_group("ct.zarr", mode="w")
    level = zarr.open_array(store="ct.zarr/s0", mode="w", shape=SHAPE, chunks=(4, 4, 4), dtype="i2")
    level[:] = read("in.nii.gz")
    with pytest.raises(InputError, match="name one of its arrays"), open_volumes(["ct.zarr"]):
        raise AssertionError
    group.attrs["ome"] = {"multiscales": [{"datasets": [{"path": "s0"}]}]}
    for name in ("ct.zarr", "ct.zarr/s0"):
        with open_volumes([name]) as files:
            assert np.array_equal(files.source[:], level[:])
