"""Random chains of operators that move data: hypothesis strategies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["Chain", "chains"]

Move = Callable[[Tensor], Tensor]
_LARGEST = 3000  # elements


@dataclass(frozen=True)
class Chain:
    """A chain of moves on a tensor.

    Attributes:
        shape: what it starts from.
        words: the moves as Python, for hypothesis's reports.
        moves: the moves.
    """

    shape: tuple[int, ...]
    words: tuple[str, ...]
    moves: tuple[Move, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for move in self.moves:
            x = move(x)
        return x

    def __repr__(self) -> str:
        return f"zeros{self.shape}{''.join(self.words)}"


@st.composite
def chains(draw: st.DrawFn, kinds: tuple[str, ...] = (), longest: int = 5) -> Chain:
    """Chains of the given kinds of moves, of all kinds by default."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=4)))
    now = torch.zeros(shape)
    words: list[str] = []
    moves: list[Move] = []
    for _ in range(draw(st.integers(1, longest))):
        made = _MOVES[draw(st.sampled_from(kinds or tuple(_MOVES)))](draw, now)
        if made is None:
            continue
        word, move = made
        after = move(now)
        if after.numel() <= _LARGEST and after.ndim <= 6:
            now = after
            words.append(word)
            moves.append(move)
    return Chain(shape, tuple(words), tuple(moves))


Made = tuple[str, Move] | None


def _permute(draw: st.DrawFn, x: Tensor) -> Made:
    order = draw(st.permutations(range(x.ndim)))
    return f".permute({order})", lambda t: t.permute(order)


def _flip(draw: st.DrawFn, x: Tensor) -> Made:
    axes = draw(st.lists(st.integers(0, x.ndim - 1), unique=True, max_size=x.ndim))
    return f".flip({axes})", lambda t: t.flip(axes)


def _unflatten(draw: st.DrawFn, x: Tensor) -> Made:
    axis = draw(st.integers(0, x.ndim - 1))
    size = x.shape[axis]
    first = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    parts = (first, size // first)
    return f".unflatten({axis}, {parts})", lambda t: t.unflatten(axis, parts)


def _flatten(draw: st.DrawFn, x: Tensor) -> Made:
    start = draw(st.integers(0, x.ndim - 1))
    end = draw(st.integers(start, x.ndim - 1))
    return f".flatten({start}, {end})", lambda t: t.flatten(start, end)


def _view(draw: st.DrawFn, x: Tensor) -> Made:
    left = x.numel()
    shape: list[int] = []
    while left > 1 and len(shape) < 4:
        shape.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= shape[-1]
    shape.append(left)
    return f".reshape({shape})", lambda t: t.reshape(shape)


def _unsqueeze(draw: st.DrawFn, x: Tensor) -> Made:
    axis = draw(st.integers(0, x.ndim))
    return f".unsqueeze({axis})", lambda t: t.unsqueeze(axis)


def _squeeze(draw: st.DrawFn, x: Tensor) -> Made:
    return (".squeeze()", lambda t: t.squeeze()) if x.ndim and x.numel() > 1 else None


def _cat_with_itself(draw: st.DrawFn, x: Tensor) -> Made:
    axis = draw(st.integers(0, x.ndim - 1))
    return f".cat_flipped({axis})", lambda t: torch.cat([t, t.flip(axis)], axis)


def _swap_chunks(draw: st.DrawFn, x: Tensor) -> Made:
    axis = draw(st.integers(0, x.ndim - 1))
    size = x.shape[axis]
    count = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    order = draw(st.permutations(range(count)))

    def move(t: Tensor) -> Tensor:
        parts = t.chunk(count, axis)
        return torch.cat([parts[i] for i in order], axis)

    return f".swap_chunks({axis}, {order})", move


def _chunk(draw: st.DrawFn, x: Tensor) -> Made:
    axis = draw(st.integers(0, x.ndim - 1))
    size = x.shape[axis]
    count = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    which = draw(st.integers(0, count - 1))
    return f".chunk({count}, {axis})[{which}]", lambda t: t.chunk(count, axis)[which]


def _split(draw: st.DrawFn, x: Tensor) -> Made:
    axis = draw(st.integers(0, x.ndim - 1))
    cut = draw(st.integers(0, x.shape[axis] - 1))
    sizes = [cut, x.shape[axis] - cut]

    def move(t: Tensor) -> Tensor:
        first, second = t.split(sizes, axis)
        return torch.cat([second, first], axis)

    return f".swap_split({sizes}, {axis})", move


def _narrow(draw: st.DrawFn, x: Tensor) -> Made:
    axis = draw(st.integers(0, x.ndim - 1))
    start = draw(st.integers(0, x.shape[axis] - 1))
    length = draw(st.integers(1, x.shape[axis] - start))
    return f".narrow({axis}, {start}, {length})", lambda t: t.narrow(axis, start, length)


def _step(draw: st.DrawFn, x: Tensor) -> Made:
    step = draw(st.integers(1, 3))
    return f"[..., ::{step}]", lambda t: t[..., ::step]


def _repeat(draw: st.DrawFn, x: Tensor) -> Made:
    times = draw(st.lists(st.integers(1, 2), min_size=x.ndim, max_size=x.ndim))
    return f".repeat({times})", lambda t: t.repeat(times)


def _interleave(draw: st.DrawFn, x: Tensor) -> Made:
    axis, times = draw(st.integers(0, x.ndim - 1)), draw(st.integers(1, 3))
    return (
        f".repeat_interleave({times}, {axis})",
        lambda t: t.repeat_interleave(times, axis),
    )


def _pad(draw: st.DrawFn, x: Tensor) -> Made:
    amounts = draw(st.lists(st.integers(0, 2), min_size=2 * x.ndim, max_size=2 * x.ndim))
    return f".pad({amounts})", lambda t: torch.nn.functional.pad(t, amounts)


def _pixel_shuffle(draw: st.DrawFn, x: Tensor) -> Made:
    if x.ndim < 3 or x.shape[-3] % 4:
        return None
    return ".pixel_shuffle(2)", lambda t: torch.pixel_shuffle(t, 2)


def _pixel_unshuffle(draw: st.DrawFn, x: Tensor) -> Made:
    if x.ndim < 3 or x.shape[-1] % 2 or x.shape[-2] % 2:
        return None
    return ".pixel_unshuffle(2)", lambda t: torch.pixel_unshuffle(t, 2)


def _channel_shuffle(draw: st.DrawFn, x: Tensor) -> Made:
    if x.ndim < 3 or math.prod(x.shape[:2]) < 2:
        return None
    size = x.shape[1]
    groups = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    return f".channel_shuffle({groups})", lambda t: torch.channel_shuffle(t, groups)


_MOVES: dict[str, Callable[[st.DrawFn, Tensor], Made]] = {
    "permute": _permute,
    "flip": _flip,
    "unflatten": _unflatten,
    "flatten": _flatten,
    "view": _view,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "cat": _cat_with_itself,
    "swap_chunks": _swap_chunks,
    "chunk": _chunk,
    "split": _split,
    "narrow": _narrow,
    "step": _step,
    "repeat": _repeat,
    "repeat_interleave": _interleave,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
}
