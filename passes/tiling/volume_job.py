"""A network that is prepared for one volume: what :func:`pocketize.run_volume` runs."""

from __future__ import annotations

__all__ = ["Reduce", "VolumeEstimate", "VolumeJob"]

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn

from pocketize._torch import FakeTensorMode, without_dispatch_modes
from pocketize.errors import CaptureError, ExecutionError, InputError, PocketizeWarning
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.attributes import mark_lost
from pocketize.passes.tiling.exact import ExactForward
from pocketize.passes.tiling.exact import prepare as plan_tiles
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.figures import estimated_peak, kept_bytes, overhead, whole_peak
from pocketize.passes.tiling.forward import OutputReduction, ProgressBar, Tiling
from pocketize.passes.tiling.intervals import cut
from pocketize.passes.tiling.plan_text import times
from pocketize.passes.tiling.processes import ShardedExecution, ShardLayout, TileGroup, group_for
from pocketize.passes.tiling.program import FullSizeOp, Program, TileLoop
from pocketize.passes.tiling.resume import (
    ResumableExecution,
    ResumeState,
    digest,
    resume_state_for,
    storage_for,
)
from pocketize.passes.tiling.sinks import FakeStorage, SharedSink, Sink, SinkStorage
from pocketize.passes.tiling.sources import FakeVolume, SourceBuffer, VolumeSource, boxes
from pocketize.passes.tiling.storage import Storage
from pocketize.passes.tiling.tiled_graph import TilingError
from pocketize.passes.tiling.tracing import ForwardTrace, tensors_by_name, trace_forward
from pocketize.units import bytes_text

Reduce = Literal["argmax", "softmax", "sigmoid", "binary"]
_CPU, _META = torch.device("cpu"), torch.device("meta")
#: uint16 has no more labels.
_MOST_LABELS = 1 << 16


@dataclass(frozen=True)
class VolumeEstimate:
    """What :func:`pocketize.run_volume` takes.

    Attributes:
        tile: sizes of a tile.
        tiles: number of tiles in the volume.
        loops: tile loops over the volume.
        peak: bytes of live tensors on the device at the peak, weights among them. Workspaces inside
            convolutions are not, nor what waits elsewhere.
        whole: the same where the volume runs whole.
        waiting: bytes that wait between tile loops, at most; on the device small maps, the rest
            where ``keep`` says.
        result: bytes that are written.
        overhead: voxels that are computed, as a multiple of those in the network.
    """

    tile: tuple[int, ...]
    tiles: int
    loops: int
    peak: int
    whole: int
    waiting: int
    result: int
    overhead: float

    def __str__(self) -> str:
        return (
            f"{self.tiles} tiles of {times(self.tile)} in {self.loops} loops; "
            f"{self.overhead:.2f} times the voxels of the network are computed\n"
            f"live tensors on the device: {bytes_text(self.peak)}, of the volume as a whole "
            f"{bytes_text(self.whole)}\n"
            f"waiting between loops: {bytes_text(self.waiting)}\n"
            f"result: {bytes_text(self.result)}"
        )


