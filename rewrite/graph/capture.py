"""Trace a model's forward as a ``torch.fx`` graph.

A dispatch mode runs over a fake copy of the model: every operator that reaches the
dispatcher becomes a node. Nothing is traced through Python, so control flow, hooks and foreign
modules do not matter, and nothing touches the user's object. Inside ``torch.inference_mode`` the
composite operators (``conv2d``, ``batch_norm``, ``linear``, attention) arrive whole.

Every node carries in ``node.meta``:

* ``"val"``: the value, a fake tensor or a nest of them (real tensors where ``TracedGraph.real``);
* ``"module"``: the path of the innermost module whose forward ran, ``""`` for the root;
* ``"call"``: how many times that module had been called before;
* ``"source"``: ``"file.py:88"`` of the line outside torch that called the operator;
* ``"tensor"``, on ``get_attr`` nodes: the name of the parameter or buffer, ``None`` for a constant;
* ``"seeded"``: whether the forward had set a seed of its own before.
"""

from __future__ import annotations

__all__ = [
    "TraceMode",
    "TracedGraph",
    "Tracer",
    "capture",
    "find_tensors",
    "quiet_tracing",
    "settle_inputs",
    "structure_of",
    "trace_module",
]

import contextlib
import dataclasses
import inspect
import operator
import os
import random
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pocketize._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    fake_tensor_logger,
    pytree,
    user_frames,
)
from pocketize.errors import CaptureError, InputError
from pocketize.graph.clone import clone, fake_clone, kept_random_states, quiet_code
from pocketize.graph.constants import Constants
from pocketize.graph.inputs import (
    Inputs,
    as_inputs,
    find_tensors,
    guess_inputs,
    structure_of,
    to_model,
)
from pocketize.graph.methods import check_methods, check_module, set_mode
from pocketize.graph.settings import settings_text

#: What traces draw random numbers from; a seed that nobody else would set.
_SEED = 0x706F636B6574
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


@dataclasses.dataclass(frozen=True, eq=False)
class TracedGraph:
    """One traced forward.

    Attributes:
        graph: operators as ``call_function`` nodes, inputs as placeholders, parameters, buffers and
            constants as ``get_attr`` nodes.
        inputs: the inputs it was traced with (fake, unless ``real``).
        train: whether the model was in training mode.
        structure: the nesting of the outputs with their shapes, to compare two traces.
        real: traced on real tensors because a branch depends on data; only the branch taken was
            seen.
    """

    graph: fx.Graph
    inputs: Inputs
    train: bool
    structure: Any
    real: bool = False

    @property
    def mode(self) -> str:
        """``"training mode"`` or ``"evaluation mode"``, with the settings of the variant."""
        settings = self.inputs.settings
        variant = f" with {settings_text(settings)}" if settings else ""
        return f"{'training' if self.train else 'evaluation'} mode{variant}"

    def operators(self) -> list[fx.Node]:
        """Return the operator nodes in the order in which they ran."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def outputs(self) -> list[fx.Node]:
        """Return the nodes of all output tensors."""
        (output,) = self.graph.find_nodes(op="output")
        return list(output.args[0])


def capture(model: nn.Module, inputs: Any = None, *, train: bool = False) -> TracedGraph:
    """Trace the forward of a model as a ``torch.fx`` graph.

    Args:
        model: any module. It is not called and not changed: a fake copy is traced.
        inputs: anything that :func:`pocketize.graph.inputs.as_inputs` takes; ``None`` guesses
            from the first convolution.
        train: trace in training instead of evaluation mode.

    Raises:
        CaptureError: the model could not be copied or did not run; the text names the module.
        InputError: the inputs cannot be read, or none could be guessed.
    """
    check_module(model)
    if inputs is None:
        settled = settle_inputs(model, None)
    else:
        settled = to_model(as_inputs(inputs, model), model)
    return Tracer(model).trace(settled, train=train)


def settle_inputs(model: nn.Module, inputs: Any) -> Inputs:
    """Return usable inputs: the given ones, or the first guess that runs in both modes.

    Raises:
        InputError: no guess ran; the text lists what was tried and why each failed.
        CaptureError: the model's class gives other answers than ``nn.Module`` does.
    """
    check_methods(model)
    if inputs is not None:
        return to_model(as_inputs(inputs, model), model)
    tried = []
    for guess in guess_inputs(model):
        candidate = to_model(guess, model)
        tracer = Tracer(model)  # a model that cannot be copied will not be with other inputs
        try:
            for train in (False, True):
                tracer.trace(candidate, train=train)
        except CaptureError as error:
            tried.append(f"  {candidate.describe()}: {error}")
        else:
            return candidate
    raise InputError(
        f"no guessed input runs through {type(model).__name__}; pass inputs=... . Tried:\n"
        + "\n".join(tried)
    )


class Tracer:
    """Traces one model several times: at several sizes, in both modes, on one fake copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._copy = fake_clone(model, self.mode)

    def trace(self, inputs: Inputs, *, train: bool) -> TracedGraph:
        """Trace the model's forward.

        Raises:
            CaptureError: the forward raised.
        """
        fakes = inputs.map(lambda t: t if isinstance(t, FakeTensor) else self.mode.from_tensor(t))
        try:
            with self.mode:
                return trace_module(self._copy, fakes, train=train)
        except CaptureError as error:
            if not isinstance(error.__cause__, _DATA_DEPENDENT):
                raise
        # A branch depends on values: run it on real ones, and keep only the branch taken.
        real = inputs.map(lambda t: t.detach().clone())
        return dataclasses.replace(trace_module(clone(self.model), real, train=train), real=True)


