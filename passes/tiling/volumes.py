"""Run a network on a volume that is read and written tile by tile, and never exists as a whole."""

from __future__ import annotations

__all__ = ["VolumeEstimate", "estimate_volume", "run_volume"]

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from pocketize._torch import global_forward_hooks
from pocketize.errors import ExecutionError, InputError
from pocketize.graph.inputs import first_parameter
from pocketize.passes.shared.forwards import is_foreign, wrapping
from pocketize.passes.tiling.forward import PatchForward, Tiling
from pocketize.passes.tiling.patchwise import Patchwise, tiling_of
from pocketize.passes.tiling.sources import Prepare, VolumeSource
from pocketize.passes.tiling.volume_job import Reduce, VolumeEstimate, VolumeJob

_CPU = torch.device("cpu")


def run_volume(
    model: nn.Module,
    source: Any,
    out: Any = None,
    *,
    size: int | Sequence[int] | None = None,
    max_peak: str | None = None,
    axis: int = -1,
    prepare: Prepare | None = None,
    pad_to: int | Sequence[int] = 1,
    reduce: Reduce | None = None,
    keep: Literal["device", "host", "disk"] | None = None,
    keep_dtype: Literal["bfloat16", "float16"] | None = None,
    folder: str | None = None,
    resume: bool = False,
    group: Any = None,
    allow_whole: bool = False,
    on_block: Callable[[tuple[slice, ...], Any], None] | None = None,
    progress: bool = True,
) -> Any:
    """Run a network on a volume tile by tile, with the outputs of the whole volume.

    The result is that of ``model(prepare(volume))`` to rounding, where ``volume`` is the source as
    a tensor (1, C, *spatial): see ``Patchwise(mode="exact")``. Parts are read from the source where
    they are needed, and written to ``out`` when they are done.

    Args:
        model: in evaluation mode, on the device that computes; takes one tensor (1, C, *spatial)
            and returns one (1, K, *spatial), which may have other sizes.
        source: anything with ``shape``, ``dtype`` and slicing, such as a memory map, a zarr, dask
            or HDF5 array, nibabel's ``dataobj``, a tensor: (*spatial) for one channel, or
            (C, *spatial); or a list of sources (*spatial), one for each channel. The number of
            spatial axes is that of the numbers in ``size``, or of the network's convolutions.
        out: anything with slice assignment, (*spatial) for labels, else (K, *spatial); or a
            function ``(shape, dtype, block)`` that makes one, where ``block`` has the sizes of the
            boxes that are written. None makes an array in memory, with ``keep="disk"`` in a
            temporary file in ``folder``.
        size: voxels of a tile, one number for ``axis`` or one for each axis.
        max_peak: instead of size: the largest tiles with which live tensors on the device stay
            within, such as "2GiB".
        axis: which spatial axis a single size cuts.
        prepare: applied to each part that is read, (1, C, *box) float32 (float64 for a float64
            network) on the device; returns a tensor of the same shape. Parts are of any size and
            place, so each voxel must be computed from that voxel alone (a window, given means);
            this is checked on a corner of each part.
        pad_to: zeros follow at the end of each axis, after ``prepare``, up to a multiple of this
            number or numbers, and the result is cut to the source's sizes.
        reduce: "argmax" writes labels, uint8 up to 256 classes, else uint16; "softmax" writes
            probabilities, float16 if ``out`` has no dtype; "sigmoid" those of each channel alone,
            and "binary" 1 (uint8) where they are above a half, without a channel axis where there
            is one channel. None writes what the network returns.
        keep: where results wait between tile loops: on the "device" (the default), on the "host",
            or on "disk" (the default with ``resume``).
        keep_dtype: rounds what waits; the result is then no longer exact.
        folder: for files; None is where the system keeps temporary ones.
        resume: a call that was interrupted continues when it is repeated with the same weights,
            source and options. Results are in ``folder`` until the end, and are then copied to
            ``out``. The source is read once more, to recognise it.
        group: of torch.distributed, "world" or a group: its processes share the tiles, and each
            writes its own to ``out``, which each has opened: one zarr array, or on one machine one
            memory map.
        allow_whole: run operators that need a map of the volume's size as a whole.
        on_block: called for each box that has been written, with its index in ``out`` and its
            values, an array.
        progress: draw a bar on terminals.

    Returns:
        ``out``.

    Raises:
        InputError: source, out or tiles do not fit.
        OptionError: an option is out of range, or no tile meets ``max_peak``.
        ExecutionError: the network cannot be computed by tiles, or is in training mode.
    """
    tiling = _tiling(
        size=size,
        max_peak=max_peak,
        axis=axis,
        keep=keep or ("disk" if resume else "device"),
        keep_dtype=keep_dtype,
        folder=folder,
        resume=resume,
        group=group,
        progress=progress,
    )
    with torch.no_grad():
        job = _job(model, source, tiling, reduce, allow_whole, prepare, pad_to)
        peers = job.group()
        sink = job.sink(out, peers, on_block)
        job.run(sink, peers)
    return out if isinstance(out, Tensor) else sink.out


