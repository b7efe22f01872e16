"""Calls that are made as one node of autograd's graph, so that less is alive at once in backward.

* ``activation(norm(x))``: autograd would go through the activation and the norm one after the
  other, each with its gradient and its input at full size. :class:`NormActivation` keeps ``x``,
  the result of a convolution, and computes norm, activation and gradient again block by block.
* ``conv(cat(a, b))`` is ``conv_a(a) + conv_b(b)``: in backward the parts come one after the other
  (:class:`_Part`), with no concatenation and no gradient of one.

Nothing is changed in the model. :class:`Fusing` is a mode that sees the calls as the model makes
them; other readers of ``norm(x)`` or ``cat(a, b)`` find the ordinary nodes.
"""

from __future__ import annotations

__all__ = ["Fusing"]

import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

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
from pocketize.passes.recompute.norms import NORMS, NormCall
from pocketize.passes.recompute.recompute_graph import RecomputeGraph
from pocketize.passes.shared.second_order import differentiate

aten = torch.ops.aten


def _join(
    func: Any, parts: tuple[Tensor, ...], data: Tensor, args: tuple[Any, ...], kwargs: Any
) -> Tensor | None:
    """Run a convolution of the concatenation of ``parts``; ``None`` for a call to make as it is."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    weight, bias = given.get("weight"), given.get("bias")
    dims = data.ndim - 2
    defaults = {"stride": 1, "padding": 0, "dilation": 1}
    geometry = [given.get(name, default) for name, default in defaults.items()]
    if given.get("groups", 1) != 1 or isinstance(geometry[1], str) or len(parts) < 2:
        return None
    if not isinstance(weight, Tensor) or weight.ndim != data.ndim:
        return None
    if any(p.ndim != data.ndim or p.dtype != data.dtype for p in parts):
        return None
    like = _ConvolutionGeometry(*(_spread(value, dims) for value in geometry))
    with torch.no_grad():
        content = func(data, weight, bias, *like)
    own = torch.split(weight, [part.shape[1] for part in parts], 1)
    tokens = [
        _Part.apply(like, content, part, weight)  # type: ignore[no-untyped-call]
        for part, weight in zip(parts, own, strict=True)
    ]
    made: Tensor = _Join.apply((content,), bias, *tokens)  # type: ignore[no-untyped-call]
    return made


def _spread(value: Any, dims: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


class _ConvolutionGeometry(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def gradients(
        self, gradient: Tensor, data: Tensor, weight: Tensor, needed: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of data and weight, in their dtypes."""
        operands = gradient, data.to(gradient.dtype), weight.to(gradient.dtype)
        last = False, [0] * len(self.stride), 1, [*needed, False]
        by_data, by_weight, _ = aten.convolution_backward(*operands, None, *self, *last)
        return (
            None if by_data is None else by_data.to(data.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
        )


class _Part(torch.autograd.Function):
    """The share of one part of a concatenation in the result."""

    @staticmethod
    def forward(
        ctx: Any, like: _ConvolutionGeometry, content: Tensor, part: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.like = like
        ctx.save_for_backward(part, weight)
        # A token of the result's shape, without content: one element, spread.
        return content.new_empty_strided(content.shape, (0,) * content.ndim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (part, weight), needed = ctx.saved_tensors, list(ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():  # to be differentiated once more
            run = partial(_convolve, like=ctx.like, dtype=gradient.dtype)
            return None, None, *differentiate(run, (part, weight), needed, gradient)
        return None, None, *ctx.like.gradients(gradient, part, weight, needed)


class _Join(torch.autograd.Function):
    """The result, which was computed in one go, as the sum of the shares and the bias."""

    @staticmethod
    def forward(ctx: Any, content: tuple[Tensor], bias: Tensor | None, *tokens: Tensor) -> Tensor:
        ctx.tokens, ctx.bias = len(tokens), None if bias is None else bias.dtype
        return content[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        by_bias = None
        if ctx.bias is not None and ctx.needs_input_grad[1]:
            dims = [d for d in range(gradient.ndim) if d != 1]
            by_bias = gradient.sum(dims).to(ctx.bias)
        return None, by_bias, *(gradient,) * ctx.tokens


def _convolve(
    data: Tensor, weight: Tensor, like: _ConvolutionGeometry, dtype: torch.dtype
) -> Tensor:
    dims = len(like.stride)
    made: Tensor = aten.convolution(data, weight, None, *like, False, [0] * dims, 1)
    return made.to(dtype)


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
    getattr(place, f"{name}_"): getattr(F if place is F else torch, name)
    for place, names in {
        torch: ("relu", "sigmoid", "tanh"),
        Tensor: ("relu", "sigmoid", "tanh"),
        F: ("relu", "leaky_relu", "elu", "selu", "celu", "hardtanh"),
    }.items()
    for name in names
}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
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
    _SET_DATA,
}


class Fusing(TorchFunctionMode):
    """Makes the calls named above as one.

    Args:
        graph: the recording of the same forward pass.
        is_ours: whether autograd's saved tensors go to the graph. Inside a region that the model
            checkpoints they do not, and calls are not fused: its second run must be the same.
    """

    def __init__(self, graph: RecomputeGraph, is_ours: Callable[[], bool]) -> None:
        super().__init__()
        self.graph, self.is_ours = graph, is_ours

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
                    self.graph.expose(argument)
            if func == _SET_DATA:
                return self.graph.exchange(*args)
            return func(*args, **kwargs)
        if not torch.is_grad_enabled() or transforms_active() or not self.is_ours():
            return func(*args, **kwargs)
        if func in NORMS:
            return self._norm(func, args, kwargs)
        if func in _CATS:
            return self._cat(func, args, kwargs)
        if func in _CONVS:
            return self._conv(func, args, kwargs)
        return self._activation(func, args, kwargs)

    def _norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = NormCall.bind(func, args, kwargs)
        self.graph.statistics = None
        made = func(*args, **kwargs)
        if call is not None and made.requires_grad and made.grad_fn is not None:
            found = self.graph.statistics
            if found is not None:
                call = replace(call, mean=found.mean, invstd=found.invstd)
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
        activation, slopes, in_place = taken
        if not in_place:
            return made.call.activated(normed, activation, slopes)
        record = self.graph.storages.record(normed)
        viewed = record.views != made.views  # it would change under a view
        alias = normed.detach()
        if viewed or _held(normed) or _held(alias):
            return func(*args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name not in ("input", "self")}
        write = partial(_apply, func, args[1:], named)
        fused = made.call.activated(alias, activation, slopes, write)
        record.note = None
        # Whoever holds the tensor sees it activated, with the history that goes with it.
        swap_tensors(normed, fused)
        return normed

    def _note(self, call: Any, tensor: Tensor) -> None:
        """Remember with its memory how a tensor was made; subclasses copy what is on a tensor."""
        record = self.graph.record_of(tensor)
        if record is not None:
            record.note = _Made(call, version_of(tensor), record.views, tensor.grad_fn)

    def _noted(self, tensor: Any, kind: type) -> _Made | None:
        """Return how a tensor was made, if it is unchanged and no hook waits for its gradient."""
        record = self.graph.record_of(tensor)
        made: _Made | None = None if record is None else record.note
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
            joined = _join(func, made.call, data, args, kwargs)
            if joined is not None:
                return joined
        return func(*args, **kwargs)


class _Made(NamedTuple):
    """How a tensor was made, while it is as it was made."""

    call: Any  # of the norm; the parts of a concatenation
    version: int
    views: int  # of its memory, at that time
    node: Any  # in autograd's graph; an alias without its history is another tensor


_KNOWN = {*NORMS, *_CATS, *_CONVS, *_ACTIVATIONS, *_IN_PLACE, *_RAW}


@cache
def _signature(func: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(func)
    except ValueError:  # written in C++, takes its input first and has no ``inplace``
        return None


def _without_input(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Tensor], Tensor | None, bool] | None:
    """Split an activation's call: its function of the input, the slopes of a PReLU, in place.

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
    if len(rest) == 1 and not named and function in (F.prelu, torch.prelu):
        return function, rest[0], in_place
    if "out" in named or any(isinstance(v, Tensor) for v in (*rest, *named.values())):
        return None
    return (partial(_apply, function, rest, named) if rest or named else function), None, in_place


def _held(tensor: Any) -> bool:
    """Whether a tensor is watched, or held from outside Python, so that it cannot be swapped."""
    return bool(weakref.getweakrefs(tensor)) or holders(tensor)[0] > 1


def _apply(function: Any, rest: tuple[Any, ...], named: dict[str, Any], x: Tensor) -> Tensor:
    made: Tensor = function(x, *rest, **named)
    return made
