"""Run a net as if some of its channels did not exist, without taking them out.

Dropped weights are set to NaN in the full-size original, which is then run under a dispatch mode
in which NaN means *not there*. Pointwise operators and data movement spread NaN by themselves,
which is just right: a channel computed from what is not there is not there. Only operators that mix
channels need a rule: contractions skip what is absent, statistics count what is present.

This is an independent reference for slicing. It uses the indices of the edits and the meaning of
each operator, and none of the engine's reasoning about which indices belong together: where an edit
kept a wrong index, a kept weight meets an absent channel, and NaN (or another value) comes out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pocketize.graph.inputs import Inputs
from pocketize.plugin.edits import Edit, Resize
from tests.contract.widths import tensors_of

__all__ = ["masked_output", "poison"]

#: The integer of a channel that is not there; arithmetic leaves what came of it far below zero.
ABSENT = torch.iinfo(torch.int64).min

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def masked_output(model: nn.Module, inputs: Inputs, edits: Iterable[Edit]) -> Any:
    """Output of a model in eval mode as if the indices that the edits drop did not exist.

    Args:
        model: the full-size model; its weights are overwritten.
        inputs: its inputs.
        edits: resizes, as a plan lists them.
    """
    poison(model, edits)
    model.eval()
    with _plain_attention(), torch.inference_mode(), AbsentChannels():
        return inputs.call(model)


def poison(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Set every index that an edit drops to NaN."""
    tensors = tensors_of(model)
    for edit in edits:
        if isinstance(edit, Resize):
            tensor = tensors[edit.tensor]
            kept = set(edit.keep)
            dropped = [i for i in range(tensor.shape[edit.axis]) if i not in kept]
            with torch.no_grad():
                tensor.index_fill_(edit.axis, torch.tensor(dropped), math.nan)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """nn.MultiheadAttention without its fused kernel for inference, which hides the operators."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class AbsentChannels(TorchDispatchMode):
    """NaN means that a channel is not there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _DECOMPOSED:
            with self:
                return func.decompose(*args, **kwargs)
        rule = RULES.get(name)
        if rule is None:
            out = func(*args, **kwargs)
            return _spread_absent(out, args) if torch.Tag.pointwise in func.tags else out
        names = [argument.name for argument in func._schema.arguments]
        given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given.update(zip(names, args, strict=False), **kwargs)
        return rule(func, **given)


def gone(tensor: Tensor) -> Tensor:
    """Where an integer stands for a channel that is not there."""
    return tensor < ABSENT // 2 if tensor.dtype is torch.int64 else torch.zeros(()).bool()


def _spread_absent(out: Any, operands: Iterable[Any]) -> Any:
    """Let what was computed element by element from an absent integer be absent."""
    if isinstance(out, Tensor) and out.dtype is not torch.bool:
        for operand in operands:
            if isinstance(operand, Tensor) and gone(operand).any():
                out = out.masked_fill(gone(operand), _nothing(out))
    return out


def _nothing(tensor: Tensor) -> Any:
    return math.nan if tensor.is_floating_point() else ABSENT


_DECOMPOSED = {"einsum", "chain_matmul", "multi_dot", "linalg_multi_dot", "inner", "tensordot"}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def _absent(tensor: Tensor, dim: Any) -> Tensor:
    """Where all of a slice is absent; ``dim`` are the axes of the slice, kept with size 1."""
    return tensor.isnan().all(dim, keepdim=True) if isinstance(dim, int) else _all(tensor, dim)


def _all(tensor: Tensor, dims: Iterable[int]) -> Tensor:
    missing = tensor.isnan()
    for dim in dims:
        missing = missing.all(dim, keepdim=True)
    return missing


# -- contractions -------------------------------------------------------------------------------


def contract(a: Tensor, b: Tensor, *, weight: bool = False) -> Tensor:
    """``a @ b`` over the indices that are present.

    Args:
        a: shape (..., m, k).
        b: shape (..., k, n).
        weight: ``b`` is a weight, and says alone which k are dropped: an absent ``a`` that meets a
            present weight is a wrong index, and gives NaN.
    """
    rows, columns = _absent(a, -1), _absent(b, -2)
    missing_a = (a.isnan() | rows).all(-2, keepdim=True).transpose(-2, -1)  # (..., k, 1)
    missing_b = (b.isnan() | columns).all(-1, keepdim=True)  # (..., k, 1)
    missing = missing_b if weight else missing_a & missing_b
    a = a.masked_fill(missing.transpose(-2, -1) | rows, 0.0)
    b = b.masked_fill(missing | columns, 0.0)
    return torch.matmul(a, b).masked_fill(rows | columns, math.nan)


