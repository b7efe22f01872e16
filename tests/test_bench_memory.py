"""The memory benchmark's own logic: what it reads, keeps and prints. Its figures are no test."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import fresh, memory
from tools.bench.memory_nets import NETS
from tools.bench.memory_rows import ROWS
from tools.bench.memory_worker import Task, work

SMALL = (16, 16, 16)


def test_sizes_are_cubes_or_three_numbers() -> None:
    assert memory.read_size("64") == (64, 64, 64)
    assert memory.read_size("256x256x152") == (256, 256, 152)
    for wrong in ("", "64x64", "0", "-1", "a"):
        with pytest.raises(ValueError, match=f"152, got {wrong!r}"):
            memory.read_size(wrong)


@pytest.mark.parametrize("name", NETS)
def test_blocks_to_checkpoint_by_hand_exist_and_hold_every_convolution_but_the_heads(
    name: str,
) -> None:
    with torch.device("meta"):
        model = NETS[name].build()
    paths = NETS[name].block_paths(model)
    assert len(set(paths)) == len(paths) > 4
    left = [
        path
        for path, module in model.named_modules()
        if type(module).__name__ in ("Conv3d", "ConvTranspose3d")
        and not any(path.startswith(f"{block}.") for block in paths)
    ]
    whole = sum(type(m).__name__ == "Conv3d" for m in model.modules())
    assert len(left) < whole / 2, left


def test_a_pattern_without_a_module_is_an_error() -> None:
    net = dataclasses.replace(NETS["memory-fcn"], blocks=("nowhere.*",))
    with pytest.raises(ValueError, match=r"zoo memory_fcn3d: no module matches 'nowhere\.\*'"):
        net.block_paths(net.build())


def test_rows_that_have_nothing_to_do_say_so() -> None:
    found = work(Task("dynunet", SMALL, "inplace-abn"))
    assert found == {"not_applicable": "it has no BatchNorm, and the package knows no other norm"}
    found = work(Task("memory-fcn", SMALL, "in-place-norm", estimate=True))
    assert "in-place-norm changed nothing" in found["not_applicable"]
    found = work(Task("memory-fcn", SMALL, "compile", estimate=True))
    assert found == {"not_applicable": "nothing of it runs on tensors without values"}


@pytest.mark.slow
def test_checkpoints_by_hand_keep_less_than_the_untouched_network() -> None:
    peaks = [
        work(Task("dynunet", (64, 64, 64), row, estimate=True))["peak"]
        for row in ("untouched", "torch-checkpoint")
    ]
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.slow
def test_a_measurement_runs_in_a_process_of_its_own_and_failures_are_told() -> None:
    found = memory.run(Task("monai-unet", (32, 32, 32), "untouched", threads=1, steps=1), 300)
    assert found["peak"] > 60e6
    assert found["seconds"] > 0
    assert found["rss"] > 0.9 * found["peak"]
    found = memory.run(Task("monai-unet", SMALL, "no such row"), 300)
    assert found == {"failed": "status 1: KeyError: 'no such row'"}
    assert memory.run(Task("monai-unet", SMALL, "untouched"), 0.01) == {
        "failed": "not done after 0 s"
    }


def measured(monkeypatch: pytest.MonkeyPatch, answers: dict[str, dict[str, Any]]) -> list[str]:
    """Let rows be measured without a process; returns the names of those that were."""
    done: list[str] = []

    def run(task: Task, timeout: float) -> dict[str, Any]:
        done.append(task.row)
        return dict(answers[task.row])

    monkeypatch.setattr(memory, "run", run)
    return done


def test_finished_rows_are_kept_and_failures_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {
        "untouched": {"peak": 200 * 2**20, "rss": 220 * 2**20, "seconds": 2.0},
        "amp": {"peak": 100 * 2**20, "rss": 110 * 2**20, "seconds": 3.0},
        "compile": {"failed": "no compiler"},
        "inplace-abn": {"not_applicable": "no BatchNorm"},
    }
    done = measured(monkeypatch, answers)
    path = tmp_path / "memory.json"
    command = ["--nets", "dynunet", "--sizes", "32", "--json", str(path), "--rows"]
    command += [",".join(answers)]
    memory.main(command)
    assert done == list(answers)
    assert len(json.loads(path.read_text())) == 4
    done.clear()
    memory.main(command)
    assert done == ["compile"]
    done.clear()
    memory.main([*command, "--again", "amp"])
    assert done == ["amp", "compile"]
    assert not list(tmp_path.glob("*.part"))
    table = capsys.readouterr().out.split("###")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert "DynUNet, 32x32x32, measured" in table
    assert ["untouched", "200", "1.00", "220", "1.00", "2.00", "1.00", ""] in rows
    assert ["amp bf16", "100", "0.50", "110", "0.50", "3.00", "1.50", ROWS["amp"].note] in rows
    assert ["torch.compile", *["-"] * 6, "failed: no compiler"] in rows
    assert ["inplace-abn package", *["-"] * 6, "not applicable: no BatchNorm"] in rows


def test_times_of_another_run_are_marked() -> None:
    untouched = {"peak": 2**20, "rss": 2**20, "seconds": 1.0, "session": "monday"}
    tasks = [Task("dynunet", SMALL, row) for row in ("untouched", "checkpoint")]
    table = memory.render(list(zip(tasks, [untouched, untouched | {"session": "x"}], strict=True)))
    assert "not timed in the same run as untouched" in table.splitlines()[-1]


def test_estimates_have_no_times_and_gpus_have_their_own_memory() -> None:
    task = Task("dynunet", SMALL, "untouched", estimate=True)
    assert "step" not in memory.render([(task, {"peak": 2**20})])
    task = Task("dynunet", SMALL, "untouched", device="cuda")
    record = {"peak": 2**20, "process": 3 * 2**20, "seconds": 1.0}
    table = memory.render([(task, record)])
    assert "whole GPU" in table
    assert "RSS" not in table


def test_unknown_names_and_sizes_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--nets", "unett"], ["--rows", "magic"], ["--sizes", "64x64"]):
        with pytest.raises(SystemExit):
            memory.main(wrong)
    told = capsys.readouterr().err
    assert "unknown: unett" in told
    assert "unknown: magic" in told
    assert "expected a size such as 64 or 256x256x152, got '64x64'" in told


def test_rows_are_told_apart_by_all_that_matters() -> None:
    tasks = [
        Task("dynunet", SMALL, "untouched"),
        Task("dynunet", SMALL, "untouched", threads=1),
        Task("dynunet", SMALL, "untouched", estimate=True),
        Task("dynunet", SMALL, "untouched", device="cuda"),
        Task("dynunet", (16, 16, 32), "untouched"),
        Task("plainconv", SMALL, "untouched"),
        Task("dynunet", SMALL, "amp"),
    ]
    assert len({memory.record_key(task) for task in tasks}) == len(tasks)


def test_what_was_answered_before_a_process_ended_is_no_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        said = f'{fresh.MARK}{{"rows": [1]}}'
        return subprocess.CompletedProcess(command, status, said, "ValueError: no")

    monkeypatch.setattr(subprocess, "run", run)
    status = 0
    assert "failed" not in fresh.ask("x.py", {}, threads=1, timeout=1)
    status = 1
    told = fresh.ask("x.py", {}, threads=1, timeout=1)
    assert (told["rows"], told["failed"]) == ([1], "status 1: ValueError: no")
