"""A comparison of fixed figures, so that its renderings can be kept as golden files."""

from __future__ import annotations

import dataclasses

from pocketize.report.document import (
    SCHEMA,
    Document,
    Environment,
    ModuleMemory,
    Peak,
    Rewrite,
    RewriteRow,
    Side,
)

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


def _peak(categories: dict[str, int], seconds: tuple[float, float], *, rss: int) -> Peak:
    return Peak(
        bytes=sum(categories.values()),
        categories=categories,
        reserved=None,
        rss=rss * MIB,
        step_seconds=seconds,
        isolated=True,
        why_not_isolated=None,
    )


BEFORE = Side(
    model="UNet",
    parameters=5_470_850,
    weight_bytes=21_883_400,
    macs=12_314_000_000,
    training=_peak(_categories(21, 21, 42, 1500, 300), (1.3, 0.04), rss=2000),
    inference=_peak(_categories(21, 0, 0, 0, 400), (0.31, 0.01), rss=450),
)
AFTER = Side(
    model="UNet",
    parameters=150_066,
    weight_bytes=600_264,
    macs=2_010_000_000,
    training=_peak(_categories(1, 1, 1, 1280, 210), (0.92, 0.03), rss=1590),
    inference=_peak(_categories(1, 0, 0, 0, 330), (0.0841, 0.002), rss=360),
)
MODULES = (
    ModuleMemory("encoder.0.conv", 640 * MIB, 640 * MIB),
    ModuleMemory("encoder.0.norm", 320 * MIB, 320 * MIB),
    ModuleMemory("decoder.3.conv", 280 * MIB, 150 * MIB),
    ModuleMemory("", 12 * MIB, None),
    ModuleMemory("decoder.3.rebuilt", None, 20 * MIB),
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
    method="measured",
    device="cpu",
    dtype="float32",
    input="1x1x96x96x96 float32",
    optimizer="adam",
    loss="mean of squares of the outputs",
    torch="2.13.0",
    pocketize="0.1.0",
    python="3.12.1",
    machine="Linux x86_64",
    threads=2,
)
DOCUMENT = Document(
    schema=SCHEMA,
    before=BEFORE,
    after=AFTER,
    modules=MODULES,
    rewrites=(POCKET,),
    environment=ENVIRONMENT,
)


def with_peaks(before: int, after: int) -> Document:
    """The same comparison with other training peaks, in bytes, all of it activations."""
    old, new = (
        dataclasses.replace(
            side,
            training=dataclasses.replace(
                side.training, bytes=peak, categories={"activations": peak}
            ),
        )
        for side, peak in ((BEFORE, before), (AFTER, after))
    )
    return dataclasses.replace(DOCUMENT, before=old, after=new)


def estimated() -> Document:
    """The same comparison as an estimate: no process, no time, no resident set."""

    def side(measured: Side) -> Side:
        def plain(peak: Peak) -> Peak:
            return dataclasses.replace(peak, rss=None, step_seconds=None, isolated=False)

        return dataclasses.replace(
            measured, training=plain(measured.training), inference=plain(measured.inference)
        )

    return dataclasses.replace(
        DOCUMENT,
        before=side(BEFORE),
        after=side(AFTER),
        environment=dataclasses.replace(ENVIRONMENT, method="estimated"),
    )
