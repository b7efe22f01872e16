"""What a network does with inputs of one size, recorded so that it can be done part by part.

A recording says which operators ran, and nothing of what a forward does beside them: attributes
that it sets, buffers that it counts in, hooks that somebody reads values with. Where there is any
of that, running the operators is not running the forward, and the recording is refused.
"""

from __future__ import annotations

__all__ = [
    "Recording",
    "check_hooks",
    "described",
    "fingerprint",
    "record_forward",
    "tensors_by_name",
]

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pocketize._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    global_forward_hooks,
    without_dispatch_modes,
)
from pocketize.errors import CaptureError
from pocketize.graph.capture import Captured, find_tensors, quiet_recording, record
from pocketize.graph.clone import fake_clone
from pocketize.graph.inputs import Inputs
from pocketize.ops.schema import bind, operator_name
from pocketize.passes.shared.forwards import first_parameter, wrapping
from pocketize.passes.shared.nests import map_tensors
from pocketize.passes.tiling.aliasing import Memory, written_by
from pocketize.passes.tiling.cutting import PatchForward, name_and_code
from pocketize.passes.tiling.gradients import check_gradients
from pocketize.passes.tiling.left import (
    Left,
    NotComputed,
    check_state,
    is_simple,
    is_table,
    state_of,
)
from pocketize.passes.tiling.network import TilingError
from pocketize.passes.tiling.running_statistics import stop_tracking
from pocketize.passes.tiling.simplifying import simplify

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class Recording:
    """One recorded forward, with all that is needed to run its operators.

    Attributes:
        captured: the graph.
        template: what the forward returned, with fake tensors.
        nodes: the node of each fake tensor in the template, by identity.
        tensors: fake parameters and buffers by name, as the recorded copy has them.
        left: attributes in which the forward leaves a tensor for later; running the operators
            leaves none.
    """

    captured: Captured
    template: Any
    nodes: dict[int, fx.Node]
    tensors: dict[str, Tensor]
    left: tuple[Left, ...] = ()

    def placeholders(self, inputs: Inputs) -> dict[fx.Node, Tensor]:
        """Return the tensors of a call by the placeholder that each stands for."""
        tensors = inputs.tensors()
        return {
            node: tensors[int(str(node.target).rpartition("_")[2])]
            for node in self.captured.graph.nodes
            if node.op == "placeholder"
        }

    def outputs(self, made: Mapping[fx.Node, Tensor], inputs: Inputs) -> Any:
        """Put tensors into the nest that the forward returned.

        Args:
            made: outputs that were computed; the others are inputs, or views of these.
            inputs: of the call.
        """
        held = {**self.placeholders(inputs), **made}
        return map_tensors(
            self.template, lambda _: True, lambda t: _result(self.nodes[id(t)], held)
        )


def _result(node: fx.Node, held: dict[fx.Node, Tensor]) -> Tensor:
    """Return a result that is held, or a view of one, which is then held, too."""
    if node not in held:
        assert isinstance(node.args[0], fx.Node)
        assert callable(node.target)
        held[node] = node.target(_result(node.args[0], held), *node.args[1:], **node.kwargs)
    return held[node]


def record_forward(model: nn.Module, inputs: Inputs, *, training: bool = False) -> Recording:
    """Record the forward of a model in evaluation mode, on a copy without memory.

    The copy's own forward and hooks are left out: they run outside of what is recorded.

    Args:
        model: the model; of one that runs by tiles, what stands below the forward by tiles.
        inputs: of the call; autocast is taken from the surroundings.
        training: record each module in the mode that it is in, instead.

    Raises:
        TilingError: running the operators would not be running the forward.
        CaptureError: the model cannot be copied, or did not run.
    """
    check_hooks(model, training=training)
    # Whoever watches operators from outside is not to see those on fake tensors.
    with without_dispatch_modes(), torch.inference_mode(False):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        copy = fake_clone(model, mode)
        _uncover(copy)
        for table in _HOOKS:
            vars(copy)[table].clear()
        returned = _Returned()
        copy.register_forward_hook(returned)
        for module in () if training else copy.modules():
            module.training = False
        if training:
            stop_tracking(copy)
        before = state_of(copy)
        first = first_parameter(copy)
        fakes = inputs.map(mode.from_tensor)
        if first is not None:  # a volume may wait in host memory, and a model be on the device
            with mode:
                fakes = fakes.map(lambda tensor: tensor.to(first.device))
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would outlive the copy's weights
        try:
            with mode:
                captured = record(copy, fakes, train=None if training else False)
                output, after = returned.value, state_of(copy)
                if after != before:  # by a flag that it sets once, and that changes nothing?
                    again = record(copy, fakes, train=None if training else False)
                    if state_of(copy) == after and str(again.graph) == str(captured.graph):
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
        left = check_state(copy, before, after)
        if training:
            with mode, quiet_recording(copy):
                check_gradients(copy, fakes)
        return replace(_finished(copy, captured, output), left=left)


