"""The laws of the literature and the libraries, each with a price for how unusual it is."""

from __future__ import annotations

__all__ = ["FAMILY_PRICE", "FAN_PRICE", "known_laws"]

import math
from collections.abc import Sequence

from pocketize.initial.families import (
    NORMAL,
    ONE_SIDED,
    SQRT3,
    TRUNCATED,
    TRUNCATED_STD,
    UNIFORM,
    Family,
)
from pocketize.initial.laws import FANS, Random
from pocketize.initial.table import FAMILIES, Candidates, Table

# Prices are in nats, about minus the logarithm of how often a law is met.
FAMILY_PRICE = {NORMAL.name: 0.0, UNIFORM.name: 0.0, TRUNCATED.name: 2.0, ONE_SIDED.name: 3.0}
FAN_PRICE = dict.fromkeys(FANS, 5.0) | {
    "fan_in": 0.0,
    "constant": 0.0,
    "fan_out": 0.5,
    "fan_avg": 0.5,
    "hidden_size": 0.5,
    "fan_out / groups": 1.5,
    "fan_in * groups": 1.5,
    "fan_avg by groups": 1.5,
    "fan_avg by thirds": 1.5,
    "last axis": 2.5,
}
_RELU = math.sqrt(2.0)
_LEAKY = {slope: math.sqrt(2 / (1 + slope**2)) for slope in (0.1, 0.2, 0.25)}
_KAIMING_GAINS = {_RELU: 0.5, 1.0: 0.5, 5 / 3: 2.5, 0.75: 2.5} | dict.fromkeys(_LEAKY.values(), 2.5)
_XAVIER_GAINS = {1.0: 0.0, _RELU: 1.5, 5 / 3: 2.5, _RELU / 2: 3.5, 0.02: 2.5, _LEAKY[0.2]: 2.5}
_CONSTANTS = {0.02: 0.0, 0.01: 0.0, 1.0: 0.5} | {
    digit * 10.0**power: 2.0 if digit == 1 else 2.5
    for power in (-6, -5, -4, -3, -2, -1)
    for digit in (1, 2, 5)
    if (digit, power) not in ((1, -2), (2, -2))
}


def known_laws(
    table: Table, stock: Random | None, carried: Sequence[tuple[Random, float]]
) -> Candidates:
    """Every law of the literature and the libraries, with a price for how unusual it is."""
    rows: list[tuple[Family, int, float, float, float]] = []
    for index, fan in enumerate(table.fans):
        if fan == "constant":
            continue
        if fan in ("fan_in", "fan_out", "fan_out / groups", "fan_in * groups"):
            gains = _KAIMING_GAINS
        elif fan.startswith("fan_avg"):
            gains = _XAVIER_GAINS
        else:
            gains = {1.0: 0.5, _RELU: 1.0}
        price = 1.0 + FAN_PRICE[fan]
        if stock is None and fan != "last axis":
            # a raw parameter, a positional table say, has no inputs and outputs to count
            price += 2.0
        for gain, extra in gains.items():
            rows.append((NORMAL, index, gain, 0.0, price + extra))
            rows.append((UNIFORM, index, gain, 0.0, price + extra))
            rows.append((TRUNCATED, index, gain, 0.0, price + extra + 1))
            # cut off without correcting the scale, as trunc_normal_ leaves it
            rows.append((TRUNCATED, index, gain * TRUNCATED_STD, 0.0, price + extra + 1.5))
        rows.append((UNIFORM, index, 1 / SQRT3, 0.0, price))
        rows.append((ONE_SIDED, index, 0.5 / SQRT3, 0.0, price + 2))
    constant = table.fans.index("constant")
    for value, extra in _CONSTANTS.items():
        rows.append((NORMAL, constant, value, 0.0, 1 + extra))
        rows.append((NORMAL, constant, value, 1.0, 1.5 + extra))
        rows.append((UNIFORM, constant, value / SQRT3, 0.0, 1 + extra))
        rows.append((ONE_SIDED, constant, value / 2 / SQRT3, 0.0, 3 + extra))
        rows.append((TRUNCATED, constant, value * TRUNCATED_STD, 0.0, 2 + extra))
    for law, price in [*carried, *([(stock, 0.0)] if stock else [])]:
        if law.fan in table.fans and law.family in FAMILIES:
            rows.append((law.family, table.fans.index(law.fan), law.gain, law.location, price))
    return Candidates.of(rows)
