"""Which law explains a whole population of tensors: all convolution weights of a net, say.

One layer alone seldom tells: a standard deviation of 0.125 may be ``1 / sqrt(fan_in)`` or just
0.125. Over layers with different fans only the true law has a constant gain. The fit is a robust
maximum likelihood: every tensor is compared with its own best free fit, a law may miss it by a few
nats (``OUTLIER``), and laws pay for how unusual they are, those with unknown gains most. The law
that explains most is taken, its tensors are set aside, and the rest is fitted again, so that a net
may mix schemes. The likelihoods need nothing but the moments and the extremes of each tensor.
"""

from __future__ import annotations

__all__ = ["TINY", "fit_population"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pocketize.initial.catalogue import FAMILY_PRICE, FAN_PRICE, known_laws
from pocketize.initial.families import NORMAL, ONE_SIDED, TRUNCATED, Family, gather_family
from pocketize.initial.laws import Random
from pocketize.initial.moments import Array
from pocketize.initial.table import FAMILIES, OUTLIER, Candidates, Table

Flags = npt.NDArray[np.bool_]

#: Elements below which a tensor says nothing about a law.
TINY = 8


def _free(table: Table, open_: Flags) -> Candidates:
    """Laws with unknown gain, guessed from the largest tensors that are still unexplained."""
    rows: list[tuple[Family, int, float, float, float]] = []
    order = np.argsort(-table.count * open_, kind="stable")[:8]
    largest = [int(index) for index in order if open_[index]]
    price = 5.0 + 0.5 * math.log(float(table.count[open_].max()))
    constant = table.fans.index("constant")
    for family in FAMILIES:
        stds, fits = table.own_std(family), table.shaped(family)
        # the largest sample falls short of the bound by about bound / count: leave room for the
        # other tensors' extremes, or little of it, which a tensor that stays alone prefers
        rooms = (0.0,) if family is NORMAL else (1.0, 6.0)
        for index in largest:
            if not fits[index] or stds[index] <= 0:
                continue
            for fan, name in enumerate(table.fans):
                gain = float(stds[index] / table.units[fan, index])
                if math.isfinite(gain):
                    cost = price + FAN_PRICE[name] + FAMILY_PRICE[family.name]
                    cost += 0.5 * (fan != constant)
                    for room in rooms:
                        wide = gain * (1 + room / table.count[index])
                        rows.append((family, fan, wide, 0.0, cost))
            if family is NORMAL:
                mean, std = float(table.mean[index]), math.sqrt(table.variance[index])
                if abs(mean) * math.sqrt(table.count[index]) > 5 * std:
                    rows.append((NORMAL, constant, std, mean, 2 * price))
    return Candidates.of(rows)


def _pooled(table: Table, law: Random, members: Flags) -> Random:
    """The same law with the gain that all tensors it explains agree on best."""
    unit = table.units[table.fans.index(law.fan)][members]
    count, total = table.count[members], float(table.count[members].sum())
    if law.location:
        mean = float((count * table.mean[members]).sum() / total)
        spread = table.variance[members] + (table.mean[members] - mean) ** 2
        return replace(law, location=mean, gain=math.sqrt(float((count * spread).sum() / total)))
    if law.family is NORMAL:
        square = (table.variance + table.mean**2)[members] / unit**2
        return replace(law, gain=math.sqrt(float((count * square).sum() / total)))
    if law.family is TRUNCATED:
        # its standard deviation says more than its extremes, which only bound it from below
        square = (table.variance + table.mean**2)[members] / unit**2
        pooled = math.sqrt(float((count * square).sum() / total))
        reach = np.maximum(table.high, -table.low)[members] / unit / law.family.bound
        return replace(law, gain=max(pooled, float(reach.max())))
    reach = table.own_std(law.family)[members] / unit
    return replace(law, gain=float(reach.max()) * (1 + 3 / total))


def fit_population(
    table: Table,
    stock: Random | None = None,
    carried: Sequence[tuple[Random, float]] = (),
    *,
    free: bool = True,
    samples: Callable[[int], Array] | None = None,
) -> list[Random | None]:
    """Find the laws of a population of tensors.

    Args:
        table: The tensors' moments and geometries.
        stock: The default law of their layer type, preferred where several fit.
        carried: Laws that were found elsewhere in the same net, with their prices.
        free: Whether laws with an unknown gain may be found.
        samples: Gives a tensor's elements by its index, for distributions of unknown shape.

    Returns:
        One law per tensor, with :attr:`Random.source` set, or None where nothing explains it.
    """
    found: list[Random | None] = [None] * len(table.count)
    open_ = (table.count >= TINY) & np.isfinite(table.background)
    known = known_laws(table, stock, carried)
    known_deviance = table.deviance(known)
    while open_.any():
        best = _best(table, open_, known, known_deviance)
        if free:
            guesses = _free(table, open_)
            deviance = table.deviance(guesses)
            refined = _refined(table, open_, guesses, deviance)
            best = _best(table, open_, guesses, deviance, best, guessed=True)
            best = _best(table, open_, refined, table.deviance(refined), best, guessed=True)
        if best.law is None:
            break
        _assign(found, best.law, best.members, best.guessed)
        open_ &= ~best.members
    _settle_loners(table, found)
    if free and samples is not None:
        _fit_unknown_shapes(table, found, carried, samples)
    return found


@dataclass(frozen=True)
class _Best:
    """The candidate that explains most: more than nothing, and more than others before it."""

    law: Random | None
    score: float
    members: Flags
    guessed: bool


def _best(
    table: Table,
    open_: Flags,
    candidates: Candidates,
    deviance: Array,
    so_far: _Best | None = None,
    *,
    guessed: bool = False,
) -> _Best:
    so_far = so_far or _Best(None, 0.0, open_, False)
    if not candidates.gain:
        return so_far
    score = _scores(open_, candidates, deviance)
    row = int(score.argmax())
    if score[row] <= so_far.score:
        return so_far
    members = open_ & (deviance[row] > -OUTLIER)
    return _Best(candidates.row(row, table.fans), float(score[row]), members, guessed)


def _scores(open_: Flags, candidates: Candidates, deviance: Array) -> Array:
    scores: Array = (deviance + OUTLIER)[:, open_].sum(axis=1) - np.array(candidates.price)
    return scores


def _refined(table: Table, open_: Flags, candidates: Candidates, deviance: Array) -> Candidates:
    """The best guess of each family and fan, with the gain that all its tensors agree on."""
    rows: dict[tuple[str, int], tuple[Family, int, float, float, float]] = {}
    for row in np.argsort(-_scores(open_, candidates, deviance), kind="stable").tolist():
        family, fan = candidates.family[row], candidates.fan[row]
        members = open_ & (deviance[row] > -OUTLIER)
        if (family.name, fan) not in rows and members.any():
            law = _pooled(table, candidates.row(row, table.fans), members)
            price = candidates.price[row]
            rows[family.name, fan] = family, fan, law.gain, law.location, price
    return Candidates.of(list(rows.values()))


def _assign(found: list[Random | None], law: Random, members: Flags, guessed: bool = True) -> None:
    size = int(members.sum())
    source = f"from {size} tensors" if size > 1 else "from this tensor alone"
    for index in np.flatnonzero(members):
        found[index] = replace(law, source=source, lone=guessed and size == 1)


def _settle_loners(table: Table, found: list[Random | None]) -> None:
    """Give gains that were read off one tensor each the fan that is likeliest around them."""
    loners = [index for index, law in enumerate(found) if law and law.lone]
    fans = [law.fan for law in found if law and not law.lone]
    if fans:
        fan = max(sorted(set(fans)), key=fans.count)
    else:
        # gains that differ from layer to layer were probably fitted to each layer's input
        fan = "fan_in" if len(loners) > 1 else "constant"
    unit = table.units[table.fans.index(fan if fan in table.fans else "constant")]
    for index in loners:
        law = found[index]
        if law and law.family is not ONE_SIDED and not law.location and np.isfinite(unit[index]):
            std = law.gain * table.units[table.fans.index(law.fan), index]
            found[index] = replace(law, fan=fan, gain=float(std / unit[index]))


def _fit_unknown_shapes(
    table: Table,
    found: list[Random | None],
    carried: Sequence[tuple[Random, float]],
    samples: Callable[[int], Array],
) -> None:
    """Laws for fresh tensors of no known family: shape from the samples, scale from the fans.

    There is no likelihood to compare, so three tensors of one kurtosis have to agree on a gain, or
    one has to agree with a law found elsewhere in the net. Small tensors fit the formulas too, if
    less well than their neighbours fit the found shape; they go with their neighbours.
    """
    shared = {
        (law.family.name, law.fan, law.gain)
        for law, judged in zip(found, table.judged, strict=True)
        if law and judged
    }
    astray = [law is None or (law.family.name, law.fan, law.gain) not in shared for law in found]
    open_ = np.array(astray) & table.even & (table.count >= TINY)
    # sampling error of the logarithm of a standard deviation
    error = np.sqrt(np.maximum(table.kurtosis - 1, 0.1) / (4 * table.count))
    std = np.sqrt(table.variance)
    gains = std[None] / table.units

    def alike(kurtosis: float) -> Flags:
        return ~table.judged | (np.abs(np.log(table.kurtosis / kurtosis)) < 0.25)

    for law, _ in carried:
        if law.family not in FAMILIES and law.fan in table.fans:
            distance = np.abs(np.log(gains[table.fans.index(law.fan)] / law.gain))
            explained = open_ & alike(law.family.kurtosis) & (distance < 6 * error + 0.005)
            _assign(found, law, explained, guessed=False)
            open_ &= ~explained
    while (open_ & table.judged).any():
        largest = int(np.argmax(table.count * open_))
        close = open_ & alike(float(table.kurtosis[largest]))
        with np.errstate(invalid="ignore"):
            distance = np.abs(np.log(gains / gains[:, largest : largest + 1]))
            members = close[None] & (distance < 6 * (error + error[largest]))
        row = int(members.sum(axis=1).argmax())
        explained = members[row]
        if explained.sum() >= 3:
            weights = table.count[explained]
            gain = float(np.exp(np.average(np.log(gains[row][explained]), weights=weights)))
            family = gather_family(samples(largest))
            offset = table.mean[explained] / std[explained]
            if np.all(np.abs(offset) * np.sqrt(weights) > 5):
                family = replace(family, offset=float(np.average(offset, weights=weights)))
            _assign(found, Random(family, table.fans[row], gain), explained)
            open_ &= ~explained
        open_[largest] = False
