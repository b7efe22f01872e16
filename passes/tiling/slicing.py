"""Forms of operators that pick or mix neighbouring entries: interpolation, padding, crops."""

from __future__ import annotations

__all__ = ["linear", "narrow", "nearest", "pad", "slice_rule"]

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pocketize.ops.schema import operator_name
from pocketize.passes.tiling.arguments import Bound, NotLocal, first_node, sizes_of
from pocketize.passes.tiling.forms import Form, Mixing, Pointwise
from pocketize.passes.tiling.intervals import (
    Source,
    crop_source,
    is_contested,
    linear_source,
    nearest_source,
    pad_source,
)


def nearest(exact: bool) -> Callable[[fx.Node, Bound, int], Form]:
    """Return the rule of nearest-neighbour interpolation.

    Args:
        exact: "nearest-exact".
    """

    def rule(node: fx.Node, bound: Bound, rank: int) -> Form:
        source = first_node(bound)
        wide = source.meta["val"].dtype == torch.float64
        sources = []
        for size, length, scale in _rows(node, bound, rank):
            if is_contested(size, length, scale, exact=exact, wide=wide):
                # which of them runs is decided by the layout in memory, which is not kept
                raise NotLocal(
                    f"torch picks other entries of {size} for {length} from one kernel to the next",
                    hopeless=rank == 3 and not source.meta["val"].is_contiguous(),
                )
            sources.append(nearest_source(size, length, scale, exact=exact))
        return Mixing(node, source, sources)

    return rule


def linear(node: fx.Node, bound: Bound, rank: int) -> Form:
    """Return the form of linear interpolation."""
    corners = bound["align_corners"]
    sources = []
    for size, length, scale in _rows(node, bound, rank):
        if size == length and scale not in (None, 1.0) and not corners:
            raise NotLocal(
                f"a scale of {scale:g} keeps the size of {size}, and torch's kernels differ in "
                "what they make of that"
            )
        sources.append(linear_source(size, length, scale, align_corners=corners))
    return Mixing(node, first_node(bound), sources)


def _rows(node: fx.Node, bound: Bound, rank: int) -> list[tuple[int, int, float | None]]:
    """Return input size, output size and the caller's scale factor, axis by axis."""
    if "scale_factors" in bound:
        factors = list(bound["scale_factors"] or [None] * rank)
    else:
        names = ("scales_d", "scales_h", "scales_w")[-rank:]
        factors = [bound.get("scales")] if rank == 1 else [bound.get(name) for name in names]
    return list(zip(sizes_of(first_node(bound)), sizes_of(node), factors, strict=True))


def pad(node: fx.Node, bound: Bound, rank: int) -> Form:
    """Return the form of a padding of any mode, which may crop as well."""
    pads = list(bound.get("pad") or bound["padding"])
    if len(pads) > 2 * rank and any(pads[2 * rank :]):
        raise NotLocal("it pads channels")
    source = first_node(bound)
    name = operator_name(node.target).rpartition(".")[2]
    mode = bound.get("mode") or "constant"
    mode = next((m for m in ("reflect", "replicat") if name.startswith(m)), mode)
    mode = "replicate" if mode == "replicat" else mode
    pads += [0] * (2 * rank - len(pads))
    pairs = [(pads[2 * axis], pads[2 * axis + 1]) for axis in range(rank)][::-1]
    sources = []
    for size, (before, after) in zip(sizes_of(source), pairs, strict=True):
        left = size + min(before, 0) + min(after, 0)
        if mode == "circular" and max(before, after) > left:
            raise NotLocal(f"it wraps around the {left} entries that it leaves more than once")
        sources.append(pad_source(size, before, after, mode))
    return Mixing(node, source, sources, constant=bound.get("value") or 0.0)


def slice_rule(node: fx.Node, bound: Bound, rank: int) -> Form:
    """Return the form of a slice."""
    source, dim = bound["self"], bound["dim"] % (rank + 2)
    if dim < 2:
        return Pointwise(node, [source])
    length = sizes_of(source)[dim - 2]
    bounds = (bound["start"], bound["end"], bound["step"])
    return _cropped(node, source, dim, slice(*bounds).indices(length))


def narrow(node: fx.Node, bound: Bound, rank: int) -> Form:
    """Return the form of a narrowing."""
    source, dim = bound["self"], bound["dim"] % (rank + 2)
    if dim < 2:
        return Pointwise(node, [source])
    start: Any = bound["start"]
    if not isinstance(start, int):
        raise NotLocal("it begins where values say")
    start %= sizes_of(source)[dim - 2]
    return _cropped(node, source, dim, (start, start + int(bound["length"]), 1))


def _cropped(node: fx.Node, source: fx.Node, dim: int, bounds: tuple[int, int, int]) -> Form:
    sources: list[Source] = [crop_source(0, size) for size in sizes_of(source)]
    sources[dim - 2] = crop_source(*bounds)
    return Mixing(node, source, sources)
