"""Which law explains a whole population of tensors: all convolution weights of a net, say.

One layer alone seldom tells: a standard deviation of 0.125 may be ``1 / sqrt(fan_in)`` or just
0.125. Over layers with different fans only the true law has a constant gain. The fit is a robust
maximum likelihood: every tensor is compared with its own best free fit, a law may miss it by at
most :data:`OUTLIER` nats, and laws pay for how unusual they are (unknown gains most). The law that
explains most is taken, its tensors are set aside, and the rest is fitted again, so that a net may
mix schemes. The likelihoods need nothing but the moments and the extremes of each tensor.
"""

from __future__ import annotations

__all__ = ["JUDGED", "TINY", "Array", "Moments", "Table", "fit_population", "measure", "sample"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketize.initial_laws import (
    FANS,
    NORMAL,
    ONE_SIDED,
    SQRT3,
    TRUNCATED,
    TRUNCATED_STD,
    UNIFORM,
    Family,
    Geometry,
    Random,
    gather_family,
)

Array = npt.NDArray[np.float64]

#: Nats by which a law may miss one tensor's own best fit before it no longer explains it.
OUTLIER = 14.0
#: Elements that statistics are taken from, at most, per tensor.
SAMPLE = 2**18
#: Elements from which the shape of a tensor's distribution can be judged.
JUDGED = 512
#: Elements below which a tensor says nothing about a law.
TINY = 8

_FAMILIES = (NORMAL, UNIFORM, TRUNCATED, ONE_SIDED)
_FAMILY_PRIOR = {NORMAL.name: 0.0, UNIFORM.name: 0.0, TRUNCATED.name: 1.0, ONE_SIDED.name: 2.0}
_FAN_PRIOR = {name: 2.5 for name in FANS} | {
    "fan_in": 0.0,
    "constant": 0.0,
    "fan_out": 0.5,
    "fan_avg": 0.5,
    "hidden_size": 0.5,
    "fan_out / groups": 1.5,
    "fan_in * groups": 1.5,
    "fan_avg by groups": 1.5,
    "fan_avg by thirds": 1.5,
    "last axis": 2.0,
}
_RELU = math.sqrt(2.0)
_LEAKY = {slope: math.sqrt(2 / (1 + slope**2)) for slope in (0.1, 0.2, 0.25)}
_KAIMING_GAINS = {_RELU: 0.5, 1.0: 0.5, 5 / 3: 1.5, 0.75: 1.5} | dict.fromkeys(_LEAKY.values(), 1.5)
_XAVIER_GAINS = {1.0: 0.0, _RELU: 1.0, 5 / 3: 1.5, _RELU / 2: 1.5, 0.02: 1.5, _LEAKY[0.2]: 1.5}
_CONSTANTS = {0.02: 0.0, 0.01: 0.0, 1.0: 0.5} | {
    digit * 10.0**power: 2.0 if digit == 1 else 2.5
    for power in (-6, -5, -4, -3, -2, -1)
    for digit in (1, 2, 5)
    if (digit, power) not in ((1, -2), (2, -2))
}


@dataclass(frozen=True)
class Moments:
    """What the fit knows of one tensor.

    Attributes:
        count: Elements looked at.
        mean: Their mean.
        variance: Their variance.
        low: The smallest.
        high: The largest.
        kurtosis: Fourth standardised moment.
        rounding: Relative rounding error of the dtype.
        uneven: How many standard errors the channels' variances differ by more than those of
            independent, identically distributed elements would. Training makes channels differ.
    """

    count: int
    mean: float
    variance: float
    low: float
    high: float
    kurtosis: float
    rounding: float
    uneven: float


def sample(values: Tensor) -> Array:
    """At most :data:`SAMPLE` elements of a tensor, evenly spread and the same in every call."""
    flat = values.detach().reshape(-1)
    if len(flat) > SAMPLE:
        # runs of 64 keep memory access cheap; an odd stride does not lock in with channel counts
        runs = flat[: len(flat) // 64 * 64].view(-1, 64)
        flat = runs[:: (-(-len(runs) * 64 // SAMPLE)) | 1].reshape(-1)
    array: Array = flat.cpu().double().numpy()
    return array


def _unevenness(values: Tensor) -> float:
    """See :attr:`Moments.uneven`; the larger of the first two axes'."""
    if values.dim() < 2 or values.numel() < JUDGED:
        return 0.0
    side = max(8, math.isqrt(2**16 // max(1, math.prod(values.shape[2:]))))
    block = values.detach()[
        :: -(-values.shape[0] // side),
        :: -(-values.shape[1] // side),
    ]
    data = block.cpu().double().numpy()
    data = data - data.mean()
    variance = max(float((data**2).mean()), 1e-300)
    excess = float((data**4).mean()) / variance**2 - 1
    worst = 0.0
    for axis in (0, 1):
        rows = np.moveaxis(data, axis, 0).reshape(data.shape[axis], -1)
        count, length = rows.shape
        if count < 8 or length < 8:
            continue
        observed = float((rows**2).mean(axis=1).var(ddof=1)) / variance**2
        expected = max(excess, 0.1) / length
        error = math.sqrt(2 / (count - 1) + 12 / (length * count))
        worst = max(worst, (observed / expected - 1) / error)
    return worst


def measure(values: Tensor, data: Array) -> Moments:
    """Moments of a real tensor, of which ``data`` is a :func:`sample`."""
    mean = float(data.mean())
    square = (data - mean) ** 2
    variance = float(square.mean())
    return Moments(
        count=len(data),
        mean=mean,
        variance=variance,
        low=float(data.min()),
        high=float(data.max()),
        kurtosis=float((square * square).mean()) / max(variance**2, 1e-300),
        rounding=max(torch.finfo(values.dtype).eps, 1e-7),
        uneven=_unevenness(values),
    )


@dataclass(frozen=True)
class _Candidates:
    """Fully specified laws as parallel lists."""

    family: list[Family]
    fan: list[int]
    gain: list[float]
    location: list[float]
    prior: list[float]

    @staticmethod
    def of(rows: Sequence[tuple[Family, int, float, float, float]]) -> _Candidates:
        columns = zip(*rows, strict=True) if rows else ([], [], [], [], [])
        return _Candidates(*map(list, columns))


class Table:
    """The moments and fans of a population, as arrays over its tensors."""

    def __init__(self, moments: Sequence[Moments], geometries: Sequence[Geometry]) -> None:
        def column(name: str) -> Array:
            return np.array([getattr(row, name) for row in moments], dtype=np.float64)

        self.count, self.mean, self.variance = column("count"), column("mean"), column("variance")
        self.low, self.high, self.rounding = column("low"), column("high"), column("rounding")
        self.kurtosis, self.uneven = column("kurtosis"), column("uneven")
        self.judged = self.count >= JUDGED
        units: dict[str, Array] = {}
        for name, fan in FANS.items():
            unit = np.array([fan(geometry) for geometry in geometries], dtype=np.float64) ** -0.5
            same = any(np.allclose(unit, other, rtol=1e-9, equal_nan=True) for other in units.values())
            if not same and not np.isnan(unit).all():
                units[name] = unit
        self.fans = list(units)
        self.units = np.stack(list(units.values()))

    @cached_property
    def even(self) -> npt.NDArray[np.bool_]:
        """Whether the channels' variances agree, as those of fresh weights do."""
        return ~self.judged | (self.uneven < 6)

    def shaped(self, family: Family) -> npt.NDArray[np.bool_]:
        """Whether tensors may come from this family: kurtosis, and channels alike."""
        error = np.sqrt(family.kurtosis_variance / self.count)
        return self.even & (~self.judged | (np.abs(self.kurtosis - family.kurtosis) < 6 * error))

    def own_std(self, family: Family) -> Array:
        """Standard deviation of each tensor's best fit of this family with mean 0 or its offset."""
        if family is ONE_SIDED:
            return self.high / (2 * SQRT3)
        reach = np.maximum(self.high, -self.low)
        if family is UNIFORM:
            return reach / SQRT3
        std = np.sqrt(self.variance + self.mean**2)
        return np.maximum(std, reach / family.bound)

    def log_likelihood(self, family: Family, centre: Array, std: Array) -> Array:
        """Log likelihood of every tensor, broadcast over leading axes of candidates."""
        spread = self.variance + (self.mean - centre) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.log(std)
            value = -self.count * (
                scale + family.log_norm + 0.5 * family.curvature * spread / std**2
            )
            if math.isfinite(family.bound):
                least = np.maximum(self.high - centre, centre - self.low) / family.bound
                if not family.curvature:
                    # a bound that rounding moved by half a bit must not count once per element
                    slack = np.clip(scale - np.log(least), 0, self.rounding)
                    value = value + self.count * slack
                value = np.where(least <= std * (1 + self.rounding), value, -np.inf)
        return np.where(np.isnan(value), -np.inf, value)

    @cached_property
    def background(self) -> Array:
        """Log likelihood of each tensor's own best fit among all families, with a free mean."""
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        std = np.sqrt(self.variance)
        reach = np.maximum(self.high - self.mean, self.mean - self.low)
        cut = np.maximum(std, reach / TRUNCATED.bound)
        fits = [
            np.where(self.shaped(NORMAL), self.log_likelihood(NORMAL, self.mean, std), -np.inf),
            np.where(
                self.shaped(UNIFORM), self.log_likelihood(UNIFORM, middle, half / SQRT3), -np.inf
            ),
            np.where(self.shaped(TRUNCATED), self.log_likelihood(TRUNCATED, self.mean, cut),
            -np.inf),
        ]
        best: Array = np.max(fits, axis=0)
        return best

    def deviance(self, candidates: _Candidates) -> Array:
        """How far each candidate stays behind the background, ``[candidates, tensors]``, in nats.

        Between ``-OUTLIER`` (does not explain the tensor) and 0.
        """
        std = np.array(candidates.gain)[:, None] * self.units[candidates.fan]
        location = np.array(candidates.location)[:, None]
        result = np.full(std.shape, -OUTLIER)
        names = np.array([family.name for family in candidates.family])
        for family in _FAMILIES:
            rows = np.flatnonzero(names == family.name)
            if len(rows):
                centre = location[rows] + family.offset * std[rows]
                value = self.log_likelihood(family, centre, std[rows])
                value = value - np.where(np.isfinite(self.background), self.background, np.inf)
                value = np.where(self.shaped(family) & np.isfinite(value), value, -OUTLIER)
                result[rows] = np.clip(value, -OUTLIER, 0.0)
        return result


def _known(table: Table, stock: Random | None, carried: Sequence[Random]) -> _Candidates:
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
        price = 1.0 + _FAN_PRIOR[fan]
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
    for law, price in [(law, 0.5) for law in carried] + ([(stock, -1.0)] if stock else []):
        if law.fan in table.fans and law.family in _FAMILIES:
            rows.append((law.family, table.fans.index(law.fan), law.gain, law.location, price))
    return _Candidates.of(rows)


def _free(table: Table, open_: npt.NDArray[np.bool_]) -> _Candidates:
    """Laws with unknown gain, guessed from the largest tensors that are still unexplained."""
    rows: list[tuple[Family, int, float, float, float]] = []
    order = np.argsort(-table.count * open_, kind="stable")[:8]
    largest = [int(index) for index in order if open_[index]]
    price = 3.0 + 0.5 * math.log(max(2.0, float(table.count[open_].sum())))
    constant = table.fans.index("constant")
    for family in _FAMILIES:
        stds, fits = table.own_std(family), table.shaped(family)
        # the largest sample falls short of the bound by about bound / count: leave room
        room = 1 + (0.0 if family is NORMAL else 6.0) / table.count
        for index in largest:
            if not fits[index] or stds[index] <= 0:
                continue
            for fan, name in enumerate(table.fans):
                gain = float(stds[index] * room[index] / table.units[fan, index])
                if math.isfinite(gain):
                    cost = price + _FAN_PRIOR[name] + _FAMILY_PRIOR[family.name]
                    cost += 0.5 * (fan != constant)
                    rows.append((family, fan, gain, 0.0, cost))
            if family is NORMAL:
                mean, std = float(table.mean[index]), math.sqrt(table.variance[index])
                if abs(mean) * math.sqrt(table.count[index]) > 5 * std:
                    rows.append((NORMAL, constant, std, mean, 2 * price))
    return _Candidates.of(rows)


def _refined(table: Table, law: Random, members: npt.NDArray[np.bool_]) -> Random:
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
    return replace(law, gain=float(reach.max()) * (1 + 1 / total))


def fit_population(
    table: Table,
    stock: Random | None = None,
    carried: Sequence[Random] = (),
    *,
    free: bool = True,
    samples: Callable[[int], Array] | None = None,
) -> list[Random | None]:
    """Find the laws of a population of tensors.

    Args:
        table: The tensors' moments and geometries.
        stock: The default law of their layer type, preferred where several fit.
        carried: Laws that were found elsewhere in the same net, preferred likewise.
        free: Whether laws with an unknown gain may be found.
        samples: Gives a tensor's elements by its index, for distributions of unknown shape.

    Returns:
        One law per tensor, with :attr:`Random.source` set, or None where nothing explains it.
    """
    found: list[Random | None] = [None] * len(table.count)
    open_ = (table.count >= TINY) & np.isfinite(table.background)
    known = _known(table, stock, carried)
    known_deviance = table.deviance(known)
    while open_.any():
        tries = [(known, known_deviance)]
        if free:
            guesses = _free(table, open_)
            tries.append((guesses, table.deviance(guesses)))
        best, best_score, best_members, guessed = None, 0.0, open_, False
        for candidates, deviance in tries:
            if not candidates.gain:
                continue
            score = (deviance + OUTLIER)[:, open_].sum(axis=1) - np.array(candidates.prior)
            row = int(score.argmax())
            if score[row] > best_score:
                fan = table.fans[candidates.fan[row]]
                best_score, guessed = float(score[row]), candidates is not known
                best = Random(
                    candidates.family[row], fan, candidates.gain[row], candidates.location[row]
                )
                best_members = open_ & (deviance[row] > -OUTLIER)
        if best is None:
            break
        if guessed:
            best = _refined(table, best, best_members)
        _assign(found, best, best_members, guessed)
        open_ &= ~best_members
    _settle_loners(table, found)
    if free and samples is not None:
        _fit_unknown_shapes(table, found, carried, samples)
    return found


def _assign(
    found: list[Random | None], law: Random, members: npt.NDArray[np.bool_], guessed: bool = True
) -> None:
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
    carried: Sequence[Random],
    samples: Callable[[int], Array],
) -> None:
    """Laws for fresh tensors of no known family: shape from the samples, scale from the fans.

    There is no likelihood to compare, so three tensors of one kurtosis have to agree on a gain, or
    one has to agree with a law found elsewhere in the net. Small tensors fit the formulas too, if
    less well than their neighbours fit the found shape; they go with their neighbours.
    """
    shared = {(law.family.name, law.fan, law.gain) for law, big in zip(found, table.judged) if law and big}
    astray = [law is None or (law.family.name, law.fan, law.gain) not in shared for law in found]
    open_ = np.array(astray) & table.even & (table.count >= TINY)
    # sampling error of the logarithm of a standard deviation
    error = np.sqrt(np.maximum(table.kurtosis - 1, 0.1) / (4 * table.count))
    std = np.sqrt(table.variance)
    gains = std[None] / table.units

    def alike(kurtosis: float) -> npt.NDArray[np.bool_]:
        return ~table.judged | (np.abs(np.log(table.kurtosis / kurtosis)) < 0.25)

    for law in carried:
        if law.family not in _FAMILIES and law.fan in table.fans:
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
