"""The file for PyTorch's memory viewer, and how a profile shows itself."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from torch import nn
from torch.cuda import _memory_viz

from pocketize import measure
from pocketize.errors import MeasureError
from pocketize.memory import MemoryProfile


@pytest.fixture(scope="module")
def profile() -> MemoryProfile:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return measure(net, "2x1x16x16", estimate=True, allocations=True)


def test_the_snapshot_holds_every_allocation(profile: MemoryProfile, tmp_path: Path) -> None:
    profile.to_memory_viz(tmp_path / "step.pickle")
    snapshot = pickle.loads((tmp_path / "step.pickle").read_bytes())
    (events,) = snapshot["device_traces"]
    live: dict[int, int] = {}
    peak, at_peak = 0, set()
    for event in events:
        if event["action"] == "alloc":
            assert event["addr"] not in live
            live[event["addr"]] = event["size"]
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"]) == event["size"]
        if sum(live.values()) > peak:
            peak, at_peak = sum(live.values()), set(live)
    assert peak == profile.peak
    by_category = dict.fromkeys(profile.categories, 0)
    for event in events:
        if event["action"] == "alloc" and event["addr"] in at_peak:
            by_category[event["category"]] += event["size"]
            assert event["frames"][0]["filename"] == event["category"]
    assert by_category == profile.categories
    assert {"name": "forward 0", "filename": "activations", "line": 0} in [
        event["frames"][0] for event in events
    ]
    assert _memory_viz.trace(snapshot).startswith("Device 0 ---")  # torch's own reader


def test_without_allocations_there_is_nothing_to_write(tmp_path: Path) -> None:
    plain = measure(nn.Linear(2, 2), "1x2", estimate=True)
    assert plain.allocations == ()
    with pytest.raises(MeasureError, match=r"measure\(\.\.\., allocations=True\)"):
        plain.to_memory_viz(tmp_path / "step.pickle")
    assert not list(tmp_path.iterdir())


def test_a_profile_shows_itself_in_short(profile: MemoryProfile) -> None:
    assert MemoryProfile.from_json(profile.to_json()) == profile
    assert repr(profile).startswith("<MemoryProfile train 2x1x16x16 float32 on cpu: peak ")
    drawn = profile._repr_html_()
    assert drawn.count("<table>") == drawn.count("</table>") == 2
    assert "optimizer state" in drawn
    assert len(drawn) < 4000
    assert profile.moment[0] in ("forward", "backward", "optimizer")


def test_a_profile_is_drawn_with_its_peak(profile: MemoryProfile) -> None:
    axes = profile.plot()
    (line,) = axes.lines
    assert max(line.get_ydata()) == pytest.approx(profile.peak / 2**20)
    assert profile.plot(axes) is axes
    assert len(axes.lines) == 2
