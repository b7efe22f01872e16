"""Resident memory of the process, where the system tells, and where it does not."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from pocketize.memory import counters
from pocketize.memory.counters import ProcessMemory

LINUX = Path("/proc/self/status").exists()


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_large_block_shows_in_current_and_peak() -> None:
    memory = ProcessMemory()
    memory.reset_peak()
    before = memory.current()
    assert before is not None
    # Pages of its own: an allocator may have 64 MiB left from an earlier test.
    with mmap.mmap(-1, 64 * 2**20) as block:
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        held, peak = memory.current(), memory.peak()
    assert held is not None
    assert peak is not None
    assert 60 * 2**20 < held - before < 80 * 2**20
    assert peak >= held


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_the_peak_can_be_reset() -> None:
    memory = ProcessMemory()
    torch.ones(32 * 2**20).sum()
    high = memory.peak()
    if not memory.reset_peak():
        return  # a container may forbid it; then the peak stays an upper bound
    low = memory.peak()
    assert high is not None
    assert low is not None
    assert low <= high


@pytest.mark.slow
def test_elsewhere_the_peak_of_the_whole_life_stands_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counters, "_STATUS", tmp_path / "missing")
    monkeypatch.setattr(counters, "_CLEAR", tmp_path / "missing" / "too")
    memory = ProcessMemory()
    assert not memory.reset_peak()
    peak = memory.peak()
    assert peak is None or peak > 2**20
    current = memory.current()
    assert current is None or current > 2**20
