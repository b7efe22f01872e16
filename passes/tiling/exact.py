"""Compute the whole volume's outputs tile by tile: ``mode="exact"``."""

from __future__ import annotations

__all__ = [
    "ExactForward",
    "Prepared",
    "check_training",
    "prepare",
]

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from pocketize._torch import pytree, transforms_active
from pocketize.errors import ExecutionError
from pocketize.graph.capture import TracedGraph, find_tensors
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs, as_plain, first_parameter
from pocketize.graph.methods import set_mode
from pocketize.memory.hints import note_followed
from pocketize.passes.tiling.attributes import Description, mark_lost
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.figures import estimated_peak, largest_tile, measured_peak
from pocketize.passes.tiling.forward import (
    PatchForward,
    ProgressBar,
    SampledTiling,
    Tiling,
    autocast_state,
    dress,
    is_exported,
    is_fake,
    is_traced,
    output_reduction,
    volume_of,
)
from pocketize.passes.tiling.operators import draws
from pocketize.passes.tiling.processes import ShardedExecution, group_for
from pocketize.passes.tiling.program import Program, TileLoop, build_program
from pocketize.passes.tiling.resume import (
    ResumableExecution,
    ResumeState,
    resume_state_for,
    storage_for,
)
from pocketize.passes.tiling.side_effects import check_hooks
from pocketize.passes.tiling.tiled_graph import AliasSets, TiledGraph, TilingError, leave_views_out
from pocketize.passes.tiling.tracing import (
    ForwardTrace,
    fingerprint,
    tensors_by_name,
    trace_forward,
)
from pocketize.passes.tiling.training import differentiable_forward, updates_of

logger = logging.getLogger(__name__)

#: Programs for so many sizes of inputs are cached.
_CACHED = 4
#: Tilings that were found for a ``max_peak`` of training: a search takes long.
_SIZES: dict[Any, Tiling] = {}
_CACHED_SIZES = 32
#: The sampled tiles may miss the peak of all by one part in so many.
_SLACK = 256


@dataclass(frozen=True, eq=False)
class Prepared:
    """How a model is computed by tiles for inputs of one size."""

    trace: ForwardTrace
    program: Program
    #: estimated bytes of live tensors, known with ``max_peak``; 0 otherwise
    peak: int = 0


def prepare(
    model: nn.Module,
    inputs: Inputs,
    tiling: Tiling,
    *,
    training: bool = False,
    peak: Callable[[ForwardTrace, Program, Tiling], int] = estimated_peak,
) -> Prepared:
    """Trace a model, in evaluation mode unless ``training``, and plan how tiles compute it.

    Tiles for a ``max_peak`` are chosen by ``peak``, in bytes.

    Raises:
        TilingError: it cannot be computed by tiles.
        InputError: the tiles do not fit the inputs.
        OptionError: no tile meets ``max_peak``.
    """
    trace = trace_forward(model, inputs, training=training)
    if tiling.reduce is None:
        leave_views_out(trace.traced.graph)
        _check_overlaps(trace.traced)
    graph = TiledGraph(trace.traced)
    for node in graph.nodes:
        if draws(node):
            raise TilingError(
                f"{node.target} in {_where(node)} draws random numbers, which tiles would draw in "
                "another order; set its probability to 0, or put it into evaluation mode"
            )
    if tiling.size is None:

        def peak_of(tile: tuple[int, ...]) -> int:
            return peak(trace, build_program(graph, tile), tiling)

        tile, reached = largest_tile(graph.volume, tiling.peak_limit, peak_of, "a forward")
        return Prepared(trace, build_program(graph, tile), reached)
    program = build_program(graph, tiling.tile(graph.volume), sampled=tiling.sampled)
    if not any(isinstance(step, TileLoop) for step in program.steps):
        rows = graph.obstacles.items()
        found = list(dict.fromkeys(f"{why} ({_where(node)})" for node, why in rows))
        raise TilingError(
            "none of its operators on maps can be computed part by part: "
            + ("; ".join(found[:3]) or "there are none")
            + ("; ..." if len(found) > 3 else "")
        )
    return Prepared(trace, program)


