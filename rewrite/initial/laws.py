"""The laws that initial weights are drawn from, and how to draw from them at any width.

A law is independent of one tensor's size: it says "uniform, standard deviation 0.577 /
sqrt(fan_in)" and not "standard deviation 0.034", so that it can be evaluated again after the layer
was resized. Fans follow ``torch.nn.init``: read off the weight's shape, ``fan_in = shape[1] *
receptive field``, for transposed and grouped convolutions too. Which law holds for which tensor is
found in :mod:`pocketize.initial.fit`.
"""

from __future__ import annotations

__all__ = [
    "FANS",
    "Blocks",
    "Constant",
    "Diagonal",
    "Geometry",
    "Keep",
    "KeepUnlessResized",
    "Law",
    "NormOf",
    "Orthogonal",
    "OwnReset",
    "Random",
    "Repeated",
    "Replicated",
    "Resampled",
    "ZeroRow",
]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketize.initial.families import SQRT3, Family


@dataclass(frozen=True)
class Geometry:
    """What the scale of an initialisation may depend on.

    Attributes:
        shape: The tensor's own shape.
        weight: The shape that fans are read from: the tensor's own if it has two axes or more, for
            a bias that of its layer's weight, ``()`` if there is none.
        groups: Groups of the owning convolution.
        hidden: Hidden size of the owning recurrent layer, 0 elsewhere.
    """

    shape: tuple[int, ...]
    weight: tuple[int, ...] = ()
    groups: int = 1
    hidden: int = 0

    def channels(self) -> tuple[float, float, float]:
        """Sizes of the weight's first two axes and of its receptive field; NaN without a weight."""
        if len(self.weight) < 2:
            return math.nan, math.nan, math.nan
        return self.weight[0], self.weight[1], math.prod(self.weight[2:])


def _fan_in(geometry: Geometry) -> float:
    _, inner, field = geometry.channels()
    return inner * field


def _fan_out(geometry: Geometry) -> float:
    outer, _, field = geometry.channels()
    return outer * field


def _fan_avg(geometry: Geometry) -> float:
    return (_fan_in(geometry) + _fan_out(geometry)) / 2


def _fan_avg_by_groups(geometry: Geometry) -> float:
    return (_fan_in(geometry) + _fan_out(geometry) / geometry.groups) / 2


def _fan_avg_by_thirds(geometry: Geometry) -> float:
    # a joint query-key-value matrix that was initialised as the three matrices it stands for
    outer, inner, _ = geometry.channels()
    return (inner + outer / 3) / 2 if outer == 3 * inner else _fan_avg(geometry)


#: Names of fans, and how the fan is computed; the standard deviation is ``gain / sqrt(fan)``.
#: Where two cannot be told apart on a network, the earlier one is taken.
FANS: Mapping[str, Callable[[Geometry], float]] = {
    "fan_in": _fan_in,
    "constant": lambda geometry: 1.0,
    "fan_out": _fan_out,
    "fan_avg": _fan_avg,
    "hidden_size": lambda geometry: geometry.hidden or math.nan,
    "fan_out / groups": lambda geometry: _fan_out(geometry) / geometry.groups,
    "fan_in * groups": lambda geometry: _fan_in(geometry) * geometry.groups,
    "fan_avg by groups": _fan_avg_by_groups,
    "fan_avg by thirds": _fan_avg_by_thirds,
    "last axis": lambda geometry: geometry.shape[-1] if geometry.shape else math.nan,
    "second axis": lambda geometry: geometry.channels()[1],
    "first axis": lambda geometry: geometry.channels()[0],
    "fan_in squared": lambda geometry: _fan_in(geometry) ** 2,
    "first times second axis, squared": lambda geometry: (
        (geometry.channels()[0] * geometry.channels()[1]) ** 2
    ),
}


class Law(ABC):
    """How one tensor is drawn at a given shape. ``str(law)`` is for people."""

    def resolve(self, shape: Sequence[int]) -> Law:
        """The law to carry out at ``shape``: this one, unless it cannot be or need not be."""
        return self

    @abstractmethod
    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill ``out`` (real, floating) in place with new values and return it."""

    @abstractmethod
    def __str__(self) -> str: ...


class _Elsewhere(Law):
    """A law whose values are not drawn here: somebody else does, or they stay."""

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Leave the values alone."""
        return out


