"""Running a network tile by tile as a pass: slabs, windows, or the whole volume's own answer.

Source of ``mode="slab"``: Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023.
``mode="exact"`` computes every operator of the recorded network on just the region that a tile
owes, with statistics of norms gathered over all tiles before they are applied.
"""

from __future__ import annotations

__all__ = ["Patchwise", "slab_backward"]

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from pocketize.engine.dry_run import Rehearsal
from pocketize.errors import (
    ExecutionError,
    InputError,
    MeasureError,
    OptionError,
    RewriteError,
)
from pocketize.graph.clone import clone_modules
from pocketize.passes.shared.forwards import first_parameter, obstacle, wrapping
from pocketize.passes.shared.order import REBUILDING
from pocketize.passes.tiling.cutting import PatchForward, Tiling
from pocketize.passes.tiling.figures import measured_peak
from pocketize.passes.tiling.network import TilingError
from pocketize.passes.tiling.patched import ExactForward
from pocketize.passes.tiling.peers import group_name
from pocketize.passes.tiling.plan_text import told, told_of_slabs, told_of_training, told_of_windows
from pocketize.passes.tiling.preparing import Prepared, prepare
from pocketize.passes.tiling.probing import probe
from pocketize.passes.tiling.slabs import SlabForward, slab_backward
from pocketize.passes.tiling.training import check_training
from pocketize.passes.tiling.windows import WindowForward
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion
from pocketize.plugin.edits import Convert
from pocketize.plugin.options import read_size

_FORWARDS: dict[str, type[PatchForward]] = {
    "exact": ExactForward,
    "slab": SlabForward,
    "window": WindowForward,
}
#: Options that only some modes have.
_ONLY = {
    "overlap": ("window",),
    "weights": ("window",),
    "batch": ("slab", "window"),
    "keep": ("exact",),
    "max_peak": ("exact",),
    "train": ("exact",),
    "axis": ("exact", "slab"),
    "keep_dtype": ("exact",),
}


