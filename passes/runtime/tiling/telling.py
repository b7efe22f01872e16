"""What a plan says of a forward by tiles."""

from __future__ import annotations

__all__ = ["told"]

from pocketize.inputs import Inputs
from pocketize.passes.runtime.tiling.cutting import Tiling
from pocketize.passes.runtime.tiling.figures import (
    foretold_peak,
    halo,
    kept_bytes,
    overhead,
    whole_peak,
)
from pocketize.passes.runtime.tiling.placing import reduction
from pocketize.passes.runtime.tiling.preparing import Prepared, whole_steps
from pocketize.passes.runtime.tiling.program import Program, Sweep
from pocketize.units import bytes_text

_PLACES = {"device": "on the device", "host": "in host memory", "disk": "in files"}


def told(prepared: Prepared, inputs: Inputs, tiling: Tiling) -> tuple[str, ...]:
    """Return sentences about a program: halo, overhead, what is stored, the peak, what runs whole.

    Args:
        prepared: the program for the example inputs.
        inputs: those.
        tiling: where things are kept.
    """
    program, recording = prepared.program, prepared.recording
    finish = reduction(tiling.reduce)
    peak = prepared.peak or foretold_peak(
        recording, program, keep=tiling.keep, output=tiling.output, finish=finish
    )
    sweeps = sum(isinstance(step, Sweep) for step in program.steps)
    notes = [
        f"on {inputs.describe()}: {sweeps} sweeps over the volume; tiles may begin anywhere",
        f"halo: {_halo_text(program)}",
        f"{overhead(program):.2f} times the voxels of the network are computed",
        f"at most {bytes_text(kept_bytes(program))} wait {_PLACES[tiling.keep]} between sweeps, "
        f"outputs are put together {_PLACES[tiling.output]}",
        f"live tensors on the device peak at {bytes_text(peak)}, weights and input among them; "
        f"whole, the same operators at {bytes_text(whole_peak(recording))} (both estimated)",
    ]
    notes += _handled(program)
    if recording.stale:
        notes.append(
            f"after a forward by tiles {', '.join(recording.stale[:3])} holds what the last whole "
            "one left there"
        )
    return tuple(notes)


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
