"""Estimating initialisation schemes from values: single tensors, then populations of them.

Constants, identities and orthogonal matrices are seen in one tensor (:func:`structure`). The scale
of random samples is not: a standard deviation of 0.125 may be ``1 / sqrt(fan_in)`` or 0.125. Over
layers with different fans, only the true fan has a constant gain. So :func:`fit` takes all tensors
of a kind, all convolution weights say, and looks for the fan and the gain that explain the standard
deviations of most of them. Those are set aside and the rest is fitted again, as a net may mix
schemes. Unusual fans and gains pay a prior, in nats.
"""

from __future__ import annotations

__all__ = [
    "JUDGED",
    "UNEVEN",
    "TensorStatistics",
    "fit",
    "measure",
    "sample",
    "structure",
    "unknown",
]

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketize.initial.schemes import (
    FANS,
    SQRT3,
    Constant,
    Diagonal,
    Geometry,
    Keep,
    Orthogonal,
    Random,
    Scheme,
)

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

#: Elements that statistics are taken from, at most, per tensor.
SAMPLE = 2**17
#: Elements from which the shape of a tensor's distribution can be judged.
JUDGED = 512
#: Elements below which a tensor cannot show a scheme.
_TINY = 8
#: Standard errors beyond which channels of differing variance are no accident.
UNEVEN = 6.0
#: Nats that a scheme gains for a tensor that it explains exactly; nothing beyond 5 standard errors.
_GAIN = 12.5
_RELU, _TANH = math.sqrt(2.0), 5 / 3
_LEAKY = dict.fromkeys((math.sqrt(2 / (1 + slope**2)) for slope in (0.1, 0.2, 0.25)), 2.5)
_KAIMING = {_RELU: 0.5, 1.0: 0.5, _TANH: 2.5} | _LEAKY
#: Priors: usual gains of a fan with their prices in nats, about minus the logarithm of how often
#: they are met, then the price of the fan itself. Each scheme costs 1 in addition.
_USUAL: dict[str, tuple[dict[float, float], float]] = {
    "fan_in": ({1 / SQRT3: -1.0} | _KAIMING, 0.0),  # the first is torch's default
    "constant": ({0.02: 0.0, 0.01: 0.0, 1.0: 0.0, 0.1: 2.0, 0.05: 2.0, 0.001: 2.0}, 0.0),
    "fan_out": (_KAIMING, 0.5),
    "fan_avg": ({1.0: 0.0, _RELU: 1.5, _TANH: 2.5, 0.02: 2.5}, 0.5),
    "hidden_size": ({1 / SQRT3: -1.0}, 0.0),
    "fan_out / groups": (_KAIMING, 1.5),
    "fan_in * groups": (_KAIMING, 1.5),
    "last axis": ({1.0: 0.0}, 2.5),
    "second axis": ({1 / SQRT3: 0.0}, 2.5),
}
_RARE_FAN = 5.0


@dataclass(frozen=True)
class TensorStatistics:
    """What the estimation knows of one tensor.

    Attributes:
        count: elements looked at.
        mean: their mean, 0 if that is within sampling error.
        std: their standard deviation about that mean.
        reach: their largest distance from that mean.
        error: relative sampling error of the standard deviation.
        one_sided: whether they look uniform between 0 and some bound.
        elements: some of them, to recognise the distribution by.
        uneven: how many standard errors the channels' variances differ by more than those of
            independent, identically distributed elements would. Training makes channels differ.
    """

    count: int
    mean: float
    std: float
    reach: float
    error: float
    one_sided: bool
    elements: Array
    uneven: float

    @property
    def judged(self) -> bool:
        """Whether there are enough elements to judge the distribution by."""
        return self.count >= JUDGED


