"""The rewritten architecture alone, without what passes do while it runs."""

from __future__ import annotations

__all__ = ["plain"]

from torch import nn

from pocketize.graph.clone import clone
from pocketize.graph.methods import check_module
from pocketize.plugin.conversions import reversals
from pocketize.plugin.edits import Convert, edit_from_json
from pocketize.plugin.history import history, record_history
from pocketize.plugin.records import PassRecord


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of a rewritten model without its run-time passes, for tools that read modules.

    Widths and swapped blocks stay. What recomputes, checkpoints, offloads, casts or tiles is gone,
    and norms that work in place are the norms that they were. So the copy computes what the model
    computes without these passes: in full precision after ``amp``, whole volumes and unreduced
    outputs after ``patchwise``. Names and values of the weights are the same. Use it for
    ``torch.ao.quantization.fuse_modules``, TorchScript and ONNX, which look at classes and run or
    compile each module's forward.

    Args:
        model: the model, rewritten or not; it is not changed.

    Raises:
        CaptureError: the model cannot be copied.
        ModelError: it is no module.
    """
    check_module(model)
    made = clone(model)
    for module in list(nn.Module.modules(made)):
        for reverse in reversals().values():
            reverse(module)
    for module in nn.Module.modules(made):  # a part may have been rewritten alone
        if done := history(module):
            record_history(module, tuple(record for record in done if not _reversed(record)))
    return made


def _reversed(record: PassRecord) -> bool:
    """Whether nothing is left of a pass: an exchanged activation, for one, is."""
    edits = [edit_from_json(dict(edit)) for edit in record.edits]
    runs = all(isinstance(e, Convert) and e.conversion in reversals() for e in edits)
    return bool(edits) and runs and record.guarantee != "retrain"
