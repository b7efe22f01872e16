"""The scripts of tools/reproduce that run volumes by parts, on volumes made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tools.reproduce import volumes
from tools.reproduce.volumes import Case, dice_scores, read_volumes, train_volumes, whole_step

SCRIPTS = Path(__file__).parent.parent / "tools" / "reproduce"


def run(script: str, *arguments: str | Path) -> str:
    """Run a script as its users do, and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def cells(table: str) -> list[list[str]]:
    """The rows of Markdown tables, headers and rules left out."""
    rows = [line for line in table.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    rules = {index for index, row in enumerate(split) if set(row[-1]) == {"-"} and len(row[-1]) > 1}
    return [row for i, row in enumerate(split) if i not in rules and i + 1 not in rules]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four volumes with two structures, in the layout of the Medical Segmentation Decathlon."""
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path_factory.mktemp("data") / "Task04_Hippocampus"
    random = np.random.default_rng(0)
    for number in range(4):
        label = np.zeros((13, 15, 30 - number), np.uint8)
        label[3:8, 4:9, 5:15] = 1
        label[5:10, 5:11, 15:25] = 2
        image = (label * 40 + random.normal(0, 5, label.shape)).astype(np.float32)
        for part, values in (("imagesTr", image), ("labelsTr", label)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            file = folder / part / f"hippocampus_{number:03}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
    return folder


def test_volumes_are_cut_or_padded_about_their_middle_with_their_labels(scans: Path) -> None:
    cases = read_volumes(scans, (16, 12, 32), limit=3)
    assert len(cases) == 3
    assert cases[0].image.shape == (1, 16, 12, 32)
    assert cases[0].image[0, 0].abs().max() == 0  # 13 became 16: one before, two behind
    assert cases[0].label.unique(return_counts=True)[1].tolist()[1:] == [5 * 5 * 10, 5 * 6 * 10]
    inside = cases[0].image[0][cases[0].label == 2]
    assert inside.mean() > cases[0].image.mean() + 1
    with pytest.raises(FileNotFoundError, match=r"holds no imagesTr/\*\.nii\.gz"):
        read_volumes(scans / "imagesTr", (16, 16, 32))


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [
        Case(torch.randn(1, 4, 4, 4, generator=generator), torch.full((4, 4, 4), index % 3))
        for index in range(6)
    ]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv3d(1, 3, 1)

    whole, resumed, kept = make(), make(), tmp_path / "state.part"
    losses = train_volumes(whole, cases, steps=60, seed=0, what="whole")
    taken = 0

    def stopping(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        if taken > 55:
            raise KeyboardInterrupt
        return whole_step(model, images, labels)

    with pytest.raises(KeyboardInterrupt):
        train_volumes(make(), cases, steps=60, seed=0, what="first", step=stopping, kept=kept)
    again = train_volumes(resumed, cases, steps=60, seed=0, what="second", kept=kept)
    assert again == losses
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dice_of_a_perfect_an_empty_and_a_missing_structure() -> None:
    label = torch.zeros(4, 4, 4, dtype=torch.int64)
    label[:2] = 1
    truth = nn.functional.one_hot(label, 3).movedim(-1, 0)[None].float()
    case = Case(torch.zeros(1, 4, 4, 4), label)
    assert dice_scores(lambda _: truth, [case]).tolist() == [[100.0, 100.0]]
    nothing = torch.zeros(1, volumes.CLASSES, 4, 4, 4)
    assert dice_scores(lambda _: nothing, [case, case]).tolist() == [[0.0, 100.0]] * 2


@pytest.mark.whole
@pytest.mark.slow
def test_hippocampus_compares_every_way_and_goes_on_where_it_was(
    scans: Path, tmp_path: Path
) -> None:
    arguments = [scans, "--out", tmp_path, "--steps", "3", "--size", "16x16x32", "--seeds", "0"]
    arguments += ["--train", "2", "--test", "1"]
    printed = run("hippocampus.py", *arguments)
    rows = cells(printed)
    assert [row[1] for row in rows if row[0] == "training"][:3] == ["whole", "slabs", "exact tiles"]
    dice = {(row[0], row[1]): row[2:] for row in rows if row[0] not in ("training", "inference")}
    assert len(dice) == 12
    assert dice["whole", "whole"] == dice["whole", "exact tiles"]
    assert dice["whole", "whole"] != dice["whole", "slabs"]
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found["float64"] < 1e-12
    assert found["0, whole, losses"][0] == pytest.approx(found["0, exact tiles, losses"][0])
    assert len(found["0, stage 2, slabs, losses"]) == 3
    assert not list(tmp_path.glob("*.part"))
    assert run("hippocampus.py", *arguments) == printed


@pytest.mark.slow
@pytest.mark.whole
def test_calibration_measures_cuts_and_goes_on_where_it_was(tmp_path: Path, scans: Path) -> None:
    pytest.importorskip("dynamic_network_architectures")
    few = ("--out", tmp_path, "--steps", "1", "--test", "1", "--seeds", "0", "--float32")
    only = ("--only", "untouched", "Width(0.25), sliced", "Separable(), calibrated")
    rows = cells(run("calibration.py", scans, *few, *only))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert "calibrated on " in str(found["0, Separable(), calibrated, notes"])
    named = {row[0]: row for row in rows}
    dice = f"{found['0, Width(0.25), sliced']:.1f}"
    assert named["`Width(0.25)`"][1:3] == ["21,626", f"{dice} ({dice})"]
    assert named["`Width(0.75)`"][2] == ""
    assert run("calibration.py", scans, *few, "--only", "nothing")  # from the file


@pytest.mark.whole
@pytest.mark.slow
def test_accuracy_trains_students(tmp_path: Path, scans: Path) -> None:
    pytest.importorskip("dynamic_network_architectures")
    few = ("--tasks", "Hippocampus", "--steps", "1", "--test", "1", "--seeds", "0")
    few += ("--out", str(tmp_path), "--only", "Pocket(), new", "Pocket(), distilled", "full")
    printed = run("accuracy.py", scans.parent, *few)
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    named = {row[0]: row for row in cells(printed)}
    assert named["full"][1] == "340,022"
    distilled = found["Hippocampus, 0, Pocket(), distilled"]
    assert named["`Pocket()`"][-3:] == ["", "", f"{distilled:.1f} (1)"]
    away = found["Hippocampus, 0, Pocket(), new"] - found["Hippocampus, 0, full, new"]
    assert f"PocketNet: Pocket(), new, against full, new: {away:+.1f} (1 seeds)" in printed
    assert not list(tmp_path.glob("*.part"))


def test_one_run_at_a_time_uses_a_folder_and_a_killed_one_loses_nothing(tmp_path: Path) -> None:
    code = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from findings import Findings
found = Findings(pathlib.Path(sys.argv[2]), only=["a", "c"])
assert found.find("a", lambda: 1) == 1 and found.find("b", lambda: 1) is None
try:
    Findings(pathlib.Path(sys.argv[2]))
except SystemExit as error:
    print(error)
def killed(file, text, encoding):
    file.write_bytes(b"{")
    raise KeyboardInterrupt
pathlib.Path.write_text = killed
try:
    found.keep("c", 2)
except KeyboardInterrupt:
    pass
"""
    arguments = [sys.executable, "-c", code, str(SCRIPTS), str(tmp_path)]
    for _ in range(2):  # the end of a process frees the folder
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.startswith("another run uses ")
        assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"a": 1}


def test_patchwise_puts_estimates_beside_what_the_thesis_prints() -> None:
    table = run("patchwise.py", "--volumes", "brain", "--rows", "whole", "slabs", "exact, in files")
    whole, slabs, files = (row[2:] for row in cells(table))
    assert whole == ["21.5 GB, 1.00x", "15.92 GiB, 1.00x", "5.80 GiB, 1.00x"]
    assert slabs == ["2.9 GB, 0.13x", "1.99 GiB, 0.12x", "0.95 GiB, 0.16x"]
    assert files[:2] == ["-", "-"]
    assert float(files[2].split()[0]) < 0.95


@pytest.mark.slow
def test_patchwise_measures_at_a_size_that_fits() -> None:
    table = run(
        "patchwise.py", "--volumes", "liver", "--measure", "32x32x64", "--rows", "whole", "exact"
    )
    whole, exact = cells(table)
    assert whole[:3] == ["liver 1x32x32x64", "whole", "-"]
    assert whole[4].endswith("1.00x")
    assert exact[3:5] == ["-", "-"]
    assert float(exact[5].split()[0]) < float(whole[5].split()[0])
