"""What a program costs: halos, voxels computed, bytes kept, and its peak, foretold."""

from __future__ import annotations

__all__ = [
    "PeakCounter",
    "foretold_peak",
    "halo",
    "kept_bytes",
    "measured_peak",
    "overhead",
    "whole_peak",
]

import functools
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from pocketize._torch import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    pytree,
    run_parts,
    storage_key,
    without_dispatch_modes,
)
from pocketize.graph.clone import clone_modules
from pocketize.graph.inputs import Inputs
from pocketize.memory import measure
from pocketize.memory.tracker import is_composite, storages_of
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.tiling.cutting import PatchForward, Tiling
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.intervals import Region, hull
from pocketize.passes.tiling.keeping import Keeper
from pocketize.passes.tiling.network import TiledGraph
from pocketize.passes.tiling.program import Direct, Program, Sweep
from pocketize.passes.tiling.recording import Recording
from pocketize.passes.tiling.reduce import reduction

#: Voxels around the middle whose halos are looked at: strides make them differ.
_PLACES = 32
#: Of sweeps with more tiles than this, some stand for all.
_TILES = 128


def halo(graph: TiledGraph) -> tuple[tuple[int, int] | None, ...]:
    """Return how far beyond a voxel of an output its input reaches, before and behind.

    Through norms and poolings of whole maps every voxel depends on all: their statistics are not
    counted. An axis is None where nothing but the volume's borders ends the reach, or an operator
    in between runs whole.
    """
    outputs = [node for node in graph.captured.outputs() if node in graph.forms]
    reaches: list[tuple[int, int] | None] = [(0, 0)] * graph.rank
    for node in outputs:
        found = _reach(graph, node)
        for axis in range(graph.rank):
            a, b = reaches[axis], found[axis]
            reaches[axis] = None if a is None or b is None else (max(a[0], b[0]), max(a[1], b[1]))
    return tuple(reaches)


