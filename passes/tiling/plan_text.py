"""What a plan says of a forward by tiles."""

from __future__ import annotations

__all__ = ["told", "told_of_slabs", "told_of_training", "told_of_windows"]

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from pocketize.errors import CaptureError, InputError, MeasureError
from pocketize.graph.inputs import Inputs
from pocketize.passes.shared.forwards import lowering
from pocketize.passes.tiling.cutting import PatchForward, Tiling
from pocketize.passes.tiling.figures import (
    foretold_peak,
    halo,
    kept_bytes,
    measured_peak,
    overhead,
    whole_peak,
)
from pocketize.passes.tiling.network import TilingError
from pocketize.passes.tiling.preparing import Prepared, whole_steps
from pocketize.passes.tiling.program import Program, Sweep
from pocketize.passes.tiling.recording import record_forward
from pocketize.passes.tiling.slabs import SlabForward
from pocketize.passes.tiling.volumes import Volume
from pocketize.passes.tiling.windows import WindowForward
from pocketize.units import bytes_text

_PLACES = {"device": "on the device", "host": "in host memory", "disk": "in files"}


def told(
    model: nn.Module, prepared: Prepared, inputs: Inputs, tiling: Tiling
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the peaks of tiles and of the whole, and sentences about a program.

    They tell halo, overhead, what is stored, the peaks, and what runs whole.

    Args:
        model: as it is.
        prepared: the program for the example inputs.
        inputs: those.
        tiling: where things are kept.
    """
    program, recording = prepared.program, prepared.recording
    peak = prepared.peak or foretold_peak(recording, replace(program, sampled=True), tiling)
    try:
        whole = measured_peak(model, inputs, mode="infer")
    except MeasureError:  # it asks for values
        whole = whole_peak(recording)
    sweeps = sum(isinstance(step, Sweep) for step in program.steps)
    notes = [
        f"on {inputs.describe()}: {sweeps} sweeps over the volume; tiles may begin anywhere",
        f"halo: {_halo_text(program)}",
        f"{overhead(program):.2f} times the voxels of the network are computed",
        f"at most {bytes_text(kept_bytes(program, tiling.held))} wait {_PLACES[tiling.keep]} "
        f"between sweeps, outputs are put together {_PLACES[tiling.output]}",
        f"live tensors on the device peak at {bytes_text(peak)} in inference, weights and input "
        f"among them; of the volume as a whole at {bytes_text(whole)} (both estimated)",
    ]
    notes += _besides(tiling)
    notes += _inert(model, tiling)
    notes += _handled(program)
    if recording.left:
        names = dict.fromkeys(name for name, _ in recording.left)
        notes.append(
            f"a forward by tiles leaves no tensor in {', '.join(list(names)[:3])}, and using what "
            "stands there raises an error"
        )
    return (peak, whole), tuple(notes)


def told_of_training(by_tiles: int, whole: int) -> str:
    """Say what a training step takes.

    Args:
        by_tiles: peak of the live tensors in bytes, as :func:`pocketize.measure` estimates it.
        whole: the same where the volume trains whole.
    """
    return (
        f"live tensors of a training step with Adam peak at {bytes_text(by_tiles)} by tiles, at "
        f"{bytes_text(whole)} where the volume trains whole (both estimated)"
    )


def told_of_slabs(forward: SlabForward, inputs: Inputs) -> tuple[str, tuple[str, ...]]:
    """Return what slabs do to the example inputs, in short and in sentences.

    Args:
        forward: of the model, not installed.
        inputs: example inputs.

    Raises:
        InputError: they have no volume, or not the axis.
    """
    volume = Volume(inputs, forward.device(inputs))
    axis, sizes, starts = forward.slabs(volume)
    padding = len(starts) * sizes[axis] - volume.sizes[axis]
    padded = f", {padding} of them zeros behind the volume" if padding else ""
    what = f"runs in slabs of {sizes[axis]} along axis {axis}, each alone"
    text = f"on {inputs.describe()}: {len(starts)} slabs{padded}"
    notes = (text, *_part_peak(forward, volume, sizes, "slab"), *_besides(forward.tiling))
    return what, notes


def told_of_windows(forward: WindowForward, inputs: Inputs) -> tuple[str, tuple[str, ...]]:
    """Return what windows do to the example inputs, in short and in sentences.

    Args:
        forward: of the model, not installed.
        inputs: example inputs.

    Raises:
        InputError: they have no volume, or another number of axes.
    """
    volume = Volume(inputs, forward.device(inputs))
    layout = forward.layout(volume)
    ratio = layout.count * math.prod(layout.window) / math.prod(volume.sizes)
    shown = "x".join(map(str, layout.window))
    what = f"runs in windows of {shown}, each alone, and averages them"
    text = (
        f"on {inputs.describe()}: {layout.count} windows, {ratio:.2f} times the voxels of the "
        "volume are computed"
    )
    notes = (text, *_part_peak(forward, volume, layout.window, "window"))
    return what, (*notes, *_besides(forward.tiling))


def _besides(tiling: Tiling) -> list[str]:
    """Say where progress is kept, and who shares the tiles."""
    notes = []
    if tiling.resume:
        notes.append(f"what is computed waits in {tiling.folder} until the volume is done")
    if tiling.group is not None:
        notes.append(
            f"in inference the processes of the group {tiling.group!r} share the tiles; figures "
            "are of one process alone"
        )
    return notes


def _inert(model: nn.Module, tiling: Tiling) -> list[str]:
    """Say which passes before this one have no effect in training by tiles."""
    names = lowering(model)
    if not tiling.train or not names:
        return []
    told, verb = " and ".join(names), "do" if len(names) > 1 else "does"
    return [
        f"{told} {verb} nothing in training by tiles: the backward pass runs the operators of a "
        f"tile again, without the modules. Leave {told} out; smaller tiles lower the peak of a "
        "step, and keep='host' or keep='disk' moves what waits"
    ]


def _part_peak(
    forward: PatchForward, volume: Volume, sizes: Sequence[int], word: str
) -> tuple[str, ...]:
    """Return the peak of one part's forward, and the volume's, where they can be recorded."""
    count = forward.tiling.batch
    try:
        part = record_forward(forward.module, _part(volume, sizes, count))
    except TilingError:
        return ()  # it cannot be recorded; it can be run
    except CaptureError as error:
        if not hasattr(error, "recorder"):
            raise  # it could not even be copied
        raise InputError(
            f"a {word} of {'x'.join(map(str, sizes))} does not run through the model: {error}"
            f"{_nearest(forward, volume, sizes)}"
        ) from None
    try:
        whole = record_forward(forward.module, volume.inputs)
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


def _nearest(forward: PatchForward, volume: Volume, sizes: Sequence[int]) -> str:
    """Say which size of parts would run, where there is one that is a multiple of a power of 2."""
    cut = [
        axis
        for axis in range(volume.rank)
        if sizes[axis] != volume.sizes[axis] or isinstance(forward, WindowForward)
    ]
    for step in (2, 4, 8, 16, 32, 64):
        tried = tuple(
            max(step, round(size / step) * step) if axis in cut else size
            for axis, size in enumerate(sizes)
        )
        try:
            record_forward(forward.module, _part(volume, tried))
        except (TilingError, CaptureError):
            continue
        return f". The nearest size that does is {'x'.join(map(str, tried))}"
    return ""


def _halo_text(program: Program) -> str:
    pairs = [
        "the whole axis" if pair is None else f"{pair[0]} before and {pair[1]} behind"
        for pair in halo(program.graph)
    ]
    return "; ".join(f"axis {axis}: {text}" for axis, text in enumerate(pairs))


def _handled(program: Program) -> list[str]:
    """Say how operators that are not local are made exact."""
    notes = []
    gathered = [node for step in program.steps if isinstance(step, Sweep) for node in step.gathers]
    if gathered:
        kinds = sorted({str(node.target).removeprefix("aten.") for node in gathered})
        notes.append(
            f"statistics of {len(gathered)} operators are gathered over all tiles before they are "
            f"applied: {', '.join(kinds)}"
        )
    whole = whole_steps(program)
    graph = program.graph
    hard = [node for node in whole if node in graph.obstacles and node not in graph.gathered]
    if hard:
        shown = dict.fromkeys(
            f"{str(node.target).removeprefix('aten.')} in {node.meta['module'] or 'the model'}"
            for node in hard
        )
        names = list(shown)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        notes.append(f"run whole, as they are not local: {', '.join(names[:4])}{more}")
    small = len(whole) - len(hard)
    if small:
        notes.append(f"{small} operators on maps no larger than a tile run whole")
    return notes
