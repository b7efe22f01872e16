"""What a program costs: halos, computed voxels, stored bytes, and an estimate of its peak."""

from __future__ import annotations

__all__ = [
    "estimated_peak",
    "halo",
    "kept_bytes",
    "largest_tile",
    "measured_peak",
    "overhead",
    "whole_peak",
]

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from pocketize._torch import FakeTensor, FakeTensorMode, without_dispatch_modes
from pocketize.errors import OptionError
from pocketize.graph.clone import clone_modules
from pocketize.graph.inputs import Inputs
from pocketize.memory import measure
from pocketize.memory.tracker import LiveTracker
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.forward import (
    OutputReduction,
    PatchForward,
    Tiling,
    output_reduction,
)
from pocketize.passes.tiling.intervals import Box, box_of
from pocketize.passes.tiling.program import FullSizeOp, Program, TileLoop, needed_boxes
from pocketize.passes.tiling.storage import Buffer, Storage
from pocketize.passes.tiling.tiled_graph import TiledGraph
from pocketize.passes.tiling.tracing import ForwardTrace
from pocketize.units import bytes_text

#: Number of voxels around the middle whose halos are computed: strides make them differ.
_PLACES = 32
#: In loops with more tiles than this, some stand for all.
_TILES = 128


def halo(graph: TiledGraph) -> tuple[tuple[int, int] | None, ...]:
    """Return the halo of an output voxel along each axis, before and behind.

    Statistics of norms and of poolings of whole maps are not counted: through them every voxel
    depends on all. An axis is None where only the volume's border ends the receptive field, or an
    operator in between runs whole.
    """
    order = [node for node in graph.nodes if node in graph.forms]
    ends = [(0, 0)] * graph.rank
    outputs = [node for node in graph.traced.outputs() if node in graph.forms]
    for output, offset in itertools.product(outputs, range(-_PLACES // 2, _PLACES // 2)):
        sizes = tuple(output.meta["val"].shape[2:])
        voxel = [min(max(size // 2 + offset, 0), size - 1) for size in sizes]
        needed = needed_boxes(graph, order, {output: tuple((v, v + 1) for v in voxel)})
        for source, box in needed.items():
            if source.op != "placeholder":
                if source not in graph.forms and graph.is_map(source):
                    return (None,) * graph.rank
                continue
            whole = source.meta["val"].shape[2:]
            for axis, ((low, high), size) in enumerate(zip(box, whole, strict=True)):
                factor = size / sizes[axis]
                first, last = voxel[axis] * factor, (voxel[axis] + 1) * factor
                before, behind = ends[axis]
                ends[axis] = (
                    max(before, math.ceil(first - low) if low > 0 else size),
                    max(behind, math.ceil(high - last) if high < size else size),
                )
    pairs = zip(ends, graph.volume, strict=True)
    return tuple(pair if max(pair) < size else None for pair, size in pairs)


def overhead(program: Program) -> float:
    """Return the entries that loops compute, as a multiple of those in their results."""
    graph = program.graph
    computed = 0.0
    there: set[fx.Node] = set()
    for step in program.steps:
        if not isinstance(step, TileLoop):
            continue
        there.update(node for node in step.order if not graph.forms[node].cheap)
        tiles = program.tiles(step)
        some = tiles[:: -(-len(tiles) // _TILES)]
        for tile in some:
            for node, box in program.boxes(step, tile).items():
                if not graph.forms[node].cheap:
                    computed += _entries(node, box) * len(tiles) / len(some)
    network = sum(_entries(node) for node in there)
    return computed / network if network else 1.0


def _entries(node: fx.Node, box: Box | None = None) -> int:
    """Return the number of entries of a map, or of a box of it."""
    shape = node.meta["val"].shape
    return math.prod([*shape[:2], *(b - a for a, b in box or box_of(shape))])


def kept_bytes(program: Program, dtype: torch.dtype | None = None) -> int:
    """Return the most bytes that are stored between tile loops at once, outputs left out.

    Floating-point maps are stored in ``dtype``; None is their own.
    """

    def stored_bytes(node: fx.Node) -> int:
        value = node.meta["val"]
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return program.graph.nbytes(node)
        return int(value.numel()) * dtype.itemsize

    held: dict[fx.Node, int] = {}
    most = 0
    for step in program.steps:
        made = [step.node] if isinstance(step, FullSizeOp) else step.targets
        held |= {node: stored_bytes(node) for node in made if node not in program.outputs}
        most = max(most, sum(held.values()))
        for node in step.frees:
            held.pop(node, None)
    return most


def measured_peak(
    model: nn.Module,
    inputs: Inputs,
    tiling: Tiling | None = None,
    mode: Literal["train", "infer"] = "train",
) -> int:
    """Return the peak that :func:`pocketize.measure` estimates, in bytes; training is with Adam.

    With a tiling the model runs by it, instead of by its own.

    Raises:
        MeasureError: the model does not get through it on fake tensors.
    """
    copy = clone_modules(model)
    if tiling is not None:
        forward = wrapping(copy, PatchForward)
        assert forward is not None
        forward.tiling = tiling
    if any(module.training for module in copy.modules()):
        copy.training = True  # or else all would be set to training
    with without_dispatch_modes():
        return measure(copy, inputs, mode, estimate=True).peak


def largest_tile(
    volume: Sequence[int], limit: int, peak_of: Callable[[tuple[int, ...]], int], what: str
) -> tuple[tuple[int, ...], int]:
    """Return the largest tiles whose peak is within a limit in bytes, and their peak.

    Raises:
        OptionError: there are none; the text says what the smallest take.
    """
    tiles = [tuple(volume)]  # each is half of the one before along its longest axis
    while max(tiles[-1]) > 8:
        last = tiles[-1]
        axis = max(range(len(last)), key=lambda a: (last[a], a))
        tiles.append(tuple(-(-t // 2) if a == axis else t for a, t in enumerate(last)))
    low, high = 0, len(tiles) - 1
    found, least = None, 0
    while low <= high:
        middle = (low + high) // 2
        peak = peak_of(tiles[middle])
        if peak <= limit:
            found, high = (tiles[middle], peak), middle - 1
        else:
            low, least = middle + 1, peak
    if found is None:
        raise OptionError(
            f"patchwise: option 'max_peak': no tile keeps the live tensors of {what} within "
            f"{bytes_text(limit)}; with tiles of {tiles[-1]} they take {bytes_text(least)}, "
            "weights and input among them. Say max_peak of at least that, or keep='host' and "
            "output='host' on a GPU, 'disk' on a CPU; pocketize.fit tries all passes"
        )
    return found


def estimated_peak(
    trace: ForwardTrace,
    program: Program,
    tiling: Tiling,
    *,
    inputs: Mapping[fx.Node, Tensor | Buffer] | None = None,
    outputs: Storage | None = None,
    finish: OutputReduction | None = None,
) -> int:
    """Return the peak of the live tensors of a forward by tiles, in bytes, without running it.

    Weights and inputs on the device are in it; what convolutions allocate inside is not. Inputs and
    outputs are elsewhere if buffers and a storage are given, and ``finish`` then precedes storing.
    """
    with _counting(trace, inputs is None) as counter:
        device = _device_of(trace)
        execution = Execution(
            program,
            tensors=trace.tensors,
            inputs=inputs or trace.placeholders(trace.traced.inputs),
            storage=Storage(tiling.keep, device, dtype=tiling.stored_dtype),
            outputs=outputs or Storage(tiling.output, device),
            finish=finish or output_reduction(tiling.reduce),
        )
        with counter:
            execution.run()
    return counter.peak


def whole_peak(trace: ForwardTrace) -> int:
    """Return the peak of the traced operators, each result freed after its last reader."""
    with _counting(trace) as counter, counter:
        _run_whole(trace.traced.graph, trace, trace.placeholders(trace.traced.inputs))
    return counter.peak


def _run_whole(graph: fx.Graph, trace: ForwardTrace, inputs: dict[fx.Node, Tensor]) -> None:
    held: dict[fx.Node, Any] = dict(inputs)
    last = {source: node for node in graph.nodes for source in node.all_input_nodes}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = node.meta["tensor"]
            held[node] = trace.tensors[name] if name else node.meta["val"]
        elif isinstance(node.meta.get("val"), int | float):  # a number that was read from a tensor
            held[node] = node.meta["val"]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
            held[node] = node.target(*args, **kwargs)
            del args, kwargs
        for source in node.all_input_nodes:
            if last[source] is node and node.op != "output":
                del held[source]


@contextlib.contextmanager
def _counting(trace: ForwardTrace, with_inputs: bool = True) -> Iterator[LiveTracker]:
    """Yield a counter of live bytes, not yet entered, that has seen the weights and the inputs."""
    inputs = trace.traced.inputs.tensors()
    mode = next((t.fake_mode for t in inputs if isinstance(t, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    with without_dispatch_modes(), torch.no_grad(), mode:
        counter = LiveTracker(_device_of(trace), fake=True)
        counter.assign("inputs", [*trace.tensors.values(), *(inputs if with_inputs else ())])
        counter.enter("forward")
        yield counter


def _device_of(trace: ForwardTrace) -> torch.device:
    tensors = [t for t in trace.tensors.values() if t.is_floating_point()]
    return [*tensors, *trace.traced.inputs.tensors()][0].device