@rule("linear")
def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = input.reshape(-1, input.shape[-1])
    out = contract(flat, weight.t(), weight=True)
    out = out.reshape(*input.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def _matmul(func: Any, self: Tensor, **other: Tensor) -> Tensor:
    (second,) = other.values()
    a = self[None] if self.ndim == 1 else self
    b = second[:, None] if second.ndim == 1 else second
    out = contract(a, b)
    out = out.squeeze(-1) if second.ndim == 1 else out
    return out.squeeze(-2 if second.ndim > 1 else -1) if self.ndim == 1 else out


@rule("addmm", "baddbmm")
def _addmm(func: Any, self: Tensor, beta: Any, alpha: Any, **pair: Tensor) -> Tensor:
    a, b = pair.values()
    return beta * self + alpha * contract(a, b)


@rule("conv1d", "conv2d", "conv3d")
def _conv(func: Any, input: Tensor, weight: Tensor, bias: Any, groups: int, **how: Any) -> Tensor:
    out, into = weight.shape[0] // groups, weight.shape[1]
    grouped = weight.reshape(groups, out, into, -1)
    return _convolve(func, input, weight, grouped, bias, groups, how)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    func: Any, input: Tensor, weight: Tensor, bias: Any, groups: int, **how: Any
) -> Tensor:
    into, out = weight.shape[0] // groups, weight.shape[1]
    grouped = weight.reshape(groups, into, out, -1).transpose(1, 2)
    return _convolve(func, input, weight, grouped, bias, groups, how)


def _convolve(
    func: Any, input: Tensor, weight: Tensor, grouped: Tensor, bias: Any, groups: int, how: Any
) -> Tensor:
    """``grouped`` is the weight as (groups, out, in, kernel)."""
    rows = _all(grouped, (2, 3))  # (groups, out, 1, 1): this output is dropped
    columns = (grouped.isnan() | rows).all(3).all(1)  # (groups, in): this input is
    spatial = (1,) * (weight.ndim - 2)
    gone = columns.reshape(1, -1, *spatial)
    batched = input if input.ndim == weight.ndim else input[None]
    clean = batched.masked_fill(gone, 0.0)
    result = func(
        clean,
        weight.nan_to_num(),
        None if bias is None else bias.nan_to_num(),
        groups=groups,
        **how,
    )
    result = result.masked_fill(rows.reshape(1, -1, *spatial), math.nan)
    return result if input.ndim == weight.ndim else result[0]


@rule("scaled_dot_product_attention")
def _attention(
    func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, scale: Any, **rest: Any
) -> Tensor:
    present = int((~_all(query, range(query.ndim - 1))).sum())
    scores = contract(query, key.transpose(-2, -1))
    scores = scores * (1 / math.sqrt(present) if scale is None else scale)
    if attn_mask is not None:
        extra = attn_mask
        if extra.dtype is torch.bool:
            extra = torch.zeros_like(scores).masked_fill(~attn_mask, -math.inf)
        scores = scores + extra
    return contract(_softmax(None, scores, -1), value)


# -- statistics ---------------------------------------------------------------------------------


def _axes(tensor: Tensor, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(tensor.ndim))
    return [d % tensor.ndim for d in ([dim] if isinstance(dim, int) else dim)]