class VolumeJob:
    """A network, planned for a volume.

    Args:
        model: in evaluation mode.
        volume: the source; its values are not read here.
        tiling: of exact mode.
        reduce: applied to the output.
        allow_whole: operators may need maps of the volume's size as a whole.

    Raises:
        ExecutionError: the network cannot be computed by tiles, or does not return one map.
        InputError: it does not run on a volume of this shape, or the tiles do not fit.
        OptionError: no tile meets ``max_peak``.
    """

    def __init__(
        self,
        model: nn.Module,
        volume: VolumeSource,
        tiling: Tiling,
        reduce: Reduce | None,
        *,
        allow_whole: bool,
    ) -> None:
        self.volume, self.tiling, self.reduce = volume, tiling, reduce
        self.forward = ExactForward(model, tiling)  # it is not installed
        with without_dispatch_modes(), FakeTensorMode():
            fake = self._inputs(volume.device)
        try:
            prepared = plan_tiles(model, fake, tiling, peak=self._peak)
        except TilingError as error:
            raise ExecutionError(f"run_volume: {error}") from error
        except CaptureError as error:
            raise InputError(
                f"run_volume: the network does not run on an input of {times(volume.shape)} "
                f"{str(volume.dtype).removeprefix('torch.')}{volume.axes_text()}: "
                f"{error}{self._fitting()}"
            ) from error
        self.trace, self.program = prepared.trace, prepared.program
        self.node = _output_of(self.trace)
        value = self.node.meta["val"]
        self.finish = _finish(reduce, value)
        loops = [step for step in self.program.steps if isinstance(step, TileLoop)]
        #: what computes the output; None where it runs whole
        self.loop = next((step for step in loops if self.node in step.targets), None)
        spatial = tuple(value.shape[2:])
        counts = tuple(-(-a // b) for a, b in zip(volume.shape[2:], self.program.tile, strict=True))
        counts = self.loop.counts if self.loop is not None else counts
        #: sizes of the boxes that are written
        self.block = tuple(-(-size // count) for size, count in zip(spatial, counts, strict=True))
        if volume.shape[2:] != volume.sizes:
            if spatial != volume.shape[2:]:
                raise InputError(
                    f"run_volume: the network returns {times(spatial)} voxels for "
                    f"{times(volume.shape[2:])}, and padding cannot be cut off; leave out pad_to"
                )
            spatial = volume.sizes
        #: of the result, and its dtype unless the sink has another
        channels = int(value.shape[1])
        one = reduce == "argmax" or (reduce == "binary" and channels == 1)
        self.shape = spatial if one else (channels, *spatial)
        self.dtype = _result_dtype(reduce, value)
        #: boxes are finished where they are computed, as nothing else reads the output
        self.alone = self.loop is not None and _is_alone(self.node)
        self._check_whole(allow_whole)

    def _inputs(self, device: torch.device) -> Inputs:
        volume = self.volume
        return Inputs((torch.empty(volume.shape, dtype=volume.dtype, device=device),))

    def _peak(self, trace: ForwardTrace, program: Program, tiling: Tiling) -> int:
        volume, node = self.volume, _output_of(trace)
        fake = FakeVolume(volume.shape, volume.device, volume.dtype)
        return estimated_peak(
            trace,
            replace(program, sampled=True),
            tiling,
            inputs=dict.fromkeys(trace.placeholders(trace.traced.inputs), fake),
            outputs=FakeStorage("host", volume.device) if _is_alone(node) else None,
            finish=_finish(self.reduce, node.meta["val"]),
        )

    def _fitting(self) -> str:
        """Say to which multiple the volume can be padded so that it runs through the network."""
        volume = self.volume
        for multiple in (2, 4, 8, 16, 32, 64, 128):
            sizes = [-(-size // multiple) * multiple for size in volume.sizes]
            with without_dispatch_modes(), FakeTensorMode():
                x = torch.empty(
                    [*volume.shape[:2], *sizes], dtype=volume.dtype, device=volume.device
                )
            with contextlib.suppress(CaptureError, TilingError):
                trace_forward(self.forward.module, Inputs((x,)))
                return f". It runs with pad_to={multiple}, which adds zeros at the end of each axis"
        return ""

    def _check_whole(self, allowed: bool) -> None:
        """Refuse operators that need as much as the volume at once, or warn of them."""
        limit = math.prod(self.volume.shape) * self.volume.dtype.itemsize
        graph, found = self.program.graph, {}
        for step in self.program.steps:
            if isinstance(step, FullSizeOp):
                nodes = [step.node, *step.node.all_input_nodes]
                most = max(map(graph.nbytes, filter(graph.depends_on_input, nodes)), default=0)
                if most >= limit and most > self.program.limit:
                    where = step.node.meta["module"] or "the network itself"
                    found[f"{str(step.node.target).removeprefix('aten.')} in {where}"] = most
        if not found:
            return
        text = (
            f"run_volume: {', '.join(list(found)[:4])}{', ...' if len(found) > 4 else ''} cannot "
            f"be computed by tiles and would hold {bytes_text(max(found.values()))} at once, as "
            "much as the volume or more"
        )
        if not allowed:
            raise ExecutionError(
                f"{text}; say allow_whole=True if there is room, or use a network without"
            )
        warnings.warn(text, PocketizeWarning, stacklevel=4)

    def estimate(self) -> VolumeEstimate:
        """Return what the job takes."""
        program, sizes = self.program, self.volume.shape[2:]
        return VolumeEstimate(
            tile=program.tile,
            tiles=math.prod(-(-a // b) for a, b in zip(sizes, program.tile, strict=True)),
            loops=sum(isinstance(step, TileLoop) for step in program.steps),
            peak=self._peak(self.trace, program, self.tiling),
            whole=whole_peak(self.trace),
            waiting=kept_bytes(program, self.tiling.stored_dtype),
            result=math.prod(self.shape) * np.dtype(self.dtype).itemsize,
            overhead=overhead(program),
        )

    # -- running ----------------------------------------------------------------------------------

    def group(self) -> TileGroup | None:
        """Return the processes that share the tiles, if there are several."""
        return group_for(self.forward, self._inputs(_META))

    def sink(self, out: Any, group: TileGroup | None, on_block: Any) -> Sink:
        """Return where the result is written, checked."""
        if callable(out) and not hasattr(out, "__setitem__"):
            out = out(self.shape, np.dtype(self.dtype), self.block)
        if out is None:
            # with a group the sink refuses an array of this process
            out = self._array() if group is None else np.broadcast_to(self.dtype(0), self.shape)
        channels = len(self.shape) > len(self.block)
        options: dict[str, Any] = {"channels": channels, "on_block": on_block}
        self._check_apart(out)
        if group is None:
            return Sink(out, self.shape, self.dtype, **options)
        layout = ShardLayout(self.program, group.size)
        slab = (0, self.shape[layout.axis + channels])
        if self.alone and self.loop is not None:
            slab = layout.block(self.node, self.loop, group.rank)[layout.axis]
        return SharedSink(
            out, self.shape, self.dtype, group=group, axis=layout.axis, slab=slab, **options
        )

    def _check_apart(self, out: Any) -> None:
        """Refuse to write where later tiles read."""
        out = out.numpy() if isinstance(out, Tensor) else out
        for part in self.volume.parts:
            arrays = isinstance(part, np.ndarray) and isinstance(out, np.ndarray)
            same = part is out or (_file_of(out) is not None and _file_of(part) == _file_of(out))
            if same or (arrays and np.may_share_memory(part, out)):
                raise InputError(
                    "run_volume: out is where the source is, so that tiles would read results of "
                    "others; name another"
                )

    def _array(self) -> Any:
        """Return an array in memory, or in a file that vanishes with it."""
        if self.tiling.keep != "disk":
            return np.empty(self.shape, self.dtype)
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        storage = Storage("disk", _CPU, folder=self.tiling.folder)
        return storage.allocate(self.shape, dtype).tensor.numpy()

    def run(self, sink: Sink, group: TileGroup | None) -> None:
        """Compute the result, and write it."""
        with self._state() as state, contextlib.closing(ProgressBar(self.tiling.progress)) as bar:
            direct = self.alone and state is None
            execution = self._execution(sink if direct else None, group, state, bar)
            # the trace has autocast's casts in it
            with torch.autocast(self.volume.device.type, enabled=False):
                made = execution.run()
            if not direct and (group is None or group.rank == 0):
                self._copy(made[self.node], sink)
            del made
            sink.finish()
        mark_lost(self.forward.module, self.trace.lost)

    def _execution(
        self, sink: Sink | None, group: TileGroup | None, state: ResumeState | None, bar: Any
    ) -> Execution:
        device, tiling = self.volume.device, self.tiling
        kind: Any = Execution
        more: dict[str, Any] = {}
        if state is not None:
            kind, more["state"] = ResumableExecution, state
        elif group is not None:
            kind, more["group"] = ShardedExecution, group
        placeholders = self.trace.placeholders(self.trace.traced.inputs)
        execution: Execution = kind(
            self.program,
            tensors=tensors_by_name(self.forward.module),
            inputs=dict.fromkeys(placeholders, SourceBuffer(self.volume)),
            storage=storage_for(self.forward, tiling.keep, device, state, tiling.stored_dtype),
            outputs=SinkStorage(sink, device)
            if sink is not None
            else storage_for(self.forward, tiling.output, device, state),
            finish=self.finish,
            progress=bar,
            **more,
        )
        return execution

    def _copy(self, made: Tensor, sink: Sink) -> None:
        """Copy a result that other operators read, or that waited in files, block by block."""
        for box in boxes(made.shape[2:], self.block):
            part = cut(made, box)
            if self.finish is not None and not self.alone:
                part = self.finish(part)
            sink.write(box, part)

    @contextlib.contextmanager
    def _state(self) -> Iterator[ResumeState | None]:
        if not self.tiling.resume:
            yield None
            return
        sizes = self.program.tile
        # what the network sees: source and prepare decide it
        parts = (self.volume.read(box) for box in boxes(self.volume.shape[2:], sizes))
        told = [sizes, self.trace.traced.graph, self.volume.shape, self.reduce, digest(parts)]
        with resume_state_for(self.forward, Inputs(), *told) as state:
            yield state


def _file_of(array: Any) -> str | None:
    """Return where a memory map or a zarr array is stored, as far as it says so."""
    store: Any = getattr(array, "store", None)  # of zarr 2
    inner = f"{store.path}/{array.path}" if hasattr(store, "path") else None
    found = getattr(array, "filename", None) or getattr(array, "store_path", None) or inner
    return None if found is None else str(found)


def _output_of(trace: ForwardTrace) -> fx.Node:
    """Return the node of the one map that a network returns."""
    tensors = find_tensors(trace.template)
    if len(tensors) != 1 or not isinstance(trace.template, Tensor):
        raise ExecutionError(
            f"run_volume: the network returns {len(tensors)} tensors in a "
            f"{type(trace.template).__name__}; wrap it in a module that returns one of them"
        )
    node, shape = trace.nodes[id(tensors[0])], tuple(tensors[0].shape)
    rank = trace.traced.inputs.tensors()[0].ndim
    if len(shape) != rank or shape[0] != 1 or not tensors[0].is_floating_point():
        raise ExecutionError(
            f"run_volume: the network returns {times(shape)} {tensors[0].dtype}; expected one "
            f"floating-point map (1, K, *spatial) with {rank} axes"
        )
    if node.op == "placeholder" or node not in trace.traced.outputs():
        raise ExecutionError("run_volume: the network returns its input, or a view of it")
    return node


def _is_alone(node: fx.Node) -> bool:
    return all(user.op == "output" for user in node.users)


def _finish(reduce: Reduce | None, value: Tensor) -> OutputReduction | None:
    """Return what is applied to each part of the output.

    Raises:
        InputError: the output has too few channels, or too many.
    """
    if reduce is None:
        return None
    channels = int(value.shape[1])
    kinds = get_args(Reduce)
    if reduce not in kinds:
        raise InputError(f"run_volume: reduce is one of {', '.join(kinds)}, got {reduce!r}")
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    if reduce == "sigmoid":
        return lambda part: part.to(wide).sigmoid()
    if reduce == "binary":
        return lambda part: (part > 0).to(torch.uint8)
    if not 2 <= channels <= _MOST_LABELS:
        raise InputError(
            f"run_volume: reduce={reduce!r} needs 2 to {_MOST_LABELS} channels, the network "
            f"returns {channels}; 'sigmoid' and 'binary' are for a single one"
        )
    if reduce == "softmax":
        return lambda part: part.softmax(1, dtype=wide)
    labels = torch.uint8 if channels <= 256 else torch.uint16
    return lambda part: part.argmax(1, keepdim=True).to(labels)


def _result_dtype(reduce: Reduce | None, value: Tensor) -> Any:
    """Return the dtype of the result in NumPy's terms."""
    if reduce == "argmax":
        return np.uint8 if int(value.shape[1]) <= 256 else np.uint16
    if reduce == "binary":
        return np.uint8
    if reduce is not None:
        return np.float16
    dtype = torch.float32 if value.dtype == torch.bfloat16 else value.dtype
    return torch.empty(0, dtype=dtype).numpy().dtype.type
