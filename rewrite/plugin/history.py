"""The rewrites that a model records."""

from __future__ import annotations

__all__ = ["history", "record_history"]

from torch import fx, nn

from pocketize.plugin.records import PassRecord

_HISTORY = "_pocketize_history"


def history(model: nn.Module) -> tuple[PassRecord, ...]:
    """Return the rewrites of a model, oldest first; empty for one that was never rewritten."""
    held = vars(model)
    if isinstance(model, fx.GraphModule):
        held = {**model.meta, **held}
    records: tuple[PassRecord, ...] = held.get(_HISTORY, ())
    return records


def record_history(model: nn.Module, records: tuple[PassRecord, ...]) -> None:
    """Store with a model what :func:`history` returns."""
    vars(model)[_HISTORY] = records  # whatever __setattr__ of the class does
    if isinstance(model, fx.GraphModule):  # whose copies keep nothing else
        model.meta[_HISTORY] = records
