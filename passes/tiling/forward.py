"""Options of a forward by tiles, and what its three modes have in common."""

from __future__ import annotations

__all__ = [
    "OutputReduction",
    "PatchForward",
    "ProgressBar",
    "SampledTiling",
    "Tiling",
    "autocast_state",
    "dress",
    "is_exported",
    "is_fake",
    "is_traced",
    "output_reduction",
    "spatial_axis",
    "volume_of",
]

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pocketize._torch import FakeTensor, dispatch_modes, without_dispatch_modes
from pocketize.errors import InputError
from pocketize.graph.capture import TraceMode, find_tensors, quiet_tracing
from pocketize.graph.clone import fake_clone
from pocketize.graph.inputs import Inputs, as_plain, first_parameter, is_dressed
from pocketize.passes.shared.forwards import Forward, wrapping
from pocketize.passes.shared.nests import dressed, map_tensors
from pocketize.plugin.options import read_size

OutputReduction = Callable[[Tensor], Tensor]
#: A progress bar appears for what takes longer than this, in seconds.
PATIENCE = 2.0
_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The options of a forward by tiles: how a volume is cut, and where results are kept.

    Attributes:
        mode: "exact", "slab" or "window".
        size: voxels of a tile at full resolution: one number for the axis that is cut (of windows,
            for every axis), or one for each axis. More than the volume has is the whole axis.
        axis: which spatial axis a single number cuts, from 0; -1 is the last.
        overlap: part of a window that it shares with the next, from 0 to below 1; one number for
            all axes or one for each.
        weights: of a window's voxels where windows overlap, "constant" or "gaussian".
        batch: slabs or windows that run through the network at once.
        keep: where exact mode keeps results between tile loops: "device", "host" or "disk".
        output: where outputs are put together: "device", "host" or "disk".
        folder: for files; none is where the system keeps temporary ones.
        reduce: "argmax" returns uint8 labels (N, 1, *spatial) in inference instead of logits, which
            never exist as a whole.
        max_peak: instead of size: the largest tiles with which the live tensors stay within, such
            as "2GiB"; with ``train`` also those of a training step, as ``measure`` estimates it.
        progress: draw a bar on terminals for what takes long.
        train: exact mode also computes gradients by tiles: the forward keeps no graph, and the
            backward pass runs each tile again. The gradients and the statistics of batch norms are
            the whole volume's. Nothing may draw random numbers.
        keep_dtype: "bfloat16" or "float16": exact mode rounds results between tile loops to that
            dtype, and the outputs are no longer exactly the whole volume's.
        resume: interrupted inference continues when the model is called again with the same weights
            and volume. Results are kept in ``folder`` until the end.
        group: of torch.distributed, "world" or the ``group_name`` of a process group (or the group
            itself): its processes share the tiles in inference, each stores its shard of the
            results between tile loops, and all return the outputs. Each calls the network with the
            whole volume, such as a memory map.
    """

    mode: Literal["exact", "slab", "window"] = "exact"
    size: int | tuple[int, ...] | None = None
    axis: int = -1
    overlap: float | tuple[float, ...] = 0.25
    weights: Literal["constant", "gaussian"] = "constant"
    batch: int = 1
    keep: Literal["device", "host", "disk"] = "device"
    output: Literal["device", "host", "disk"] = "device"
    folder: str | None = None
    reduce: Literal["argmax"] | None = None
    max_peak: str | None = None
    progress: bool = True
    train: bool = False
    keep_dtype: Literal["bfloat16", "float16"] | None = None
    resume: bool = False
    group: str | None = None

    #: Compute only those tiles of each loop that decide the peak; see :class:`SampledTiling`.
    sampled: ClassVar[bool] = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """The given sizes of a tile, one or several; none with ``max_peak``."""
        return () if self.size is None else _several(self.size)

    @property
    def overlaps(self) -> tuple[float, ...]:
        """The given overlaps, one or several."""
        return _several(self.overlap)

    @property
    def peak_limit(self) -> int:
        """``max_peak`` in bytes; 0 for no limit.

        Raises:
            OptionError: it is no size.
        """
        if self.max_peak is None:
            return 0
        return read_size(self.max_peak, "patchwise: option 'max_peak'", "2GiB")

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype in which floating-point maps are stored; None for their own."""
        made: torch.dtype | None = getattr(torch, self.keep_dtype) if self.keep_dtype else None
        return made

    def tile(self, volume: Sequence[int]) -> tuple[int, ...]:
        """Return the size of a tile along each axis of a volume of some spatial sizes.

        Raises:
            InputError: the volume has another number of axes.
        """
        sizes = self.sizes
        if len(sizes) > 1:
            if len(sizes) != len(volume):
                raise InputError(
                    f"patchwise: size has {len(sizes)} numbers and the input {len(volume)} "
                    f"spatial axes, {tuple(volume)}; give one number for each, or a single one"
                )
            return tuple(min(a, b) for a, b in zip(sizes, volume, strict=True))
        axis = spatial_axis(self.axis, len(volume))
        return tuple(
            min(sizes[0], size) if index == axis else size for index, size in enumerate(volume)
        )


