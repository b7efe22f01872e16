"""Run a network tile by tile: exactly, in slabs or in overlapping windows.

Source of ``mode="slab"``: Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023.
``mode="exact"`` computes every operator of the traced network on the box that a tile needs, with
statistics of norms reduced over all tiles before they are applied.
"""

from __future__ import annotations

__all__ = ["Patchwise", "slab_backward", "tiling_of"]

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import nn

from pocketize.engine.dry_run import DryRun
from pocketize.errors import (
    ExecutionError,
    InputError,
    MeasureError,
    OptionError,
    RewriteError,
)
from pocketize.graph.clone import clone_modules
from pocketize.passes.shared import REBUILDING
from pocketize.passes.shared.forwards import obstacle, unwrapping, wrapping
from pocketize.passes.tiling.exact import ExactForward, check_training, prepare
from pocketize.passes.tiling.figures import measured_peak
from pocketize.passes.tiling.forward import PatchForward, SampledTiling, Tiling, volume_of
from pocketize.passes.tiling.plan_text import (
    compare,
    exact_notes,
    part_notes,
    times,
    training_note,
)
from pocketize.passes.tiling.processes import group_name
from pocketize.passes.tiling.slabs import PartForward, SlabForward, slab_backward
from pocketize.passes.tiling.tiled_graph import TilingError
from pocketize.passes.tiling.windows import WindowForward
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion, reversal
from pocketize.plugin.edits import Convert
from pocketize.plugin.options import to_jsonable

_FORWARDS: dict[str, type[PatchForward]] = {
    "exact": ExactForward,
    "slab": SlabForward,
    "window": WindowForward,
}


@dataclass(frozen=True, kw_only=True)
class Patchwise(Tiling, Pass):
    """Run volumes tile by tile that would not fit as a whole.

    ``"exact"`` gives the whole volume's outputs, to rounding, in evaluation mode under
    ``torch.inference_mode()`` or ``torch.no_grad()``; elsewhere the volume runs whole, or trains by
    tiles with ``train=True``. ``"slab"`` cuts the volume along one axis, ``"window"`` into windows
    that overlap, and the network sees each alone: outputs differ, in evaluation as in training.
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

    def __post_init__(self) -> None:
        """Replace a process group by its name, so that the pass can be written down."""
        object.__setattr__(self, "group", group_name(self.group))
        super().__post_init__()

    def validate(self) -> None:
        """Refuse sizes and overlaps out of range, and options of another mode."""
        for name in self.options():
            modes = [mode for mode, cls in _FORWARDS.items() if name in cls.own_options]
            if modes and self.mode not in modes:
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
        _ = self.peak_limit  # raises for a text that is no size
        if self.folder is not None and "disk" not in (self.keep, self.output):
            raise OptionError("patchwise: option 'folder' is for keep='disk' or output='disk'")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.train and (self.keep_dtype or self.group is not None):
            name, other = "keep_dtype", ""
            if not self.keep_dtype:
                name = "group"
                other = "; train whole volumes in several processes with DistributedDataParallel"
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
                "patchwise: option 'resume' reads earlier results from files; say also "
                + ", ".join(wrong)
            )

    def _check_numbers(self) -> None:
        sizes = self.sizes if self.size is not None else (1,)
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
        for overlap in self.overlaps:
            if not 0 <= overlap < 1:
                near = "0" if overlap < 0 else "0.9"
                raise OptionError(
                    f"patchwise: option 'overlap': from 0 to below 1, got {overlap}; such as {near}"
                )

    @property
    def guarantee(self) -> Guarantee:
        """Exact mode keeps the function; the others show the network one part at a time."""
        exact = self.mode == "exact" and self.reduce is None and self.keep_dtype is None
        return Guarantee.EXACT if exact else Guarantee.APPROXIMATE

    def propose(self, target: Target) -> Proposal:
        """Replace the model's forward by one that runs by tiles."""
        tiling = tiling_of(self)
        reason = _refusal(target.model)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        edit = Convert("", "patchwise", self.conversion_options())
        try:
            if self.mode == "exact":
                what, why, notes = self._propose_exact(target, tiling)
            else:
                forward = _FORWARDS[self.mode](target.model, tiling)
                assert isinstance(forward, PartForward)
                what, notes = part_notes(forward, target.inputs)
                why = "each fits where the whole does not"
                failure = DryRun(target.model, target.inputs, target.variants).error((edit,))
                if failure:  # the outputs cannot be put together
                    raise InputError(f"in {self.mode}s, {failure}")
        except (TilingError, InputError, ExecutionError) as error:
            return Proposal(refused=(Refusal("", str(error).removeprefix("patchwise: ")),))
        return Proposal((edit,), (Change("", what, why),), (), notes)

    def _propose_exact(self, target: Target, tiling: Tiling) -> tuple[str, str, tuple[str, ...]]:
        model, inputs = target.model, target.inputs
        try:
            prepared = prepare(model, inputs, tiling)
        except OptionError:
            if tiling.train:
                self._training_peaks(target, tiling)  # the step has an error of its own
            raise
        if tiling.train:
            tile = prepared.program.tile
            check_training(model, inputs, replace(tiling, size=tile, max_peak=None))
        kept = self.keep_dtype
        answer = f"with {kept} results between tile loops" if kept else "with the same outputs"
        what = f"runs by tiles of {times(prepared.program.tile)}, {answer}"
        peaks, notes = exact_notes(model, prepared, inputs, tiling)
        if self.train:
            tile, *steps = self._training_peaks(target, tiling)
            peaks = tuple(steps)
            what += f"; trains by tiles of {times(tile)}"
            if peaks:
                notes = (*notes, training_note(*peaks))
        why = "each fits where the whole does not"
        if peaks and peaks[0] >= peaks[1]:
            why = "on this input the peak is no lower than that of the whole; see the notes"
        return what, why, (*notes, *compare(model, inputs, tiling))

    def _training_peaks(self, target: Target, tiling: Tiling) -> tuple[Any, ...]:
        """Return the tile of a training step; its peak and that of the whole, where known."""
        copy = clone_modules(target.model)
        if not copy.training:  # as measure does
            copy.train()
        forward = ExactForward(copy, tiling)
        forward.install()
        sized = forward.sized(target.inputs)
        tile = sized.tile(volume_of(target.inputs))
        try:
            by_tiles = measured_peak(copy, target.inputs, SampledTiling(**vars(sized)))
            return tile, by_tiles, measured_peak(target.model, target.inputs)
        except MeasureError:  # its backward pass does not run on fake tensors, or there is none
            return (tile,)

    def conversion_options(self) -> dict[str, Any]:
        """All options."""
        return {option.name: to_jsonable(getattr(self, option.name)) for option in fields(self)}


def _refusal(model: nn.Module) -> str:
    already = wrapping(model, PatchForward)
    if already is not None:
        return f"it already runs patch-wise, in mode {already.tiling.mode!r}"
    return obstacle(model)


def tiling_of(patchwise: Patchwise) -> Tiling:
    """Return the options of a pass alone."""
    return _tiling(patchwise.conversion_options())


def _tiling(options: Mapping[str, Any]) -> Tiling:
    given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
    return Tiling(**given)


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


reversal("patchwise", unwrapping(PatchForward))
