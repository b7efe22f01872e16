"""What the formats that hold no recipe keep of passes: found by trying, for every pass alike."""

from __future__ import annotations

__all__ = ["lost_steps"]

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pocketize.artifact.pt2 import export
from pocketize.artifact.states import full_state
from pocketize.engine.history import dry_run
from pocketize.engine.surgery import apply_edits
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs
from pocketize.plugin.edits import Edit, Redraw


def lost_steps(
    model: nn.Module, steps: Sequence[Sequence[Edit]], inputs: Inputs | None = None
) -> list[int]:
    """Return the steps of a rewrite that leave nothing in a state_dict, or in an exported program.

    A step is lost in a state_dict if it changes neither names nor shapes, and draws no weights
    anew. It is lost in an exported program if, besides, the program is the same without it: what a
    pass does for training, such as recomputing, is not part of one.

    Args:
        model: the model before the steps; unchanged.
        steps: the edits of each pass.
        inputs: for an exported program: what it is exported with. None for a state_dict.

    Raises:
        RewriteError: the model cannot be exported.
    """
    states = [_shapes(dry_run(model, steps[:count])) for count in range(len(steps) + 1)]
    same = [
        number
        for number, edits in enumerate(steps)
        if edits
        and states[number] == states[number + 1]
        and not any(isinstance(edit, Redraw) for edit in edits)
    ]
    if inputs is None or not same:
        return same
    copy, lost = clone(model), []
    for number, edits in enumerate(steps):
        before = _program(copy, inputs) if number in same else None
        apply_edits(copy, edits)
        if before is not None and before == _program(copy, inputs):
            lost.append(number)
    return lost


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {
        key: (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)
        for key, value in full_state(model).items()
    }


def _program(model: nn.Module, inputs: Inputs) -> list[str]:
    """Describe every operator of an exported program, with its arguments and results."""
    graph = export(clone(model), inputs).graph
    graph.eliminate_dead_code()  # torch 2.6 leaves some of its checkpoints
    return [f"{node.format_node()} {node.meta.get('val')}" for node in graph.nodes]