def sample(values: Tensor, most: int = SAMPLE) -> Array:
    """Return at most that many elements of a tensor, evenly spread, the same in every call."""
    flat = values.detach().reshape(-1)
    if len(flat) > most:
        # runs of 64 keep memory access cheap; an odd stride does not lock in with channel counts
        runs = flat[: len(flat) // 64 * 64].view(-1, 64)
        flat = runs[:: (-(-len(runs) * 64 // most)) | 1].reshape(-1)
    data: Array = flat.cpu().double().numpy()
    return data


def measure(values: Tensor) -> TensorStatistics:
    """Take the statistics of a real tensor, of a sample if it is large."""
    data = sample(values)
    count, mean, std = len(data), float(data.mean()), float(data.std())
    if abs(mean) * math.sqrt(count) <= 5 * std or count < _TINY:
        mean, std = 0.0, math.sqrt(float((data**2).mean()))
    centred, judged = data - mean, count >= JUDGED
    kurtosis = _kurtosis(centred) if judged else 3.0
    from_zero = float(data.min()) >= 0 and abs(mean - SQRT3 * std) < 0.05 * std
    return TensorStatistics(
        count=count,
        mean=mean,
        std=std,
        reach=float(np.abs(centred).max()),
        # at least what rounding to bfloat16 may do
        error=math.hypot(math.sqrt(max(kurtosis - 1, 0.5) / (4 * count)), 0.002),
        one_sided=judged and from_zero and abs(kurtosis - 1.8) < 0.2,
        elements=sample(values, 2**13),
        uneven=_unevenness(values),
    )


def _kurtosis(centred: Array) -> float:
    square = centred * centred
    return float((square * square).mean()) / max(float(square.mean()) ** 2, 1e-300)


def _unevenness(values: Tensor) -> float:
    """See :attr:`TensorStatistics.uneven`; the larger of the first two axes'."""
    if values.dim() < 2 or values.numel() < JUDGED:
        return 0.0
    side = max(8, math.isqrt(2**16 // max(1, math.prod(values.shape[2:]))))
    block = values.detach()[:: -(-values.shape[0] // side), :: -(-values.shape[1] // side)]
    data = block.cpu().double().numpy()
    square = (data - data.mean()) ** 2
    variance = max(float(square.mean()), 1e-150)
    excess = float((square * square).mean()) / variance**2 - 1
    worst = 0.0
    for axis in (0, 1):
        count, length = data.shape[axis], data.size // data.shape[axis]
        if count < 8 or length < 8:
            continue
        others = tuple(other for other in range(data.ndim) if other != axis)
        observed = float(square.mean(axis=others).var(ddof=1)) / variance**2
        expected = max(excess, 0.1) / length
        # a sample variance is about chi-square distributed; its cube root is about normal
        # (Wilson and Hilferty, 1931), which keeps rare large values from passing for a sign
        error = (2 / (count - 1) + 12 / (length * count)) / 9
        worst = max(worst, ((observed / expected) ** (1 / 3) - (1 - error)) / math.sqrt(error))
    return worst


def structure(values: Tensor, groups: int = 1) -> Scheme | None:
    """Return the scheme of a tensor whose elements determine one another, if it is known here.

    Args:
        values: the tensor, real and finite.
        groups: groups of its convolution.
    """
    first = values.reshape(-1)[0]
    if bool((values == first).all()):
        return Constant(float(first))
    if values.dim() < 2:
        return None
    diagonal = _diagonal(values, groups)
    if diagonal is not None:
        return diagonal
    if any(
        values.shape[axis] > 1
        and torch.equal(values.select(axis, 0), values.select(axis, 1))
        and bool((values == values.narrow(axis, 0, 1)).all())
        for axis in range(values.dim())
    ):
        return Keep("copies of one kernel, which slicing leaves as they are")
    gain = _orthogonal_gain(values)
    return None if gain is None else Orthogonal(gain)


def _diagonal(values: Tensor, groups: int) -> Diagonal | None:
    if (min(values.shape[:2]) < 2 and groups == 1) or bool(values[:2].all()):
        return None
    kernel = values[0, 0].detach().clone()
    for by_groups in (False, True) if groups > 1 else (False,):
        scheme = Diagonal(kernel, by_groups)
        expected = torch.empty_like(values, memory_format=torch.contiguous_format)
        scheme.draw(expected, Geometry(tuple(values.shape), groups=groups), None)
        if bool(kernel.any()) and torch.equal(expected, values):
            return scheme
    return None


def _orthogonal_gain(values: Tensor) -> float | None:
    matrix = values.detach().flatten(1)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rounding = torch.finfo(values.dtype).eps
    if len(matrix) < 2:
        # one row shows orthogonality only by its norm
        norm = float(matrix.cpu().double().norm())
        likely = matrix.numel() > 1 and rounding < 1e-6
        return norm if likely and min(abs(norm - 1), abs(norm / _RELU - 1)) < 1e-5 else None
    # independent rows have products of about 1 / sqrt(length)
    tolerance = 1e-5 + 4 * rounding / math.sqrt(matrix.shape[1])
    # two rows are enough to exclude most others
    for count in (2, 16):
        rows = matrix[:count].cpu().double().numpy()
        products = rows @ rows.T
        square = products.diagonal()
        gain = math.sqrt(float(square.mean()))
        if gain == 0 or np.abs(products - np.diag(square)).max() > tolerance * gain**2:
            return None
    return gain if np.abs(square / gain**2 - 1).max() < 1e-4 + 4 * rounding else None


@dataclass(frozen=True)
class _Candidate:
    """A fan and a gain, with the price in nats for how unusual they are."""

    fan: str
    gain: float
    price: float
    guessed: bool = False


class _Population:
    """Standard deviations and fans of tensors, as arrays, and what explains them."""

    def __init__(self, tensors: Sequence[TensorStatistics], geometries: Sequence[Geometry]) -> None:
        self.tensors = tensors
        self.error = np.array([t.error for t in tensors])
        self.roots: dict[str, Array] = {}
        for name, fan in FANS.items():
            root = np.sqrt(np.array([fan(g) for g in geometries], dtype=np.float64))
            # of fans that cannot be told apart here only the first is kept
            if not np.isnan(root).all() and not any(
                np.allclose(root, other, rtol=1e-9, equal_nan=True) for other in self.roots.values()
            ):
                self.roots[name] = root
        stds = np.array([max(t.std, 1e-150) for t in tensors])
        #: The gain that each tensor would have by each fan.
        self.gains = {name: stds * root for name, root in self.roots.items()}

    def explained(self, fan: str, gain: float) -> Array:
        """Nats that a scheme gains for each tensor; 0 for those that it does not explain."""
        with np.errstate(invalid="ignore"):
            off = np.log(self.gains[fan] / gain) / self.error
        nats: Array = np.nan_to_num(np.clip(_GAIN - off**2 / 2, 0, None))
        return nats

    def score(self, candidate: _Candidate, open_: Flags) -> float:
        """Nats that a candidate gains for the unexplained tensors, less its price."""
        return float(self.explained(candidate.fan, candidate.gain)[open_].sum()) - candidate.price

    def guesses(self, fan: str, price: float, open_: Flags) -> list[_Candidate]:
        """Gains read off the tensors with the least error, and one that their likes agree on."""
        gains = self.gains[fan]
        order = [i for i in np.argsort(self.error, kind="stable") if open_[i] and gains[i] > 0][:8]
        guesses = [_Candidate(fan, float(gains[i]), price, True) for i in order]
        if guesses:
            best = max(guesses, key=lambda guess: self.score(guess, open_))
            members = open_ & (self.explained(fan, best.gain) > 0)
            logs = np.average(np.log(gains[members]), weights=self.error[members] ** -2.0)
            guesses.append(_Candidate(fan, math.exp(logs), price, True))
        return guesses


def fit(
    tensors: Sequence[TensorStatistics],
    geometries: Sequence[Geometry],
    found_elsewhere: Iterable[tuple[Random, float]] = (),
    *,
    free: bool = True,
) -> list[Random | None]:
    """Find the schemes of a population of tensors that have about the same mean.

    Args:
        tensors: their statistics.
        geometries: what their fans are read from.
        found_elsewhere: schemes of other populations of the same net, with their prices.
        free: whether schemes with an unusual gain may be found, and tensors that nearly match or
            are too small to judge take the commonest scheme.

    Returns:
        One scheme per tensor, or None where nothing explains it.
    """
    population = _Population(tensors, geometries)
    # a mean that is not proportional to the standard deviation leaves no fan but the constant one
    scaled = all(not t.mean or t.one_sided for t in tensors)
    fans = [fan for fan in population.roots if fan == "constant" or scaled]
    usual = [
        _Candidate(fan, gain, 1.0 + price + prior)
        for fan, (gains, prior) in _USUAL.items()
        for gain, price in gains.items()
    ]
    usual += [_Candidate(s.fan, s.gain, price) for s, price in found_elsewhere]
    usual = [candidate for candidate in usual if candidate.fan in fans]
    found: list[Random | None] = [None] * len(tensors)
    counts = np.array([t.count for t in tensors])
    open_ = counts >= _TINY
    while open_.any():
        candidates = list(usual)
        price = 5.0 + 0.5 * math.log(counts[open_].max())
        for fan in fans if free else ():
            _, prior = _USUAL.get(fan, ({}, _RARE_FAN))
            candidates += population.guesses(fan, price + prior + 0.5 * (fan != "constant"), open_)
        best = max(candidates, key=lambda c: population.score(c, open_), default=None)
        if best is None or population.score(best, open_) <= 0:
            break
        members = open_ & (population.explained(best.fan, best.gain) > 0)
        scheme = _describe(population, best, members)
        for i in np.flatnonzero(members):
            found[i] = scheme
        open_ &= ~members
    if free:
        _settle(population, geometries, found)
    return found


def _describe(population: _Population, candidate: _Candidate, members: Flags) -> Random:
    """The scheme of the tensors that a candidate explains, with their distribution."""
    index = np.flatnonzero(members).tolist()
    tensors = [population.tensors[i] for i in index]
    stds = candidate.gain / population.roots[candidate.fan][index]
    pairs = list(zip(tensors, stds, strict=True))
    pooled = np.concatenate([(t.elements - t.mean) / std for t, std in pairs])
    reach = max(t.reach / float(std) for t, std in pairs)
    kurtosis, slack = _kurtosis(pooled), 0.1 + 30 / math.sqrt(len(pooled))
    mean, gain, quantiles = float(np.mean([t.mean for t in tensors])), candidate.gain, None
    if all(t.one_sided for t in tensors):
        distribution, mean = "one-sided uniform", 0.0
    elif reach < SQRT3 * (1.02 + 2 / len(pooled)) and abs(kurtosis - 1.8) < slack:
        distribution = "uniform"
        # the bounds are known better than the standard deviation
        gain *= reach / SQRT3 if candidate.guessed else 1.0
    elif abs(kurtosis - 3) < (0.4 if len(pooled) > 4096 else slack):
        distribution = "normal"
    else:
        distribution, quantiles = "resampled", _quantiles(pooled)
    source = f"from {len(index)} tensors" if len(index) > 1 else "from this tensor alone"
    singleton = candidate.guessed and len(index) == 1
    return Random(distribution, candidate.fan, gain, mean, source, singleton, quantiles)


def _quantiles(elements: Array) -> Tensor:
    points = np.quantile(elements, (np.arange(2048) + 0.5) / 2048)
    return torch.from_numpy((points - points.mean()) / max(float(points.std()), 1e-150))


def unknown(tensor: TensorStatistics, geometry: Geometry) -> Random:
    """Return the last resort: a tensor's own values shuffled, scaled by the root of the fan-in."""
    fan = "fan_in" if len(geometry.shape) > 1 else "constant"
    gain = tensor.std * math.sqrt(FANS[fan](geometry))
    quantiles = _quantiles(tensor.elements - tensor.mean)
    source = "no scheme found: samples of its own values"
    return Random("resampled", fan, gain, tensor.mean, source, quantiles=quantiles)


def _settle(
    population: _Population, geometries: Sequence[Geometry], found: list[Random | None]
) -> None:
    """Let single tensors take the likeliest fan, and those that nearly match the likeliest scheme.

    A gain that was read off one tensor cannot tell the fan. Tensors of few elements cannot tell a
    scheme at all.
    """
    shared = Counter(s for s in found if s and not s.singleton).most_common(1)
    singletons = [i for i, scheme in enumerate(found) if scheme and scheme.singleton]
    # gains that differ from layer to layer were probably fitted to each layer's input
    fan = shared[0][0].fan if shared else "fan_in" if len(singletons) > 1 else "constant"
    for i, (tensor, geometry) in enumerate(zip(population.tensors, geometries, strict=True)):
        scheme = found[i]
        if shared and (scheme is None or scheme.singleton):
            std = shared[0][0].std(geometry)
            if abs(tensor.std / std - 1) < 0.1 + 2 / math.sqrt(tensor.count):
                found[i] = replace(shared[0][0], source="as others of its kind")
                continue
        if scheme and scheme.singleton and not scheme.mean and fan in population.gains:
            found[i] = replace(scheme, fan=fan, gain=float(population.gains[fan][i]))
