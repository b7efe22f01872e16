"""A forward by tiles that autograd can go back through, by tiles again."""

from __future__ import annotations

__all__ = ["check_repeatable", "differentiable_forward"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from pocketize.passes.runtime.tiling.arguments import draws
from pocketize.passes.runtime.tiling.backward import Differentiation, differentiable
from pocketize.passes.runtime.tiling.execution import Execution
from pocketize.passes.runtime.tiling.keeping import Keeper
from pocketize.passes.runtime.tiling.network import TiledGraph, TilingError
from pocketize.passes.runtime.tiling.program import Program
from pocketize.passes.runtime.tiling.running import update_running, updates_of
from pocketize.rules import operator_name


def differentiable_forward(
    program: Program,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[fx.Node, Tensor],
    keeper: Keeper,
    *,
    outputs: Keeper | None = None,
    model: nn.Module | None = None,
) -> dict[fx.Node, Tensor]:
    """Run a program without a graph; a backward pass runs its tiles again, each with one.

    The gradients are those of the whole volume's loss, to rounding. Between the two passes only
    what the program stores is kept, where the keeper says. The backward pass can run once.

    Args:
        program: what to do.
        tensors: parameters and buffers by name.
        inputs: the input tensors by placeholder.
        keeper: where results and their gradients are kept between sweeps.
        outputs: where outputs are kept; the same by default.
        model: whose norms update their running statistics, where they do.

    Returns:
        The outputs by node.

    Raises:
        TilingError: an operator would not give the same result again.
    """
    check_repeatable(program.graph)
    updates = [] if model is None else updates_of(program.graph, model)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    nodes = [node for node, tensor in inputs.items() if tensor.requires_grad]
    asked = [*(tensors[name] for name in names), *(inputs[node] for node in nodes)]
    execution = Execution(program, tensors, inputs, keeper, outputs=outputs, retain=True)
    made = _ByTiles.apply(_Run(execution, names, nodes), *asked)  # type: ignore[no-untyped-call]
    update_running(execution, updates)
    return dict(zip(program.outputs, made, strict=True))


def check_repeatable(graph: TiledGraph) -> None:
    """Refuse networks whose tiles would not give the same results when they run again.

    Raises:
        TilingError: an operator draws random numbers.
    """
    for node in graph.nodes:
        if draws(node):
            where = f"{operator_name(node.target)} in {node.meta['module'] or 'the model'}"
            raise TilingError(
                f"{where} draws random numbers, which cannot be drawn again tile by tile; set its "
                "probability to 0 or put it into evaluation mode"
            )


class _Run:
    """One run of a program, from its forward to its backward."""

    def __init__(self, execution: Execution, names: list[str], nodes: list[fx.Node]) -> None:
        self.execution: Execution | None = execution
        self.names, self.nodes = names, nodes
        self.devices = [execution.stored[node].tensor.device for node in nodes]

    def take(self) -> Execution:
        """Return the execution, once."""
        execution, self.execution = self.execution, None
        if execution is None:
            raise TilingError(
                "the backward pass of a forward by tiles runs once, and what it went through is "
                "gone; run the forward again (retain_graph=True is not supported)"
            )
        return execution


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *asked: Tensor) -> tuple[Tensor, ...]:
        assert run.execution is not None  # it is new
        ctx.run = run
        # the recording has autocast's casts in it
        with torch.autocast(run.execution.keeper.device.type, enabled=False):
            made = run.execution.run()
        program = run.execution.program
        results = tuple(made[node] for node in program.outputs)
        ctx.mark_non_differentiable(*(t for t in results if not differentiable(t)))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        execution = run.take()
        of_outputs = {
            node: gradient
            for node, gradient in zip(execution.program.outputs, gradients, strict=True)
            if gradient is not None and differentiable(node.meta["val"])
        }
        back = Differentiation(execution, execution.keeper, of_inputs=run.nodes)
        with torch.autocast(execution.keeper.device.type, enabled=False):
            weights, inputs = back.gradients(of_outputs)
        found = [weights.get(name) for name in run.names]
        for node, device in zip(run.nodes, run.devices, strict=True):
            gradient = inputs.get(node)
            found.append(None if gradient is None else gradient.to(device))
        return None, *found
