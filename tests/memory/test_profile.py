"""The profile as data and as text."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pocketize.errors import MeasureError
from pocketize.memory import MemoryProfile, top_modules
from pocketize.memory.profile import thin_out

PROFILE = MemoryProfile(
    mode="train",
    optimizer="adam",
    estimated=False,
    device="cpu",
    dtype="float32",
    input="1x1x96x96x96 float32",
    torch="2.13.0",
    peak=200 * 2**20,
    categories={
        "parameters": 10 * 2**20,
        "gradients": 2**19,
        "optimizer_state": 20 * 2**20,
        "activations": 150 * 2**20,
        "temporaries": 19 * 2**20,
        "inputs": 2**19,
    },
    modules={"": 2**20, "up": 99 * 2**20, "down.conv": 50 * 2**20, "down.norm": 50 * 2**20},
    timeline=(("forward", 0), ("backward up", 200 * 2**20), ("end", 0)),
    reserved=None,
    rss=210 * 2**20,
    parameters=2_621_440,
    weight_bytes=10 * 2**20,
    macs=123_456_789,
    step_seconds=(1.25, 0.05),
    isolated=True,
)

TABLE = """\
training step, adam optimizer, 1x1x96x96x96 float32 on cpu (measured, torch 2.13.0)

at the peak         memory    share
---------------  ---------  -------
parameters        10.0 MiB    5.0 %
gradients        512.0 KiB    0.2 %
optimizer state   20.0 MiB   10.0 %
activations      150.0 MiB   75.0 %
temporaries       19.0 MiB    9.5 %
inputs           512.0 KiB    0.2 %
peak             200.0 MiB  100.0 %

largest modules      memory    share
-----------------  --------  -------
up                 99.0 MiB   49.5 %
down.conv          50.0 MiB   25.0 %
down.norm          50.0 MiB   25.0 %
(model)             1.0 MiB    0.5 %

parameters 2,621,440 (10.0 MiB with buffers), 123,456,789 MACs
process memory (RSS) 210.0 MiB
step time 1.25 s (quartiles 50.0 ms apart)"""


def test_table() -> None:
    assert str(PROFILE) == TABLE


def test_table_of_an_estimate_on_a_gpu_and_of_a_measurement_that_was_not_isolated() -> None:
    changed = dataclasses.replace(
        PROFILE,
        mode="infer",
        optimizer=None,
        estimated=True,
        device="cuda (on CPU fakes)",
        reserved=256 * 2**20,
        rss=None,
        step_seconds=None,
        why_not_isolated="its class is defined in __main__",
    )
    lines = str(changed).splitlines()
    assert lines[0] == (
        "inference, 1x1x96x96x96 float32 on cuda (on CPU fakes) (estimated, torch 2.13.0)"
    )
    assert lines[-2] == "reserved by the allocator 256.0 MiB"
    assert lines[-1] == "not isolated: its class is defined in __main__"


def test_json_round_trip_is_exact_and_sizes_are_integers() -> None:
    data = json.loads(json.dumps(PROFILE.to_json()))
    assert MemoryProfile.from_json(data) == PROFILE
    assert data["peak"] == 209715200
    assert data["timeline"][1] == ["backward up", 209715200]
    assert data["step_seconds"] == [1.25, 0.05]


def test_json_of_something_else_is_refused() -> None:
    data = PROFILE.to_json()
    data["peek"] = data.pop("peak")
    with pytest.raises(MeasureError, match="memory profile: lacks peak"):
        MemoryProfile.from_json(data)


def test_profile_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROFILE.peak = 1  # type: ignore[misc]


def test_top_modules_are_sorted_by_size_then_path() -> None:
    assert [path for path, _ in top_modules(PROFILE, 3)] == ["up", "down.conv", "down.norm"]


def test_thinning_keeps_order_and_every_stretch_its_maximum() -> None:
    events = [(str(i), (i * 7919) % 1000) for i in range(10_000)]
    thin = thin_out(events, 300)
    assert len(thin) == 300
    assert [int(label) for label, _ in thin] == sorted(int(label) for label, _ in thin)
    assert max(live for _, live in thin) == max(live for _, live in events)
    assert thin_out(events[:300], 300) == tuple(events[:300])
