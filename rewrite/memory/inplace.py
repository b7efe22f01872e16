"""What autograd does in place, and how to let it do so under a dispatch mode.

Where a tensor has several readers, such as the start of a skip connection, autograd adds their
gradients. It adds into the first one if nobody else holds that tensor, which spares a whole tensor
at just the places where a U-Net's peak is. Likewise it scatters the gradient of a selection into
fresh zeros. Under *any* dispatch mode it does neither, since it cannot tell what a mode makes of
its tensors (``isTensorSubclassLike`` in PyTorch's ``InputBuffer.cpp`` and ``FunctionsManual.cpp``).
A tracker that is a mode would see more memory than there is without it; so it must recognise these
operators and run them in place itself, under the conditions that autograd has for it.

Left as they are, being rare and small: the backward of products over an axis and of cumulative
products, and the bias of a linear layer on non-contiguous data of three or more axes.
"""

from __future__ import annotations

__all__ = ["Holders", "in_place_twin", "is_dense", "sole_holders"]

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


class Holders(NamedTuple):
    """How many hold a tensor: its handle in C++, its memory, its Python object."""

    handle: int
    memory: int
    python: int


def in_place_twin(func: Any, args: Sequence[Any], sole: Holders) -> Any:
    """Return the operator that autograd would run instead if no dispatch mode were active.

    To be called from ``__torch_dispatch__`` itself, whose own references are known.

    Args:
        func: the operator that arrived.
        args: its arguments, as ``__torch_dispatch__`` got them.
        sole: how many hold a tensor that only autograd holds; see :func:`sole_holders`.

    Returns:
        An operator that takes the same arguments and writes to the first, or ``None``.
    """
    twin = _IN_PLACE.get(func)
    if twin is None or torch.is_grad_enabled() or not backward_runs(2):
        return None
    written = args[0]
    if not isinstance(written, Tensor) or written.layout is not torch.strided:
        return None
    if not is_dense(written.shape, written.stride()):
        return None
    held = _holders(written)
    if twin is not aten.add_.Tensor:
        # Zeros that a formula made a moment ago; how many names it has for them is its business.
        held = held._replace(handle=sole.handle)
    return twin if held == sole else None


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether a tensor fills its memory without gaps, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _holders(tensor: Tensor) -> Holders:
    return Holders(*holders(tensor), sys.getrefcount(tensor))


@functools.cache
def sole_holders() -> Holders:
    """Count the holders of a tensor that autograd alone holds; the figures depend on torch."""
    found: list[Holders] = []

    class Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
        with Probe():  # type: ignore[no-untyped-call]
            loss.backward()  # type: ignore[no-untyped-call]
    return found[0]


def _note(found: list[Holders], args: tuple[Any, ...]) -> None:
    written = args[0]  # the same number of names for it as in in_place_twin
    found.append(_holders(written))
