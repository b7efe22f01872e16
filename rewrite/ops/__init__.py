"""What is known of an operator: one record each, see :mod:`pocketize.ops.record`."""

from __future__ import annotations

__all__ = [
    "CONVOLUTIONS",
    "MOVEMENTS",
    "NORMS",
    "UNKNOWN",
    "Kind",
    "Operator",
    "Window",
    "all_operators",
    "bind",
    "is_convolution",
    "operator_name",
    "operator_of",
    "register",
]

from pocketize.ops import layers, movement, pointwise, spatial  # noqa: F401  (write the records)
from pocketize.ops.record import (
    CONVOLUTIONS,
    MOVEMENTS,
    NORMS,
    UNKNOWN,
    Kind,
    Operator,
    Window,
    all_operators,
    is_convolution,
    operator_of,
    register,
)
from pocketize.ops.schema import bind, operator_name