def trace_module(model: nn.Module, inputs: Inputs, *, train: bool | None) -> TracedGraph:
    """Trace a model that may be changed: its mode, buffers and random state are not kept.

    Args:
        model: a copy made for the purpose, fake or real.
        inputs: inputs of the same kind.
        train: the mode to set on the whole model; None leaves each module's flag.

    Raises:
        CaptureError: the forward raised. Its ``trace_mode`` attribute holds what had been traced.
    """
    if train is None:
        train = model.training
    else:
        set_mode(model, train)
    trace_mode = TraceMode(model, inputs)
    with quiet_tracing(model), trace_mode.module_paths():
        try:
            with torch.inference_mode(), trace_mode:
                output = inputs.call(model)
        except Exception as error:  # a user's forward may raise anything
            where = trace_mode.raised_in(error) or "the model itself"
            failure = CaptureError(
                f"{type(model).__name__} did not run in {'training' if train else 'evaluation'} "
                f"mode on {inputs.describe()}{_as_one_dict(inputs, model)}: "
                f"{type(error).__name__} in {where}: {_brief(error)}"
            )
            failure.trace_mode = trace_mode  # type: ignore[attr-defined]
            raise failure from error
    return trace_mode.finish(output, inputs, train)


def _as_one_dict(inputs: Inputs, model: nn.Module) -> str:
    """Say so where a model gets a dict whose keys are no arguments of its forward."""
    if inputs.kwargs or len(inputs.args) != 1 or not isinstance(inputs.args[0], dict):
        return ""
    takes = ""
    with contextlib.suppress(TypeError, ValueError):  # a forward written in C
        takes = f", as forward takes {', '.join(inspect.signature(model.forward).parameters)}"
    return f" (in one dict of {', '.join(map(str, inputs.args[0]))}{takes})"


class TraceMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that writes every operator into a ``torch.fx`` graph."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.model = model
        self.path = ""
        self.count = 0
        self._calls: dict[str, int] = {}
        self._stack: list[tuple[str, int]] = [("", 0)]
        self._error: BaseException | None = None
        self._raised_in = ""
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # identities stay unique only while tensors live
        for index, tensor in enumerate(inputs.tensors()):
            if id(tensor) not in self._nodes:
                self._assign(tensor, self.graph.placeholder(f"input_{index}"))
        held = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in reversed(held)}
        self._constants = Constants(self.graph)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and write its node."""
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except _DATA_DEPENDENT:
            # No branch on values, if the number comes from numbers: sizes that were computed.
            node = self._nodes.get(id(args[0])) if len(args) == 1 else None
            if node is None or (out := self._constants.number(node)) is None:
                raise
        if not find_tensors(out) and not isinstance(out, int | float | bool):
            return out  # asks about a tensor (its device, say) and computes nothing
        node_args, node_kwargs = pytree.tree_map_only(Tensor, self._node_of, (args, kwargs))
        self._fill(self.graph.call_function(func, node_args, node_kwargs), out)
        self.count += 1
        return out

    def finish(self, output: Any, inputs: Inputs, train: bool) -> TracedGraph:
        """Close the graph with the model's outputs."""
        tensors = find_tensors(output)
        self.graph.output([self._node_of(tensor) for tensor in tensors])
        return TracedGraph(self.graph, inputs, train, structure_of(output))

    @contextlib.contextmanager
    def module_paths(self) -> Iterator[None]:
        """Keep track of the module whose forward runs, by hooks on the traced copy."""
        handles = []
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._enter(path), prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append((path, self._calls.get(path, 0)))
            self._calls[path] = self._calls.get(path, 0) + 1
            self.path = path

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        error = sys.exc_info()[1]
        if error is not self._error:  # the innermost module that an exception leaves
            self._error, self._raised_in = error, self.path
        self._stack.pop()
        self.path = self._stack[-1][0]

    def raised_in(self, error: Exception) -> str:
        """Return the path of the module whose forward raised an error."""
        return self._raised_in if error is self._error else self.path

    def _node_of(self, tensor: Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is None:
            name = self._names.get(id(tensor))
            node = self.graph.create_node("get_attr", name or f"_constant_{len(self._alive)}")
            node.meta["tensor"] = name
            self._assign(tensor, node)
        return node

    def _assign(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta.setdefault("val", tensor)
        node.meta.setdefault("module", self.path)
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _fill(self, node: fx.Node, out: Any) -> None:
        path, call = self._stack[-1]
        seeded = torch.default_generator.initial_seed() != _SEED
        node.meta.update(val=out, module=path, call=call, source=_source(), seeded=seeded)
        if isinstance(out, Tensor):
            self._assign(out, node)
        elif isinstance(out, tuple | list):
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    part.meta.update(node.meta, val=item)
                    self._assign(item, part)


#: Recordings change what all threads share, so they take turns.
_TRACING = threading.RLock()


@contextlib.contextmanager
def quiet_tracing(model: nn.Module) -> Iterator[None]:
    """Fix what makes traces differ, and put it back: random states, fast paths, warnings.

    What hooks and forwards write into globals and closures is undone too, and synchronised batch
    norms run alone: a copy without memory has nothing to tell the other processes.
    """
    with _TRACING, _fixed(), quiet_code(model), _alone(model):
        yield


@contextlib.contextmanager
def _fixed() -> Iterator[None]:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # A shape that does not fit is an answer here; torch logs it as an error with its traceback.
    fake_logger = fake_tensor_logger()
    disabled, fake_logger.disabled = fake_logger.disabled, True
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with kept_random_states(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(_SEED)
            yield
    finally:
        fake_logger.disabled = disabled
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Let SyncBatchNorm do what it does in a single process; it refuses CPU tensors in several."""
    layers = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    layers = [m for m in layers if type(m).forward is nn.SyncBatchNorm.forward]
    layers = [m for m in layers if "forward" not in vars(m)]
    for layer in layers:
        vars(layer)["forward"] = types.MethodType(nn.BatchNorm1d.forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _source() -> str:
    frame = next(user_frames(3), None)  # what called the operator
    if frame is None or frame.f_code is Inputs.call.__code__:
        return ""  # nobody's forward is in between: a graph was run
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
