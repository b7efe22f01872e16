"""A forward by tiles that autograd can go back through, by tiles again."""

from __future__ import annotations

__all__ = ["check_training", "differentiable_forward"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pocketize._torch import keeps_graph, storage_key, version_of
from pocketize.errors import ExecutionError
from pocketize.graph.capture import find_tensors
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode
from pocketize.ops.schema import operator_name
from pocketize.passes.shared.second_order import refuse_second
from pocketize.passes.tiling.backward import Differentiation, differentiable
from pocketize.passes.tiling.cutting import Tiling
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.keeping import Keeper
from pocketize.passes.tiling.network import TiledGraph, TilingError
from pocketize.passes.tiling.preparing import prepare
from pocketize.passes.tiling.program import Program
from pocketize.passes.tiling.running_statistics import update_running, updates_of


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
    what the program stores is kept, where the keeper says.

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
        TilingError: a norm that would update its running statistics is not computed.
    """
    updates = [] if model is None else updates_of(program.graph, model)
    run = _Run(program, tensors, inputs, keeper, outputs)
    made = _ByTiles.apply(run, *run.asked)  # type: ignore[no-untyped-call]
    update_running(run.execution, updates)
    return dict(zip(program.outputs, made, strict=True))


def check_training(model: nn.Module, inputs: Inputs, tiling: Tiling) -> None:
    """Refuse what would be refused in the first step that trains by tiles.

    Args:
        model: unchanged; one in evaluation mode is tried in training mode, others as they are.
        inputs: example inputs.
        tiling: how the volume is to be cut.

    Raises:
        TilingError: the model cannot be trained by tiles.
        InputError: no tile meets ``max_peak``.
    """
    copy = clone(model)
    if not model.training:
        set_mode(copy, True)
    try:
        graph = prepare(copy, inputs.map(Tensor.detach), tiling, training=True).program.graph
        updates_of(graph, copy)
    except TilingError as error:
        raise TilingError(f"in training (train=True), {error}") from error


class _Run:
    """One run of a program, from its forward to its backward.

    Attributes:
        execution: the forward, with all that it stored.
        asked: weights and inputs whose gradients are asked for.
    """

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[fx.Node, Tensor],
        keeper: Keeper,
        outputs: Keeper | None,
    ) -> None:
        read = {source for node in program.graph.nodes for source in node.all_input_nodes}
        named = {n: n.meta["tensor"] for n in read if n.op == "get_attr" and n.meta["tensor"]}
        weights = {name: tensor for name, tensor in tensors.items() if name in named.values()}
        self.names = [name for name, tensor in weights.items() if tensor.requires_grad]
        self.nodes = [node for node, tensor in inputs.items() if tensor.requires_grad]
        self.asked = [*(weights[n] for n in self.names), *(inputs[n] for n in self.nodes)]
        # without the hooks of tensors, which are run with the sum over all tiles
        aliases = {name: _alias(tensor) for name, tensor in weights.items()}
        self.execution = Execution(program, aliases, inputs, keeper, outputs=outputs, retain=True)
        asked = {node for node, name in named.items() if name in self.names}
        self.reached = _reached(program.graph, asked.union(self.nodes))
        self.done = False
        self._watched: list[tuple[str, Tensor, Any]] = []
        for name, tensor in weights.items():
            self._watch(name, tensor)
        for index, tensor in enumerate(inputs.values()):
            self._watch(f"input {index}", tensor)

    def _watch(self, what: str, tensor: Tensor) -> None:
        self._watched.append((what, tensor, _state(tensor)))

    def forward(self) -> tuple[Tensor, ...]:
        """Return the outputs, of which the execution holds nothing but aliases."""
        program = self.execution.program
        # the recording has autocast's casts in it
        with torch.autocast(self.execution.keeper.device.type, enabled=False):
            made = self.execution.run()
        for index, node in enumerate(program.outputs):
            alias = self.execution.hold_alias(node)
            if node in program.graph.gathered or not self.reached.isdisjoint(node.users):
                self._watch(f"output {index}", alias)
        return tuple(made[node] for node in program.outputs)

    def backward(self, of_outputs: Mapping[fx.Node, Tensor]) -> tuple[Tensor | None, ...]:
        """Return the gradients of what is asked for.

        Raises:
            ExecutionError: it has run, or what it computes again was written.
        """
        if self.done:
            raise ExecutionError(
                "patchwise: the backward pass of this forward by tiles has run, and what it went "
                "through is gone; say retain_graph=True in the first, or run the forward again"
            )
        if not all(_has_memory(gradient) for gradient in of_outputs.values()):
            raise ExecutionError(
                "patchwise: training by tiles goes back with one gradient at a time, and here are "
                "several (vmap, is_grads_batched=True, a vectorised Jacobian); take them one by one"
            )
        for what, tensor, before in self._watched:
            if _state(tensor) != before:
                raise ExecutionError(
                    f"patchwise: {what} was written or replaced between forward and backward, "
                    "which computes tiles again from it; run the backward pass first, or write "
                    "into a copy"
                )
        keeps = keeps_graph()
        self.done = not keeps
        execution = self.execution
        back = Differentiation(execution, execution.keeper, of_inputs=self.nodes, retain=keeps)
        with torch.autocast(execution.keeper.device.type, enabled=False):
            weights, inputs = back.gradients(of_outputs)
        found = [weights.get(name) for name in self.names]
        found += [inputs.get(node) for node in self.nodes]
        moved = tuple(
            None if gradient is None else gradient.to(tensor.device)
            for gradient, tensor in zip(found, self.asked, strict=True)
        )
        if self.done:  # an output may outlive its backward pass
            self._watched, execution.tensors = [], {}
        return moved


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is one, and does not stand for several as within ``vmap``."""
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _reached(graph: TiledGraph, asked: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that have gradients by what they are asked for."""
    reached = set(asked)
    for node in graph.nodes:
        name = operator_name(node.target).rpartition(".")[2]
        cut = name.startswith(("detach", "new_")) or name.endswith("_like")
        values = [value for value in find_tensors(node.meta["val"]) if differentiable(value)]
        if values and not cut and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor is written, or when its ``.data`` is replaced."""
    return version_of(tensor), storage_key(tensor), tensor.storage_offset(), tensor.shape


def _alias(tensor: Tensor) -> Tensor:
    alias = tensor.detach()
    return alias.requires_grad_() if tensor.requires_grad else alias


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *asked: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        results = run.forward()
        rows = zip(run.execution.program.outputs, results, strict=True)
        ctx.mark_non_differentiable(*(t for node, t in rows if node not in run.reached))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        outputs = run.execution.program.outputs
        of_outputs = {
            node: gradient
            for node, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and node in run.reached
        }
        with torch.no_grad():
            found = run.backward(of_outputs)
        advice = "Rewrite the network without pocketize's train=True where that is needed"
        return None, *refuse_second("patchwise", found, [*gradients, *run.asked], advice)
