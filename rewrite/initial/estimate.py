"""From values to initialisation schemes: single tensors, then populations of them.

Constants, identities and orthogonal matrices are seen in one tensor (:func:`structure`). The scale
of random samples is not: a standard deviation of 0.125 may be ``1 / sqrt(fan_in)`` or 0.125. Over
layers with different fans, only the true fan has a constant gain. So :func:`fit` takes all tensors
of a kind, all convolution weights say, and looks for the fan and the gain that explain the standard
deviations of most of them. Those are set aside and the rest is fitted again, as a net may mix
schemes. Unusual fans and gains pay a prior, in nats.
"""

from __future__ import annotations

__all__ = ["UNEVEN", "TensorStatistics", "fit", "resample", "sample", "structure"]

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

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
    draw,
)

Array = npt.NDArray[np.float64]

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
#: Priors: usual gains of a fan with their costs in nats, about minus the logarithm of how often
#: they are met, then the cost of the fan itself. Each scheme costs 1 in addition.
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


class TensorStatistics:
    """Statistics of a real tensor, of a sample if it is large.

    Attributes:
        count: elements looked at.
        mean: their mean, 0 if that is within sampling error.
        std: their standard deviation about that mean.
        reach: their largest distance from that mean.
        error: relative sampling error of the standard deviation.
        judged: whether there are enough elements to judge the distribution by.
        one_sided: whether they look uniform between 0 and some bound.
        elements: some of them, less the mean, to recognise the distribution by.
        uneven: how many standard errors the channels' variances differ by more than those of
            independent, identically distributed elements would. Training makes channels differ.
    """

    def __init__(self, values: Tensor) -> None:
        data = sample(values)
        self.count, self.mean, self.std = len(data), float(data.mean()), float(data.std())
        if abs(self.mean) * math.sqrt(len(data)) <= 5 * self.std or len(data) < _TINY:
            self.mean, self.std = 0.0, math.sqrt(float((data**2).mean()))
        centred = data - self.mean
        self.judged = len(data) >= JUDGED
        kurtosis = _kurtosis(centred) if self.judged else 3.0
        self.reach = float(np.abs(centred).max())
        # at least what rounding to bfloat16 may do
        self.error = math.hypot(math.sqrt(max(kurtosis - 1, 0.5) / (4 * len(data))), 0.002)
        from_zero = float(data.min()) >= 0 and abs(self.mean - SQRT3 * self.std) < 0.05 * self.std
        self.one_sided = self.judged and from_zero and abs(kurtosis - 1.8) < 0.2
        self.elements = sample(values, 2**13) - self.mean
        self.uneven = _unevenness(values)


