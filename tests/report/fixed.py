"""A comparison of fixed figures, so that its renderings can be kept as golden files."""

from __future__ import annotations

import dataclasses
from typing import Any

from pocketize.memory import MemoryProfile
from pocketize.report import Comparison
from pocketize.report.layers import LayerSummary
from pocketize.report.measurement import Environment, Measurement, Rewrite, RewriteRow

MIB = 2**20


def _categories(
    parameters: int, gradients: int, state: int, kept: int, passing: int
) -> dict[str, int]:
    return {
        "parameters": parameters * MIB,
        "gradients": gradients * MIB,
        "optimizer_state": state * MIB,
        "activations": kept * MIB,
        "temporaries": passing * MIB,
        "inputs": 4 * MIB,
    }


def profile(mode: str, categories: dict[str, int], **changes: Any) -> MemoryProfile:
    fields: dict[str, Any] = {
        "mode": mode,
        "optimizer": "adam" if mode == "train" else None,
        "estimated": False,
        "device": "cpu",
        "dtype": "float32",
        "input": "1x1x96x96x96 float32",
        "torch": "2.13.0",
        "peak": sum(categories.values()),
        "categories": categories,
        "modules": {},
        "timeline": (),
        "reserved": None,
        "rss": None,
        "parameters": 5_470_850,
        "weight_bytes": 21_883_400,
        "macs": 12_314_000_000,
        "flops": 73_884_000_000 if mode == "train" else 24_628_000_000,
        "step_seconds": None,
        "isolated": True,
    }
    return MemoryProfile(**fields | changes)


SMALL: dict[str, Any] = {
    "parameters": 150_066,
    "weight_bytes": 600_264,
    "macs": 2_010_000_000,
}
STEP_BEFORE = profile(
    "train",
    _categories(21, 21, 42, 1500, 300),
    step_seconds=(1.3, 0.04),
    rss=2000 * MIB,
    modules={
        "encoder.0.conv": 640 * MIB,
        "encoder.0.norm": 320 * MIB,
        "decoder.3.conv": 280 * MIB,
        "": 12 * MIB,
    },
    timeline=(
        ("forward", 88 * MIB),
        ("forward encoder.0.conv", 900 * MIB),
        ("backward decoder.3.conv", 1888 * MIB),
        ("backward encoder.0.conv", 1400 * MIB),
        ("optimizer", 120 * MIB),
    ),
)
STEP_AFTER = profile(
    "train",
    _categories(1, 1, 1, 1280, 210),
    step_seconds=(0.92, 0.03),
    rss=1590 * MIB,
    flops=12_060_000_000,
    modules={
        "encoder.0.conv": 640 * MIB,
        "encoder.0.norm": 320 * MIB,
        "decoder.3.conv": 150 * MIB,
        "decoder.3.rebuilt": 20 * MIB,
    },
    timeline=(
        ("forward", 8 * MIB),
        ("forward encoder.0.conv", 800 * MIB),
        ("backward decoder.3.conv", 1497 * MIB),
        ("optimizer", 12 * MIB),
    ),
    **SMALL,
)
FORWARD_BEFORE = profile(
    "infer",
    _categories(21, 0, 0, 0, 400),
    step_seconds=(0.31, 0.01),
    rss=450 * MIB,
    modules={"encoder.0.conv": 400 * MIB, "": 25 * MIB},
    timeline=(("forward encoder.0.conv", 425 * MIB),),
)
FORWARD_AFTER = profile(
    "infer",
    _categories(1, 0, 0, 0, 330),
    step_seconds=(0.0841, 0.002),
    rss=360 * MIB,
    flops=4_020_000_000,
    modules={"encoder.0.conv": 330 * MIB, "": 5 * MIB},
    timeline=(("forward encoder.0.conv", 335 * MIB),),
    **SMALL,
)
POCKET = Rewrite(
    name="pocket",
    guarantee="RETRAIN",
    options={"width": 16, "keep": ["encoder.4.*"]},
    version="0.1.0",
    changed=tuple(
        RewriteRow(f"encoder.{level}.conv{i}", f"{16 * 2**level} -> 16 channels", "group 3")
        for level in range(1, 4)
        for i in range(5)
    ),
    refused=(
        RewriteRow("encoder.4.conv0", "", "kept by encoder.4.*"),
        RewriteRow(
            "head", "", "its channels are the output | of <the> network, or a*b*c of __it__"
        ),
    ),
    notes=("width 16: the width of encoder.0.conv, the first convolution.",),
)
ENVIRONMENT = Environment(
    pocketize="0.1.0", python="3.12.1", machine="Linux x86_64, a processor", threads=2
)


def _layers(widths: tuple[int, ...]) -> tuple[LayerSummary, ...]:
    return tuple(
        LayerSummary(
            f"encoder.{level}.conv",
            "Conv3d",
            {"in": str(before), "out": str(after), "kernel_size": "3x3x3"},
        )
        for level, (before, after) in enumerate(zip((1, *widths), widths, strict=False))
    )


BEFORE = Measurement(
    model="UNet",
    train=STEP_BEFORE,
    infer=FORWARD_BEFORE,
    layers=_layers((16, 32, 64, 128)),
    passes=(),
    loss="mean of squares of the outputs",
    exported=False,
    environment=ENVIRONMENT,
)
AFTER = dataclasses.replace(
    BEFORE,
    train=STEP_AFTER,
    infer=FORWARD_AFTER,
    layers=_layers((16, 16, 16, 16)),
    passes=(POCKET,),
)
MEASURED = Comparison(BEFORE, AFTER)


def with_peaks(before: int, after: int) -> Comparison:
    """The same comparison with other training peaks, in bytes, all of it activations."""

    def side(made: Measurement, peak: int) -> Measurement:
        assert made.train is not None
        categories = {"activations": peak}
        train = dataclasses.replace(made.train, peak=peak, categories=categories)
        return dataclasses.replace(made, train=train)

    return Comparison(side(BEFORE, before), side(AFTER, after))


def estimated() -> Comparison:
    """The same comparison as an estimate: no process, no time, no resident set."""

    def side(made: Measurement) -> Measurement:
        plain = {
            mode: dataclasses.replace(
                getattr(made, mode), estimated=True, rss=None, step_seconds=None, isolated=False
            )
            for mode in ("train", "infer")
        }
        return dataclasses.replace(made, **plain)

    return Comparison(side(BEFORE), side(AFTER))
