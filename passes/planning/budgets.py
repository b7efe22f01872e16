"""What a plan has to meet: bytes, parameters, a peak, a drop in accuracy; read and checked."""

from __future__ import annotations

__all__ = ["COUNTS", "Budgets", "Count", "read_bytes_per_weight", "read_drop", "read_quantity"]

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from pocketize.errors import OptionError, nearest
from pocketize.passes.planning.network import Sizes
from pocketize.units import UNITS, quantity

Count: TypeAlias = Literal["parameters", "conv", "stored"]

#: What a storage or parameter budget counts.
COUNTS: dict[str, Callable[[Sizes], int]] = {
    "parameters": lambda sizes: sizes.parameters,
    "conv": lambda sizes: sizes.theta,
    "stored": lambda sizes: sizes.stored,
}


@dataclass(frozen=True)
class Budgets:
    """Everything that was asked for; at least one thing."""

    max_bytes: float | None
    bytes_per_weight: float
    max_parameters: float | None
    max_peak: float | None
    max_drop: float | None
    count: Count

    def __post_init__(self) -> None:
        """Check that there is a budget, and what counts."""
        if self.count not in COUNTS:
            raise OptionError(
                f"count must be one of {', '.join(COUNTS)}, not {self.count!r}."
                f"{nearest(str(self.count), COUNTS)}"
            )
        given = (self.max_bytes, self.max_parameters, self.max_peak, self.max_drop)
        if all(value is None for value in given):
            raise OptionError(
                "no budget was given: say max_bytes, max_parameters, max_peak, or max_drop (or "
                "min_accuracy)"
            )

    @property
    def weights(self) -> int | None:
        """The most weights that storage and parameter budgets allow; None if there are neither."""
        allowed = []
        if self.max_bytes is not None:
            allowed.append(math.floor(self.max_bytes / self.bytes_per_weight + 1e-9))
        if self.max_parameters is not None:
            allowed.append(math.floor(self.max_parameters))
        return min(allowed) if allowed else None

    def counted(self, sizes: Sizes) -> int:
        """Return the weights that count."""
        return COUNTS[self.count](sizes)


def read_quantity(value: Any, name: str, kind: str) -> float | None:
    """Return a number, or read a text: ``"1MB"`` (10^6) or ``"2GiB"`` (2^30), ``"500k"``.

    Args:
        value: the number or text; ``None`` is returned as it is.
        name: of the option, for the error.
        kind: ``"bytes"`` or ``"count"``.

    Raises:
        OptionError: it is neither, or not positive.
    """
    if value is None:
        return None
    number = value
    if isinstance(value, str):
        plain = re.fullmatch(r"\d+(\.\d+)?(e\d+)?", value.strip())
        number = float(value) if plain else quantity(value.strip(), kind)
    known = ", ".join(unit for unit in UNITS[kind] if unit)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise OptionError(f"{name}: expected a number, or one with a unit ({known}), got {value!r}")
    if not (math.isfinite(number) and number > 0):
        raise OptionError(f"{name} must be positive, not {value!r}")
    return float(number)


def read_drop(max_drop: Any, min_accuracy: Any, accuracy: Any) -> float | None:
    """Return the relative drop that is allowed.

    Args:
        max_drop: that drop, 0.05 for a twentieth of the accuracy, or ``None``.
        min_accuracy: the accuracy to stay above, or ``None``.
        accuracy: the accuracy of the uncompressed network.

    Raises:
        OptionError: both were given, or a number is out of range.
    """
    given = {"max_drop": max_drop, "min_accuracy": min_accuracy, "accuracy": accuracy}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise OptionError(f"{name} must be a number, not {value!r}")
    if not (math.isfinite(accuracy) and accuracy > 0):
        raise OptionError(f"accuracy, of the network as it is, must be positive, not {accuracy!r}")
    if max_drop is not None and min_accuracy is not None:
        raise OptionError("give max_drop or min_accuracy, not both: they say the same")
    if min_accuracy is not None:
        if not 0 < min_accuracy < accuracy:
            raise OptionError(
                f"min_accuracy must be above 0 and below the accuracy of the network as it is "
                f"({accuracy!r}), not {min_accuracy!r}"
            )
        return float(1 - min_accuracy / accuracy)
    if max_drop is not None and not 0 < max_drop < 1:
        raise OptionError(
            f"max_drop is relative to the accuracy of the network as it is: above 0 and below 1, "
            f"not {max_drop!r}"
        )
    return None if max_drop is None else float(max_drop)


def read_bytes_per_weight(
    model: torch.nn.Module, dtype: torch.dtype | str | None, bytes_per_weight: float | None
) -> tuple[float, str]:
    """Return the bytes that a weight takes, and what to call that.

    Args:
        model: whose dtype is taken where nothing is said.
        dtype: a torch dtype or its name, ``"float16"``.
        bytes_per_weight: any number, such as 0.5 for packed 4-bit weights.

    Raises:
        OptionError: both were given, or one cannot be read.
    """
    if dtype is not None and bytes_per_weight is not None:
        raise OptionError("give dtype or bytes_per_weight, not both")
    if bytes_per_weight is not None:
        each = read_quantity(bytes_per_weight, "bytes_per_weight", "count") or 0.0
        return each, f"{each:g} B a weight"
    if dtype is None:
        floating = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
        dtype = floating[0] if floating else torch.float32
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            known = [name for name, held in vars(torch).items() if isinstance(held, torch.dtype)]
            raise OptionError(f"dtype: torch has no {dtype!r}.{nearest(dtype, known)}")
        dtype = found
    if not isinstance(dtype, torch.dtype):
        raise OptionError(f"dtype: expected a torch dtype or its name, got {dtype!r}")
    return float(dtype.itemsize), str(dtype).removeprefix("torch.")
