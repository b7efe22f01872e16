"""A forward by tiles whose backward pass runs by tiles as well.

The norms of the traced copy track no running statistics, so that the trace has the operator on the
statistics of the batch alone. These are reduced over all tiles like any norm's, and when the
forward is done they are added to the running statistics as torch would do it, once.

The backward pass is a chain of autograd nodes. Each differentiates some steps of the program and
returns the gradients of the weights that no earlier step reads. Autograd accumulates them before it
runs the next node, so that hooks on a parameter (``step_in_backward``) may update it then.
"""

from __future__ import annotations

__all__ = ["differentiable_forward", "stop_tracking", "updates_of"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from pocketize._torch import (
    BatchNorm,
    NormBase,
    backward_number,
    is_batched,
    keeps_graph,
    storage_key,
    version_of,
)
from pocketize.errors import ExecutionError
from pocketize.graph.capture import find_tensors
from pocketize.ops import Kind, operator_name, operator_of
from pocketize.passes.shared.second_order import refuse_second
from pocketize.passes.tiling.backward import TiledBackward, differentiable
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.program import FullSizeOp, Program
from pocketize.passes.tiling.statistics import NormMoments
from pocketize.passes.tiling.tiled_graph import TiledGraph, TilingError

#: Norms, and the operators that reduce the statistics.
Updates: TypeAlias = list[tuple[NormBase, fx.Node]]

_FORWARDS = (nn.BatchNorm1d.forward, nn.InstanceNorm1d.forward)


def _tracking_norms(model: nn.Module) -> list[NormBase]:
    """Return the norms that would update running statistics in a forward."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, NormBase) or not module.training or module.running_mean is None:
            continue
        if isinstance(module, BatchNorm) and not module.track_running_stats:
            continue  # it has running statistics, and leaves them
        if "forward" in vars(module) or type(module).forward not in _FORWARDS:
            raise TilingError(
                f"{path or 'the model'} ({type(module).__name__}) is in training mode and updates "
                "its running statistics in a forward that is not torch's, which training by tiles "
                "cannot do for it; put it into evaluation mode, or train the volume whole "
                "(train=False)"
            )
        found.append(module)
    return found


def stop_tracking(copy: nn.Module) -> None:
    """Let the norms of a copy use the statistics of the batch and update nothing.

    Raises:
        TilingError: a norm has a forward of its own, which may do something else.
    """
    for module in _tracking_norms(copy):
        module.running_mean = module.running_var = module.num_batches_tracked = None
        module.track_running_stats = False


def updates_of(graph: TiledGraph, model: nn.Module) -> Updates:
    """Return the norms of a model that an execution updates, in order, once for each call.

    Raises:
        TilingError: nothing that is returned depends on one, so that it is not computed.
    """
    norms = {id(module) for module in _tracking_norms(model)}
    found: Updates = []
    for node in graph.traced.operators():
        if operator_of(node.target).kind is not Kind.CHANNEL_NORM:
            continue
        module = model.get_submodule(node.meta["module"] or "")
        if id(module) not in norms or not isinstance(module, NormBase):
            continue
        if not isinstance(graph.reductions.get(node), NormMoments):
            raise TilingError(
                f"{node.meta['module']} updates its running statistics and nothing that is "
                "returned depends on it, so that training by tiles does not compute it; put it "
                "into evaluation mode, or train the volume whole (train=False)"
            )
        found.append((module, node))
    return found


def _update_running(execution: Execution, updates: Updates) -> None:
    """Add the statistics of an execution, with ``retain``, to the running ones."""
    for module, node in updates:
        moments = execution.graph.reductions[node]
        assert isinstance(moments, NormMoments)
        made = execution.norms.get(node)
        if made is None:  # it ran whole
            made = moments.finish(moments.measure(execution.value(moments.source)))
        mean, variance = made.mean(1)
        variance = variance * (moments.count / max(1, moments.count - 1))
        factor: float | Tensor = 0.0 if module.momentum is None else module.momentum
        if isinstance(module, BatchNorm) and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:
                factor = 1.0 / module.num_batches_tracked.double()
        for running, new in ((module.running_mean, mean), (module.running_var, variance)):
            assert running is not None
            running.add_(((new.to(running.dtype) - running) * factor).to(running.dtype))


def differentiable_forward(
    program: Program, *, model: nn.Module | None = None, **settings: Any
) -> dict[fx.Node, Tensor]:
    """A forward without a graph; a backward pass runs its tiles again, each with one.

    The gradients are those of the whole volume's loss, to rounding. Between the two passes only
    the results of the program's steps are stored. ``settings`` are those of :class:`Execution`;
    norms of the model update their running statistics, where they do.

    Raises:
        TilingError: a norm that would update its running statistics is not computed.
    """
    updates = [] if model is None else updates_of(program.graph, model)
    run = _TrainingRun(program, **settings)
    link = None
    for part in reversed(run.parts):
        link = _TiledPart.apply(run, part, link, *part.asked)  # type: ignore[no-untyped-call]
    made = _TiledFunction.apply(run, link, *run.asked)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        _update_running(run.execution, updates)
    return dict(zip(program.outputs, made, strict=True))


@dataclass(eq=False)
class _Segment:
    """Steps that one node of the graph differentiates, and the weights that no earlier step reads.

    The last part also has the inputs.
    """

    steps: range
    names: list[str]
    nodes: list[fx.Node]
    asked: list[Tensor]


@dataclass(eq=False)
class _Running:
    """A backward pass that runs; with ``create_graph``, ``sources`` are the outputs' gradients."""

    back: TiledBackward
    sources: list[Tensor | None]


class _TrainingRun:
    """One run of a program, from its forward to its backward; ``asked`` wants gradients."""

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[fx.Node, Tensor],
        **settings: Any,
    ) -> None:
        read = {source for node in program.graph.nodes for source in node.all_input_nodes}
        named = {n: n.meta["tensor"] for n in read if n.op == "get_attr" and n.meta["tensor"]}
        weights = {n: tensor for n, tensor in tensors.items() if n in named.values()}
        names = [name for name, tensor in weights.items() if tensor.requires_grad]
        self.nodes = [node for node, tensor in inputs.items() if tensor.requires_grad]
        self.asked = [*(weights[n] for n in names), *(inputs[n] for n in self.nodes)]
        # aliases without hooks of tensors, which autograd runs with the sum over all tiles
        aliases = {name: _alias(tensor) for name, tensor in weights.items()}
        self.execution = Execution(program, tensors=aliases, inputs=inputs, retain=True, **settings)
        asked = {node for node, name in named.items() if name in names}
        self.reached = _reached(program.graph, asked.union(self.nodes))
        self.done = False
        self._watched: list[tuple[str, Tensor, Any]] = []
        self._running: dict[int, _Running] = {}
        self._watch(weights)
        self._watch({f"input {index}": tensor for index, tensor in enumerate(inputs.values())})
        self._readers = _readers(program, weights, list(inputs.values()))
        first = {name: min(steps, default=0) for name, steps in self._readers.items()}
        self.parts: list[_Segment] = []
        end = len(program.steps)
        for begin in sorted({0, *(first[name] for name in names)}, reverse=True):
            mine = [name for name in names if first[name] == begin]
            nodes = [] if begin else self.nodes
            tensors_asked = [*(weights[n] for n in mine), *(inputs[n] for n in nodes)]
            steps = range(end - 1, begin - 1, -1)
            if tensors_asked:
                self.parts.append(_Segment(steps, mine, nodes, tensors_asked))
            end = begin

    def _watch(self, tensors: Mapping[str, Tensor]) -> None:
        self._watched += [(what, tensor, _state(tensor)) for what, tensor in tensors.items()]

    def forward(self) -> tuple[Tensor, ...]:
        """Return the outputs; the execution keeps aliases of them."""
        program = self.execution.program
        # the trace has autocast's casts in it
        with torch.autocast(self.execution.storage.device.type, enabled=False):
            made = self.execution.run()
        for index, node in enumerate(program.outputs):
            alias = self.execution.hold_alias(node)
            if node in program.graph.reductions or not self.reached.isdisjoint(node.users):
                self._watch({f"output {index}": alias})
        return tuple(made[node] for node in program.outputs)

    def begin(self, of_outputs: Mapping[fx.Node, Tensor], sources: list[Tensor | None]) -> None:
        """Begin a backward pass.

        Raises:
            ExecutionError: it has run, or what it computes again from was written.
        """
        if self.done:
            raise ExecutionError(
                "patchwise: the backward pass of this forward by tiles has run, and its results "
                "are freed; say retain_graph=True in the first, or run the forward again"
            )
        if any(map(is_batched, of_outputs.values())):
            raise ExecutionError(
                "patchwise: training by tiles differentiates one gradient at a time, and here are "
                "several (vmap, is_grads_batched=True, a vectorised Jacobian); take them one by one"
            )
        self._check_unwritten(range(len(self.execution.program.steps)))
        keeps = keeps_graph()
        self.done = not keeps
        # a backward pass that asks for late weights alone does not reach the last part
        number = backward_number(lambda: self._finish(number))
        execution = self.execution
        back = TiledBackward(execution, execution.storage, of_inputs=self.nodes, retain=keeps)
        self._running[number] = _Running(back, sources)
        back.begin(of_outputs)

    def backward(self, part: _Segment) -> tuple[Tensor | None, ...]:
        """Return the gradients that a part asks for.

        Raises:
            ExecutionError: what it computes again from was written.
        """
        number = backward_number()
        running = self._running[number]
        try:
            self._check_unwritten(part.steps)
            with torch.no_grad(), torch.autocast(running.back.storage.device.type, enabled=False):
                running.back.differentiate(part.steps)
            found = [
                *running.back.take_weights(part.names),
                *running.back.take_inputs(part.nodes),
            ]
            moved = tuple(
                None if gradient is None else gradient.to(tensor.device)
                for gradient, tensor in zip(found, part.asked, strict=True)
            )
            if part is self.parts[-1]:
                self._finish(number)
        except BaseException:
            self._finish(number)
            raise
        advice = "Rewrite the network without pocketize's train=True where that is needed"
        return refuse_second("patchwise", moved, [*running.sources, *self.asked], advice)

    def _finish(self, number: int) -> None:
        running = self._running.pop(number, None)
        if running is None:
            return
        running.back.end()
        if self.done:  # an output may outlive its backward pass
            self._watched, self.execution.tensors = [], {}

    def _check_unwritten(self, steps: range) -> None:
        """Raise an error if something was written that these steps read: inputs count for all."""
        for what, tensor, before in self._watched:
            unread = what in self._readers and self._readers[what].isdisjoint(steps)
            if not unread and _state(tensor) != before:
                raise ExecutionError(
                    f"patchwise: {what} was written or replaced between forward and backward, "
                    "which computes tiles again from it; run the backward pass first, or write "
                    "into a copy"
                )