def _finish(value: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    return value if keepdim else value.squeeze(tuple(axes))


def _moments(x: Tensor, axes: list[int], correction: float = 0.0) -> tuple[Tensor, Tensor]:
    count = (~x.isnan()).sum(tuple(axes), keepdim=True)
    mean = x.nansum(tuple(axes), keepdim=True) / count
    squares = (x - mean).square().nansum(tuple(axes), keepdim=True)
    return mean, (squares / (count - correction)).masked_fill(count == 0, math.nan)


@rule("mean")
def _mean(func: Any, self: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    axes = _axes(self, dim)
    return _finish(_moments(self, axes)[0], axes, keepdim)


@rule("sum")
def _sum(func: Any, self: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
    if not self.is_floating_point():
        return self.sum() if dim is None else self.sum(dim, keepdim)
    axes = _axes(self, dim)
    total = self.nansum(tuple(axes), keepdim=True).masked_fill(_all(self, axes), math.nan)
    return _finish(total, axes, keepdim)


@rule("var", "std")
def _spread(func: Any, self: Tensor, dim: Any = None, keepdim: bool = False, **how: Any) -> Tensor:
    axes = _axes(self, dim)
    correction = how.get("correction")
    if correction is None:
        correction = 1.0 if how.get("unbiased", True) else 0.0
    value = _moments(self, axes, float(correction))[1]
    value = value.sqrt() if func.overloadpacket.__name__ == "std" else value
    return _finish(value, axes, keepdim)


@rule("linalg_vector_norm", "norm")
def _vector_norm(
    func: Any, self: Tensor, dim: Any = None, keepdim: bool = False, **how: Any
) -> Tensor:
    order = how.get("ord", how.get("p"))
    order = 2.0 if order is None else float(order)
    axes = _axes(self, dim)
    powers = self.abs().pow(order).nansum(tuple(axes), keepdim=True)
    return _finish((powers ** (1 / order)).masked_fill(_all(self, axes), math.nan), axes, keepdim)


@rule("amax", "amin")
def _extreme(func: Any, self: Tensor, dim: Any, keepdim: bool) -> Tensor:
    axes = _axes(self, dim)
    least = -math.inf if func.overloadpacket.__name__ == "amax" else math.inf
    value = func(self.nan_to_num(least, math.inf, -math.inf), axes, True)
    return _finish(value.masked_fill(_all(self, axes), math.nan), axes, keepdim)


@rule("max")
def _max(func: Any, self: Tensor, dim: int | None = None, keepdim: bool = False, **_: Any) -> Any:
    if dim is None:
        return self.nan_to_num(-math.inf).max()
    values, indices = self.nan_to_num(-math.inf, math.inf, -math.inf).max(dim, keepdim)
    missing = self.isnan().all(dim, keepdim)
    pair = values.masked_fill(missing, math.nan), indices.masked_fill(missing, ABSENT)
    return torch.return_types.max(pair)


@rule("argmax", "argmin")
def _where_extreme(func: Any, self: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    indices = func(self.nan_to_num(), dim, keepdim)
    return indices if dim is None else indices.masked_fill(self.isnan().all(dim, keepdim), ABSENT)


@rule("sort", "topk")
def _sorted(func: Any, self: Tensor, **how: Any) -> Any:
    """An axis that is sorted is whole, so that it is absent as a whole or not at all."""
    values, indices = func(self, **how)
    return values, indices.masked_fill(values.isnan(), ABSENT)


@rule("softmax", "_softmax")
def _softmax(func: Any, self: Tensor, dim: int, *rest: Any, **_: Any) -> Tensor:
    value = self.masked_fill(self.isnan(), -math.inf).softmax(dim)
    return value.masked_fill(self.isnan(), math.nan)


@rule("cumsum")
def _cumsum(func: Any, self: Tensor, dim: int, **_: Any) -> Tensor:
    return self.nan_to_num().cumsum(dim).masked_fill(self.isnan(), math.nan)


@rule("layer_norm")
def _layer_norm(
    func: Any, input: Tensor, normalized_shape: Any, weight: Any, bias: Any, eps: float, **_: Any
) -> Tensor:
    axes = list(range(input.ndim - len(normalized_shape), input.ndim))
    mean, variance = _moments(input, axes)
    return _affine((input - mean) / (variance + eps).sqrt(), weight, bias)


@rule("rms_norm")
def _rms_norm(
    func: Any, input: Tensor, normalized_shape: Any, weight: Any, eps: float | None
) -> Tensor:
    axes = list(range(input.ndim - len(normalized_shape), input.ndim))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    mean_square, _ = _moments(input.square(), axes)
    return _affine(input / (mean_square + eps).sqrt(), weight, None)


@rule("group_norm")
def _group_norm(
    func: Any, input: Tensor, num_groups: int, weight: Any, bias: Any, eps: float, **_: Any
) -> Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    mean, variance = _moments(grouped, [2])
    value = ((grouped - mean) / (variance + eps).sqrt()).reshape(input.shape)
    spatial = (1,) * (input.ndim - 2)
    shaped = [None if t is None else t.reshape(-1, *spatial) for t in (weight, bias)]
    return _affine(value, *shaped)


def _affine(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


@rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(func: Any, v: Tensor, g: Tensor, dim: int) -> Any:
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    norms = v.square().nansum(tuple(axes), keepdim=True).sqrt()
    weight = v * (g / norms)
    return weight if func.overloadpacket.__name__ == "_weight_norm" else (weight, norms)


# -- integers -----------------------------------------------------------------------------------


@rule("to", "_to_copy")
def _converted(func: Any, self: Tensor, **how: Any) -> Tensor:
    out = func(self, **how)
    if self.is_floating_point() and out.dtype is torch.int64:
        return out.masked_fill(self.isnan(), ABSENT)
    return _spread_absent(out, [self])


@rule(
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"{kind}_max_pool{n}d" for kind in ("adaptive", "fractional") for n in (1, 2, 3)),
)
def _pooled(func: Any, self: Tensor, **how: Any) -> Any:
    values, indices = func(self, **how)
    return values, indices.masked_fill(values.isnan(), ABSENT)


@rule("max_unpool2d", "max_unpool3d")
def _unpooled(func: Any, self: Tensor, indices: Tensor, **how: Any) -> Tensor:
    """A plane of which either is absent is: the other belongs to another channel."""
    missing = self.isnan() | gone(indices)
    out = func(self.masked_fill(missing, 0.0), indices.masked_fill(missing, 0), **how)
    space = tuple(range(self.ndim - int(func.overloadpacket.__name__[-2]), self.ndim))
    return out.masked_fill(missing.any(space, keepdim=True), math.nan)


@rule("embedding")
def _embedded(func: Any, weight: Tensor, indices: Tensor, **_: Any) -> Tensor:
    missing = gone(indices)
    return weight[indices.masked_fill(missing, 0)].masked_fill(missing[..., None], math.nan)


@rule("gather")
def _gathered(func: Any, self: Tensor, dim: int, index: Tensor, **_: Any) -> Tensor:
    missing = gone(index)
    out = self.gather(dim, index.masked_fill(missing, 0))
    return out.masked_fill(missing, _nothing(out))