def estimate_volume(
    model: nn.Module,
    shape: Sequence[int],
    *,
    size: int | Sequence[int] | None = None,
    max_peak: str | None = None,
    axis: int = -1,
    pad_to: int | Sequence[int] = 1,
    reduce: Reduce | None = None,
    keep: Literal["device", "host", "disk"] = "device",
    keep_dtype: Literal["bfloat16", "float16"] | None = None,
    allow_whole: bool = False,
) -> VolumeEstimate:
    """Estimate what :func:`run_volume` takes for a source of a shape, without running it.

    ``shape`` is (*spatial) or (C, *spatial). Options and errors are those of :func:`run_volume`.
    """
    tiling = _tiling(
        size=size, max_peak=max_peak, axis=axis, keep=keep, keep_dtype=keep_dtype, progress=False
    )
    like = np.broadcast_to(np.zeros((), np.float32), tuple(shape))
    with torch.no_grad():
        return _job(model, like, tiling, reduce, allow_whole, None, pad_to).estimate()


def _tiling(*, size: Any, keep: Any, **options: Any) -> Tiling:
    size = tuple(map(int, size)) if isinstance(size, Sequence) else size
    return tiling_of(Patchwise(size=size, keep=keep, output=keep, **options))


def _job(
    model: nn.Module,
    source: Any,
    tiling: Tiling,
    reduce: Reduce | None,
    allow_whole: bool,
    prepare: Prepare | None,
    pad_to: int | Sequence[int],
) -> VolumeJob:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    device, dtype = _where_it_works(model)
    rank = _spatial_rank(model, tiling)
    volume = VolumeSource(source, rank, device, dtype, prepare, pad_to)
    return VolumeJob(model, volume, tiling, reduce, allow_whole=allow_whole)


def _where_it_works(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of a model, and the dtype of its input.

    Raises:
        ExecutionError: it cannot be run by tiles as it is.
    """
    if any(module.training for module in model.modules()):
        raise ExecutionError(
            "run_volume: the network is in training mode, in which it returns something else; "
            "call model.eval() first"
        )
    if isinstance(model, torch.jit.ScriptModule | fx.GraphModule):
        raise ExecutionError(
            f"run_volume: a {type(model).__name__} is a program, which may hold for the sizes "
            "alone that it was made with; give the Python module"
        )
    already = wrapping(model, PatchForward)
    if already is not None:
        raise ExecutionError(
            f"run_volume: the network already runs patch-wise, in mode {already.tiling.mode!r}; "
            "give the network without that pass"
        )
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    if any(map(is_foreign, [*hooks, *global_forward_hooks()])):
        raise ExecutionError(
            "run_volume: the network has a forward hook, which would not run, as the network is "
            "never called with the whole volume; remove it"
        )
    first = first_parameter(model)
    if first is None:
        return _CPU, torch.float32
    if first.is_meta:
        raise ExecutionError("run_volume: the network has no values: it is on the meta device")
    return first.device, first.dtype


def _spatial_rank(model: nn.Module, tiling: Tiling) -> int:
    """Return the number of spatial axes: that of a tile's sizes, or of the convolutions.

    Raises:
        InputError: neither tells.
    """
    sizes = tiling.sizes
    if len(sizes) > 1:
        return len(sizes)
    kinds: tuple[tuple[int, Any], ...] = (
        (1, nn.Conv1d | nn.ConvTranspose1d),
        (2, nn.Conv2d | nn.ConvTranspose2d),
        (3, nn.Conv3d | nn.ConvTranspose3d),
    )
    modules = list(model.modules())
    found = [rank for rank, kind in kinds if any(isinstance(m, kind) for m in modules)]
    if len(found) != 1:
        raise InputError(
            "run_volume: the convolutions of the network do not tell the number of spatial axes; "
            "say size with one number for each, such as size=(32, 128, 128)"
        )
    return found[0]
