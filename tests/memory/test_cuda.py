"""The figures of CUDA's allocator: what is taken off them, and how they enter a profile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pocketize.memory import measure, meter
from pocketize.memory.counters import CudaCounters
from pocketize.memory.flops import Macs


class FakeAllocator:
    """Stands for ``torch.cuda``: counts on paper."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated, self.reserved = 1000, 4096
        self.peaks = [9000, 16384]
        self.log: list[str] = []
        for name, answer in {
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_allocated": lambda device: self.peaks[0],
            "max_memory_reserved": lambda device: self.peaks[1],
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, self._logger(name))

    def _logger(self, name: str) -> Any:
        return lambda *args: self.log.append(name)


@pytest.mark.slow
def test_what_others_hold_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeAllocator(monkeypatch)
    counters = CudaCounters(torch.device("cuda"))
    counters.reset()
    assert counters.read() == (8000, 16384 - 4096)


def test_in_a_process_of_its_own_nothing_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeAllocator(monkeypatch)
    assert CudaCounters(torch.device("cuda"), alone=True).read() == (9000, 16384)


@pytest.mark.slow
def test_the_device_is_idle_and_its_cache_empty_when_counting_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = FakeAllocator(monkeypatch)
    counters = CudaCounters(torch.device("cuda"))
    allocator.log.clear()
    counters.reset()
    assert allocator.log == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    counters.read()
    assert allocator.log[-1] == "synchronize"


class Counted:
    """Counters of a device whose allocator handed out more than the tensors are."""

    surplus = 5000

    def __init__(self, peak: int) -> None:
        self.peak = peak
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def read(self) -> tuple[int, int]:
        return self.peak + self.surplus, 2**20


@pytest.mark.slow
def test_the_allocators_peak_is_reported_and_workspaces_are_temporaries() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    tracked = measure(net, "1x1x16x16")
    counters = Counted(tracked.peak)
    request = meter.Request(net, "1x1x16x16")
    stage = meter.real_stage(net, "1x1x16x16", None)
    with meter.fixed_surroundings():
        profile = meter.measure_on(stage, request, Macs(0, 0, 0), counters, own=False)
    assert counters.resets == 1
    assert profile.peak == tracked.peak + Counted.surplus
    assert profile.reserved == 2**20
    assert profile.categories["temporaries"] == tracked.categories["temporaries"] + Counted.surplus
    assert sum(profile.categories.values()) == profile.peak
    assert profile.rss is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_on_a_gpu(mode: Any) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 1)
    ).cuda()
    foreign = torch.ones(2**20, device="cuda")
    profile = measure(net, "4x1x256x256", mode, time_steps=3)
    del foreign
    estimate = measure(net, "4x1x256x256", mode, estimate=True)
    assert profile.device.startswith("cuda (")
    assert sum(profile.categories.values()) == profile.peak
    assert estimate.peak <= profile.peak <= 2 * estimate.peak + 2**26
    assert profile.reserved is not None
    assert profile.reserved >= profile.peak
    assert profile.step_seconds is not None
    assert measure(net, "4x1x256x256", mode, isolate=True).peak == profile.peak
