"""What a plan says about a forward by tiles, and the comparison on a small volume behind it."""

from __future__ import annotations

__all__ = [
    "compare",
    "exact_notes",
    "part_notes",
    "times",
    "training_note",
]

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pocketize.errors import CaptureError, InputError, MeasureError
from pocketize.graph.capture import find_tensors
from pocketize.graph.clone import clone, quiet_code
from pocketize.graph.inputs import Inputs, first_parameter
from pocketize.graph.methods import set_mode
from pocketize.passes.shared.forwards import lowering
from pocketize.passes.tiling.exact import ExactForward, Prepared
from pocketize.passes.tiling.figures import (
    estimated_peak,
    halo,
    kept_bytes,
    measured_peak,
    overhead,
    whole_peak,
)
from pocketize.passes.tiling.forward import Tiling, spatial_axis, volume_of
from pocketize.passes.tiling.program import Program, TileLoop
from pocketize.passes.tiling.slabs import Layout, PartForward, Volume
from pocketize.passes.tiling.tiled_graph import TilingError
from pocketize.passes.tiling.tracing import trace_forward
from pocketize.passes.tiling.windows import Windows
from pocketize.units import bytes_text

_PLACES = {"device": "on the device", "host": "in host memory", "disk": "in files"}
#: Volumes of up to so many voxels are compared at their own size.
_SMALL = 2**18
_SIZES = (32, 48, 64, 96, 128)


def times(sizes: Sequence[int]) -> str:
    """Write sizes as "16x16x8"."""
    return "x".join(map(str, sizes))