class SampledTiling(Tiling):
    """For estimates: of each tile loop only the tiles that decide the peak are computed."""

    sampled: ClassVar[bool] = True


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def volume_of(inputs: Inputs) -> tuple[int, ...]:
    """Return the spatial sizes of the largest input."""
    largest = max(inputs.tensors(), key=lambda t: (t.ndim, t.numel()))
    return tuple(largest.shape[2:])


def spatial_axis(axis: int, rank: int) -> int:
    """Return the number of a spatial axis, counted from the first.

    Raises:
        InputError: there is no such axis.
    """
    if not -rank <= axis < rank:
        nearest = min(max(axis, -rank), rank - 1)
        raise InputError(
            f"patchwise: axis={axis} is none of the {rank} spatial axes (0 to {rank - 1}, or "
            f"{-rank} to -1); the nearest is {nearest}"
        )
    return axis % rank


class PatchForward(Forward):
    """A model's forward that runs tile by tile; each mode has a subclass."""

    #: Options that this mode has and another does not.
    own_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, module: nn.Module, tiling: Tiling) -> None:
        super().__init__(module)
        self.tiling = tiling

    def device(self, inputs: Inputs) -> torch.device:
        """Return where tiles are computed: where the model is."""
        first = first_parameter(self.module)
        return first.device if first is not None else inputs.tensors()[0].device

    def reduces(self) -> bool:
        """Whether outputs are reduced: in inference only."""
        wanted = self.tiling.reduce is not None
        return wanted and not self.module.training and not torch.is_grad_enabled()


def is_traced() -> bool:
    """Whether the engine traces the network, which is to see the network itself."""
    return any(isinstance(mode, TraceMode) for mode in dispatch_modes())


def is_exported() -> bool:
    """Whether a compiler or an exporter traces the model, to run or differentiate it itself."""
    exporting = getattr(torch.compiler, "is_exporting", bool)  # from torch 2.7 on
    tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
    return bool(torch.compiler.is_compiling() or tracing() or exporting())


def is_fake(inputs: Inputs) -> bool:
    """Whether this is a dry run or an estimate, on tensors without values."""
    return any(isinstance(tensor, FakeTensor) for tensor in inputs.tensors())


def autocast_state() -> Any:
    """Return what decides dtypes besides inputs and weights: autocast and the default dtype."""
    states = [
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda", "mps", "xpu")
        if torch.is_autocast_enabled(kind)
    ]
    return tuple(states), torch.get_default_dtype()


# -- outputs -------------------------------------------------------------------------------------


def output_reduction(name: str | None) -> OutputReduction | None:
    """Return the function that is applied to an output before it is stored, for "argmax"."""
    return None if name is None else _labels


def _labels(logits: Tensor) -> Tensor:
    """Return the number of the largest channel, (N, 1, *spatial) uint8."""
    if logits.ndim < 3 or not 2 <= logits.shape[1] <= 256:
        channels = logits.shape[1] if logits.ndim > 1 else 0
        raise InputError(
            "patchwise: reduce='argmax' needs outputs (N, C, *spatial) with 2 to 256 channels, "
            f"got {tuple(logits.shape)} with {channels}; leave reduce out, and threshold the "
            "output of a single channel yourself"
        )
    return logits.argmax(1, keepdim=True).to(torch.uint8)


def dress(model: nn.Module, made: Any, inputs: Inputs) -> Any:
    """Return outputs in the tensor subclass that the network would return, such as ``MetaTensor``.

    Tiles are computed on plain tensors. Class and attributes of an output are decided by
    ``__torch_function__`` of the inputs, so a copy of the network without values runs on inputs of
    that class.
    """
    if not any(is_dressed(tensor) for tensor in inputs.tensors()):
        return made
    tensors = find_tensors(made)
    likes = _meta_outputs(model, inputs)
    if len(likes) != len(tensors):  # it does not run on meta tensors, or takes another branch
        likes = [next(filter(is_dressed, inputs.tensors()))] * len(tensors)
    by_identity = {id(t): dressed(t, like) for t, like in zip(tensors, likes, strict=True)}
    return map_tensors(made, lambda t: id(t) in by_identity, lambda t: by_identity[id(t)])


def _meta_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    def on_meta(tensor: Tensor) -> Tensor:
        t = as_plain(tensor)
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_META)
        return dressed(made, tensor)

    with without_dispatch_modes(), torch.no_grad():
        copy = fake_clone(model, contextlib.nullcontext(), device=_META)
        forward = wrapping(copy, PatchForward)
        assert forward is not None
        given = inputs.map(on_meta)
        try:
            with quiet_tracing(copy):
                return find_tensors(forward.original(*given.args, **given.kwargs))
        except Exception:  # a user's forward may raise anything on tensors without values
            return []


class ProgressBar:
    """A callback ``(done, total)`` that draws a bar on terminals, for what takes long.

    Args:
        wanted: False for never.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted and sys.stderr.isatty()
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show how many tiles are done."""
        if not self.wanted:
            return
        from tqdm import tqdm

        self.bar = self.bar or tqdm(
            total=total, unit="tile", leave=False, file=sys.stderr, delay=PATIENCE, mininterval=0
        )
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
