"""Which options each registered pass is tried with, alone and together with others.

A pass without a row of its own fails the suite.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

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
from tests.contract.indices import sliced
from tests.contract.precision import as_amp_alone, as_autocast_by_hand
from tests.contract.sample import CONVOLUTIONS, DTYPES, GRAPHS, NORMS, PARTS, VOLUMES, WIDTHS
from tests.models.registry import Net

__all__ = ["CASES", "COMBINATIONS", "Extent", "Row"]


class Extent(enum.IntEnum):
    """On which nets a row is tried, beside those that it names."""

    NAMED = 0
    """On no others."""
    PART = 1
    """On an eighth of the core of the sample, another eighth for the next row."""
    EVERYWHERE = 2
    """On every net."""


@dataclass(frozen=True)
class Row:
    """One way to try a pass, or several in a row.

    Attributes:
        make: the passes for a net; a clamp, for one, depends on the width the net's author states.
        promise: a check of what this pass promises beyond the contract of all.
        extent: on which nets.
        on: names of nets on which it is tried besides: what this pass alone changes or refuses.
        not_on: names of nets on which it cannot be tried here.
        repeats: options that speak of the model as it is, such as a multiplier, do something again
            when they are given twice.
        turns: one of the rows of which each net outside of the core is tried with one.
        change: makes the net that is rewritten of a test net.
    """

    make: Callable[[Net], tuple[Pass, ...]]
    promise: Callable[[Case], None] | None = None
    extent: Extent = Extent.PART
    on: frozenset[str] = frozenset()
    not_on: frozenset[str] = frozenset()
    repeats: bool = False
    turns: bool = False
    change: Callable[[Net], Net] = lambda net: net


# The gradient that torch 2.13 computes on the CPU of the weights of a bfloat16 convolution over
# 2x2x2 or 1x2x2 voxels has memory in it that nobody wrote: torch.autocast by hand gives 1e33 or NaN
# in these nets, in some runs.
_TINY_VOLUMES = frozenset(
    {"monai_basic_unet", "monai_dynunet_plain", "monai_dynunet_residual_deep_supervision"}
    | {"nnunet_plain_conv", "nnunet_plain_conv_deep_supervision"}
)


# Autocast by hand, which is what this pass is compared with, fails at nn.Bilinear.
_NO_AUTOCAST = _TINY_VOLUMES | {"bilinear_top"}

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


def _leaky(net: Net) -> Net:
    """The net with leaky ReLUs, as norms in place cannot invert a ReLU."""

    def build() -> nn.Module:
        model = net.factory()
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.ReLU:
                    setattr(module, name, nn.LeakyReLU(0.1, child.inplace))
        return model

    return replace(net, name=f"{net.name}, leaky", factory=build)


# Small nets: with a lower bound there would be nothing to recompute in them.
_CONV, _BLOCK, _LEVEL = (Recompute(keep=keep, min_bytes=0) for keep in ("conv", "block", "level"))

CASES: dict[str, dict[str, Row]] = {
    "pocket": {
        "slice": Row(lambda net: (Pocket(width=net.width),), sliced, Extent.EVERYWHERE),
        "reset": Row(
            lambda net: (Pocket(width=net.width, weights="reset"),), None, Extent.PART, WIDTHS
        ),
    },
    "width": {
        "half": Row(
            lambda net: (Width(0.5),), halved, Extent.NAMED, WIDTHS, repeats=True, turns=True
        ),
        "by-level": Row(
            lambda net: (_levels_clamped(net),), clamped, not_on=frozenset({"no_parameters"})
        ),
    },
    "in-place-norm": {
        "native": Row(
            lambda net: (InPlaceNorm(),), None, Extent.NAMED, NORMS, turns=True, change=_leaky
        )
    },
    "recompute": {
        "conv": Row(lambda net: (_CONV,)),
        "block": Row(lambda net: (_BLOCK,)),
        "level": Row(lambda net: (_LEVEL,), None, Extent.PART, GRAPHS, turns=True),
    },
    "checkpoint": {
        "every-child": Row(lambda net: (_every_child(net),), None, Extent.NAMED, PARTS, turns=True),
        "smallest": Row(lambda net: (Checkpoint(),)),
    },
    "offload": {
        "disk": Row(
            lambda net: (Offload(min_bytes="256B", to="disk"),), None, Extent.PART, turns=True
        )
    },
    "bottleneck": {
        "decompose": Row(
            lambda net: (_swap(Bottleneck, ratio=2),), as_blocks, Extent.PART, CONVOLUTIONS
        ),
        "reset": Row(lambda net: (_swap(Bottleneck, weights="reset", inner_norm=True),), as_blocks),
    },
    "separable": {
        "decompose": Row(lambda net: (_swap(Separable),), as_blocks, Extent.PART, CONVOLUTIONS),
    },
    "compact-block": {
        "energy": Row(
            lambda net: (_swap(CompactBlock, ratio="energy:0.3"),),
            as_blocks,
            Extent.PART,
            CONVOLUTIONS,
        ),
        "inner-norm": Row(lambda net: (_swap(CompactBlock, inner_norm=True),), as_blocks),
    },
    "patchwise": {
        "exact": Row(lambda net: (Patchwise(size=5),), None, Extent.NAMED, VOLUMES, turns=True),
        "exact-rounded": Row(lambda net: (Patchwise(size=5, keep_dtype="bfloat16"),)),
        "slab": Row(lambda net: (Patchwise(mode="slab", size=16),), not_on=_HOOKED),
        "window": Row(lambda net: (Patchwise(mode="window", size=32),), not_on=_HOOKED),
    },
    "amp": {
        "bf16": Row(
            lambda net: (Amp(),),
            as_autocast_by_hand,
            Extent.NAMED,
            DTYPES,
            _NO_AUTOCAST,
            turns=True,
        )
    },
}
"""Name of a pass -> label -> row."""

COMBINATIONS: dict[str, Row] = {
    "pocket+in-place-norm": Row(
        lambda net: (Pocket(width=net.width), InPlaceNorm()), change=_leaky
    ),
    "pocket+recompute": Row(lambda net: (Pocket(width=net.width), _LEVEL)),
    "amp+recompute": Row(lambda net: (Amp(), _LEVEL), as_amp_alone, not_on=_TINY_VOLUMES),
    "width+separable": Row(lambda net: (Width(0.5), _swap(Separable)), repeats=True),
    "bottleneck+recompute": Row(lambda net: (_swap(Bottleneck), _LEVEL), as_blocks),
    "compact-block+in-place-norm+amp": Row(
        lambda net: (_swap(CompactBlock, inner_norm=True), InPlaceNorm(), Amp()),
        not_on=_TINY_VOLUMES,
        change=_leaky,
    ),
    "in-place-norm+patchwise": Row(lambda net: (InPlaceNorm(), Patchwise(size=5)), change=_leaky),
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
        change=_leaky,
    ),
}
"""Label -> row of several passes; what they keep together is the weakest that one of them keeps."""