def exact_notes(
    model: nn.Module, prepared: Prepared, inputs: Inputs, tiling: Tiling
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the peaks of tiles and of the whole in bytes, and the notes of a plan in exact mode.

    They state halo, overhead, stored bytes, peaks, and which operators run at full size.
    """
    program, trace = prepared.program, prepared.trace
    peak = prepared.peak or estimated_peak(trace, replace(program, sampled=True), tiling)
    try:
        whole = measured_peak(model, inputs, mode="infer")
    except MeasureError:  # it asks for values
        whole = whole_peak(trace)
    loops = sum(isinstance(step, TileLoop) for step in program.steps)
    kept = bytes_text(kept_bytes(program, tiling.stored_dtype))
    halos = "; ".join(
        f"axis {axis}: "
        + ("the whole axis" if pair is None else f"{pair[0]} before and {pair[1]} behind")
        for axis, pair in enumerate(halo(program.graph))
    )
    notes = [
        f"on {inputs.describe()}: {loops} tile loops over the volume; tiles may start anywhere",
        f"halo: {halos}",
        f"{overhead(program):.2f} times the voxels of the network are computed",
        f"at most {kept} are kept {_PLACES[tiling.keep]} between tile loops, outputs are put "
        f"together {_PLACES[tiling.output]}",
        f"live tensors on the device peak at {bytes_text(peak)} in inference, weights and input "
        f"among them; of the volume as a whole at {bytes_text(whole)} (both estimated)",
    ]
    notes += [*_common_notes(tiling), *_ineffective(model, tiling), *_nonlocal_notes(program)]
    if trace.lost:
        names = dict.fromkeys(name for name, _ in trace.lost)
        notes.append(
            f"a forward by tiles stores no tensor in {', '.join(list(names)[:3])}; reading it "
            "raises an error"
        )
    return (peak, whole), tuple(notes)


def training_note(by_tiles: int, whole: int) -> str:
    """State the peaks of a training step in bytes, as :func:`pocketize.measure` estimates them."""
    return (
        f"live tensors of a training step with Adam peak at {bytes_text(by_tiles)} by tiles, at "
        f"{bytes_text(whole)} where the volume trains whole (both estimated)"
    )


def part_notes(forward: PartForward, inputs: Inputs) -> tuple[str, tuple[str, ...]]:
    """Return what slabs or windows do to the example inputs, in short and as notes.

    Raises:
        InputError: the inputs have no volume, or not the axes; or a part does not run.
    """
    layout, word = forward.layout(Volume(inputs, forward.device(inputs))), forward.tiling.mode
    count = sum(map(len, layout.rows))
    if isinstance(layout, Windows):
        ratio = count * math.prod(layout.sizes) / math.prod(layout.volume.sizes)
        what = f"runs in windows of {times(layout.sizes)}, each alone, and averages them"
        more = f", {ratio:.2f} times the voxels of the volume are computed"
    else:
        axis, size = layout.axis, layout.sizes[layout.axis]
        padding = count * size - layout.volume.sizes[axis]
        what = f"runs in slabs of {size} along axis {axis}, each alone"
        more = f", {padding} of them zeros behind the volume" if padding else ""
    text = f"on {inputs.describe()}: {count} {word}s{more}"
    return what, (text, *_part_peak(forward, layout, word), *_common_notes(forward.tiling))


def _common_notes(tiling: Tiling) -> list[str]:
    notes = []
    if tiling.resume:
        notes.append(f"results are kept in {tiling.folder} until the volume is done")
    if tiling.group is not None:
        notes.append(
            f"in inference the processes of the group {tiling.group!r} share the tiles; figures "
            "are of one process alone"
        )
    return notes


def _ineffective(model: nn.Module, tiling: Tiling) -> list[str]:
    """Name passes before this one that have no effect in training by tiles."""
    names = lowering(model)
    if not tiling.train or not names:
        return []
    shown, verb = " and ".join(names), "do" if len(names) > 1 else "does"
    return [
        f"{shown} {verb} nothing in training by tiles: the backward pass runs the operators of a "
        f"tile again, without the modules. Leave {shown} out; smaller tiles lower the peak of a "
        "step, and keep='host' or keep='disk' moves stored results off the device"
    ]


def _part_peak(forward: PartForward, layout: Layout, word: str) -> tuple[str, ...]:
    """Return the peak of one part's forward, and the volume's, where they can be traced."""
    volume, count = layout.volume, forward.tiling.batch
    try:
        part = trace_forward(forward.module, _part(volume, layout.sizes, count))
    except TilingError:
        return ()  # it cannot be traced; it can be run
    except CaptureError as error:
        if not hasattr(error, "trace_mode"):
            raise  # it could not even be copied
        raise InputError(
            f"a {word} of {times(layout.sizes)} does not run through the model: {error}"
            f"{_nearest(forward, layout)}"
        ) from None
    try:
        whole = trace_forward(forward.module, volume.inputs)
    except (TilingError, CaptureError):
        return ()  # a network need not run on a volume of any size
    many = f"{count} {word}s" if count > 1 else f"a {word}"
    return (
        f"live tensors of the forward of {many} peak at {bytes_text(whole_peak(part))}, of the "
        f"whole volume at {bytes_text(whole_peak(whole))} (both estimated), outputs of the volume "
        "left out",
    )


def _part(volume: Volume, sizes: Sequence[int], count: int = 1) -> Inputs:
    return volume.read([(0,) * volume.rank] * count, sizes)


def _nearest(forward: PartForward, layout: Layout) -> str:
    """Name the nearest size of parts that runs and is a multiple of a power of 2, if any."""
    volume, every = layout.volume, isinstance(layout, Windows)
    for step in (2, 4, 8, 16, 32, 64):
        tried = tuple(
            max(step, round(size / step) * step) if every or size != whole else size
            for size, whole in zip(layout.sizes, volume.sizes, strict=True)
        )
        try:
            trace_forward(forward.module, _part(volume, tried))
        except (TilingError, CaptureError):
            continue
        return f". The nearest size that does is {times(tried)}"
    return ""


def _nonlocal_notes(program: Program) -> list[str]:
    """Say how operators that are not local are computed exactly."""
    notes = []
    loops = [step for step in program.steps if isinstance(step, TileLoop)]
    reduced = [node for step in loops for node in step.reductions]
    if reduced:
        kinds = sorted({str(node.target).removeprefix("aten.") for node in reduced})
        notes.append(
            f"statistics of {len(reduced)} operators are reduced over all tiles before they are "
            f"applied: {', '.join(kinds)}"
        )
    graph, obstacles = program.graph, program.graph.obstacles.keys() - program.graph.reductions
    direct = [step.node for step in program.steps if not isinstance(step, TileLoop)]
    whole = [node for node in direct if any(map(graph.is_map, [node, *node.all_input_nodes]))]
    hard = [node for node in whole if node in obstacles]
    if hard:
        shown = dict.fromkeys(
            f"{str(node.target).removeprefix('aten.')} in {node.meta['module'] or 'the model'}"
            for node in hard
        )
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        notes.append(f"run whole, as they are not local: {', '.join(list(shown)[:4])}{more}")
    if len(whole) > len(hard):
        notes.append(f"{len(whole) - len(hard)} operators on maps no larger than a tile run whole")
    return notes


# -- a small volume, computed by tiles and whole ---------------------------------------------------


def compare(model: nn.Module, inputs: Inputs, tiling: Tiling) -> tuple[str, ...]:
    """Run copies of a model on random values, whole and by tiles; return how far they agree.

    Large inputs are reduced, and at least two tiles are tried.

    Raises:
        TilingError: they differ, or the model cannot be computed by tiles.
    """
    first = first_parameter(model)
    if first is not None and first.is_meta:
        return ("it has no values yet, so that tiles could not be compared with the whole",)
    found = _small_inputs(model, inputs)
    try:
        whole = _run(model, found[0]) if found is not None else []
    except Exception:  # a user's forward may raise anything on random values
        found = None
    if found is None:
        return ("no small volume runs through it, so that tiles were not compared with one",)
    small, rounding = found
    sizes = volume_of(small)
    alone = Tiling(size=_tile(tiling, sizes), axis=tiling.axis, progress=False)
    where = f"a volume of {times(sizes)} by tiles of {times(alone.sizes)}"
    difference, tolerance = _difference(whole, _run(model, small, alone), rounding)
    if difference > tolerance:
        raise TilingError(
            f"on {where} the outputs differ from the whole volume's by {difference:.2g} of their "
            f"largest value, more than rounding explains ({tolerance:.2g})"
        )
    same = f"{where} gave the whole volume's outputs to {difference:.2g} of the largest"
    if tiling.keep_dtype is None:
        return (same,)
    rounded = _run(model, small, replace(alone, keep_dtype=tiling.keep_dtype))
    difference, _ = _difference(whole, rounded, rounding)
    return same, f"with {tiling.keep_dtype} between tile loops, to {difference:.2g} of it"


def _run(model: nn.Module, inputs: Inputs, tiling: Tiling | None = None) -> list[Tensor]:
    copy = clone(model)
    set_mode(copy, False)
    if tiling is not None:
        ExactForward(copy, tiling).install()
    with torch.no_grad(), quiet_code(copy):
        return find_tensors(inputs.call(copy))


def _difference(whole: list[Tensor], tiled: list[Tensor], rounding: float) -> tuple[float, float]:
    """Return the difference of the worst output, and what rounding explains of it.

    It is relative to the largest value; of integers it is the fraction that differs.
    """
    worst, tolerance = 0.0, 0.0
    for a, b in zip(whole, tiled, strict=True):
        allowed = rounding**0.5 if a.is_floating_point() else 0.01
        apart = _apart(a, b)
        if apart / allowed >= (worst / tolerance if tolerance else 0.0):
            worst, tolerance = apart, allowed
    return worst, tolerance


def _apart(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return float((a != b).double().mean())
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = float(torch.where(same, 0.0, (a - b).abs()).max())
    return apart / float(a[a.isfinite()].abs().max().clamp_min(1e-30)) if apart else 0.0


def _small_inputs(model: nn.Module, inputs: Inputs) -> tuple[Inputs, float] | None:
    """Return random inputs that run, and the coarsest rounding on the way to the outputs."""
    sizes, generator = volume_of(inputs), torch.Generator().manual_seed(0)
    small = math.prod(sizes) <= _SMALL
    cuts = [tuple(min(size, s) for s in sizes) for size in _SIZES]
    for cut in [sizes] if small else [each for each in cuts if each != sizes]:
        corner = (slice(1), slice(None), *map(slice, cut))

        def random(tensor: Tensor, corner: tuple[slice, ...] = corner) -> Tensor:
            if not small and tuple(tensor.shape[2:]) == sizes:
                tensor = tensor[corner]
            if not tensor.is_floating_point():
                return tensor
            return torch.randn(tensor.shape, generator=generator).to(tensor)

        made = inputs.map(random)
        try:
            trace = trace_forward(model, made)
        except (CaptureError, TilingError):
            continue
        values = [node.meta["val"] for node in trace.traced.operators()]
        dtypes = {t.dtype for t in find_tensors(values) if t.is_floating_point()}
        return made, max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-7)
    return None


def _tile(tiling: Tiling, sizes: Sequence[int]) -> tuple[int, ...]:
    axis = spatial_axis(tiling.axis, len(sizes))
    halves = tuple(
        max(1, -(-size // 2)) if index == axis else size for index, size in enumerate(sizes)
    )
    if tiling.size is None:
        return halves
    tile = tiling.tile(sizes)
    return tile if tile != tuple(sizes) else halves