def _uncover(copy: nn.Module) -> None:
    """Put what stands below a forward by tiles in place of all that stands above."""
    forward = wrapping(copy, PatchForward)
    if forward is not None:
        del vars(copy)["forward"]
        if forward.inner is not None:
            vars(copy)["forward"] = forward.inner


class _Returned:
    """A hook that keeps what a forward returns."""

    value: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.value = output


def _finished(copy: nn.Module, captured: Captured, output: Any) -> Recording:
    simplify(captured.graph)
    tensors = tensors_by_name(copy)
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    memory = Memory(captured.graph)
    for node in captured.graph.nodes:
        if node.op == "get_attr" and node.meta["tensor"] is None:
            node.meta["tensor"] = names.get(id(node.meta["val"]))
            if node.meta["tensor"] is None and isinstance(node.meta["val"], FakeTensor):
                raise TilingError(
                    "its forward reads a tensor that is no input, parameter, buffer or attribute "
                    "of a module, so that its values are not known; register it as a buffer"
                )
            if node.meta["tensor"] is None:
                node.meta["val"] = node.meta["val"].clone()  # it was made in inference mode
        _check_written(node, memory)
    outputs = captured.outputs()
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
    return Recording(captured, output, nodes, tensors)


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
    """Return what decides which operators run: classes, attributes, and tensors but for values.

    Somebody may turn deep supervision off between two calls, replace an activation, tie two
    weights, or load a model in half precision.
    """
    parts: list[Any] = []
    for path, module in model.named_modules():
        held = {
            name: _Is(value) if name == "forward" else described(value)
            for name, value in vars(module).items()
            if not is_table(name)
        }
        parts.append((path, type(module), tuple(held.items())))
    places: dict[int, int] = {}
    for name, tensor in tensors_by_name(model).items():
        place = places.setdefault(id(tensor), len(places))  # one tensor may have two names
        kind = tensor.dtype, tensor.device, tensor.requires_grad
        parts.append((name, place, tuple(tensor.shape), _stride(tensor), *kind))
    return tuple(parts)


def _stride(tensor: Tensor) -> Any:
    return tensor.stride() if tensor.layout is torch.strided else tensor.layout


class _Is:
    """Equal to another of the same object alone, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return name_and_code(self.value)


def described(value: Any, depth: int = 4) -> Any:
    """Return something that compares equal while a forward may take a value for the same."""
    if isinstance(value, Tensor | NotComputed):
        return Tensor  # told apart elsewhere
    if is_simple(value):
        return type(value), value
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, value.tobytes()
    if not depth or isinstance(value, nn.Module | type):
        return _Is(value)
    if isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else value
        return type(value), tuple(described(item, depth - 1) for item in items)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(described(item, depth - 1) for item in value)
    return _Is(value), described(dict(getattr(value, "__dict__", {})), depth - 1)


def check_hooks(model: nn.Module, *, training: bool = False) -> None:
    """Refuse hooks of the user's on inner modules, which tiles do not run.

    Args:
        model: whose own hooks run around its forward.
        training: look at hooks of the backward pass, too.

    Raises:
        TilingError: there is one.
    """
    tables = {"forward": _HOOKS, **({"backward": _BACKWARD_HOOKS} if training else {})}
    found = [("every module", "forward", hook) for hook in global_forward_hooks()]
    for path, module in model.named_modules():
        for kind, names in tables.items() if path else ():
            hooks = (hook for name in names for hook in vars(module).get(name, {}).values())
            found += [(path, kind, hook) for hook in hooks]
    for path, kind, hook in found:
        home = getattr(hook, "__module__", None) or type(hook).__module__
        if home.partition(".")[0] not in ("torch", "pocketize"):
            raise TilingError(
                f"{path} has a {kind} hook ({_name(hook)}), which tiles would not run; remove it, "
                "and register it again afterwards"
            )


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _check_written(node: fx.Node, memory: Memory) -> None:
    """Refuse operators that write into what outlives the forward."""
    for source in _written(node):
        for held in memory.beside(source):
            if held.op == "get_attr" and held.meta["tensor"] is not None:
                raise TilingError(
                    f"its forward writes into {held.meta['tensor']} ({node.target}), which a "
                    "forward by tiles would not"
                )


def _written(node: fx.Node) -> list[fx.Node]:
    """Return what an operator writes into; running statistics, of which no schema tells, too."""
    name = operator_name(node.target).rpartition(".")[2]
    if name not in ("batch_norm", "instance_norm"):
        return written_by(node)
    bound = bind(node.target, node.args, node.kwargs)
    updates = bound["training"] if name == "batch_norm" else bound["use_input_stats"]
    running = [bound["running_mean"], bound["running_var"]]
    return [each for each in running if isinstance(each, fx.Node)] if updates else []
