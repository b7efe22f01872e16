"""Gradients by tiles: the steps of a program in reverse order, each tile computed again.

The gradient of a stored map is complete when all later steps are done. For each tile the operators
of the loop run once more, now with a graph, from stored results; their gradients are accumulated
where tiles overlap. Statistics of norms are inputs of the tiles like any other: the gradients of a
mean and a variance are scattered to the whole map by the derivative of the two, so that the sum of
all tiles is the gradient of the whole.
"""

from __future__ import annotations

__all__ = ["TiledBackward", "differentiable"]

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pocketize.memory.hints import note_followed
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.forms import Convolution
from pocketize.passes.tiling.intervals import Box, cut
from pocketize.passes.tiling.program import FullSizeOp, TileLoop
from pocketize.passes.tiling.statistics import NormMoments, Pooled
from pocketize.passes.tiling.storage import Buffer, Storage


def differentiable(tensor: Tensor) -> bool:
    """Whether a tensor's dtype has gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


class TiledBackward(Execution):
    """The backward pass of an execution that has run, with ``retain``.

    Gradients of stored maps are kept in ``storage``. Of inputs all gradients are computed, or those
    named by ``of_inputs``. With ``retain`` the execution's results stay for another backward pass.
    """

    def __init__(
        self,
        execution: Execution,
        storage: Storage,
        *,
        of_inputs: Collection[fx.Node] | None = None,
        retain: bool = False,
    ) -> None:
        super().__init__(
            execution.program,
            tensors=execution.tensors,
            inputs={},
            storage=execution.storage,
            retain=retain,
        )
        self.stored, self.norms = execution.stored, execution.norms
        if retain:
            self.stored = dict(self.stored)
        self.gradient_storage, self.of_inputs = storage, of_inputs
        self._sums: dict[tuple[fx.Node, int], Buffer | Tensor] = {}
        self._norm_sums: dict[fx.Node, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        #: tensors with ``requires_grad``, and the boxes of results that their gradients belong to
        self._leaves: list[tuple[Tensor, fx.Node, Box | None, int]] = []
        self._norm_leaves: dict[fx.Node, Tensor] = {}
        self._used: dict[str, Tensor] = {}

    def begin(self, of_outputs: Mapping[fx.Node, Tensor]) -> None:
        """Take the gradients of the outputs."""
        for node, gradient in of_outputs.items():
            self._add(node, None, 0, gradient)

    def differentiate(self, numbers: range) -> None:
        """Differentiate steps of the program by their numbers, which go from the last down."""
        for number in numbers:
            step = self.program.steps[number]
            if isinstance(step, FullSizeOp):
                self._full_size_back(step)
            else:
                self._tile_loop_back(step)

    def take_weights(self, names: Collection[str]) -> list[Tensor | None]:
        """Return the gradients of parameters, and hold them no longer."""
        return [self._weights.pop(name, None) for name in names]

    def take_inputs(self, nodes: Collection[fx.Node]) -> list[Tensor | None]:
        """Return the gradients of inputs, and hold them no longer."""
        held = [self._sums.pop((node, 0), None) for node in nodes]
        return [each.tensor if isinstance(each, Buffer) else each for each in held]

    def end(self) -> None:
        """Free what is stored, unless it is retained."""
        self._sums.clear()
        if not self.retain:
            self.close()

    # -- what forms read: leaves ------------------------------------------------------------------

    def part(self, node: fx.Node, box: Box) -> Tensor:
        """Return a box of a result; of a stored one, as a leaf."""
        part = super().part(node, box)
        if node in self._local or node.op == "get_attr":
            return part
        return self._leaf(node, box, 0, part)

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

    def _leaf(self, node: fx.Node, box: Box | None, index: int, tensor: Tensor) -> Tensor:
        idle = self.of_inputs is not None and node not in self.of_inputs
        if not differentiable(tensor) or (idle and node.op == "placeholder"):
            return tensor.detach()
        leaf = tensor.detach().requires_grad_()
        self._leaves.append((leaf, node, box, index))
        return leaf

    # -- steps ------------------------------------------------------------------------------------

    def _full_size_back(self, step: FullSizeOp) -> None:
        node = step.node
        several = isinstance(node.meta["val"], list | tuple)
        with torch.enable_grad():
            made = self._full_size(node)
            roots = [_root(result) for result in (made if several else [made])]
        del made
        sums = [self._sums.pop((node, index), None) for index in range(len(roots))]
        rows = zip(roots, sums, strict=True)
        self._differentiate([(r, _all_of(s)) for r, s in rows if r is not None and s is not None])
        self._free([node])

    def _tile_loop_back(self, step: TileLoop) -> None:
        for node in step.reductions:
            self._scatter(node, step)
        for tile in self._tiles(step):
            boxes = self.program.wanted(step, tile)
            wanted = {n: boxes[n] for n in step.targets if n in boxes and (n, 0) in self._sums}
            if not wanted:
                continue
            with torch.enable_grad():
                self._compute(step, wanted)
                roots = [_root(super(TiledBackward, self).part(n, b)) for n, b in wanted.items()]
            self._local.clear()
            sums = [self._read_sum(node, box) for node, box in wanted.items()]
            rows = zip(roots, sums, strict=True)
            self._differentiate([(root, total) for root, total in rows if root is not None])
        for node in [*step.targets, *step.reductions]:
            if (node, 0) in self._sums:
                waited = self._sums.pop((node, 0))
                if isinstance(waited, Buffer):
                    waited.close()
            self._free([node])

    def _run_form(self, step: TileLoop, node: fx.Node, box: Box) -> Tensor:
        """Compute a box; not a convolution whose result is stored, and is not read by this loop."""
        form = self.graph.forms[node]
        read = any(user in step.order for user in node.users)
        if isinstance(form, Convolution) and not read and node.meta["val"].is_floating_point():
            return form.run(box, self, differentiable_only=type(form) is Convolution)
        return form.run(box, self)

    def _differentiate(self, pairs: list[tuple[Tensor | GradientEdge, Tensor]]) -> None:
        """Differentiate results by leaves, weights and statistics, and accumulate the gradients."""
        note_followed(1)
        leaves, self._leaves = self._leaves, []
        norms, self._norm_leaves = self._norm_leaves, {}
        used, self._used = self._used, {}
        if not pairs:
            return
        roots, gradients = zip(*pairs, strict=True)
        asked = [*(leaf for leaf, *_ in leaves), *norms.values(), *used.values()]
        rest = iter(torch.autograd.grad(roots, asked, gradients, allow_unused=True))
        for _, node, box, index in leaves:
            if (gradient := next(rest)) is not None:
                self._add(node, box, index, gradient)
        for node in norms:
            if (gradient := next(rest)) is not None:
                held = self._norm_sums.get(node)
                self._norm_sums[node] = gradient if held is None else held + gradient
        for name in used:
            if (gradient := next(rest)) is not None:
                total = self._weights.get(name)
                self._weights[name] = gradient if total is None else total.add_(gradient)

    def _scatter(self, node: fx.Node, step: TileLoop) -> None:
        """Scatter the gradient of a reduction to its map."""
        reduction = self.graph.reductions[node]
        source = reduction.source
        wanted = [self.program.wanted(step, tile) for tile in self._tiles(step)]
        boxes = [each[source] for each in wanted if source in each]
        if isinstance(reduction, NormMoments):
            arrived = self._norm_sums.pop(node, None)
        else:
            held = self._sums.get((node, 0))
            arrived = None if held is None else _all_of(held)
        if arrived is None:
            return
        if isinstance(reduction, Pooled):
            arrived = _as_vector(arrived, source) / self._sharers(reduction, boxes)
        for box in boxes:
            part = super().part(source, box)
            if isinstance(reduction, NormMoments):
                gradient = _of_moments(reduction, arrived, self.norms[node], part)
            else:
                assert isinstance(reduction, Pooled)
                gradient = arrived.expand_as(part)
                if reduction.kind == "max":
                    gradient = gradient * self._is_largest(reduction, part)
            self._add(source, box, 0, gradient.to(part.dtype))

    def _sharers(self, pooled: Pooled, boxes: Sequence[Box]) -> Tensor | int:
        """Return the number of entries of each channel that share its gradient.

        All entries that equal the maximum do, as in torch's own gradient.
        """
        if pooled.kind == "mean":
            return self.graph.voxels(pooled.source)
        parts = (super(TiledBackward, self).part(pooled.source, box) for box in boxes)
        counts = [self._is_largest(pooled, part).flatten(2).sum(-1) for part in parts]
        return _as_vector(torch.stack(counts).sum(0), pooled.source)

    def _is_largest(self, pooled: Pooled, part: Tensor) -> Tensor:
        equal: Tensor = part == _as_vector(super().value(pooled.node), pooled.source)
        return equal

    # -- sums -------------------------------------------------------------------------------------

    def _add(self, node: fx.Node, box: Box | None, index: int, gradient: Tensor) -> None:
        held = self._sums.get((node, index))
        if held is None:
            held = self._sums[node, index] = self._zeros(node, index, gradient)
        if isinstance(held, Buffer):
            held.add(box, gradient)
        elif box is None:
            held += gradient.to(held.dtype)
        else:
            cut(held, box).add_(gradient)

    def _read_sum(self, node: fx.Node, box: Box) -> Tensor:
        held = self._sums[node, 0]
        return held.read(box) if isinstance(held, Buffer) else cut(held, box)

    def _zeros(self, node: fx.Node, index: int, like: Tensor) -> Buffer | Tensor:
        value = node.meta["val"]
        value = value[index] if isinstance(value, list | tuple) else value
        if node.op == "placeholder" or not self.graph.is_map(node):
            return torch.zeros(tuple(value.shape), dtype=like.dtype, device=like.device)
        small = self.graph.nbytes(node) <= self.program.limit
        allocate = self.gradient_storage.allocate(value.shape, like.dtype, small=small)
        allocate.tensor.zero_()
        return allocate

    def _free(self, nodes: Sequence[fx.Node]) -> None:
        if not self.retain:
            super()._free(nodes)


def _root(result: Tensor) -> Tensor | GradientEdge | None:
    """Return where to begin differentiating a result, without the memory of the result."""
    if not result.requires_grad:
        return None
    return result if result.grad_fn is None else get_gradient_edge(result)


def _all_of(held: Buffer | Tensor) -> Tensor:
    if isinstance(held, Buffer):
        return held.read(tuple((0, size) for size in held.tensor.shape[2:]))
    return held


def _as_vector(tensor: Tensor, source: fx.Node) -> Tensor:
    """Give values of samples and channels the shape (N, C, 1, ...) of a map."""
    shape = source.meta["val"].shape
    return tensor.reshape(*shape[:2], *(1 for _ in shape[2:]))


def _of_moments(moments: NormMoments, arrived: Tensor, statistics: Tensor, part: Tensor) -> Tensor:
    """Return the gradient of a part through the mean and the variance of its map.

    With n entries, d mean / d x = 1 / n and d variance / d x = 2 (x - mean) / n.
    """
    each = part.shape[1] // moments.groups
    ends = (1,) * (part.ndim - 2)
    mean = statistics[0].repeat_interleave(each, -1)
    by_mean, by_variance = (arrived / moments.count).repeat_interleave(each, -1)
    centred = part.to(mean.dtype) - mean.reshape(*mean.shape, *ends)
    centred *= 2 * by_variance.reshape(*mean.shape, *ends)
    centred += by_mean.reshape(*mean.shape, *ends)
    return centred
