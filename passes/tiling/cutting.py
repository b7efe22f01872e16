"""How a volume is cut into tiles, and what all forwards by tiles have in common."""

from __future__ import annotations

__all__ = [
    "PatchForward",
    "Tiling",
    "is_exported",
    "is_fake",
    "is_recorded",
    "name_and_code",
    "plain",
    "spatial_axis",
    "surroundings",
]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pocketize._torch import FakeTensor, dispatch_modes
from pocketize.errors import InputError
from pocketize.graph.capture import Recorder
from pocketize.graph.inputs import Inputs, as_plain
from pocketize.passes.shared.forwards import Forward, first_parameter


@dataclass(frozen=True)
class Tiling:
    """How a volume is cut, and where what comes of it goes.

    Attributes:
        mode: "exact", "slab" or "window".
        size: voxels of a tile, along ``axis`` or along every axis; None where ``max_peak`` decides.
        axis: the axis that a single number cuts.
        max_peak: bytes that the live tensors of a forward may take; 0 for any.
        keep: place of what waits between sweeps.
        output: place of the outputs.
        folder: for files; None for where the system keeps temporary ones.
        reduce: None or "argmax".
        progress: draw a bar.
        overlap: of neighbouring windows, as a part of their size, along every axis or along each.
        weights: of the voxels of a window, "constant" or "gaussian".
        batch: tiles that run through the network at once.
        train: exact mode goes back by tiles, too.
        keep_dtype: name of the dtype in which floating maps wait; None for their own.
        resume: what was computed stays in ``folder`` until the forward ends.
        group: the process group that shares the tiles: "world", or its name; None for none.
        sampled: for estimates: of each sweep only the tiles that decide the peak are gone through.
    """

    mode: str = "exact"
    size: tuple[int, ...] | None = None
    axis: int = -1
    max_peak: int = 0
    keep: str = "device"
    output: str = "device"
    folder: str | None = None
    reduce: str | None = None
    progress: bool = True
    overlap: tuple[float, ...] = (0.25,)
    weights: str = "constant"
    batch: int = 1
    train: bool = False
    keep_dtype: str | None = None
    resume: bool = False
    group: str | None = None
    sampled: bool = False

    @property
    def held(self) -> torch.dtype | None:
        """The dtype in which floating maps wait; None for their own."""
        made: torch.dtype | None = getattr(torch, self.keep_dtype) if self.keep_dtype else None
        return made

    def tile(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the size of a tile along each axis of a volume.

        Args:
            sizes: of the volume.

        Raises:
            InputError: the volume has another number of axes.
        """
        assert self.size is not None
        if len(self.size) > 1:
            if len(self.size) != len(sizes):
                raise InputError(
                    f"patchwise: size has {len(self.size)} numbers and the input {len(sizes)} "
                    f"spatial axes, {tuple(sizes)}; give one number for each, or a single one"
                )
            return tuple(min(a, b) for a, b in zip(self.size, sizes, strict=True))
        axis = spatial_axis(self.axis, len(sizes))
        return tuple(
            min(self.size[0], size) if index == axis else size for index, size in enumerate(sizes)
        )


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
    """A model's forward that runs tile by tile; what that means is the subclasses' affair.

    Args:
        module: the model.
        tiling: how volumes are cut.
    """

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


def is_recorded() -> bool:
    """Whether the engine records the network, which is to see the network itself."""
    return any(isinstance(mode, Recorder) for mode in dispatch_modes())


def is_exported() -> bool:
    """Whether a compiler or an exporter records the model, to run or differentiate it itself."""
    exporting = getattr(torch.compiler, "is_exporting", bool)  # from torch 2.7 on
    tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
    return bool(torch.compiler.is_compiling() or tracing() or exporting())


def is_fake(inputs: Inputs) -> bool:
    """Whether a forward is rehearsed or estimated, on tensors without values."""
    return any(isinstance(tensor, FakeTensor) for tensor in inputs.tensors())


def surroundings() -> Any:
    """Return what decides dtypes besides inputs and weights: autocast, and the default."""
    states = [
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda", "mps", "xpu")
        if torch.is_autocast_enabled(kind)
    ]
    return tuple(states), torch.get_default_dtype()


def name_and_code(value: Any) -> str:
    """Return what tells objects apart in other processes, too: a name and code, and no address."""
    named = value if hasattr(value, "__qualname__") else type(value)
    code = getattr(getattr(value, "__code__", None), "co_code", b"")
    return f"{named.__module__}.{named.__qualname__} {code.hex()}"


def plain(inputs: Inputs) -> Inputs:
    """Return inputs as plain tensors, where a package has tensors of a class of its own."""
    return inputs.map(as_plain)
