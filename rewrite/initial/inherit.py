"""Laws for the parameters of a module that a conversion has made in place of another."""

from __future__ import annotations

__all__ = ["inherit", "names_inside"]

from collections.abc import Mapping

from torch import nn

from pocketize.initial.laws import (
    Constant,
    KeepUnlessResized,
    Law,
    Orthogonal,
    Random,
    Resampled,
)
from pocketize.initial.slots import Slot, find_slots


def inherit(laws: Mapping[str, Law], model: nn.Module, path: str) -> dict[str, Law]:
    """Return a law for the parameters of one module that have none of their own.

    A layer inside it inherits the law of the weight or bias that the module had before under the
    same name. A weight that was zero, as the last layer of a residual branch may be, is inherited
    by the last layer only: a product of zeros would never learn. What has no law to inherit that
    can be drawn at another shape is left to the default of its own layer.

    Args:
        laws: laws of the model before.
        model: the model after.
        path: the module that was made.
    """
    found: dict[str, Law] = {}
    inside = [slot for slot in find_slots(model) if _under(slot, path)]
    weights = [slot for slot in inside if slot.role == "weight" and slot.kind in ("conv", "linear")]
    for slot in inside:
        if slot.kind not in ("conv", "linear") or any(name in laws for name in slot.names):
            continue
        law = laws.get(f"{path}.{slot.leaf}")
        if isinstance(law, KeepUnlessResized):
            law = law.law
        zero = isinstance(law, Constant) and (slot.role == "bias" or slot is weights[-1])
        if zero or isinstance(law, Random | Orthogonal | Resampled):
            assert law is not None
            found.update(dict.fromkeys(slot.names, law))
    return found


def names_inside(model: nn.Module, path: str) -> list[str]:
    """Return the names of the parameters and buffers of one module of a model."""
    module = model.get_submodule(path)
    held = [*module.named_parameters(), *module.named_buffers()]
    return [f"{path}.{name}" for name, _ in held]


def _under(slot: Slot, path: str) -> bool:
    return any(name.startswith(f"{path}.") for name in slot.names)
