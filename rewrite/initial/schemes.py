"""Initialisation schemes: how a tensor is drawn at any width.

A scheme does not depend on one tensor's size: it says "uniform, standard deviation 0.577 /
sqrt(fan_in)" and not "standard deviation 0.034". So it can be carried out again after the layer was
resized. Fans follow ``torch.nn.init``: they are read off the weight's shape, ``fan_in = shape[1] *
receptive field``, for transposed and grouped convolutions too.
"""

from __future__ import annotations

__all__ = [
    "FANS",
    "SQRT3",
    "Constant",
    "Diagonal",
    "Geometry",
    "IfResized",
    "Keep",
    "Orthogonal",
    "Random",
    "Repeated",
    "Reset",
    "Scheme",
    "draw",
]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

SQRT3 = math.sqrt(3.0)


@dataclass(frozen=True)
class Geometry:
    """What the scale of an initialisation may depend on.

    Attributes:
        shape: the tensor's own shape.
        weight: the shape that fans are read from: the tensor's own if it has two axes or more, for
            a bias that of its layer's weight, ``()`` if there is none.
        groups: groups of the owning convolution.
        hidden: hidden size of the owning recurrent layer, 0 elsewhere.
    """

    shape: tuple[int, ...]
    weight: tuple[int, ...] = ()
    groups: int = 1
    hidden: int = 0

    def fan(self, axis: int) -> float:
        """Return the size of an axis of the weight times its receptive field, NaN without one."""
        return self.weight[axis] * math.prod(self.weight[2:]) if self.weight else math.nan


#: Names of fans, and how the fan is computed; the standard deviation is ``gain / sqrt(fan)``.
#: Where two cannot be told apart on a network, the earlier one is taken.
FANS: Mapping[str, Callable[[Geometry], float]] = {
    "fan_in": lambda g: g.fan(1),
    "constant": lambda g: 1.0,
    "fan_out": lambda g: g.fan(0),
    "fan_avg": lambda g: (g.fan(1) + g.fan(0)) / 2,
    "hidden_size": lambda g: g.hidden or math.nan,
    "fan_out / groups": lambda g: g.fan(0) / g.groups,
    "fan_in * groups": lambda g: g.fan(1) * g.groups,
    "last axis": lambda g: g.shape[-1] if g.shape else math.nan,
    "second axis": lambda g: g.weight[1] if g.weight else math.nan,
    # Fourier neural operators draw between 0 and 1 / (in * out)
    "(first * second axis)^2": lambda g: math.prod(g.weight[:2]) ** 2 if g.weight else math.nan,
}


class Scheme:
    """How one tensor is drawn; see :func:`draw`."""


@dataclass(frozen=True)
class Keep(Scheme):
    """The values stay as the rewrite left them."""

    reason: str


@dataclass(frozen=True)
class Reset(Scheme):
    """The owner's ``reset_parameters()`` is called, torch's or its own."""

    reason: str


@dataclass(frozen=True)
class IfResized(Scheme):
    """Values of a fresh net that match no scheme: they stay while the shape is the same."""

    scheme: Scheme
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Constant(Scheme):
    """Every element has the same value."""

    value: float


@dataclass(frozen=True)
class Random(Scheme):
    """Independent samples with standard deviation ``gain / sqrt(fan)``.

    Attributes:
        distribution: ``"normal"``, ``"uniform"``, ``"one-sided uniform"`` (from 0 on) or
            ``"resampled"``, which has no formula.
        fan: a name in :data:`FANS`.
        gain: standard deviation where the fan is 1.
        mean: added to the samples.
        quantiles: of a resampled distribution, with mean 0 and standard deviation 1.
        source: where the scheme comes from: "from 22 tensors".
        singleton: whether the gain was read off a single tensor, which cannot tell the fan.
    """

    distribution: str
    fan: str
    gain: float
    mean: float = 0.0
    source: str = ""
    singleton: bool = False
    quantiles: Tensor | None = field(default=None, repr=False, compare=False)

    def std(self, geometry: Geometry) -> float:
        """Return the standard deviation at this geometry; NaN if it has no such fan."""
        return self.gain / math.sqrt(FANS[self.fan](geometry))


@dataclass(frozen=True)
class Orthogonal(Scheme):
    """``gain`` times orthonormal rows, or columns if there are fewer of them.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning" (2014), for the matrix
    ``weight.flatten(1)``, as in :func:`torch.nn.init.orthogonal_`.
    """

    gain: float


@dataclass(frozen=True)
class Diagonal(Scheme):
    """One kernel where output and input channel agree within a group, zero elsewhere.

    Covers :func:`torch.nn.init.eye_`, :func:`torch.nn.init.dirac_` and interpolating transposed
    convolutions. ``by_groups`` says whether the diagonal starts anew in each of the layer's groups.
    """

    kernel: Tensor
    by_groups: bool


@dataclass(frozen=True)
class Repeated(Scheme):
    """Every ``times`` neighbouring slices of the first axis are equal.

    Aitken et al., "Checkerboard artifact free sub-pixel convolution" (2017).
    """

    scheme: Scheme
    times: int


def draw(
    scheme: Scheme, out: Tensor, geometry: Geometry, generator: torch.Generator | None
) -> None:
    """Fill ``out`` (real, floating, of the shape that ``geometry`` has) with new values."""
    if isinstance(scheme, Constant):
        out.fill_(scheme.value)
    elif isinstance(scheme, Random):
        if scheme.quantiles is not None:
            count = len(scheme.quantiles)
            index = torch.randint(count, out.shape, generator=generator, device=out.device)
            out.copy_(scheme.quantiles.to(out.device, out.dtype)[index])
        elif scheme.distribution == "normal":
            out.normal_(generator=generator)
        elif scheme.distribution == "uniform":
            out.uniform_(-SQRT3, SQRT3, generator=generator)
        else:
            out.uniform_(0, 2 * SQRT3, generator=generator)
        out.mul_(scheme.std(geometry)).add_(scheme.mean)
    elif isinstance(scheme, Orthogonal):
        torch.nn.init.orthogonal_(out, scheme.gain, generator=generator)
    elif isinstance(scheme, Diagonal):
        out.zero_()
        for block in out.tensor_split(geometry.groups if scheme.by_groups else 1):
            place = torch.arange(min(block.shape[:2]), device=out.device)
            block[place, place] = scheme.kernel.to(out.device, out.dtype)
    elif isinstance(scheme, Repeated):
        once = out.new_empty(-(-out.shape[0] // scheme.times), *out.shape[1:])
        shape = tuple(once.shape)
        draw(scheme.scheme, once, replace(geometry, shape=shape, weight=shape), generator)
        out.copy_(once.repeat_interleave(scheme.times, dim=0)[: out.shape[0]])
    else:
        raise NotImplementedError(f"{scheme} draws nothing")
