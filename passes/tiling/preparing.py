"""From a model and inputs of one size to the program that computes it tile by tile."""

from __future__ import annotations

__all__ = ["Prepared", "largest_tile", "prepare", "prepare_recorded", "volume_of"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn

from pocketize.errors import OptionError
from pocketize.graph.capture import Captured
from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.aliasing import Memory, leave_views_out
from pocketize.passes.tiling.arguments import draws
from pocketize.passes.tiling.cutting import Tiling
from pocketize.passes.tiling.figures import foretold_peak
from pocketize.passes.tiling.network import TiledGraph, TilingError
from pocketize.passes.tiling.program import Program, Sweep, build_program
from pocketize.passes.tiling.recording import Recording, record_forward
from pocketize.units import bytes_text


@dataclass(frozen=True, eq=False)
class Prepared:
    """How a model is computed by tiles for inputs of one size.

    Attributes:
        recording: of its forward.
        program: what is done, in which order.
        peak: foretold bytes of live tensors, where a target made them known; 0 otherwise.
    """

    recording: Recording
    program: Program
    peak: int = 0


def prepare(
    model: nn.Module, inputs: Inputs, tiling: Tiling, *, training: bool = False
) -> Prepared:
    """Record a model and plan how it is computed by tiles.

    Args:
        model: in evaluation mode.
        inputs: of the call.
        tiling: how it is cut.
        training: with each module in the mode that it is in.

    Raises:
        TilingError: it cannot be computed by tiles.
        InputError: the tiles do not fit the inputs.
        OptionError: no tile meets ``max_peak``.
    """
    return prepare_recorded(record_forward(model, inputs, training=training), tiling)


def prepare_recorded(recording: Recording, tiling: Tiling) -> Prepared:
    """Do the same from a recording.

    Raises:
        TilingError, InputError, OptionError: as :func:`prepare`.
    """
    if tiling.reduce is None:
        leave_views_out(recording.captured.graph)
        _check_overlaps(recording.captured)
    graph = TiledGraph(recording.captured)
    _check_random(graph)
    volume = volume_of(graph)
    if tiling.size is None:
        return _within(recording, graph, tiling)
    program = build_program(graph, tiling.tile(volume), sampled=tiling.sampled)
    if not any(isinstance(step, Sweep) for step in program.steps):
        raise TilingError(
            "none of its operators on maps can be computed part by part: " + obstacles_text(graph)
        )
    return Prepared(recording, program)


def volume_of(graph: TiledGraph) -> tuple[int, ...]:
    """Return the spatial sizes of the largest input."""
    inputs = [node for node in graph.captured.graph.nodes if node.op == "placeholder"]
    full = max((node for node in inputs if graph.is_map(node)), key=graph.voxels)
    return tuple(full.meta["val"].shape[2:])


def obstacles_text(graph: TiledGraph) -> str:
    """Say which operators need their inputs whole, where, and why."""
    found = dict.fromkeys(
        f"{why} ({node.meta['module'] or 'the model itself'})"
        for node, why in graph.obstacles.items()
    )
    shown = list(found)[:3]
    return "; ".join(shown) + ("; ..." if len(found) > 3 else "") if shown else "there are none"


def _check_random(graph: TiledGraph) -> None:
    for node in graph.nodes:
        if draws(node):
            raise TilingError(
                f"{node.target} in {node.meta['module'] or 'the model itself'} draws random "
                "numbers, which tiles would draw in another order; set its probability to 0, or "
                "put it into evaluation mode"
            )


def _check_overlaps(captured: Captured) -> None:
    memory, outputs = Memory(captured.graph), set(captured.outputs())
    for node in outputs:
        if len(outputs.intersection(memory.beside(node))) > 1:
            raise TilingError(
                f"it returns two parts of one tensor that overlap ({node.target} in "
                f"{node.meta['module'] or 'the model itself'}), and tiles would make two tensors "
                "of them; return a clone of one"
            )


def _within(recording: Recording, graph: TiledGraph, tiling: Tiling) -> Prepared:
    """Return the program of the largest tiles whose forward has a peak within the target."""

    def peak_of(tile: tuple[int, ...]) -> int:
        return foretold_peak(recording, build_program(graph, tile), tiling)

    tile, peak = largest_tile(volume_of(graph), tiling.max_peak, peak_of, "a forward")
    return Prepared(recording, build_program(graph, tile), peak)


def largest_tile(
    volume: Sequence[int], limit: int, peak_of: Callable[[tuple[int, ...]], int], what: str
) -> tuple[tuple[int, ...], int]:
    """Return the largest tiles whose peak is within a limit, and their peak.

    Args:
        volume: sizes of the whole.
        limit: in bytes.
        peak_of: of tiles of some sizes.
        what: is run.

    Raises:
        OptionError: there are none; the text says what the smallest take.
    """
    tiles = list(_smaller(volume))
    low, high = 0, len(tiles) - 1
    found, least = None, 0
    while low <= high:
        middle = (low + high) // 2
        peak = peak_of(tiles[middle])
        if peak <= limit:
            found, high = (tiles[middle], peak), middle - 1
        else:
            low, least = middle + 1, peak
    if found is None:
        raise OptionError(
            f"patchwise: option 'max_peak': no tile keeps the live tensors of {what} within "
            f"{bytes_text(limit)}; with tiles of {tiles[-1]} they take {bytes_text(least)}, "
            "weights and input among them. Say max_peak of at least that, or keep='host' and "
            "output='host' on a GPU, 'disk' on a CPU"
        )
    return found


def _smaller(volume: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield tiles, each half of the one before along its longest axis, down to 8 voxels."""
    tile = tuple(volume)
    yield tile
    while max(tile) > 8:
        axis = max(range(len(tile)), key=lambda a: (tile[a], a))
        tile = tuple(-(-t // 2) if a == axis else t for a, t in enumerate(tile))
        yield tile


def whole_steps(program: Program) -> list[fx.Node]:
    """Return operators on maps that run whole."""
    graph = program.graph
    direct = [step.node for step in program.steps if not isinstance(step, Sweep)]
    return [node for node in direct if graph.is_map(node) or _reads_maps(graph, node)]


def _reads_maps(graph: TiledGraph, node: fx.Node) -> bool:
    return any(graph.is_map(source) for source in node.all_input_nodes if source.op != "get_attr")