def _readers(
    program: Program, weights: Mapping[str, Tensor], inputs: list[Tensor]
) -> dict[str, set[int]]:
    """Return the numbers of the steps that read the memory of each weight.

    Until the backward pass has been at the first, the weight must not be updated. Tied weights,
    views of one memory and detached uses count for each other; a weight that is an input counts as
    read by all steps.
    """
    found: dict[str, set[int]] = {}
    for number, step in enumerate(program.steps):
        order = [step.node] if isinstance(step, FullSizeOp) else [*step.order, *step.reductions]
        for source in {source for node in order for source in node.all_input_nodes}:
            if source.op == "get_attr" and source.meta["tensor"]:
                found.setdefault(source.meta["tensor"], set()).add(number)
    memory = {storage_key(tensor): set(range(len(program.steps))) for tensor in inputs}
    for name, tensor in weights.items():
        memory.setdefault(storage_key(tensor), set()).update(found.get(name, {0}))
    return {name: memory[storage_key(tensor)] for name, tensor in weights.items()}


def _reached(graph: TiledGraph, asked: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that gradients flow through."""
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


class _TiledFunction(torch.autograd.Function):
    """The forward; its backward hands the gradients of the outputs to the parts."""

    @staticmethod
    def forward(
        ctx: Any, run: _TrainingRun, link: Tensor | None, *asked: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run = run
        results = run.forward()
        rows = zip(run.execution.program.outputs, results, strict=True)
        ctx.mark_non_differentiable(*(t for node, t in rows if node not in run.reached))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _TrainingRun = ctx.run
        outputs = run.execution.program.outputs
        of_outputs = {
            node: gradient
            for node, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and node in run.reached
        }
        sources = list(gradients) if torch.is_grad_enabled() else []
        with torch.no_grad():
            run.begin(of_outputs, sources)
            return None, _link(run), *(None for _ in run.asked)


class _TiledPart(torch.autograd.Function):
    """Nothing in the forward; its backward is that of a part, after those of the parts before."""

    @staticmethod
    def forward(
        ctx: Any, run: _TrainingRun, part: _Segment, link: Tensor | None, *asked: Tensor
    ) -> Tensor:
        ctx.run, ctx.part = run, part
        return _link(run)

    @staticmethod
    def backward(ctx: Any, *links: Tensor) -> tuple[Tensor | None, ...]:
        run: _TrainingRun = ctx.run
        found = run.backward(ctx.part)
        last = ctx.part is run.parts[-1]
        return None, None, None if last else _link(run), *found


def _link(run: _TrainingRun) -> Tensor:
    """Return a number that stands for one node's having run, on the device of all nodes."""
    return torch.zeros((), device=run.execution.storage.device)
