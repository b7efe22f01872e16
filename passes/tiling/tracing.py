"""Trace the forward of a network on inputs of one size, so that it can be computed by tiles.

A trace has the operators that ran, and nothing of what a forward does besides: attributes that it
sets, buffers that it counts in, hooks. Where there is any of that, running the operators is not
running the forward, and the network is refused.
"""

from __future__ import annotations

__all__ = [
    "ForwardTrace",
    "fingerprint",
    "tensors_by_name",
    "trace_forward",
]

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pocketize._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    storage_key,
    without_dispatch_modes,
)
from pocketize.errors import CaptureError
from pocketize.graph.capture import TracedGraph, find_tensors, quiet_tracing, trace_module
from pocketize.graph.clone import fake_clone
from pocketize.graph.code_reads import code_reads
from pocketize.graph.inputs import Inputs, first_parameter
from pocketize.ops import Kind, bind, operator_of
from pocketize.ops.effects import written_nodes
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.shared.nests import map_tensors
from pocketize.passes.tiling.attributes import (
    Description,
    Identity,
    Lost,
    check_state,
    is_table,
    state_of,
)
from pocketize.passes.tiling.forward import PatchForward
from pocketize.passes.tiling.side_effects import check_gradients, check_hooks
from pocketize.passes.tiling.tiled_graph import AliasSets, TilingError, simplify
from pocketize.passes.tiling.training import stop_tracking

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True, eq=False)
class ForwardTrace:
    """A traced forward, with all that is needed to run its operators.

    Attributes:
        traced: the graph.
        template: what the forward returned, with fake tensors.
        nodes: the node of each fake tensor in the template, by identity.
        tensors: fake parameters and buffers by name, as the traced copy has them.
        lost: attributes in which the forward stores a tensor; running the operators does not.
    """

    traced: TracedGraph
    template: Any
    nodes: dict[int, fx.Node]
    tensors: dict[str, Tensor]
    lost: tuple[Lost, ...] = ()

    def placeholders(self, inputs: Inputs) -> dict[fx.Node, Tensor]:
        """Return the tensors of a call by the placeholder that each stands for."""
        tensors = inputs.tensors()
        return {
            node: tensors[int(str(node.target).rpartition("_")[2])]
            for node in self.traced.graph.nodes
            if node.op == "placeholder"
        }

    def outputs(self, made: Mapping[fx.Node, Tensor], inputs: Inputs) -> Any:
        """Put computed outputs into the nest that the forward returned; others are made of them."""
        held = {**self.placeholders(inputs), **made}
        return map_tensors(
            self.template, lambda _: True, lambda t: _result(self.nodes[id(t)], held)
        )


def _result(node: fx.Node, held: dict[fx.Node, Tensor]) -> Tensor:
    """Return a result, or make the view of one and add it."""
    if node not in held:
        assert isinstance(node.args[0], fx.Node)
        assert callable(node.target)
        held[node] = node.target(_result(node.args[0], held), *node.args[1:], **node.kwargs)
    return held[node]


def trace_forward(model: nn.Module, inputs: Inputs, *, training: bool = False) -> ForwardTrace:
    """Trace the forward of a model in evaluation mode, on a copy without memory.

    Hooks of the model itself are left out: they run outside of the forward. Of a model that runs by
    tiles it is the forward that tiles replaced. The present autocast state applies. In ``training``
    each module is in its present mode.

    Raises:
        TilingError: running the operators would not be running the forward.
        CaptureError: the model cannot be copied, or did not run.
    """
    check_hooks(model, training=training)
    # dispatch modes from outside are not to see operators on fake tensors
    with without_dispatch_modes(), torch.inference_mode(False):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        copy = fake_clone(model, mode)
        _unwrap(copy)
        copy._forward_pre_hooks.clear()
        copy._forward_hooks.clear()
        returned = _Returned()
        copy.register_forward_hook(returned)
        for module in () if training else copy.modules():
            module.training = False
        if training:
            stop_tracking(copy)
        before = state_of(copy)
        held = [(n, t) for n, t in tensors_by_name(copy).items() if t.layout is torch.strided]
        memory = [(n, t, t.untyped_storage()) for n, t in held]
        first = first_parameter(copy)
        fakes = inputs.map(mode.from_tensor)
        if first is not None:  # a volume may wait in host memory, and a model be on the device
            with mode:
                fakes = fakes.map(lambda tensor: tensor.to(first.device))
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would outlive the copy's weights
        try:
            with mode:
                traced = trace_module(copy, fakes, train=None if training else False)
                output, after = returned.value, state_of(copy)
                if after != before:  # by a flag that it sets once, and that changes nothing?
                    again = trace_module(copy, fakes, train=None if training else False)
                    if state_of(copy) == after and str(again.graph) == str(traced.graph):
                        before = after
        except CaptureError as error:
            if isinstance(error.__cause__, _DATA_DEPENDENT):
                raise TilingError(
                    "a branch of its forward depends on values, which differ from part to part; "
                    "run the model whole"
                ) from error
            raise
        finally:
            torch.set_autocast_cache_enabled(cached)
        lost = check_state(copy, before, after)
        for name, tensor, storage in memory:
            if storage_key(tensor) != storage_key(storage):
                raise TilingError(
                    f"its forward gives {name} other data (.data = ...), which a forward by tiles "
                    "would not"
                )
        if training:
            with mode, quiet_tracing(copy):
                check_gradients(copy, fakes)
        return replace(_finished(copy, traced, output), lost=lost)