def sample(values: Tensor, most: int = SAMPLE) -> Array:
    """Return at most that many elements of a tensor, evenly spread, the same in every call."""
    flat = values.detach().reshape(-1)
    if len(flat) > most:
        # runs of 64 keep memory access cheap; an odd stride does not lock in with channel counts
        runs = flat[: len(flat) // 64 * 64].view(-1, 64)
        flat = runs[:: (-(-len(runs) * 64 // most)) | 1].reshape(-1)
    data: Array = flat.cpu().double().numpy()
    return data


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


def structure(values: Tensor, groups: int) -> Scheme | None:
    """Return the scheme of a tensor whose elements determine one another, if it is known here."""
    first = values.reshape(-1)[0]
    if bool((values == first).all()):
        return Constant(float(first))
    if values.dim() < 2:
        return None
    kernel = values[0, 0].detach().clone()
    square = min(values.shape[:2]) > 1 or groups > 1
    if square and bool(kernel.any()) and not bool(values[:2].all()):
        for by_groups in (False, True) if groups > 1 else (False,):
            diagonal = Diagonal(kernel, by_groups)
            expected = torch.empty_like(values, memory_format=torch.contiguous_format)
            draw(diagonal, expected, Geometry(tuple(values.shape), groups=groups), None)
            if torch.equal(expected, values):
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
        found_elsewhere: schemes of other populations of the same net, with their costs.
        free: whether schemes with an unusual gain may be found, and tensors that nearly match or
            are too small to judge take the commonest scheme.

    Returns:
        One scheme per tensor, or None where nothing explains it.
    """
    errors = np.array([t.error for t in tensors])
    stds = np.array([max(t.std, 1e-150) for t in tensors])
    counts = np.array([t.count for t in tensors])
    gains: dict[str, Array] = {}  # that each tensor would have by each fan
    # a mean that is not proportional to the standard deviation leaves no fan but the constant one
    scaled = all(not t.mean or t.one_sided for t in tensors)
    for fan in FANS if scaled else ("constant",):
        by_fan = stds * np.sqrt(np.array([FANS[fan](g) for g in geometries], dtype=np.float64))
        # of fans that cannot be told apart here only the first is kept
        if not np.isnan(by_fan).all() and not any(
            np.allclose(by_fan / stds, other / stds, 1e-9, equal_nan=True)
            for other in gains.values()
        ):
            gains[fan] = by_fan

    def nats(fan: str, gain: float) -> Array:
        """What a scheme gains for each tensor; 0 for those that it does not explain."""
        with np.errstate(invalid="ignore"):
            off = np.log(gains[fan] / gain) / errors
        gained: Array = np.nan_to_num(np.clip(_GAIN - off**2 / 2, 0, None))
        return gained

    usual = [
        (fan, gain, 1.0 + cost + prior)
        for fan, (costs, prior) in _USUAL.items()
        for gain, cost in costs.items()
    ]
    usual += [(scheme.fan, scheme.gain, cost) for scheme, cost in found_elsewhere]
    usual = [candidate for candidate in usual if candidate[0] in gains]
    found: list[Random | None] = [None] * len(tensors)
    open_ = counts >= _TINY
    while open_.any():
        candidates = list(usual)
        for fan, by_fan in gains.items() if free else ():
            cost = 5.0 + 0.5 * math.log(counts[open_].max()) + _USUAL.get(fan, ({}, _RARE_FAN))[1]
            cost += 0.5 * (fan != "constant")
            # gains read off the tensors with the least error, and one that their likes agree on
            exact = [i for i in np.argsort(errors, kind="stable") if open_[i] and by_fan[i] > 0][:8]
            if exact:
                guesses = [float(by_fan[i]) for i in exact]
                best = max(guesses, key=lambda gain: nats(fan, gain)[open_].sum())
                agreed = open_ & (nats(fan, best) > 0)
                logs = np.average(np.log(by_fan[agreed]), weights=errors[agreed] ** -2.0)
                candidates += [(fan, gain, cost) for gain in [*guesses, math.exp(logs)]]
        scores = [float(nats(f, gain)[open_].sum()) - cost for f, gain, cost in candidates]
        top = int(np.argmax(scores)) if scores else 0
        if not scores or scores[top] <= 0:
            break
        fan, gain, _ = candidates[top]
        index = np.flatnonzero(open_ & (nats(fan, gain) > 0)).tolist()
        scales = gain * stds[index] / gains[fan][index]
        scheme = _describe([tensors[i] for i in index], scales, fan, gain, top >= len(usual))
        for i in index:
            found[i] = scheme
        open_[index] = False
    if not free:
        return found
    # A gain that was read off one tensor cannot tell the fan, and tensors of few elements cannot
    # tell a scheme: they take the commonest scheme if they nearly match, else the likeliest fan.
    shared = Counter(s for s in found if s and not s.singleton).most_common(1)
    singletons = [s for s in found if s and s.singleton]
    # gains that differ from layer to layer were probably fitted to each layer's input
    fan = shared[0][0].fan if shared else "fan_in" if len(singletons) > 1 else "constant"
    for i, (tensor, now) in enumerate(zip(tensors, found, strict=True)):
        if shared and (now is None or now.singleton):
            std = shared[0][0].std(geometries[i])
            if abs(tensor.std / std - 1) < 0.1 + 2 / math.sqrt(tensor.count):
                found[i] = replace(shared[0][0], source="as others of its kind")
                continue
        if now and now.singleton and not now.mean and fan in gains:
            found[i] = replace(now, fan=fan, gain=float(gains[fan][i]))
    return found


def _describe(
    tensors: Sequence[TensorStatistics], stds: Array, fan: str, gain: float, guessed: bool
) -> Random:
    """The scheme of tensors that a fan and a gain explain, with their distribution."""
    pooled = np.concatenate([t.elements / std for t, std in zip(tensors, stds, strict=True)])
    reach = max(t.reach / float(std) for t, std in zip(tensors, stds, strict=True))
    kurtosis, slack = _kurtosis(pooled), 0.1 + 30 / math.sqrt(len(pooled))
    mean, quantiles = float(np.mean([t.mean for t in tensors])), None
    if all(t.one_sided for t in tensors):
        distribution, mean = "one-sided uniform", 0.0
    elif reach < SQRT3 * (1.02 + 2 / len(pooled)) and abs(kurtosis - 1.8) < slack:
        distribution = "uniform"
        # the bounds are known better than the standard deviation
        gain *= reach / SQRT3 if guessed else 1.0
    elif abs(kurtosis - 3) < (0.4 if len(pooled) > 4096 else slack):
        distribution = "normal"
    else:
        distribution, quantiles = "resampled", _quantiles(pooled)
    source = f"from {len(tensors)} tensors" if len(tensors) > 1 else "from this tensor alone"
    return Random(distribution, fan, gain, mean, source, guessed and len(tensors) == 1, quantiles)


def _quantiles(elements: Array) -> Tensor:
    points = np.quantile(elements, (np.arange(2048) + 0.5) / 2048)
    return torch.from_numpy((points - points.mean()) / max(float(points.std()), 1e-150))


def resample(tensor: TensorStatistics, geometry: Geometry) -> Random:
    """Return the last resort: a tensor's own values shuffled, scaled by the root of the fan-in."""
    fan = "fan_in" if len(geometry.shape) > 1 else "constant"
    gain = tensor.std * math.sqrt(FANS[fan](geometry))
    source = "no scheme found: samples of its own values"
    quantiles = _quantiles(tensor.elements)
    return Random("resampled", fan, gain, tensor.mean, source, quantiles=quantiles)