@dataclass(frozen=True)
class Constant(Law):
    """Every element has the same value."""

    value: float
    source: str = ""

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill with the value."""
        return out.fill_(self.value)

    def __str__(self) -> str:
        text = f"constant({self.value:.4g})"
        return f"{text}, {self.source}" if self.source else text


@dataclass(frozen=True)
class Random(Law):
    """Independent samples with standard deviation ``gain / sqrt(fan)`` about ``location``.

    Attributes:
        family: The shape of the distribution.
        fan: A name in :data:`FANS`.
        gain: Standard deviation where the fan is 1.
        location: The mean, if it does not depend on the fan.
        source: Where the law comes from, for explanations: "from 22 tensors".
        lone: Whether the gain was read off a single tensor, which cannot tell the fan.
    """

    family: Family
    fan: str
    gain: float
    location: float = 0.0
    source: str = ""
    lone: bool = False

    def std(self, geometry: Geometry) -> float:
        """Standard deviation at this geometry."""
        return self.gain / math.sqrt(FANS[self.fan](geometry))

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill with samples, scaled for this geometry."""
        std = self.std(geometry)
        self.family.draw(out, generator)
        return out.mul_(std).add_(self.location + self.family.offset * std)

    def __str__(self) -> str:
        kind = {"normal": "normal", "uniform": "uniform", "trunc_normal": "trunc_normal"}.get(
            self.family.name, ""
        )
        gain = f"gain {self.gain:.4g}"
        if kind and self.fan in ("fan_in", "fan_out") and not self.location:
            text = f"kaiming_{kind}({self.fan}, {gain})"
        elif kind and self.fan == "fan_avg" and not self.location:
            text = f"xavier_{kind}({gain})"
        elif self.fan == "constant" and kind == "uniform":
            reach = self.gain * SQRT3
            text = f"uniform({self.location - reach:.4g}, {self.location + reach:.4g})"
        elif self.fan == "constant":
            mean = self.location + self.family.offset * self.gain
            text = f"{self.family.name}(mean {mean:.4g}, std {self.gain:.4g})"
        else:
            text = f"{self.family.name}({gain} / sqrt({self.fan}))"
        return f"{text}, {self.source}" if self.source else text


@dataclass(frozen=True)
class Orthogonal(Law):
    """``gain`` times orthonormal rows, or columns if there are fewer of them.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning" (2014), for the matrix
    ``weight.flatten(1)``, as in :func:`torch.nn.init.orthogonal_`.
    """

    gain: float

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill with the orthogonal factor of a Gaussian matrix."""
        rows, columns = out.shape[0], out[0].numel()
        tall = out.new_empty(max(rows, columns), min(rows, columns)).normal_(generator=generator)
        basis, triangle = torch.linalg.qr(tall)
        # the factorisation is unique, and the law uniform, only once signs are fixed
        basis = basis * triangle.diagonal().sign()
        return out.copy_((basis if rows >= columns else basis.T).reshape(out.shape)).mul_(self.gain)

    def __str__(self) -> str:
        return f"orthogonal(gain {self.gain:.4g})"


@dataclass(frozen=True)
class Diagonal(Law):
    """One kernel where output and input channel agree within a group, zero elsewhere.

    Covers :func:`torch.nn.init.eye_`, :func:`torch.nn.init.dirac_` and interpolating transposed
    convolutions. ``by_groups`` says whether the diagonal starts anew in each of the layer's groups.
    """

    kernel: Tensor
    by_groups: bool

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill with the diagonal."""
        return self.fill(out, geometry.groups)

    def fill(self, out: Tensor, groups: int) -> Tensor:
        """Fill with the diagonal of a layer with that many groups."""
        out.zero_()
        for block in out.tensor_split(groups if self.by_groups else 1):
            index = torch.arange(min(block.shape[:2]), device=out.device)
            block[index, index] = self.kernel.to(out.device, out.dtype)
        return out

    def __str__(self) -> str:
        taps = int(self.kernel.count_nonzero())
        return "identity" if taps == 1 else "the same kernel on the channels' diagonal"


