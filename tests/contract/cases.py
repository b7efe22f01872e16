"""Which options each registered pass is tried with, alone and together with others.

A pass without a row of its own fails the suite.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pocketize.channels.analysis import analyse
from pocketize.channels.levels import find_levels
from pocketize.passes import (
    Amp,
    Bottleneck,
    Checkpoint,
    CompactBlock,
    InPlaceNorm,
    Offload,
    Patchwise,
    Pocket,
    Recompute,
    Separable,
    Width,
)
from pocketize.passes.swaps.base import Swap
from pocketize.plugin.base import Pass
from tests.contract.blocks import as_blocks
from tests.contract.case import Case
from tests.contract.clamp import clamped, halved
from tests.contract.precision import as_amp_alone, as_autocast_by_hand
from tests.models.registry import Net

__all__ = ["CASES", "COMBINATIONS", "Extent", "Row"]


class Extent(enum.IntEnum):
    """On which nets a row is tried: every step costs minutes.

    What is left out runs with ``pytest --whole-contract``.
    """

    CORE = 0
    """All checks on the core of the sample."""
    SAMPLE = 1
    """All checks on the nets of the sample."""
    EVERYWHERE = 2
    """And on every other net, but the slow, the decisive ones."""
    THOROUGH = 3
    """All checks on every net, but those that train only on the sample."""


@dataclass(frozen=True)
class Row:
    """One way to try a pass, or several in a row.

    Attributes:
        make: the passes for a net; a clamp, for one, depends on the width the net's author states.
        promise: a check of what this pass promises beyond the contract of all.
        extent: on which nets.
        not_on: names of nets on which it cannot be tried here.
        repeats: options that speak of the model as it is, such as a multiplier, do something again
            when they are given twice.
    """

    make: Callable[[Net], tuple[Pass, ...]]
    promise: Callable[[Case], None] | None = None
    extent: Extent = Extent.CORE
    not_on: frozenset[str] = frozenset()
    repeats: bool = False


# The gradient that torch 2.13 computes on the CPU of the weights of a bfloat16 convolution over
# 2x2x2 or 1x2x2 voxels has memory in it that nobody wrote: torch.autocast by hand gives 1e33 or NaN
# in these nets, in some runs.
_TINY_VOLUMES = frozenset(
    {"monai_basic_unet", "monai_dynunet_plain", "monai_dynunet_residual_deep_supervision"}
    | {"nnunet_plain_conv", "nnunet_plain_conv_deep_supervision"}
)


# Parts of a volume go through the network one by one, and through hooks inside of it.
_HOOKED = frozenset({"hook_that_records", "hook_that_changes", "hook_on_backward"})


def _every_child(net: Net) -> Checkpoint:
    """Every part that the model's own forward calls, where there is one."""
    return Checkpoint(only=tuple(path for path, _ in net.build().named_children()))


def _levels_clamped(net: Net) -> Width:
    """The clamp of pocket, said level by level."""
    levels = find_levels(analyse(net.build(), net.inputs()))
    return Width(levels=(net.width,) * len(levels))


def _swap(kind: type[Swap], **options: Any) -> Swap:
    """A swap of the small nets' convolutions, which are narrow, and small against their maps."""
    return kind(**{"activations": "any", "min_channels": 1} | options)


# Small nets: with a lower bound there would be nothing to recompute in them.
_CONV, _BLOCK, _LEVEL = (Recompute(keep=keep, min_bytes=0) for keep in ("conv", "block", "level"))

