"""The benchmark of volumes by tiles at a tiny size: what it counts, compares and prints."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import DynUNet

from tools.bench import fresh, tiling
from tools.bench.tiling_rows import SUBJECTS, WAYS, Subject
from tools.bench.tiling_worker import Task, estimate, race, synthetic, weigh

SIZE, TILE = (16, 16, 64), (16, 16, 16)
CLASSES = 3


def narrow() -> Subject:
    return Subject(
        "narrow",
        lambda: DynUNet(3, 1, CLASSES, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 16]),
        multiple=4,
        classes=CLASSES,
    )


@pytest.fixture(autouse=True)
def _subject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUBJECTS, "narrow", narrow())


def task(kind: str, *ways: str, **others: Any) -> Task:
    return Task(kind, "narrow", SIZE, TILE, ways, **others)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    "way", ["monai-buffer", "monai-away", "window-argmax", "exact", "exact-disk"]
)
def test_what_is_estimated_is_what_is_measured(way: str) -> None:
    found = weigh(task("weigh", way))
    assert found["peak"] == found["estimated"] > 0
    assert ("own" in found) == (sys.platform == "linux" and not WAYS[way].counted)


@pytest.mark.slow
@pytest.mark.whole
def test_tiles_take_less_than_the_volume_and_labels_less_than_logits() -> None:
    names = ("whole", "window-gauss", "window-argmax", "exact", "exact-disk", "exact-thin")
    peaks = {name: estimate(task("estimate", name))["peak"] for name in names}
    assert peaks["exact-disk"] < peaks["exact"] < peaks["whole"]
    assert peaks["window-argmax"] < peaks["window-gauss"] < peaks["whole"]
    assert peaks["exact-thin"] < peaks["exact-disk"]


@pytest.mark.slow
@pytest.mark.whole
def test_a_volume_that_does_not_fit_the_network_is_padded_and_cut() -> None:
    odd = dataclasses.replace(task("weigh", "whole"), size=(16, 16, 63))
    with torch.inference_mode():
        runs = WAYS["whole"].prepare(SUBJECTS["narrow"], odd.size, TILE)
        assert runs(torch.randn(1, 1, *odd.size)).shape == (1, CLASSES, *odd.size)
    for way in ("whole", "exact-argmax"):
        found = weigh(dataclasses.replace(odd, ways=(way,)))
        assert found["peak"] == found["estimated"]


@pytest.mark.slow
def test_exact_tiles_give_the_whole_volume_and_windows_what_monai_gives() -> None:
    ways = ("whole", "monai-gauss", "monai-buffer", "window-gauss", "exact-disk")
    found = race(task("race", *ways, "window-argmax", "exact-argmax", rounds=1, steps=2))["ways"]
    assert found["whole"]["error"] == 0
    assert found["exact-disk"]["error"] < 1e-5
    assert found["exact-disk"]["differ"] == found["exact-argmax"]["differ"] == 0
    assert found["monai-gauss"]["error"] > 1e-3
    for name in ("window-gauss", "monai-buffer"):
        assert found[name]["error"] == pytest.approx(found["monai-gauss"]["error"], rel=1e-4)
    assert found["window-argmax"]["differ"] == found["window-gauss"]["differ"]
    assert all(made["cpu"] > 0 and made["wall"] > 0 for made in found.values())


def test_the_head_of_many_classes_gives_them_all() -> None:
    with torch.device("meta"):
        net = SUBJECTS["plainconv104"].build()
        assert net(torch.empty(1, 1, 64, 64, 64)).shape == (1, 104, 64, 64, 64)


def test_synthetic_volumes_are_the_same_every_time_and_have_both_labels() -> None:
    (x, labels), (again, _) = (synthetic(SIZE, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(x, again)
    assert x.shape == (1, 1, *SIZE)
    assert set(labels.unique().tolist()) == {0, 1}


def asked(monkeypatch: pytest.MonkeyPatch, answers: dict[str, dict[str, Any]]) -> list[str]:
    """Let questions be answered without a process; returns those that were asked."""
    done: list[str] = []

    def ask(script: str, given: dict[str, Any], **_: Any) -> dict[str, Any]:
        name = "race" if given["kind"] == "race" else given["ways"][0]
        done.append(name)
        return dict(answers[name])

    monkeypatch.setattr(tiling, "ask", ask)
    return done


def test_figures_are_kept_and_printed_as_ratios_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mib = 2**20
    answers: dict[str, dict[str, Any]] = {
        "whole": {"peak": 200 * mib, "estimated": 200 * mib, "own": 400 * mib, "files": 0},
        "exact": {"peak": 50 * mib, "estimated": 50 * mib, "own": 100 * mib, "files": 7 * mib},
        "monai": {"failed": "killed"},
        "race": {
            "right": 0.75,
            "ways": {
                "whole": {"cpu": 2.0, "wall": 9.0, "error": 0.0, "differ": 0.0},
                "exact": {"cpu": 3.0, "wall": 9.0, "error": 2e-7, "differ": 0.0},
            },
        },
    }
    done = asked(monkeypatch, answers)
    path = tmp_path / "tiling.json"
    command = ["--nets", "narrow", "--rows", "whole,monai,exact", "--cpu", "--json", str(path)]
    tiling.main(command)
    assert done == ["whole", "monai", "exact", "race"]
    assert len(json.loads(path.read_text())) == 4
    capsys.readouterr()
    tiling.main(command)
    assert done[4:] == ["monai"]
    assert not list(tmp_path.glob("*.part"))
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    whole = ["whole", "200", "200", "1.00", "400", "1.00", "0", "1.00", "0", "0"]
    exact = ["Patchwise exact", "50", "50", "0.25", "100", "0.25", "7", "1.50", "2e-07", "0"]
    assert whole in rows
    assert exact in rows
    assert ["MONAI, 0.25 constant", *["-"] * 9] in rows
    assert "weigh of monai failed: killed" in text
    assert "labels right: 0.750" in text


def test_estimates_have_neither_times_nor_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(monkeypatch, {"whole": {"peak": 2**30}, "exact-disk": {"peak": 2**28, "kept": 2**22}})
    command = ["--nets", "narrow", "--rows", "whole,exact-disk", "--estimate"]
    tiling.main([*command, "--json", str(tmp_path / "estimates.json")])
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["whole", "1024", "1.00", "-"] in rows
    assert ["Patchwise exact, on disk", "256", "0.25", "4"] in rows
    assert "nothing ran" in text
    assert "error" not in text


@pytest.mark.whole
@pytest.mark.slow
def test_the_script_answers_from_processes_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiling.json"
    command = ["--nets", "monai-unet", "--size", "32x32x64", "--tile", "32", "--threads", "1"]
    command += ["--rows", "whole,monai-gauss,exact-argmax", "--rounds", "1", "--steps", "1"]
    tiling.main([*command, "--json", str(path)])
    answers = json.loads(path.read_text())
    assert len(answers) == 4
    assert not any("failed" in answer for answer in answers.values()), answers
    text = capsys.readouterr().out
    assert "MONAI UNet, 32x32x64 by 32x32x32" in text
    assert "Patchwise exact, on disk, argmax" in text


@pytest.mark.slow
def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    wrong = vars(task("weigh", "no such way"))
    found = fresh.ask("tiling_worker.py", wrong | {"net": "plainconv"}, threads=1, timeout=300)
    assert found == {"failed": "status 1: KeyError: 'no such way'"}


def test_unknown_names_and_sizes_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--nets", "unett"], ["--rows", "magic"], ["--size", "64x64"], ["--tile", "0"]):
        with pytest.raises(SystemExit):
            tiling.main(wrong)
    told = capsys.readouterr().err
    assert "unknown: unett" in told
    assert "unknown: magic" in told
    assert "expected a size such as 64 or 256x256x152, got '64x64'" in told


def test_questions_are_told_apart_by_all_that_matters() -> None:
    tasks = [
        task("weigh", "exact"),
        task("estimate", "exact"),
        task("weigh", "whole"),
        task("weigh", "exact", threads=1),
        dataclasses.replace(task("weigh", "exact"), tile=(8, 8, 8)),
        dataclasses.replace(task("weigh", "exact"), size=(16, 16, 80)),
        dataclasses.replace(task("weigh", "exact"), net="dynunet"),
        task("race", "exact"),
        task("race", "exact", rounds=1),
        task("race", "exact", steps=1),
    ]
    assert len({tiling.record_key(each) for each in tasks}) == len(tasks)