@dataclass(frozen=True, kw_only=True)
class Patchwise(Pass):
    """Run volumes tile by tile that would not fit as a whole.

    ``"exact"`` gives the whole volume's answer, to rounding, in evaluation mode under
    ``torch.inference_mode()`` or ``torch.no_grad()``; elsewhere the volume runs whole, or trains by
    tiles with ``train=True``. ``"slab"``
    cuts the volume along one axis, ``"window"`` into windows that overlap, and the network sees
    each alone: other answers, in evaluation as in training.

    Attributes:
        mode: "exact", "slab" or "window".
        size: voxels of a tile at full resolution: one number for the axis that is cut (of windows,
            for every axis), or one for each axis. More than the volume has is the whole axis.
        axis: which spatial axis a single number cuts, from 0; -1 is the last.
        overlap: part of a window that it shares with the next, from 0 to below 1; one number for
            all axes or one for each.
        weights: of a window's voxels where windows overlap, "constant" or "gaussian".
        batch: slabs or windows that run through the network at once.
        keep: where exact mode keeps what waits between sweeps: "device", "host" or "disk".
        output: where outputs are put together: "device", "host" or "disk".
        folder: for files; none is where the system keeps temporary ones.
        reduce: "argmax" returns uint8 labels (N, 1, *spatial) in inference instead of logits, which
            never exist as a whole.
        max_peak: instead of size: the largest tiles with which the live tensors stay within, such
            as "2GiB"; with ``train`` also those of a training step, as ``measure`` estimates it.
        progress: draw a bar on terminals for what takes long.
        train: exact mode also goes back by tiles: the forward keeps no graph, and the backward pass
            runs each tile again. The gradients are the whole volume's, and so are the statistics of
            batch norms. Nothing may draw random numbers.
        keep_dtype: "bfloat16" or "float16": in exact mode, what waits between sweeps is rounded to
            that, and the answer is the whole volume's no more.
        resume: inference that was interrupted goes on where it was when it is called again with the
            same weights and volume. What is computed waits in ``folder`` until the end.
        group: of torch.distributed, "world" or the ``group_name`` of a process group (or the group
            itself): its processes share the tiles in inference, each holds its share of what waits,
            and all return the result. Each calls the network with the whole volume, such as a
            memory map.
    """

    name: ClassVar[str] = "patchwise"
    summary: ClassVar[str] = "Run volumes tile by tile: exactly, in slabs or in windows"
    after: ClassVar[tuple[str, ...]] = (
        *REBUILDING,
        "in-place-norm",
        "recompute",
        "amp",
        "checkpoint",
        "offload",
    )

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

    def __post_init__(self) -> None:
        """Take a process group by its name, so that the pass can be written down."""
        object.__setattr__(self, "group", group_name(self.group))
        super().__post_init__()

    def validate(self) -> None:
        """Refuse sizes and overlaps that are none, and options of another mode."""
        for name in self.options():
            modes = _ONLY.get(name, (self.mode,))
            if self.mode not in modes:
                raise OptionError(
                    f"patchwise: option {name!r} is for mode={' or '.join(map(repr, modes))}, not "
                    f"for mode={self.mode!r}"
                )
        if (self.size is None) == (self.max_peak is None):
            other = " or max_peak, such as '2GiB'" if self.mode == "exact" else ""
            both = ", not both" if self.size is not None else ""
            raise OptionError(
                f"patchwise: say size, the voxels of a tile (size=32 for instance){other}{both}"
            )
        self._check_numbers()
        if self.max_peak is not None:
            _bytes(self.max_peak)
        if self.folder is not None and "disk" not in (self.keep, self.output):
            raise OptionError("patchwise: option 'folder' is for keep='disk' or output='disk'")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.train and (self.keep_dtype or self.group is not None):
            name = "keep_dtype" if self.keep_dtype else "group"
            other = (
                "; train whole volumes in several processes with DistributedDataParallel"
                if name == "group"
                else ""
            )
            raise OptionError(f"patchwise: option {name!r} is for inference, not for train{other}")
        if not self.resume:
            return
        if self.group is not None:
            raise OptionError(
                "patchwise: option 'resume' is for one process; leave out group, or resume"
            )
        places = {"output": self.output} | ({"keep": self.keep} if self.mode == "exact" else {})
        wrong = [f"{name}='disk'" for name, place in places.items() if place != "disk"]
        wrong += ["folder='...'"] if self.folder is None else []
        if wrong:
            raise OptionError(
                "patchwise: option 'resume' finds what was computed in files; say also "
                + ", ".join(wrong)
            )

    def _check_numbers(self) -> None:
        sizes = _several(self.size) if self.size is not None else (1,)
        if not sizes or min(sizes) < 1:
            raise OptionError(
                f"patchwise: option 'size': a tile has at least 1 voxel along each axis, got "
                f"{self.size}; the nearest is {[max(1, s) for s in sizes] or 1}"
            )
        if self.mode == "slab" and len(sizes) > 1:
            raise OptionError(
                f"patchwise: option 'size': slabs are cut along one axis, got {len(sizes)} sizes; "
                f"say size={sizes[-1]} and axis, or mode='window'"
            )
        if len(sizes) > 1 and "axis" in self.options():
            raise OptionError(
                f"patchwise: option 'axis' is for a single size, got size={list(sizes)} for each "
                "axis; leave axis out"
            )
        if self.batch < 1:
            raise OptionError(f"patchwise: option 'batch': at least 1, got {self.batch}")
        for overlap in _several(self.overlap):
            if not 0 <= overlap < 1:
                near = "0" if overlap < 0 else "0.9"
                raise OptionError(
                    f"patchwise: option 'overlap': from 0 to below 1, got {overlap}; such as {near}"
                )

    @property
    def guarantee(self) -> Guarantee:
        """Exact mode keeps the function; the others show the network a part at a time."""
        exact = self.mode == "exact" and self.reduce is None and self.keep_dtype is None
        return Guarantee.EXACT if exact else Guarantee.APPROXIMATE

    def propose(self, target: Target) -> Proposal:
        """Put a forward by tiles in place of the model's."""
        tiling = _tiling(self.conversion_options())
        reason = _refusal(target.model)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        edit = Convert("", "patchwise", self.conversion_options())
        try:
            if self.mode == "exact":
                what, why, notes = self._look(target, tiling)
            else:
                what, notes = self._look_at_parts(target, tiling, edit)
                why = "each fits where the whole does not"
        except (TilingError, InputError, ExecutionError) as error:
            return Proposal(refused=(Refusal("", str(error).removeprefix("patchwise: ")),))
        return Proposal((edit,), (Change("", what, why),), (), notes)

    def _look(self, target: Target, tiling: Tiling) -> tuple[str, str, tuple[str, ...]]:
        model, inputs = target.model, target.inputs
        try:
            prepared = prepare(model, inputs, tiling)
        except OptionError:
            if tiling.train:
                self._trained(target, tiling)  # the step has an error of its own
            raise
        if tiling.train:
            check_training(model, inputs, replace(tiling, size=prepared.program.tile, max_peak=0))
        answer = (
            f"with what waits in {self.keep_dtype}" if self.keep_dtype else "to the same answer"
        )
        what = f"runs by tiles of {_times(prepared.program.tile)}, {answer}"
        peaks, notes = told(model, prepared, inputs, tiling)
        if self.train:
            tile, *steps = self._trained(target, tiling)
            peaks = tuple(steps)
            what += f"; trains by tiles of {_times(tile)}"
            if peaks:
                notes = (*notes, told_of_training(*peaks))
        lower = len(peaks) < 2 or peaks[0] < peaks[1]
        why = (
            "each fits where the whole does not"
            if lower
            else "on this input the peak is no lower than that of the whole; see the notes"
        )
        return what, why, (*notes, *self._probed(target, tiling, prepared))

    def _trained(self, target: Target, tiling: Tiling) -> tuple[Any, ...]:
        """Return the tile of a training step; its peak and that of the whole, where known."""
        copy = clone_modules(target.model)
        if not copy.training:  # as measure does
            copy.train()
        forward = ExactForward(copy, tiling)
        forward.install()
        sized = forward.sized(target.inputs)
        volume = max(target.inputs.tensors(), key=lambda t: (t.ndim, t.numel())).shape[2:]
        tile = sized.tile(volume)
        try:
            by_tiles = measured_peak(copy, target.inputs, replace(sized, sampled=True))
            return tile, by_tiles, measured_peak(target.model, target.inputs)
        except MeasureError:  # its backward pass does not run on fake tensors, or there is none
            return (tile,)

    def _look_at_parts(
        self, target: Target, tiling: Tiling, edit: Convert
    ) -> tuple[str, tuple[str, ...]]:
        """Try slabs or windows on a copy without memory.

        Raises:
            InputError: the outputs cannot be put together.
        """
        forward = _FORWARDS[self.mode](target.model, tiling)
        if isinstance(forward, SlabForward):
            what, notes = told_of_slabs(forward, target.inputs)
        else:
            assert isinstance(forward, WindowForward)
            what, notes = told_of_windows(forward, target.inputs)
        failure = Rehearsal(target.model, target.inputs).failure((edit,))
        if failure:
            raise InputError(f"in {self.mode}s, {failure}")
        return what, notes

    def _probed(self, target: Target, tiling: Tiling, prepared: Prepared) -> tuple[str, ...]:
        """Compare tiles with the whole on a small volume.

        Raises:
            TilingError: they differ.
        """
        first = first_parameter(target.model)
        if first is not None and first.is_meta:
            return ("it has no values yet, so that tiles could not be compared with the whole",)
        found = probe(target.model, target.inputs, tiling)
        if found is None:
            return ("no small volume runs through it, so that tiles were not compared with one",)
        where = f"a volume of {_times(found.sizes)} by tiles of {_times(found.tile)}"
        if not found.agrees:
            raise TilingError(
                f"on {where} the outputs differ from the whole volume's by {found.difference:.2g} "
                f"of their largest value, more than rounding explains ({found.tolerance:.2g})"
            )
        same = f"{where} gave the whole volume's outputs to {found.difference:.2g} of the largest"
        if self.keep_dtype is None:
            return (same,)
        rounded = probe(target.model, target.inputs, tiling, rounded=True)
        assert rounded is not None  # the same volume has just run
        return (
            same,
            f"with what waits in {self.keep_dtype}, to {rounded.difference:.2g} of it",
        )

    def conversion_options(self) -> dict[str, Any]:
        """What its edit says."""
        return {
            "mode": self.mode,
            "size": None if self.size is None else list(_several(self.size)),
            "axis": self.axis,
            "overlap": list(_several(self.overlap)),
            "weights": self.weights,
            "batch": self.batch,
            "keep": self.keep,
            "output": self.output,
            "folder": self.folder,
            "reduce": self.reduce,
            "max_peak": 0 if self.max_peak is None else _bytes(self.max_peak),
            "progress": self.progress,
            "train": self.train,
            "keep_dtype": self.keep_dtype,
            "resume": self.resume,
            "group": self.group,
        }


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _bytes(text: str) -> int:
    return read_size(text, "patchwise: option 'max_peak'", "2GiB")


def _refusal(model: nn.Module) -> str:
    already = wrapping(model, PatchForward)
    if already is not None:
        return f"it already runs patch-wise, in mode {already.tiling.mode!r}"
    return obstacle(model)


def _tiling(options: Mapping[str, Any]) -> Tiling:
    size = options.get("size")
    return Tiling(
        **{
            **options,
            "size": None if size is None else tuple(size),
            "overlap": tuple(options.get("overlap", (0.25,))),
        }
    )


@conversion("patchwise")
def _convert(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    mode = options.get("mode")
    if mode not in _FORWARDS:
        raise RewriteError(f"patchwise: expected a mode of {', '.join(_FORWARDS)}, got {mode!r}")
    reason = _refusal(module)
    if reason:
        raise RewriteError(f"patchwise: {reason}")
    _FORWARDS[mode](module, _tiling(options)).install()
    return module
