"""Calls that are made as one node of autograd's graph, so that less is alive at once in backward.

* ``activation(norm(x))``: autograd would go through the activation and the norm one after the
  other, each with its gradient and its input at full size. :class:`NormAct` starts from ``x``, the
  result of a convolution, and works through the channels in pieces: norm and activation are run
  again on one piece and differentiated there, by the same kernels.
* ``conv(cat(a, b))`` is ``conv_a(a) + conv_b(b)``: in backward the parts come one after the other
  (:class:`Part`), with no concatenation and no gradient of one.

Nothing is changed in the model. :class:`Fusing` is a mode that sees the calls as the model makes
them; whoever else reads ``norm(x)`` or ``cat(a, b)`` finds the ordinary nodes in place.
"""

from __future__ import annotations

__all__ = ["Fusing"]

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pocketize._torch import (
    has_tensor_hooks,
    holders,
    swap_tensors,
    transforms_active,
    version_of,
)
from pocketize.passes.recompute.joining import join
from pocketize.passes.recompute.normact import NormAct, NormCall
from pocketize.passes.recompute.tape import Tape

_NORMS = {F.batch_norm, F.instance_norm, F.group_norm}
_CATS = {torch.cat, torch.concat, torch.concatenate}
_CONVS = {torch.conv1d, torch.conv2d, torch.conv3d}
#: Activations, all of one tensor, with the function that does the same out of place.
_ACTIVATIONS: dict[Any, Any] = {
    function: function
    for function in (
        F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.hardtanh, F.hardswish, F.silu,
        F.mish, F.hardsigmoid, F.gelu, F.softplus, F.prelu, F.softsign, F.tanhshrink,
        F.logsigmoid, torch.relu, torch.selu, torch.celu, torch.prelu, torch.tanh, torch.sigmoid,
        Tensor.relu, Tensor.tanh, Tensor.sigmoid,
    )
}  # fmt: skip
_IN_PLACE: dict[Any, Any] = {
    torch.relu_: torch.relu,
    Tensor.relu_: torch.relu,
    torch.sigmoid_: torch.sigmoid,
    Tensor.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
    Tensor.tanh_: torch.tanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.selu_: F.selu,
    F.celu_: F.celu,
    F.relu_: F.relu,
    F.hardtanh_: F.hardtanh,
}
#: Ways to the memory of a tensor that do not pass through an operator.
_RAW = {
    Tensor.numpy,
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__reduce_ex__,
    Tensor.__deepcopy__,
    Tensor.share_memory_,
    Tensor.set_,
    Tensor.data.__set__,  # type: ignore[attr-defined]
}


