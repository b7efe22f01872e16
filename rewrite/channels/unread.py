"""Parameters that no recorded forward reads, and that may read channels which are resized.

A network may read them in another setting: the heads of deep supervision are read in training only.
There they would meet fewer channels than they have weights for.
"""

from __future__ import annotations

__all__ = ["unread_warning"]

from collections.abc import Sequence

from torch import nn

from pocketize.channels.groups import ChannelGroups
from pocketize.plugin.edits import Edit, Resize

#: An axis of this size or less is no sign of anything.
_SMALL = 2
_SHOWN = 5


def unread_warning(channels: ChannelGroups, edits: Sequence[Edit]) -> str:
    """Name the unread parameters with as many channels as some that are resized; ``""`` if none."""
    sizes = {edit.size for edit in edits if isinstance(edit, Resize) and edit.size > _SMALL}
    tensors = dict(channels.model.named_parameters())
    found = [n for n in channels.unreached if not sizes.isdisjoint(tensors[n].shape[:2])]
    if not found:
        return ""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    switches = _switches(channels.model, found)
    other = ", ".join(f"{{{name!r}: {not value}}}" for name, value in list(switches.items())[:2])
    example = f", variants=[{other}]" if other else " with variants="
    return (
        f"no recorded forward reads {', '.join(found[:_SHOWN])}{more}, which may read channels "
        "that are resized. They stay as they are, and do not fit where the network reads them in "
        f"another setting, such as deep supervision. Let that be recorded too{example}"
    )


def _switches(model: nn.Module, names: Sequence[str]) -> dict[str, bool]:
    """Return the truth values that the modules around parameters hold, the innermost first."""
    found: dict[str, bool] = {}
    for name in names:
        path = name
        while path:
            path = path.rpartition(".")[0]
            module = model.get_submodule(path)
            if type(module).__module__.startswith("torch."):
                continue
            for key, value in vars(module).items():
                if isinstance(value, bool) and not key.startswith("_") and key != "training":
                    found.setdefault(f"{path}.{key}" if path else key, value)
    return found
