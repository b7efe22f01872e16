"""Run in place under a dispatch mode what autograd runs in place without one.

Where a tensor has several readers, such as the start of a skip connection, autograd adds their
gradients. It adds in place into the first one if nothing else refers to that tensor. This saves a
whole tensor, just where a U-Net has its peak. Likewise autograd scatters the gradient of a
selection into fresh zeros. Under *any* dispatch mode it does neither (``isTensorSubclassLike`` in
PyTorch's ``InputBuffer.cpp`` and ``FunctionsManual.cpp``), so a tracker that is a mode would
measure more memory than the step takes. The tracker therefore recognises these operators and runs
them in place itself, under autograd's own conditions.

Not covered, being rare and small: the backward of products over an axis and of cumulative
products, and the bias of a linear layer on non-contiguous data of three or more axes.
"""

from __future__ import annotations

__all__ = ["ReferenceCounts", "counts_in_autograd", "in_place_overload", "is_dense"]

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocketize._torch import TorchDispatchMode, backward_runs, holders, without_dispatch_modes

aten = torch.ops.aten

#: What autograd runs under a dispatch mode, and what it runs without.
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.index_add.default: aten.index_add_.default,
    aten.index_put.default: aten.index_put_.default,
    aten.put.default: aten.put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter.value: aten.scatter_.value,
    aten.scatter_add.default: aten.scatter_add_.default,
}


class ReferenceCounts(NamedTuple):
    """References to a tensor in C++, to its storage, and to its Python object."""

    handle: int
    memory: int
    python: int


def in_place_overload(func: Any, args: Sequence[Any], sole: ReferenceCounts) -> Any:
    """Return the operator that autograd would run instead if no dispatch mode were active.

    To be called from ``__torch_dispatch__`` itself, whose own references are known.

    Args:
        func: the operator that arrived.
        args: its arguments, as ``__torch_dispatch__`` got them.
        sole: references to a tensor that only autograd holds; see :func:`counts_in_autograd`.

    Returns:
        An operator that takes the same arguments and writes to the first, or ``None``.
    """
    overload = _IN_PLACE.get(func)
    if overload is None or torch.is_grad_enabled() or not backward_runs(2):
        return None
    written = args[0]
    if not isinstance(written, Tensor) or written.layout is not torch.strided:
        return None
    if not is_dense(written.shape, written.stride()):
        return None
    counts = _counts(written)
    if overload is not aten.add_.Tensor:
        # Fresh zeros of a backward formula: its references in C++ differ between formulas.
        counts = counts._replace(handle=sole.handle)
    return overload if counts == sole else None


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether a tensor fills its memory without gaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _counts(tensor: Tensor) -> ReferenceCounts:
    return ReferenceCounts(*holders(tensor), sys.getrefcount(tensor))


@functools.cache
def counts_in_autograd() -> ReferenceCounts:
    """Return the counts of a tensor that autograd alone refers to; they depend on torch."""
    found: list[ReferenceCounts] = []

    class ReferenceProbe(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is aten.add.Tensor:
                _note(found, args)
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                out.untyped_storage()  # as the tracker does; it gives the storage a Python object
            return out

    with torch.inference_mode(False), torch.enable_grad(), without_dispatch_modes():
        start = torch.ones(2, requires_grad=True)
        twice = start * 2
        loss = (twice.relu() * twice.sigmoid()).sum()
        with ReferenceProbe():  # type: ignore[no-untyped-call]
            loss.backward()  # type: ignore[no-untyped-call]
    return found[0]


def _note(found: list[ReferenceCounts], args: tuple[Any, ...]) -> None:
    written = args[0]  # as many Python names as in in_place_overload
    found.append(_counts(written))
