"""Numbers that meet channels position by position: indices of a pooling, made tables."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.convs import around
from tests.models.registry import net, register
from tests.models.sizes import Frame
from tests.models.views import Apply

_HEAD = {"head": "output"}
_OTHERS = "would not be those that the kept channels met"


def _conv(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1)


# -- indices of one tensor that another is read by ------------------------------------------------


@net("indices", movable=["enc1", "enc2", "mid", "dec2", "dec1"], frozen=_HEAD)
class SegNet(nn.Module):
    """Every unpooling reads the indices of its level: their channels are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = _conv(3, 8), _conv(8, 16), _conv(16, 16)
        self.dec2, self.dec1, self.head = _conv(16, 8), _conv(8, 8), _conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, first = F.max_pool2d(self.enc1(x), 2, return_indices=True)
        x, second = F.max_pool2d(self.enc2(x.relu()), 2, return_indices=True)
        x = F.max_unpool2d(self.mid(x).relu(), second, 2)
        x = F.max_unpool2d(self.dec2(x).relu(), first, 2)
        return self.head(self.dec1(x).relu())


@net("indices concat", movable=["a", "b", "mid", "tail"], frozen=_HEAD)
class UnpoolJoined(nn.Module):
    """Indices that went through a concatenation and a slice: each part has its own channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = _conv(3, 8), _conv(3, 8)
        self.mid, self.tail, self.head = _conv(16, 8), _conv(16, 8), _conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        (a, at_a), (b, at_b) = (
            F.max_pool2d(layer(x), 2, return_indices=True) for layer in (self.a, self.b)
        )
        y = self.mid(torch.cat([a, b], 1)).relu()
        both = F.max_unpool2d(torch.cat([y, y], 1), torch.cat([at_b, at_a], 1), 2)
        return self.head(self.tail(both).relu())


@net("indices", width=4, movable=["tail"], frozen={"stem": "needs the axis whole", **_HEAD})
class StrongestChannel(Frame):
    """The position of the strongest channel is a number of that channel: it must stay one."""

    def middle(self, x: Tensor) -> Tensor:
        return x * (1 + x.argmax(1, keepdim=True))


@net("indices embedding", movable=["stem", "tail"], frozen=_HEAD)
class QuantisedChannels(Frame):
    """A table is read at what each channel holds; the channels pass through the indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 2)

    def middle(self, x: Tensor) -> Tensor:
        at = (x.sigmoid() * 7.99).long()
        scale, shift = self.table(at).unbind(-1)
        return x * scale + shift


# -- tables made in a forward ---------------------------------------------------------------------


def _per_channel(numbers: Tensor) -> Tensor:
    return numbers.view(1, -1, 1, 1)


def arange(x: Tensor) -> Tensor:
    return x * _per_channel(torch.arange(1, x.shape[1] + 1, dtype=x.dtype))


def linspace(x: Tensor) -> Tensor:
    return x + _per_channel(torch.linspace(-1, 1, x.shape[1], dtype=x.dtype))


def cumsum_of_ones(x: Tensor) -> Tensor:
    return x * torch.ones_like(x).cumsum(1)


def written_by_parts(x: Tensor) -> Tensor:
    """Sines on even positions, cosines on odd ones, written into a table of zeros."""
    table, at = torch.zeros(x.shape[1], dtype=x.dtype), torch.arange(x.shape[1] // 2).to(x)
    table[0::2], table[1::2] = at.sin(), at.cos()
    return x + _per_channel(table)


def first_three(x: Tensor) -> Tensor:
    """The first three channels are left alone."""
    return torch.where(_per_channel(torch.arange(x.shape[1]) < 3), x, x.tanh())


def mixing_table(x: Tensor) -> Tensor:
    """Every channel is a cosine transform of all."""
    at = torch.arange(x.shape[1], dtype=x.dtype)
    table = (torch.pi / x.shape[1] * (at + 0.5) * at[:, None]).cos()
    return torch.einsum("bchw,dc->bdhw", x, table)


def seeded_by_generator(x: Tensor) -> Tensor:
    numbers = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(3))
    return x * _per_channel(numbers.to(x))