class Fusing(TorchFunctionMode):
    """Makes the calls named above as one.

    Args:
        tape: the recording of the same forward pass.
        is_ours: whether autograd's saved tensors go to the tape; inside a region that somebody
            checkpoints they do not, and the region must run in its repetition as it did at first.
    """

    def __init__(self, tape: Tape, is_ours: Callable[[], bool]) -> None:
        super().__init__()
        self.tape, self.is_ours = tape, is_ours

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a call, together with the one before where they are made as one."""
        kwargs = kwargs or {}
        try:
            known = func in _KNOWN
        except TypeError:  # whatever cannot be hashed is none of these
            known = False
        if not known:
            return func(*args, **kwargs)
        if func in _RAW and not transforms_active():
            for argument in args:
                if isinstance(argument, Tensor):
                    self.tape.expose(argument)
            return func(*args, **kwargs)
        if not torch.is_grad_enabled() or transforms_active() or not self.is_ours():
            return func(*args, **kwargs)
        if func in _NORMS:
            return self._norm(func, args, kwargs)
        if func in _CATS:
            return self._cat(func, args, kwargs)
        if func in _CONVS:
            return self._conv(func, args, kwargs)
        return self._activation(func, args, kwargs)

    def _norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = NormCall.bind(func, args, kwargs)
        self.tape.statistics = None
        made = func(*args, **kwargs)
        if call is not None and made.requires_grad and made.grad_fn is not None:
            call = replace(call, dtype=made.dtype, statistics=self.tape.statistics)
            self._note(call, made)
        return made

    def _activation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        normed: Any = args[0] if args else kwargs.get("input")
        made = self._noted(normed, NormCall)
        if made is None:
            return func(*args, **kwargs)
        taken = _without_input(func, args, kwargs)
        if taken is None:
            return func(*args, **kwargs)
        activation, extra, in_place = taken
        if not in_place:
            return NormAct.run(made.call, normed, activation, extra, None)
        memory = self.tape.ledger.memory(normed)
        viewed = memory.views != made.views  # somebody would see it through a view
        alias = normed.detach()
        if viewed or _held(normed) or _held(alias):
            return func(*args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name not in ("input", "self")}
        write = partial(_apply, func, args[1:], named)
        fused = NormAct.run(made.call, alias, activation, extra, write)
        memory.note = None
        # Whoever holds the tensor sees it activated, with the history that goes with it.
        swap_tensors(normed, fused)
        return normed

    def _note(self, call: Any, tensor: Tensor) -> None:
        """Remember with its memory how a tensor was made; subclasses copy what is on a tensor."""
        memory = self.tape.memory_of(tensor)
        if memory is not None:
            memory.note = _Made(call, version_of(tensor), memory.views, tensor.grad_fn)

    def _noted(self, tensor: Any, kind: type) -> _Made | None:
        """Return how a tensor was made, if it is as it was and nobody waits for its gradient."""
        memory = self.tape.memory_of(tensor)
        made: _Made | None = None if memory is None else memory.note
        if made is None or not isinstance(made.call, kind) or tensor.grad_fn is not made.node:
            return None
        awaited = has_tensor_hooks(tensor) or tensor.retains_grad
        return None if awaited or version_of(tensor) != made.version else made

    def _cat(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = func(*args, **kwargs)
        parts = args[0] if args else kwargs.get("tensors")
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if dim in (1, 1 - made.ndim) and made.requires_grad and isinstance(parts, tuple | list):
            self._note(tuple(parts), made)
        return made

    def _conv(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data: Any = args[0] if args else kwargs.get("input")
        made = self._noted(data, tuple)
        if made is not None:
            joined = join(func, made.call, data, args, kwargs)
            if joined is not None:
                return joined
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Made:
    """How a tensor was made, while it is as it was made.

    Attributes:
        call: the call of the norm, or the parts of the concatenation.
        version: the tensor's version then.
        views: how many views of its memory there were.
        node: its node in autograd's graph; an alias without its history is another tensor.
    """

    call: Any
    version: int
    views: int
    node: Any


_KNOWN = {*_NORMS, *_CATS, *_CONVS, *_ACTIVATIONS, *_IN_PLACE, *_RAW}


@cache
def _signature(func: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(func)
    except ValueError:  # written in C++, takes its input first and has no ``inplace``
        return None


def _without_input(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], bool] | None:
    """Split an activation's call: its function of the input and further tensors, these, in place.

    ``None`` for calls that are not understood.
    """
    in_place = func in _IN_PLACE
    function = _IN_PLACE.get(func) or _ACTIVATIONS[func]
    signature = _signature(func)
    rest, named = args[1:], {k: v for k, v in kwargs.items() if k not in ("input", "self")}
    if signature is not None and "inplace" in signature.parameters:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = dict(bound.arguments)
        in_place = in_place or bool(options.pop("inplace"))
        options.pop("input")
        rest, named = (), options
    if "out" in named or any(isinstance(v, Tensor) for v in named.values()):
        return None
    tensors = tuple(v for v in rest if isinstance(v, Tensor))
    if tensors and len(tensors) != len(rest):
        return None
    if tensors:
        return function, tensors, in_place
    return (partial(_apply, function, rest, named) if rest or named else function), (), in_place


def _held(tensor: Any) -> bool:
    """Whether a tensor is watched, or held from outside Python, so that it cannot be swapped."""
    return bool(weakref.getweakrefs(tensor)) or holders(tensor)[0] > 1


def _apply(function: Any, rest: tuple[Any, ...], named: dict[str, Any], x: Tensor) -> Tensor:
    made: Tensor = function(x, *rest, **named)
    return made
