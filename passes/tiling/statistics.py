"""Norms and poolings of whole maps, by sums that are accumulated tile by tile.

Means and squared deviations are joined as in Chan, Golub, LeVeque, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979, so that no digits are lost however many
tiles there are.
"""

from __future__ import annotations

__all__ = ["MapReduction", "NormMoments", "Normalised", "Pooled", "reduction_form"]

import abc
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from pocketize.ops import UNKNOWN, bind, operator_of, register
from pocketize.passes.tiling.forms import Context, Pointwise
from pocketize.passes.tiling.intervals import Box
from pocketize.passes.tiling.operators import NotLocal, check_rank

_FACET = "tile reduction"


class MapReduction(abc.ABC):
    """What an operator ``node`` reads of a whole map ``source``, accumulated from its parts."""

    def __init__(self, node: fx.Node, source: fx.Node) -> None:
        self.node, self.source = node, source

    @abc.abstractmethod
    def measure(self, part: Tensor) -> tuple[Any, ...]:
        """Return the measure of a part (N, C, *spatial): a count, and small tensors."""

    @abc.abstractmethod
    def join(self, held: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the measure of two parts together."""

    @abc.abstractmethod
    def finish(self, held: tuple[Any, ...]) -> Tensor:
        """Return what the operator reads, from the measure of the whole."""


class NormMoments(MapReduction):
    """Mean and variance of groups of channels.

    Args:
        node: the norm.
        source: its input.
        groups: number of groups of channels.
        over_batch: statistics are over the samples of a batch, as in batch norms.
    """

    def __init__(
        self, node: fx.Node, source: fx.Node, groups: int, *, over_batch: bool = False
    ) -> None:
        super().__init__(node, source)
        self.groups, self.over_batch = groups, over_batch

    @property
    def count(self) -> int:
        """Number of values of each mean and variance."""
        shape = self.source.meta["val"].shape
        each = math.prod(shape[1:]) // self.groups
        return int(each * shape[0] if self.over_batch else each)

    def measure(self, part: Tensor) -> tuple[int, Tensor, Tensor]:
        """Return the count, the mean and the sum of squared deviations of each group."""
        wide = torch.promote_types(part.dtype, torch.float32)
        rows = self._rows(part).to(wide)
        mean = rows.mean(-1)
        return rows.shape[-1], mean, (rows - mean[..., None]).square_().sum(-1)

    def join(self, held: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[int, Tensor, Tensor]:
        """Join the moments of two parts."""
        before, old_mean, old_deviation = held
        count, mean, deviation = more
        total = before + count
        step = mean - old_mean
        joined = old_mean + step * (count / total)
        return (
            total,
            torch.where(step.isfinite(), joined, old_mean + mean),  # differences of Inf are NaN
            old_deviation + deviation + step.square() * (before * count / total),
        )

    def finish(self, held: tuple[Any, ...]) -> Tensor:
        """Return mean and biased variance, (2, N or 1, groups)."""
        count, mean, deviation = held
        return torch.stack([mean, deviation / count])

    def _rows(self, part: Tensor) -> Tensor:
        batch = part.shape[0]
        rows = part.reshape(batch, self.groups, -1)
        return rows.transpose(0, 1).reshape(1, self.groups, -1) if self.over_batch else rows


class Pooled(MapReduction):
    """The mean or the largest entry of every channel of a map."""

    def __init__(self, node: fx.Node, source: fx.Node, kind: str) -> None:
        super().__init__(node, source)
        self.kind = kind

    def measure(self, part: Tensor) -> tuple[int, Tensor]:
        """Return the count and the sums, or 1 and the maxima."""
        rows = part.flatten(2)
        if self.kind == "max":
            return 1, rows.amax(-1)
        wide = torch.promote_types(part.dtype, torch.float32)
        return rows.shape[-1], rows.sum(-1, dtype=wide)

    def join(self, held: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[int, Tensor]:
        """Add the sums, or compare the maxima, of two parts."""
        if self.kind == "max":
            return 1, torch.maximum(held[1], more[1])
        return held[0] + more[0], held[1] + more[1]

    def finish(self, held: tuple[Any, ...]) -> Tensor:
        """Return the operator's result, of its own shape and dtype."""
        count, value = held
        out = self.node.meta["val"]
        result: Tensor = (value if self.kind == "max" else value / count).to(out.dtype)
        return result.reshape(out.shape)


class Normalised(Pointwise):
    """A norm with known statistics: every entry is scaled and shifted."""

    def __init__(self, node: fx.Node, bound: Mapping[str, Any], moments: NormMoments) -> None:
        super().__init__(node, [moments.source])
        self.moments, self.eps = moments, float(bound["eps"])
        self.weight, self.bias = bound.get("weight"), bound.get("bias")

    def run(self, box: Box, context: Context) -> Tensor:
        """Scale and shift the part by mean and variance, (2, N or 1, groups)."""
        x = context.part(self.moments.source, box)
        each = x.shape[1] // self.moments.groups
        mean, variance = context.statistics(self.node).repeat_interleave(each, -1)
        scale = (variance + self.eps).rsqrt()
        ends = (1,) * (x.ndim - 2)
        if self.weight is not None:
            scale = scale * context.value(self.weight).to(scale.dtype)
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + context.value(self.bias).to(scale.dtype)
        # in place, so that no map is allocated for the sum; addcmul takes three times as long here
        out: Tensor = x.to(scale.dtype) * scale.reshape(*scale.shape, *ends)
        out += shift.reshape(*shift.shape, *ends)
        return out.to(self.node.meta["val"].dtype)


def reduction_form(node: fx.Node, rank: int) -> MapReduction:
    """Return the reduction of a whole map, of some spatial axes, that an operator reads.

    Raises:
        NotLocal: it needs more than sums or maxima.
    """
    record = operator_of(node.target)
    if record.short == "getitem":
        raise NotLocal("it is one of several results")
    bound = bind(node.target, node.args, node.kwargs)
    source = next((value for value in bound.values() if isinstance(value, fx.Node)), None)
    value = source.meta["val"] if source is not None else None
    if source is None or not isinstance(value, Tensor) or value.ndim != rank + 2:
        raise NotLocal(f"{record.short} does not read a map")
    check_rank(node, rank)
    rule = record.facet(_FACET)
    made: MapReduction | None = None if rule is UNKNOWN else rule(node, source, bound)
    if made is None:
        raise NotLocal(f"{record.name} is not known to be local")
    return made


@register(_FACET, "aten.batch_norm", "aten.instance_norm")
def _channel_norm(node: fx.Node, source: fx.Node, bound: Mapping[str, Any]) -> MapReduction | None:
    of_samples, of_batch = bound.get("use_input_stats"), bound.get("training")
    if not (of_samples or of_batch):
        return None
    return NormMoments(node, source, source.meta["val"].shape[1], over_batch=not of_samples)


@register(_FACET, "aten.group_norm")
def _group_norm(node: fx.Node, source: fx.Node, bound: Mapping[str, Any]) -> MapReduction:
    return NormMoments(node, source, int(bound["num_groups"]))


@register(_FACET, *(f"aten.adaptive_avg_pool{d}d" for d in (1, 2, 3)))
def _pool(node: fx.Node, source: fx.Node, bound: Mapping[str, Any]) -> MapReduction | None:
    return Pooled(node, source, "mean") if math.prod(node.meta["val"].shape[2:]) == 1 else None


@register(_FACET, "aten.mean", "aten.amax")
def _mean_or_max(node: fx.Node, source: fx.Node, bound: Mapping[str, Any]) -> MapReduction | None:
    axes, dims = source.meta["val"].ndim, bound.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    if sorted(dim % axes for dim in dims) != list(range(2, axes)):
        return None
    return Pooled(node, source, "max" if operator_of(node.target).short == "amax" else "mean")
