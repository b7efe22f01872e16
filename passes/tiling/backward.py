"""Gradients part by part: the steps of a program backwards, each tile computed again.

The gradient of what a sweep stored is known when all later steps have been gone through. For each
tile the sweep's operators run once more, now with a graph, from what was stored; their gradients
are added up where tiles overlap. Statistics of norms are inputs of the tiles like any other: the
gradients that arrive at a mean and a variance are spread over the whole map by the derivative of
the two, so that the sum of all tiles is the gradient of the whole.
"""

from __future__ import annotations

__all__ = ["Differentiation", "differentiable"]

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.intervals import Region, cut
from pocketize.passes.tiling.keeping import Keeper, Kept
from pocketize.passes.tiling.program import Direct, Sweep
from pocketize.passes.tiling.statistics import Moments, Pooled


def differentiable(tensor: Tensor) -> bool:
    """Whether gradients exist by entries of a tensor's kind."""
    return tensor.is_floating_point() or tensor.is_complex()


class _Leaf:
    """A tensor that gradients are asked for, and where they belong."""

    def __init__(self, node: fx.Node, region: Region | None, index: int, tensor: Tensor) -> None:
        self.node, self.region, self.index, self.tensor = node, region, index, tensor


class Differentiation(Execution):
    """The way back through an execution that has kept everything that it stored.

    Args:
        execution: it has run, with ``retain``.
        keeper: where gradients of stored maps are kept.
        of_inputs: inputs whose gradients are asked for; None for all.
        retain: what the execution stored is kept for another way back.
    """

    def __init__(
        self,
        execution: Execution,
        keeper: Keeper,
        *,
        of_inputs: Collection[fx.Node] | None = None,
        retain: bool = False,
    ) -> None:
        super().__init__(execution.program, execution.tensors, {}, execution.keeper, retain=retain)
        self.stored, self.norms = execution.stored, execution.norms
        if retain:
            self.stored = dict(self.stored)
        self.gradients_keeper, self.of_inputs = keeper, of_inputs
        self._sums: dict[tuple[fx.Node, int], Kept | Tensor] = {}
        self._norm_sums: dict[fx.Node, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._leaves: list[_Leaf] = []
        self._norm_leaves: dict[fx.Node, Tensor] = {}
        self._used: dict[str, Tensor] = {}

    def gradients(
        self, of_outputs: Mapping[fx.Node, Tensor]
    ) -> tuple[dict[str, Tensor], dict[fx.Node, Tensor]]:
        """Return the gradients of the parameters by name, and of the inputs by node.

        Args:
            of_outputs: the gradient of the loss by the outputs.
        """
        try:
            for node, gradient in of_outputs.items():
                self._add(node, None, 0, gradient)
            for step in reversed(self.program.steps):
                if isinstance(step, Direct):
                    self._direct_back(step)
                else:
                    self._sweep_back(step)
            inputs = {
                node: held.tensor if isinstance(held, Kept) else held
                for (node, _), held in self._sums.items()
                if node.op == "placeholder"
            }
            return self._weights, inputs
        finally:
            if not self.retain:
                self.close()

    # -- what forms read: leaves ------------------------------------------------------------------

    def part(self, node: fx.Node, region: Region) -> Tensor:
        """Return a region of a result; of a stored one, as a leaf."""
        if node in self._local:
            return super().part(node, region)
        if node.op == "get_attr":
            return cut(self.value(node), region)
        return self._leaf(node, region, 0, super().part(node, region))

    def value(self, node: fx.Node) -> Any:
        """Return a weight, or a stored result as a leaf."""
        if node.op == "get_attr":
            value = super().value(node)
            name = node.meta["tensor"]
            if name and value.requires_grad:
                self._used[name] = value
            return value
        held = super().value(node)
        if isinstance(held, Tensor):
            return self._leaf(node, None, 0, held)
        return [self._leaf(node, None, index, tensor) for index, tensor in enumerate(held)]

    def statistics(self, node: fx.Node) -> Tensor:
        """Return a norm's statistics, as a leaf."""
        if node not in self._norm_leaves:
            self._norm_leaves[node] = self.norms[node].detach().requires_grad_()
        return self._norm_leaves[node]

    def _leaf(self, node: fx.Node, region: Region | None, index: int, tensor: Tensor) -> Tensor:
        idle = self.of_inputs is not None and node not in self.of_inputs
        if not differentiable(tensor) or (idle and node.op == "placeholder"):
            return tensor.detach()
        leaf = tensor.detach().requires_grad_()
        self._leaves.append(_Leaf(node, region, index, leaf))
        return leaf

    # -- steps ------------------------------------------------------------------------------------

    def _direct_back(self, step: Direct) -> None:
        node = step.node
        several = isinstance(node.meta["val"], list | tuple)
        with torch.enable_grad():
            made = self._direct(node)
            results = list(made) if several else [made]
        pairs = []
        for index, result in enumerate(results):
            held = self._sums.pop((node, index), None)
            if held is not None and result.requires_grad:
                pairs.append((result, _all_of(held)))
        self._differentiate(pairs)
        self._free([node])

    def _sweep_back(self, step: Sweep) -> None:
        for node in step.gathers:
            self._spread(node, step)
        for tile in self._tiles(step):
            shares = {node: self._share(node, step, tile) for node in step.targets}
            wanted = {
                node: region
                for node, region in shares.items()
                if region is not None and (node, 0) in self._sums
            }
            if not wanted:
                continue
            with torch.enable_grad():
                self._compute(step, wanted, {})
                pairs = []
                for node, region in wanted.items():
                    result = super().part(node, region)
                    held = self._sums[node, 0]
                    gradient = held.read(region) if isinstance(held, Kept) else cut(held, region)
                    pairs.append((result, gradient))
            self._differentiate([pair for pair in pairs if pair[0].requires_grad])
            self._local.clear()
        for node in [*step.targets, *step.gathers]:
            if (node, 0) in self._sums:
                waited = self._sums.pop((node, 0))
                if isinstance(waited, Kept):
                    waited.close()
            self._free([node])

    def _differentiate(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Go back from results to leaves, weights and statistics, and add up what arrives."""
        leaves, self._leaves = self._leaves, []
        norms, self._norm_leaves = self._norm_leaves, {}
        used, self._used = self._used, {}
        if not pairs:
            return
        results, gradients = zip(*pairs, strict=True)
        asked = [*(leaf.tensor for leaf in leaves), *norms.values(), *used.values()]
        found = torch.autograd.grad(results, asked, gradients, allow_unused=True)
        rest = iter(found)
        for leaf in leaves:
            if (gradient := next(rest)) is not None:
                self._add(leaf.node, leaf.region, leaf.index, gradient)
        for node in norms:
            if (gradient := next(rest)) is not None:
                held = self._norm_sums.get(node)
                self._norm_sums[node] = gradient if held is None else held + gradient
        for name in used:
            if (gradient := next(rest)) is not None:
                total = self._weights.get(name)
                self._weights[name] = gradient if total is None else total.add_(gradient)

    def _spread(self, node: fx.Node, step: Sweep) -> None:
        """Spread the gradient of what was gathered of a map over the map."""
        gathered = self.graph.gathered[node]
        sizes = gathered.source.meta["val"].shape
        if isinstance(gathered, Moments):
            arrived = self._norm_sums.pop(node, None)
        else:
            held = self._sums.get((node, 0))
            arrived = None if held is None else _all_of(held)
        if arrived is None:
            return
        if isinstance(gathered, Pooled):
            arrived = arrived.reshape(*sizes[:2], *(1 for _ in sizes[2:]))
            arrived = arrived / self._sharers(gathered, step)
        for region in self._shares(gathered.source, step):
            part = super().part(gathered.source, region)
            if isinstance(gathered, Moments):
                gradient = _of_moments(gathered, arrived, self.norms[node], part, sizes)
            else:
                assert isinstance(gathered, Pooled)
                gradient = arrived.expand_as(part)
                if gathered.kind == "max":
                    gradient = gradient * self._is_largest(gathered, part)
            self._add(gathered.source, region, 0, gradient.to(part.dtype))

    def _sharers(self, pooled: Pooled, step: Sweep) -> Tensor | int:
        """Return among how many entries of each channel the gradient is divided.

        All that are the largest have a part in it, as torch's own gradient has it.
        """
        if pooled.kind == "mean":
            sizes: torch.Size = pooled.source.meta["val"].shape[2:]
            return sizes.numel()
        total: Any = 0
        for region in self._shares(pooled.source, step):
            equal = self._is_largest(pooled, super().part(pooled.source, region))
            total = total + equal.flatten(2).sum(-1)
        found: Tensor = total
        return found.reshape(*found.shape, *(1 for _ in step.counts))

    def _is_largest(self, pooled: Pooled, part: Tensor) -> Tensor:
        largest = super().value(pooled.node)
        equal: Tensor = part == largest.reshape(*part.shape[:2], *(1 for _ in part.shape[2:]))
        return equal

    def _shares(self, node: fx.Node, step: Sweep) -> Iterator[Region]:
        for tile in self._tiles(step):
            region = self._share(node, step, tile)
            if region is not None:
                yield region

    # -- sums -------------------------------------------------------------------------------------

    def _add(self, node: fx.Node, region: Region | None, index: int, gradient: Tensor) -> None:
        held = self._sums.get((node, index))
        if held is None:
            held = self._sums[node, index] = self._zeros(node, index, gradient)
        if isinstance(held, Kept):
            held.add(region, gradient)
        elif region is None:
            held += gradient.to(held.dtype)
        else:
            cut(held, region).add_(gradient)

    def _zeros(self, node: fx.Node, index: int, like: Tensor) -> Kept | Tensor:
        value = node.meta["val"]
        value = value[index] if isinstance(value, list | tuple) else value
        if node.op == "placeholder" or not self.graph.is_map(node):
            return torch.zeros(tuple(value.shape), dtype=like.dtype, device=like.device)
        small = self.graph.nbytes(node) <= self.program.limit
        room = self.gradients_keeper.room(value.shape, like.dtype, small=small)
        room.tensor.zero_()
        return room

    def _free(self, nodes: Sequence[fx.Node]) -> None:
        if not self.retain:
            super()._free(nodes)


def _all_of(held: Kept | Tensor) -> Tensor:
    if isinstance(held, Kept):
        return held.read(tuple((0, size) for size in held.tensor.shape[2:]))
    return held


def _of_moments(
    moments: Moments, arrived: Tensor, statistics: Tensor, part: Tensor, sizes: torch.Size
) -> Tensor:
    """Return the gradient of a part by way of the mean and the variance of its whole.

    With n entries, d mean / d x = 1 / n and d variance / d x = 2 (x - mean) / n.
    """
    each = part.shape[1] // moments.groups
    count = each * math.prod(sizes[2:]) * (sizes[0] if moments.over_batch else 1)
    ends = (1,) * (part.ndim - 2)
    mean = statistics[0].repeat_interleave(each, -1)
    by_mean, by_variance = (arrived / count).repeat_interleave(each, -1)
    centred = part.to(mean.dtype) - mean.reshape(*mean.shape, *ends)
    scaled: Tensor = torch.addcmul(
        by_mean.reshape(*mean.shape, *ends), centred, 2 * by_variance.reshape(*mean.shape, *ends)
    )
    return scaled