def _reach(graph: TiledGraph, output: fx.Node) -> list[tuple[int, int] | None]:
    sizes = tuple(output.meta["val"].shape[2:])
    ends = [(0, 0)] * graph.rank
    complete = True
    for offset in range(-_PLACES // 2, _PLACES // 2):
        voxel = [min(max(size // 2 + offset, 0), size - 1) for size in sizes]
        needed: dict[fx.Node, Region] = {output: tuple((v, v + 1) for v in voxel)}
        for node in reversed(graph.nodes):
            if node not in needed:
                continue
            form = graph.forms.get(node)
            if form is None:
                complete = complete and not graph.is_map(node)
                continue
            for source, region in form.needs(needed[node]).items():
                needed[source] = hull(needed.get(source), region)
        for source, region in needed.items():
            if source.op != "placeholder":
                continue
            whole = source.meta["val"].shape[2:]
            for axis, ((low, high), size) in enumerate(zip(region, whole, strict=True)):
                factor = size / sizes[axis]
                first, last = voxel[axis] * factor, (voxel[axis] + 1) * factor
                before, behind = ends[axis]
                ends[axis] = (
                    max(before, math.ceil(first - low)) if low > 0 else max(before, size),
                    max(behind, math.ceil(high - last)) if high < size else max(behind, size),
                )
    return [
        pair if complete and max(pair) < limit else None
        for pair, limit in zip(ends, _sizes_of_inputs(graph), strict=True)
    ]


def _sizes_of_inputs(graph: TiledGraph) -> tuple[int, ...]:
    inputs = [n for n in graph.captured.graph.nodes if n.op == "placeholder" and graph.is_map(n)]
    return tuple(max(inputs, key=graph.voxels).meta["val"].shape[2:])


def overhead(program: Program) -> float:
    """Return the entries that sweeps compute, over those that the same operators have."""
    graph = program.graph
    computed = 0.0
    there: set[fx.Node] = set()
    for step in program.steps:
        if not isinstance(step, Sweep):
            continue
        there.update(node for node in step.order if not graph.forms[node].cheap)
        tiles = program.tiles(step)
        stride = -(-len(tiles) // _TILES)
        some = tiles[::stride]
        for tile in some:
            for node, region in program.regions(step, tile).items():
                if not graph.forms[node].cheap:
                    voxels = math.prod([high - low for low, high in region])
                    computed += voxels * _channels(node) * len(tiles) / len(some)
    network = sum(graph.voxels(node) * _channels(node) for node in there)
    return computed / network if network else 1.0


def _channels(node: fx.Node) -> int:
    shape = node.meta["val"].shape
    return int(shape[0] * shape[1])


def kept_bytes(program: Program, dtype: torch.dtype | None = None) -> int:
    """Return the most bytes that wait between sweeps at once, outputs left out.

    Args:
        program: to be carried out.
        dtype: in which floating maps wait; None for their own.
    """
    held: dict[fx.Node, int] = {}
    most = 0
    for step in program.steps:
        if isinstance(step, Direct):
            made: Sequence[fx.Node] = [step.node]
        else:
            made = step.targets
        for node in made:
            if node not in program.outputs:
                held[node] = _waiting(program.graph, node, dtype)
        most = max(most, sum(held.values()))
        for node in step.frees:
            held.pop(node, None)
    return most


def _waiting(graph: TiledGraph, node: fx.Node, dtype: torch.dtype | None) -> int:
    value = node.meta["val"]
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return graph.nbytes(node)
    return int(value.numel()) * dtype.itemsize


def measured_peak(
    model: nn.Module,
    inputs: Inputs,
    tiling: Tiling | None = None,
    mode: Literal["train", "infer"] = "train",
) -> int:
    """Return the peak that :func:`pocketize.measure` estimates, in bytes.

    Args:
        model: unchanged.
        inputs: of the call.
        tiling: instead of that of the model's forward by tiles; None for the model as it is.
        mode: of the measurement; a training step is one with Adam.

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


class PeakCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of live tensors on one device.

    Args:
        device: only tensors on devices of this type count.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device.type
        self.now = self.peak = 0
        self._live: dict[int, int] = {}
        self._watches: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and look at what it made."""
        kwargs = kwargs or {}
        if is_composite(func, self.device):
            with self:
                return run_parts(func, args, kwargs)
        out = func(*args, **kwargs)
        self.see(out)
        return out

    def see(self, values: Any) -> None:
        """Count tensors that are there."""
        for value in pytree.tree_leaves(values):
            if not isinstance(value, FakeTensor) or value.device.type != self.device:
                continue
            for storage in storages_of(value):
                key, nbytes = storage_key(storage), storage.nbytes()
                if key not in self._live:
                    self._live[key] = nbytes
                    gone = functools.partial(self._release, key)
                    self._watches[key] = weakref.ref(storage, gone)
                    self.now += nbytes
                    self.peak = max(self.peak, self.now)

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor no longer: it stands for one that is elsewhere."""
        for storage in storages_of(tensor):
            self.now -= self._live.get(storage_key(storage), 0)
            self._live[storage_key(storage)] = 0

    def _release(self, key: int, _: object) -> None:
        self.now -= self._live.pop(key, 0)
        self._watches.pop(key, None)


class _Elsewhere(Keeper):
    """Makes room on fake tensors, which do not count where they would not be on the device."""

    def __init__(
        self,
        place: str,
        device: torch.device,
        counter: PeakCounter,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("device", device, dtype=dtype)
        # what is in host memory counts for a model that is there itself
        self.counts = place == "device" or (place == "host" and device.type == "cpu")
        self.counter = counter

    def memory(
        self, size: int, held: torch.dtype, *, small: bool, name: str
    ) -> tuple[Tensor, Path | None]:
        peak = self.counter.peak
        made = super().memory(size, held, small=small, name=name)
        if not self.counts and not small:
            self.counter.forget(made[0])
            self.counter.peak = max(peak, self.counter.now)
        return made


def foretold_peak(recording: Recording, program: Program, tiling: Tiling) -> int:
    """Return the peak of the live tensors of a forward by tiles, in bytes, without running it.

    Weights and inputs on the device are in it; what convolutions allocate inside is not.

    Args:
        recording: of the forward.
        program: to be carried out.
        tiling: where what waits between sweeps is kept, and outputs; what is stored of them.
    """
    inputs = recording.captured.inputs
    mode, device = _mode_of(recording), _device_of(recording)
    with without_dispatch_modes(), torch.no_grad(), mode:
        counter = PeakCounter(device)
        counter.see((list(recording.tensors.values()), inputs.tensors()))
        execution = Execution(
            program,
            recording.tensors,
            recording.placeholders(inputs),
            _Elsewhere(tiling.keep, device, counter, tiling.held),
            outputs=_Elsewhere(tiling.output, device, counter),
            finish=reduction(tiling.reduce),
        )
        with counter:
            execution.run()
    return counter.peak


def whole_peak(recording: Recording) -> int:
    """Return the same of the recorded operators, each result freed after its last reader."""
    inputs, graph = recording.captured.inputs, recording.captured.graph
    mode, device = _mode_of(recording), _device_of(recording)
    with without_dispatch_modes(), torch.no_grad(), mode:
        counter = PeakCounter(device)
        counter.see((list(recording.tensors.values()), inputs.tensors()))
        with counter:
            _run_whole(graph, recording, recording.placeholders(inputs))
    return counter.peak


def _run_whole(graph: fx.Graph, recording: Recording, inputs: dict[fx.Node, Tensor]) -> None:
    held: dict[fx.Node, Any] = dict(inputs)
    last = {source: node for node in graph.nodes for source in node.all_input_nodes}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = node.meta["tensor"]
            held[node] = recording.tensors[name] if name else node.meta["val"]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
            held[node] = node.target(*args, **kwargs)
            del args, kwargs
        for source in node.all_input_nodes:
            if last[source] is node and node.op != "output":
                del held[source]


def _mode_of(recording: Recording) -> FakeTensorMode:
    for tensor in recording.captured.inputs.tensors():
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _device_of(recording: Recording) -> torch.device:
    tensors = [t for t in recording.tensors.values() if t.is_floating_point()]
    return [*tensors, *recording.captured.inputs.tensors()][0].device