def _check_overlaps(traced: TracedGraph) -> None:
    aliases, outputs = AliasSets(traced.graph), set(traced.outputs())
    for node in outputs:
        if len(outputs.intersection(aliases.aliases_of(node))) > 1:
            raise TilingError(
                f"it returns two parts of one tensor that overlap ({node.target} in "
                f"{_where(node)}), and tiles would make two tensors of them; return a clone of one"
            )


def _where(node: fx.Node) -> str:
    return node.meta["module"] or "the model itself"


def check_training(model: nn.Module, inputs: Inputs, tiling: Tiling) -> None:
    """Refuse what would be refused in the first step that trains by tiles.

    A model in evaluation mode is tried in training mode, others as they are.

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


class ExactForward(PatchForward):
    """A model's forward in evaluation mode, computed tile by tile, with the same outputs.

    With ``train``, gradients are computed by tiles as well. Otherwise, where gradients are enabled,
    in training mode, and where the model is traced or exported, the original forward runs. Programs
    are cached by the sizes of inputs; copies and files do not have the cache.
    """

    own_options: ClassVar[frozenset[str]] = frozenset(
        {"axis", "keep", "keep_dtype", "max_peak", "train"}
    )

    def __init__(self, module: nn.Module, tiling: Tiling) -> None:
        super().__init__(module, tiling)
        self._prepared: dict[Any, Prepared] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_prepared": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run by tiles in inference, and in training with ``train``."""
        inputs = Inputs(args, kwargs)
        empty = any(not tensor.numel() for tensor in inputs.tensors())
        if is_exported() or is_traced() or empty:
            return self.original(*args, **kwargs)
        trains = self.tiling.train and torch.is_grad_enabled()
        if transforms_active():
            if trains:
                raise ExecutionError(
                    "patchwise: a function transform (torch.func.grad, vmap, jvp) or forward-mode "
                    "AD does not go through training by tiles; call the network without it, or "
                    "rewrite it without pocketize's train=True"
                )
            return self.original(*args, **kwargs)
        try:
            if self._infers(inputs):
                bare = inputs.map(as_plain)
                return dress(self.module, self._run(self.prepare(bare), bare), inputs)
            if trains:
                return dress(self.module, self._train(inputs.map(as_plain)), inputs)
        except TilingError as error:
            # a dry run puts all modules into training mode; a model that cannot be trained by
            # tiles in its present modes is refused by the first real step
            if not is_fake(inputs):
                raise ExecutionError(f"patchwise: {error}") from error
        return self.original(*args, **kwargs)

    def _infers(self, inputs: Inputs) -> bool:
        if any(module.training for module in self.module.modules()):
            return False
        first = first_parameter(self.module)
        if first is not None and first.is_meta:
            return False
        if not torch.is_grad_enabled():
            return True
        wanted = [*self.module.parameters(), *inputs.tensors()]
        if self.tiling.reduce is None and not any(t.requires_grad for t in wanted):
            return True
        if not self.tiling.train:
            logger.info(
                "gradients are enabled, so the volume runs whole; use torch.inference_mode(), or "
                "train=True for gradients by tiles"
            )
        return False

    def prepare(self, inputs: Inputs, *, training: bool = False) -> Prepared:
        """Return the program for a call, from the cache where there is one; see :func:`prepare`."""
        check_hooks(self.module, training=training)
        key = (_shapes(inputs), autocast_state(), fingerprint(self.module), training)
        note_followed(sum(1 for _ in self.module.modules()))
        found = self._prepared.pop(key, None)
        if found is None:
            tiling = self.sized(inputs) if training else self.tiling
            # a trace needs no gradients
            found = prepare(self.module, inputs.map(Tensor.detach), tiling, training=training)
            while len(self._prepared) >= _CACHED:
                del self._prepared[next(iter(self._prepared))]
        self._prepared[key] = found  # the last inserted is the last to be removed
        return found

    def sized(self, inputs: Inputs) -> Tiling:
        """Return a tiling by size: for ``max_peak``, with the largest tiles that can be trained.

        Raises:
            OptionError: no tiles meet ``max_peak``.
        """
        tiling = self.tiling
        if tiling.size is not None:
            return tiling
        asks = tuple(t.requires_grad for t in [*self.module.parameters(), *inputs.tensors()])
        key = (tiling, asks, _shapes(inputs), autocast_state(), fingerprint(self.module))
        if key not in _SIZES:

            def peak_of(tile: tuple[int, ...]) -> int:
                sampled = SampledTiling(**{**vars(tiling), "size": tile, "max_peak": None})
                peak = measured_peak(self.module, inputs, sampled)
                return peak + peak // _SLACK

            limit, what = tiling.peak_limit, "a training step with Adam"
            tile, _ = largest_tile(volume_of(inputs), limit, peak_of, what)
            while len(_SIZES) >= _CACHED_SIZES:
                del _SIZES[next(iter(_SIZES))]
            _SIZES[key] = replace(tiling, size=tile, max_peak=None)
        return _SIZES[key]

    def _train(self, inputs: Inputs) -> Any:
        prepared = self.prepare(inputs, training=True)
        settings = self._settings(prepared, inputs)
        made = differentiable_forward(prepared.program, model=self.module, **settings)
        mark_lost(self.module, prepared.trace.lost)
        return prepared.trace.outputs(made, inputs)

    def _run(self, prepared: Prepared, inputs: Inputs) -> Any:
        trace, device = prepared.trace, self.device(inputs)
        finish = output_reduction(self.tiling.reduce)
        bar = ProgressBar(self.tiling.progress)
        with torch.no_grad():
            group = group_for(self, inputs)
            identity = prepared.program.tile, trace.traced.graph
            with resume_state_for(self, inputs, *identity) as state:
                settings = self._settings(prepared, inputs, state)
                kind: Any = Execution
                if state is not None:
                    kind, settings["state"] = ResumableExecution, state
                elif group is not None:
                    kind, settings["group"] = ShardedExecution, group
                execution = kind(prepared.program, finish=finish, progress=bar, **settings)
                try:
                    # the trace has autocast's casts in it
                    with torch.autocast(device.type, enabled=False):
                        made = execution.run()
                finally:
                    bar.close()
            if finish is not None:
                made = {node: _finished(node, tensor, finish) for node, tensor in made.items()}
        mark_lost(self.module, trace.lost)
        return trace.outputs(made, inputs)

    def _settings(
        self, prepared: Prepared, inputs: Inputs, state: ResumeState | None = None
    ) -> dict[str, Any]:
        """Return what :class:`Execution` takes."""
        device = self.device(inputs)
        return {
            "tensors": tensors_by_name(self.module),
            "inputs": prepared.trace.placeholders(inputs),
            "storage": storage_for(self, self.tiling.keep, device, state, self.tiling.stored_dtype),
            "outputs": storage_for(self, self.tiling.output, device, state),
        }


def _finished(node: fx.Node, tensor: Tensor, finish: Any) -> Tensor:
    """Reduce an output that was stored unreduced because something else read it, too."""
    value = node.meta["val"]
    reduced = tensor.dtype != value.dtype or tensor.shape != value.shape
    made: Tensor = tensor if reduced else finish(tensor)
    return made


def _shapes(inputs: Inputs) -> Any:
    """Return what a trace depends on: nesting, shapes, dtypes, and what is no tensor."""
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    seen: dict[int, int] = {}
    rows: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            same = seen.setdefault(id(leaf), len(seen))  # one tensor may be given twice
            rows.append((same, tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device))
        else:
            if find_tensors(leaf):
                raise TilingError(
                    f"an argument of type {type(leaf).__name__} holds tensors, which tiles do not "
                    "find in it; give tensors themselves, or in tuples, lists or dicts"
                )
            rows.append(Description().of(leaf))
    return str(spec), tuple(rows)
