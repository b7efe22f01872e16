"""A small volume, computed by tiles and whole: do they agree?"""

from __future__ import annotations

__all__ = ["Probe", "probe"]

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketize.errors import CaptureError
from pocketize.graph.capture import find_tensors
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode
from pocketize.passes.tiling.cutting import Tiling, spatial_axis
from pocketize.passes.tiling.network import TilingError
from pocketize.passes.tiling.patched import ExactForward
from pocketize.passes.tiling.recording import record_forward

#: Volumes of up to so many voxels are probed at their own size.
_SMALL = 2**18
_SIZES = (32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Probe:
    """How far tiles were from the whole.

    Attributes:
        difference: the largest, relative to the largest value of the output; of whole numbers the
            part that differs.
        tolerance: what rounding explains.
        sizes: of the volume that was probed.
        tile: its tiles.
    """

    difference: float
    tolerance: float
    sizes: tuple[int, ...]
    tile: tuple[int, ...]

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= self.tolerance


def probe(
    model: nn.Module, inputs: Inputs, tiling: Tiling, *, rounded: bool = False
) -> Probe | None:
    """Run a copy of a model on random values, whole and by tiles.

    Args:
        model: with values; unchanged.
        inputs: example inputs, whose sizes are taken, or cut down where they are large.
        tiling: how the volume is to be cut; at least two tiles are tried.
        rounded: what waits between sweeps is rounded as the tiling says, instead of kept as it is.

    Returns:
        What was found; None where no small volume runs through the model.

    Raises:
        TilingError: the model cannot be computed by tiles.
    """
    found = _small_inputs(model, inputs)
    if found is None:
        return None
    small, rounding = found
    copy = clone(model)
    set_mode(copy, False)
    sizes = _volume(small)
    tile = _tile(tiling, sizes)
    kept = tiling.keep_dtype if rounded else None
    alone = Tiling(size=tile, axis=tiling.axis, progress=False, keep_dtype=kept)
    forward = ExactForward(copy, alone)
    with torch.no_grad():
        try:
            whole = find_tensors(small.call(copy))
        except Exception:  # a user's forward may raise anything on random values
            return None
        forward.install()
        tiled = find_tensors(small.call(copy))
    worst, tolerance = 0.0, 0.0
    for a, b in zip(whole, tiled, strict=True):
        allowed = rounding**0.5 if a.is_floating_point() else 0.01
        apart = _difference(a, b)
        if apart / allowed >= (worst / tolerance if tolerance else 0.0):
            worst, tolerance = apart, allowed
    return Probe(worst, tolerance, sizes, tile)


def _difference(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return float((a != b).double().mean())
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs()).max()
    return float(apart / a[a.isfinite()].abs().max().clamp_min(1e-30)) if float(apart) else 0.0


def _small_inputs(model: nn.Module, inputs: Inputs) -> tuple[Inputs, float] | None:
    """Return random inputs that run, and the coarsest rounding on the way to the outputs."""
    generator = torch.Generator().manual_seed(0)
    for small in _candidates(inputs):
        made = small.map(lambda t: _random(t, generator))
        try:
            recording = record_forward(model, made)
        except (CaptureError, TilingError):
            continue
        values = [node.meta["val"] for node in recording.captured.operators()]
        dtypes = {t.dtype for t in find_tensors(values) if t.is_floating_point()}
        return made, max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-7)
    return None


def _candidates(inputs: Inputs) -> Iterator[Inputs]:
    sizes = _volume(inputs)
    if torch.Size(sizes).numel() <= _SMALL:
        yield inputs
        return
    for size in _SIZES:
        cut = tuple(min(size, s) for s in sizes)
        if cut != sizes:
            yield inputs.map(lambda t, cut=cut: _cropped(t, sizes, cut))  # type: ignore[misc]


def _cropped(tensor: Tensor, sizes: Sequence[int], cut: Sequence[int]) -> Tensor:
    if tuple(tensor.shape[2:]) != tuple(sizes):
        return tensor
    corner = (slice(1), slice(None), *(slice(size) for size in cut))
    return tensor[corner]


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def _volume(inputs: Inputs) -> tuple[int, ...]:
    largest = max(inputs.tensors(), key=lambda t: (t.ndim, t.numel()))
    return tuple(largest.shape[2:])


def _tile(tiling: Tiling, sizes: Sequence[int]) -> tuple[int, ...]:
    axis = spatial_axis(tiling.axis, len(sizes))
    halves = tuple(
        max(1, -(-size // 2)) if index == axis else size for index, size in enumerate(sizes)
    )
    if tiling.size is None:
        return halves
    tile = tiling.tile(sizes)
    return tile if tile != tuple(sizes) else halves