@dataclass(frozen=True)
class Replicated(Law):
    """Constant along some axes: those may change their size, the others may not."""

    kernel: Tensor

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill with copies of the kernel, whose replicated axes have size 1."""
        return out.copy_(self.kernel.expand(out.shape))

    def resolve(self, shape: Sequence[int]) -> Law:
        """This law, if the kernel can be expanded to ``shape``."""
        kernel = self.kernel.shape
        if len(kernel) == len(shape) and all(
            have in (1, want) for have, want in zip(kernel, shape, strict=True)
        ):
            return self
        return Keep("a fixed pattern that only slicing can resize")

    def __str__(self) -> str:
        return f"copies of one {'x'.join(map(str, self.kernel.shape))} kernel"


@dataclass(frozen=True)
class Repeated(Law):
    """Every ``times`` neighbouring slices of the first axis are equal.

    Aitken et al., "Checkerboard artifact free sub-pixel convolution" (2017).
    """

    law: Law
    times: int

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill with repeated samples of the inner law."""
        shape = (-(-out.shape[0] // self.times), *out.shape[1:])
        inner = self.law.draw(out.new_empty(shape), replace(geometry, weight=shape), generator)
        return out.copy_(inner.repeat_interleave(self.times, dim=0)[: out.shape[0]])

    def __str__(self) -> str:
        return f"{self.law}, each repeated {self.times} times"


@dataclass(frozen=True)
class Blocks(Law):
    """Equal blocks along the first axis, each with a law of its own: the gates of an LSTM."""

    laws: tuple[Law, ...]

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill block by block."""
        for block, law in zip(out.tensor_split(len(self.laws)), self.laws, strict=True):
            law.draw(block, geometry, generator)
        return out

    def __str__(self) -> str:
        return "blocks of " + ", ".join(map(str, self.laws))


@dataclass(frozen=True)
class Resampled(Law):
    """The last resort: the tensor's own values shuffled, scaled by the root of the fan-in ratio."""

    law: Random
    geometry: Geometry

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill with samples of the old values."""
        old, new = FANS["fan_in"](self.geometry), FANS["fan_in"](geometry)
        ratio = 1.0 if math.isnan(old) or math.isnan(new) or len(out.shape) < 2 else old / new
        scaled = replace(self.law, gain=self.law.gain * math.sqrt(ratio))
        return scaled.draw(out, geometry, generator)

    def __str__(self) -> str:
        return (
            f"no law found: samples of its own values (mean {self.law.location:.4g}, "
            f"std {self.law.gain:.4g}), scaled by the root of the fan-in ratio"
        )


@dataclass(frozen=True)
class ZeroRow(Law):
    """Another law, but one row is zero: the padding of an embedding."""

    law: Law
    row: int

    def draw(self, out: Tensor, geometry: Geometry, generator: torch.Generator | None) -> Tensor:
        """Fill by the other law, then clear the row."""
        self.law.draw(out, geometry, generator)
        if self.row < len(out):
            out[self.row] = 0
        return out

    def __str__(self) -> str:
        return f"{self.law}, row {self.row} zero"


@dataclass(frozen=True)
class OwnReset(_Elsewhere):
    """The owner's ``reset_parameters()`` is asked."""

    reason: str

    def __str__(self) -> str:
        return f"reset_parameters() of its layer: {self.reason}"


@dataclass(frozen=True)
class NormOf(_Elsewhere):
    """The magnitude of a weight-normalised layer: the norm of the direction beside it.

    Salimans and Kingma, "Weight normalization" (2016): ``w = g v / |v|``, so ``g = |v|`` is what
    wrapping a fresh layer gives.
    """

    direction: str

    def __str__(self) -> str:
        return f"norm of {self.direction}"


@dataclass(frozen=True)
class Keep(_Elsewhere):
    """The values stay as the rewrite left them."""

    reason: str

    def __str__(self) -> str:
        return f"kept: {self.reason}"


@dataclass(frozen=True)
class KeepUnlessResized(_Elsewhere):
    """Values of a fresh net that match no law: as good as a new draw while the shape is the
    same."""

    law: Law
    shape: tuple[int, ...]

    def resolve(self, shape: Sequence[int]) -> Law:
        """Nothing to do at the old shape, the other law at a new one."""
        if tuple(shape) == self.shape:
            return Keep("no law found, but its size is the same")
        return self.law.resolve(shape)

    def __str__(self) -> str:
        return f"kept while its size is the same, else {self.law}"
