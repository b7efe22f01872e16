"""The operators of a step and the sizes of their tensors, from which its time is predicted."""

from __future__ import annotations

__all__ = ["EXAMPLE_BYTES", "ConvolutionShape", "Described", "Operations", "Work"]

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocketize._torch import pytree, schema_of
from pocketize.memory.flops import flops_of
from pocketize.memory.in_place import is_dense

aten = torch.ops.aten

#: An operator is timed at a call of at most so many bytes, where there is one.
EXAMPLE_BYTES = 64 << 20
#: Namespaces of operators that no kernel is behind.
_QUESTIONS = ("prim", "prims")
#: A described tensor spans at most so many times its own memory.
_GAPS = 8


class ConvolutionShape(NamedTuple):
    """A convolution or its backward pass.

    Attributes:
        input: shape (N, C, \\*spatial).
        weight: shape; (C_out, C_in / groups, \\*kernel), or (C_in, C_out / groups, \\*kernel).
        dtype: of both, such as ``"float32"``.
        options: stride, padding, dilation, transposed, output padding and groups.
        mask: which gradients the backward pass computes (input, weight, bias); empty for a forward.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: str
    options: tuple[Any, ...]
    mask: tuple[bool, ...] = ()


class Described(NamedTuple):
    """A tensor without its values; ``stride`` has gaps where it has, but short ones."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]


@dataclass
class Operations:
    """All calls of one operator whose tensors have about the same layouts.

    Attributes:
        calls: how many.
        nbytes: bytes of the tensors that they were given and returned.
        flops: as in :class:`Work`.
        example: one of them: function, arguments, keyword arguments, with tensors described.
        example_bytes: its part of ``nbytes``.
    """

    calls: int = 0
    nbytes: int = 0
    flops: int = 0
    example: tuple[Any, Any, Any] = (None, (), {})
    example_bytes: int = 0


class Work:
    """Counts the operators of a step.

    Attributes:
        convolutions: how many times each convolution ran.
        others: every other operator, by name and layouts: "s" for each tensor whose memory has
            gaps, such as a tile of a larger map, and "b" for each that is broadcast.
        flops: floating-point operations of convolutions and matrix products, by torch's formulas.
        dispatched: operators that reached the dispatcher, those that only make views included.
        followed: operators, modules and tiles that a pass looked at in Python, and tensors that it
            was asked to save.
        moves: moves without an operator, by the place ("host" or "disk") and whether they went
            there or came back; ("map", False) are files that are mapped, filled and removed.
        moved: their bytes.
    """

    def __init__(self) -> None:
        self.convolutions: Counter[ConvolutionShape] = Counter()
        self.others: dict[str, Operations] = {}
        self.flops = 0
        self.dispatched = 0
        self.followed = 0
        self.moves: Counter[tuple[str, bool]] = Counter()
        self.moved: Counter[tuple[str, bool]] = Counter()

    def note_move(self, nbytes: int, place: str, *, away: bool) -> None:
        """Count bytes that are moved to another place, or back to the device."""
        self.moves[place, away] += 1
        self.moved[place, away] += nbytes

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operator that has just run."""
        packet = getattr(func, "overloadpacket", None)
        if packet is None or func.namespace in _QUESTIONS:
            return  # fake tensors alone are asked for their device by an operator
        self.dispatched += 1
        if _only_views(func):
            return
        flops = flops_of(func, args, kwargs, out) or 0
        self.flops += flops
        if packet is aten.convolution:
            x, weight, _, *options = args
            self.convolutions[_convolution(x, weight, options)] += 1
            return
        if packet is aten.convolution_backward:
            _, x, weight, _, *options, mask = args
            self.convolutions[_convolution(x, weight, options, mask)] += 1
            return
        given = [t for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in given)
        name = f"{packet.__name__.rstrip('_')} {_layouts(given)}".rstrip()
        seen = self.others.setdefault(name, Operations())
        seen.calls, seen.nbytes, seen.flops = (
            seen.calls + 1,
            seen.nbytes + moved,
            seen.flops + flops,
        )
        # the largest call that is quick to repeat, else the smallest
        if seen.calls == 1 or _rank(moved) > _rank(seen.example_bytes):
            seen.example_bytes = moved
            seen.example = (func, *pytree.tree_map_only(Tensor, _described, (args, kwargs)))


def _rank(nbytes: int) -> int:
    return nbytes if nbytes <= EXAMPLE_BYTES else -nbytes


def _layouts(tensors: list[Tensor]) -> str:
    most = max((t.numel() for t in tensors), default=0)
    return "".join("b" if t.numel() < most else "" if _is_dense(t) else "s" for t in tensors)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or is_dense(tensor.shape, tensor.stride())


def _described(tensor: Tensor) -> Described:
    shape, strides = tuple(tensor.shape), list(tensor.stride())
    dense, gaps = 1, _GAPS
    for axis in sorted(range(len(shape)), key=lambda axis: (strides[axis], shape[axis])):
        if strides[axis] and shape[axis] > 1:
            gap = min(gaps, max(1, strides[axis] // dense))
            strides[axis], gaps = dense * gap, gaps // gap
            dense = strides[axis] * shape[axis]
    return Described(shape, tensor.dtype, tuple(strides))


def _convolution(x: Tensor, weight: Tensor, options: list[Any], mask: Any = ()) -> ConvolutionShape:
    fixed = tuple(tuple(o) if isinstance(o, list | tuple) else o for o in options)
    dtype = str(weight.dtype).removeprefix("torch.")
    return ConvolutionShape(tuple(x.shape), tuple(weight.shape), dtype, fixed, tuple(mask))


def _only_views(func: Any) -> bool:
    """Tell whether an operator moves nothing: it returns views of its arguments, or no tensor."""
    schema = schema_of(func)
    if schema is None or func.namespace == "profiler":
        return True
    if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
        return True
    return all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
