"""Measurements in a fresh process, and what cannot go there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import InputError, MeasureError
from pocketize.memory import measure
from pocketize.memory.isolate import Settings
from pocketize.memory.step import Request


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def halved(outputs: Any) -> Tensor:
    return outputs.sum() / 2


class Dies(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return x


class Exits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        sys.stderr.write("the end is near\n")
        os._exit(7)


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.slow
def test_figures_are_those_of_this_process() -> None:
    net = small()
    here = measure(net, "2x1x16x16", loss=halved)
    there = measure(net, "2x1x16x16", loss=halved, isolate=True, time_steps=2)
    assert there.isolated
    assert there.why_not_isolated is None
    assert (there.peak, there.categories, there.modules, there.timeline) == (
        here.peak,
        here.categories,
        here.modules,
        here.timeline,
    )
    assert there.step_seconds is not None
    assert not here.isolated


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_growth_of_the_process_is_near_the_tracked_peak(mode: Any) -> None:
    net = nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 1), nn.ReLU())
    profile = measure(net, "1x1x96x96x96", mode, isolate=True)
    assert profile.rss is not None
    assert 0.95 * profile.peak < profile.rss < 2 * profile.peak


@pytest.mark.slow
@pytest.mark.parametrize("what", ["class", "loss"])
def test_what_a_script_defines_stays_here_and_the_profile_says_so(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: nn.Module = nn.Sequential(Hidden(), nn.Linear(4, 4))
    monkeypatch.setattr(Hidden if what == "class" else halved, "__module__", "__main__")
    profile = measure(net, "2x4", loss=halved, isolate=True)
    assert not profile.isolated
    assert profile.rss is None
    expected = "the class of 0 (Hidden) is defined in __main__" if what == "class" else "loss is"
    assert profile.why_not_isolated is not None
    assert profile.why_not_isolated.startswith(expected)


def test_what_cannot_be_pickled_stays_here() -> None:
    net = small()
    net.activation = lambda x: x  # type: ignore[assignment]
    profile = measure(net, "2x1x8x8", isolate=True)
    assert profile.why_not_isolated is not None
    assert profile.why_not_isolated.startswith("it cannot be pickled: ")


@pytest.mark.slow
def test_what_only_this_process_can_import_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("made_up_here")
    monkeypatch.setitem(sys.modules, "made_up_here", module)
    monkeypatch.setattr(module, "Hidden", Hidden, raising=False)
    monkeypatch.setattr(Hidden, "__module__", "made_up_here")
    profile = measure(Hidden(), "4", "infer", isolate=True)
    assert profile.why_not_isolated == (
        "another process cannot rebuild it: ModuleNotFoundError: No module named 'made_up_here'"
    )


def test_autocast_of_the_caller_keeps_the_measurement_here() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        profile = measure(small(), "2x1x8x8", "infer", isolate=True)
    assert profile.why_not_isolated is not None
    assert profile.why_not_isolated.startswith("autocast is on")


def test_where_no_process_can_be_started_it_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    profile = measure(small(), "2x1x8x8", isolate=True)
    assert profile.why_not_isolated is not None
    assert profile.why_not_isolated.startswith("no other process could be started: FileNotFound")


def test_an_estimate_needs_no_process() -> None:
    profile = measure(small(), "2x1x8x8", isolate=True, estimate=True)
    assert not profile.isolated
    assert profile.why_not_isolated is None


@pytest.mark.slow
def test_errors_of_the_model_come_back() -> None:
    with pytest.raises(InputError, match="give a batch of 2, or a larger input"):
        measure(small(), "1x1x1x1", isolate=True)


@pytest.mark.slow
def test_a_process_that_is_killed_is_explained() -> None:
    with pytest.raises(MeasureError, match="that measured Dies was killed, most likely because"):
        measure(Dies(), "4", "infer", isolate=True)


@pytest.mark.slow
def test_a_process_that_ends_without_an_answer_is_quoted() -> None:
    with pytest.raises(MeasureError, match="ended with status 7: the end is near"):
        measure(Exits(), "4", "infer", isolate=True)


SCRIPT = """
import torch
from torch import nn
from pocketize.memory import measure

with open("ran", "a") as file:
    file.write("once ")

class Net(nn.Linear):
    pass

print(measure(Net(2, 2), "1x2", isolate=True).isolated)
print(measure(nn.Linear(2, 2), "1x2", isolate=True).isolated)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
    assert (tmp_path / "ran").read_text() == "once "


@pytest.mark.slow
def test_settings_of_this_process_go_along() -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    settings = Settings.here(Request(small(), None))
    assert settings.threads == threads
    assert all(Path(entry).is_absolute() for entry in settings.path)
    changed = Settings(
        path=settings.path,
        threads=threads,
        dtype="float64",
        matmul_precision="high",
        deterministic=settings.deterministic,
        benchmark=settings.benchmark,
    )
    try:
        changed.apply()
        assert torch.get_default_dtype() is torch.float64
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        settings.apply()
    assert torch.get_default_dtype() is torch.float32
    assert torch.get_float32_matmul_precision() == precision


PARENT = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn
from pocketize import measure

class Waits(nn.Module):
    def forward(self, x):
        Path("child").write_text(str(os.getpid()))
        time.sleep(600)
        return x

if __name__ == "__main__":
    from parent import Waits
    measure(Waits(), "1x1x8x8", "infer", None, isolate=True)
"""


@pytest.mark.slow
def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path)
    child = tmp_path / "child"
    try:
        while not (child.exists() and child.read_text()):
            assert parent.poll() is None, "the parent ended early"
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    for _ in range(600):
        try:
            os.kill(int(child.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the child goes on")


PLANTED = (
    "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nraise ImportError\n"
)


@pytest.mark.slow
def test_a_folder_that_is_not_searched_any_more_goes_along_and_the_current_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, left = tmp_path / "current", tmp_path / "left"
    current.mkdir()
    left.mkdir()
    for name in ("json", "threading", "numpy", "torch", "PIL"):
        (current / f"{name}.py").write_text(PLANTED)
    (left / "left_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Conv2d):\n"
        "    def __init__(self): super().__init__(1, 2, 3)\n"
    )
    monkeypatch.chdir(current)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    with monkeypatch.context() as patched:
        patched.syspath_prepend(left)
        import left_nets
    profile = measure(left_nets.Net(), "1x1x8x8", "infer", None, isolate=True)
    assert profile.isolated, profile.why_not_isolated
    assert not list(current.glob("*.ran"))
    sys.modules.pop("left_nets")