def _unwrap(copy: nn.Module) -> None:
    """Remove a forward by tiles, and what wraps it, and restore the forward that it replaced."""
    forward = wrapping(copy, PatchForward)
    if forward is not None:
        del vars(copy)["forward"]
        if forward.inner is not None:
            vars(copy)["forward"] = forward.inner


class _Returned:
    """A hook that stores what a forward returns; tracing would undo an append in a closure."""

    value: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.value = output


def _finished(copy: nn.Module, traced: TracedGraph, output: Any) -> ForwardTrace:
    simplify(traced.graph)
    tensors = tensors_by_name(copy)
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    aliases = AliasSets(traced.graph)
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node.meta["tensor"] is None:
            node.meta["tensor"] = names.get(id(node.meta["val"]))
            if node.meta["tensor"] is None and isinstance(node.meta["val"], FakeTensor):
                raise TilingError(
                    "its forward reads a tensor that is no input, parameter, buffer or attribute "
                    "of a module, so that its values are not known; register it as a buffer"
                )
            if node.meta["tensor"] is None:
                node.meta["val"] = node.meta["val"].clone()  # it was made in inference mode
        for source in _written(node):  # into what outlives the forward?
            for held in aliases.aliases_of(source):
                if held.op == "get_attr" and held.meta["tensor"] is not None:
                    raise TilingError(
                        f"its forward writes into {held.meta['tensor']} ({node.target}), which a "
                        "forward by tiles would not"
                    )
    outputs = traced.outputs()
    if not outputs:
        raise TilingError("its forward returns no tensor")
    if output is None:
        raise TilingError(
            f"{type(copy).__name__} has a __call__() of its own that runs no forward hooks; let it "
            "call super().__call__()"
        )
    if any(node.op == "get_attr" for node in outputs):
        raise TilingError("its forward returns one of its own parameters or buffers")
    nodes = {id(t): node for t, node in zip(find_tensors(output), outputs, strict=True)}
    return ForwardTrace(traced, output, nodes, tensors)


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, buffers and tensors that are plain attributes, by name."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                named[f"{path}.{name}" if path else name] = value
    return named


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Return what decides which operators run: classes, attributes, and tensors without values.

    Between two calls a user may turn deep supervision off, replace an activation, tie two weights,
    or load a model in half precision.
    """
    parts: list[Any] = []
    description = Description(model.modules())
    for path, module in model.named_modules():
        held = {
            name: Identity(value) if name == "forward" else description.of(value)
            for name, value in vars(module).items()
            if not is_table(name)
        }
        parts.append((path, type(module), tuple(held.items())))
    parts.append(_read_by_code(model))
    places: dict[int, int] = {}
    for name, tensor in tensors_by_name(model).items():
        place = places.setdefault(id(tensor), len(places))  # one tensor may have two names
        stride = tensor.stride() if tensor.layout is torch.strided else tensor.layout
        kind = tensor.dtype, tensor.device, tensor.requires_grad
        parts.append((name, place, tuple(tensor.shape), stride, *kind))
    return tuple(parts)


def _read_by_code(model: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Describe the globals, and the attributes of classes, that a model's code reads."""
    description = Description(model.modules())
    return tuple((read.label, description.of(read.value)) for read in code_reads(model))


def _written(node: fx.Node) -> list[fx.Node]:
    """Return what an operator writes into, also running statistics, which no schema declares."""
    if operator_of(node.target).kind is not Kind.CHANNEL_NORM:
        return written_nodes(node)
    bound = bind(node.target, node.args, node.kwargs)
    updates = bound.get("training", bound.get("use_input_stats"))
    running = [bound.get("running_mean"), bound.get("running_var")]
    return [each for each in running if isinstance(each, fx.Node)] if updates else []