def seeded_globally(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return x * _per_channel(torch.rand(x.shape[1], dtype=x.dtype))


def share_of_each(x: Tensor) -> Tensor:
    """One number for all, but a table of it: it would be another."""
    return x * torch.full((1, x.shape[1], 1, 1), 1 / x.shape[1], dtype=x.dtype)


def rows_by_width(x: Tensor) -> Tensor:
    """A table over rows whose numbers come from the number of channels."""
    return x * (torch.arange(x.shape[2], dtype=x.dtype) / x.shape[1])[:, None]


def from_numpy(x: Tensor) -> Tensor:
    return x * _per_channel(torch.from_numpy(np.arange(1.0, 1 + x.shape[1])).to(x.dtype))


def from_a_list(x: Tensor) -> Tensor:
    return x * _per_channel(torch.tensor([0.9**i for i in range(x.shape[1])], dtype=x.dtype))


for _function, _reason in {
    **dict.fromkeys((arange, linspace, cumsum_of_ones, written_by_parts, first_three), _OTHERS),
    **dict.fromkeys((mixing_table, seeded_by_generator, seeded_globally), _OTHERS),
    **dict.fromkeys((share_of_each, rows_by_width), _OTHERS),
    **dict.fromkeys((from_numpy, from_a_list), "joins it with an axis that cannot change"),
}.items():
    register(
        f"numbers_{_function.__name__}",
        lambda f=_function: around(Apply(f)),  # type: ignore[misc]
        "numbers channel-statistics" if _function is mixing_table else "numbers",
        movable=["tail"],
        frozen={"stem": _reason, **_HEAD},
    )


def constants(x: Tensor) -> Tensor:
    shape = (1, x.shape[1], 1, 1)
    both = x * torch.full(shape, 0.5, dtype=x.dtype) + torch.ones(shape, dtype=x.dtype)
    return both - torch.zeros_like(x).expand_as(x)


def identity(x: Tensor) -> Tensor:
    return torch.einsum("bchw,dc->bdhw", x, torch.eye(x.shape[1], dtype=x.dtype))


def running_sum(x: Tensor) -> Tensor:
    """A triangle of ones, of which any part that keeps the order is one too."""
    ones = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype)
    order = torch.arange(x.shape[1])
    return torch.einsum("bchw,dc->bdhw", x, ones * (order <= order[:, None]))


def scaled_by_root(x: Tensor) -> Tensor:
    """A single number may come from the number of channels, as in attention."""
    return x / torch.tensor(float(x.shape[1])).sqrt()


def over_space(x: Tensor) -> Tensor:
    return x + torch.linspace(-1, 1, x.shape[3], dtype=x.dtype)


def _numbers(function: Callable[[Tensor], Tensor], tags: str = "") -> None:
    register(
        f"numbers_{function.__name__}",
        lambda: around(Apply(function)),
        f"numbers {tags}",
        movable=["stem", "tail"],
        frozen=_HEAD,
    )


_numbers(constants)
_numbers(identity, "made-weight")
_numbers(running_sum, "made-weight")
_numbers(scaled_by_root, "counts-channels")
_numbers(over_space)


@net("numbers owner", movable=["tail"], frozen={"stem": _OTHERS, **_HEAD})
class DecaysOfOwner(Frame):
    """A table built from the owner's own count, which would follow."""

    def __init__(self) -> None:
        super().__init__(16)
        self.n = 16

    def middle(self, x: Tensor) -> Tensor:
        decay = torch.exp(-torch.arange(self.n, dtype=x.dtype) / self.n)
        return x * decay[:, None, None]


@net("numbers buffer", movable=["stem", "tail"], frozen=_HEAD)
class DecaysInBuffer(Frame):
    """The same as a buffer, registered once, of which each channel keeps its own number."""

    def __init__(self) -> None:
        super().__init__(16)
        self.decay: Tensor
        self.register_buffer("decay", torch.exp(-torch.arange(16.0) / 16), persistent=False)

    def middle(self, x: Tensor) -> Tensor:
        return x * self.decay[:, None, None]


@net("numbers lazy", movable=["tail"], frozen={"stem": "", **_HEAD})
class DecaysWhenNeeded(Frame):
    """Made at the first call and kept as an attribute."""

    def __init__(self) -> None:
        super().__init__(16)
        self.decay: Tensor | None = None

    def middle(self, x: Tensor) -> Tensor:
        if self.decay is None:
            self.decay = torch.exp(-torch.arange(x.shape[1], dtype=x.dtype) / 7)
        return x * self.decay[:, None, None]
