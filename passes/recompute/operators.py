"""Whether and how an operator can run a second time."""

from __future__ import annotations

__all__ = ["Replay", "describe", "in_place_variant"]

import functools
from dataclasses import dataclass
from typing import Any

from pocketize._torch import schema_of
from pocketize.ops import CONVOLUTIONS, Kind, operator_of
from pocketize.ops.effects import Effect, draws_random_numbers, effect_of, in_place_overload

#: Operators that may give another resolution than they were given.
_RESAMPLES = {
    *CONVOLUTIONS,
    Kind.POOLING,
    Kind.ADAPTIVE_POOLING,
    Kind.UNPOOLING,
    Kind.RESIZE,
}


@dataclass(frozen=True)
class Replay:
    """An operator as the graph sees it.

    Attributes:
        effect: how it treats its arguments.
        heavy: it is a convolution, a matrix product or the like, whose result is worth keeping.
        resamples: it may give another resolution than it was given.
        random: it draws random numbers.
        weight: position of the argument that is the weight of a convolution or matrix product.
        data: position of the argument that it is applied to.
        statistics: positions of running statistics that it updates in training.
        training: position of the argument that says whether it trains.
    """

    effect: Effect
    heavy: bool = False
    resamples: bool = False
    random: bool = False
    weight: int | None = None
    data: int = 0
    statistics: tuple[int, ...] = ()
    training: int | None = None


def in_place_variant(func: Any) -> Any:
    """Return the overload of an activation that overwrites its input, or ``None``."""
    plain = operator_of(func).kind is Kind.ACTIVATION and not draws_random_numbers(func)
    return in_place_overload(func) if plain else None


@functools.cache
def describe(func: Any) -> Replay:
    """Look an operator up by its record and its schema."""
    effect = effect_of(func)
    if effect is Effect.OTHER:
        return Replay(effect)
    record = operator_of(func)
    names = [argument.name for argument in schema_of(func).arguments]
    updated = [names.index(n) for n in ("running_mean", "running_var") if n in names]
    training = next((names.index(n) for n in ("training", "train") if n in names), None)
    return Replay(
        effect,
        bool(record.heavy),
        record.kind in _RESAMPLES,
        draws_random_numbers(func),
        names.index(record.weight) if record.weight else None,
        names.index(record.data) if record.weight and record.data else 0,
        tuple(updated),
        training if updated else None,
    )