CASES: dict[str, dict[str, Row]] = {
    "pocket": {
        "slice": Row(lambda net: (Pocket(width=net.width),), clamped, Extent.THOROUGH),
        "reset": Row(
            lambda net: (Pocket(width=net.width, weights="reset"),), extent=Extent.THOROUGH
        ),
    },
    "width": {
        "half": Row(lambda net: (Width(0.5),), halved, Extent.SAMPLE, repeats=True),
        "by-level": Row(
            lambda net: (_levels_clamped(net),), clamped, not_on=frozenset({"no_parameters"})
        ),
    },
    "in-place-norm": {"native": Row(lambda net: (InPlaceNorm(),), extent=Extent.EVERYWHERE)},
    "recompute": {
        "conv": Row(lambda net: (_CONV,), extent=Extent.SAMPLE),
        "block": Row(lambda net: (_BLOCK,)),
        "level": Row(lambda net: (_LEVEL,), extent=Extent.EVERYWHERE),
    },
    "checkpoint": {
        "every-child": Row(lambda net: (_every_child(net),), extent=Extent.EVERYWHERE),
        "smallest": Row(lambda net: (Checkpoint(),)),
    },
    "offload": {
        "disk": Row(lambda net: (Offload(min_bytes="256B", to="disk"),), extent=Extent.SAMPLE)
    },
    "bottleneck": {
        "decompose": Row(lambda net: (_swap(Bottleneck, ratio=2),), as_blocks, Extent.SAMPLE),
        "reset": Row(lambda net: (_swap(Bottleneck, weights="reset", inner_norm=True),), as_blocks),
    },
    "separable": {
        "decompose": Row(lambda net: (_swap(Separable),), as_blocks),
    },
    "compact-block": {
        "energy": Row(lambda net: (_swap(CompactBlock, ratio="energy:0.3"),), as_blocks),
        "inner-norm": Row(lambda net: (_swap(CompactBlock, inner_norm=True),), as_blocks),
    },
    "patchwise": {
        "exact": Row(lambda net: (Patchwise(size=5),), extent=Extent.SAMPLE),
        "exact-rounded": Row(
            lambda net: (Patchwise(size=5, keep_dtype="bfloat16"),), extent=Extent.CORE
        ),
        "slab": Row(lambda net: (Patchwise(mode="slab", size=16),), not_on=_HOOKED),
        "window": Row(lambda net: (Patchwise(mode="window", size=32),), not_on=_HOOKED),
    },
    "amp": {"bf16": Row(lambda net: (Amp(),), as_autocast_by_hand, Extent.SAMPLE, _TINY_VOLUMES)},
}
"""Name of a pass -> label -> row."""

COMBINATIONS: dict[str, Row] = {
    "pocket+in-place-norm": Row(lambda net: (Pocket(width=net.width), InPlaceNorm())),
    "pocket+recompute": Row(lambda net: (Pocket(width=net.width), _LEVEL)),
    "amp+recompute": Row(lambda net: (Amp(), _LEVEL), as_amp_alone, not_on=_TINY_VOLUMES),
    "width+separable": Row(lambda net: (Width(0.5), _swap(Separable)), repeats=True),
    "bottleneck+recompute": Row(lambda net: (_swap(Bottleneck), _LEVEL), as_blocks),
    "compact-block+in-place-norm+amp": Row(
        lambda net: (_swap(CompactBlock, inner_norm=True), InPlaceNorm(), Amp()),
        not_on=_TINY_VOLUMES,
    ),
    "in-place-norm+patchwise": Row(lambda net: (InPlaceNorm(), Patchwise(size=5))),
    "recompute+patchwise": Row(lambda net: (_LEVEL, Patchwise(size=5))),
    "amp+checkpoint+patchwise": Row(
        lambda net: (Amp(), _every_child(net), Patchwise(size=5)),
        not_on=_TINY_VOLUMES,
    ),
    "checkpoint+offload": Row(
        lambda net: (_every_child(net), Offload(min_bytes="256B", to="disk"))
    ),
    "in-place-norm+amp+checkpoint": Row(
        lambda net: (InPlaceNorm(), Amp(), _every_child(net)),
        as_amp_alone,
        not_on=_TINY_VOLUMES,
    ),
}
"""Label -> row of several passes; what they keep together is the weakest that one of them keeps."""
