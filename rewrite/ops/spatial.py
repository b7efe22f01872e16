"""Records of operators on space without weights: pooling, interpolation, padding."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Mapping
from functools import partial
from typing import Any

from pocketize.ops.layers import numbers
from pocketize.ops.record import Kind, Window, define

_define = partial(define, weight="", heavy=False)


def _pooling(bound: Mapping[str, Any], rank: int) -> Window:
    kernel = numbers(bound["kernel_size"], rank)
    return Window(
        kernel,
        numbers(bound["stride"] or kernel, rank),
        numbers(bound["padding"], rank),
        numbers(bound.get("dilation", 1), rank),
    )


_define(
    Kind.POOLING,
    *(f"{name}{n}d" for n in (1, 2, 3) for name in ("avg_pool", "max_pool")),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    data="self",
    keeps="input",
    window=_pooling,
)
_define(
    Kind.POOLING,
    "fractional_max_pool2d fractional_max_pool3d",
    data="self",
    keeps="input",
    window=None,  # random windows
)
_define(
    Kind.ADAPTIVE_POOLING,
    *(f"adaptive_{name}_pool{n}d" for n in (1, 2, 3) for name in ("avg", "max")),
    "_adaptive_avg_pool2d _adaptive_avg_pool3d",
    data="self",
    keeps="input",
    window=None,
)
_define(Kind.UNPOOLING, "max_unpool2d", "max_unpool3d", data="self", keeps="mask", window=None)
_define(
    Kind.RESIZE,
    *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    data="self",
    keeps="",
    window=None,
)
define(
    Kind.SAMPLING,
    "grid_sampler grid_sampler_2d grid_sampler_3d",
    data="input",
    weight="",
    keeps="input",
    heavy=True,
    window=None,
)
_define(Kind.PADDING, "constant_pad_nd", "pad", data="self", keeps="", window=None)
_define(
    Kind.PADDING,
    *(f"{mode}_pad{n}d" for n in (1, 2, 3) for mode in ("reflection", "replication")),
    data="self",
    keeps="input",
    window=None,
)
