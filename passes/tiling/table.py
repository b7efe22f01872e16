"""Which operators are local, and in what form.

An operator that is not in the table is not local: it needs its inputs whole. So is one whose
arguments make it so, a softmax over space for instance; the reason is kept for the plan.
"""

from __future__ import annotations

__all__ = ["NotLocal", "local_form"]

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pocketize._torch import OpOverload, schema_of
from pocketize.ops.schema import bind, operator_name
from pocketize.passes.tiling.arguments import (
    Bound,
    NotLocal,
    check_rank,
    numbers,
    shape_of,
    sizes_of,
)
from pocketize.passes.tiling.forms import Convolution, Form, Pointwise, Pooling, Transposed
from pocketize.passes.tiling.intervals import Reach
from pocketize.passes.tiling.places import Expanded, Piece, Redirected
from pocketize.passes.tiling.slicing import linear, narrow, nearest, pad, slice_rule

_Rule = Callable[[fx.Node, Bound, int], Form]

#: Element-wise, though torch does not tag them so, or nothing at all in evaluation.
_POINTWISE = {
    "alias",
    "clone",
    "contiguous",
    "copy",
    "detach",
    "fill",
    "floor_divide",
    "full_like",
    "hardswish",
    "lift_fresh",
    "log_sigmoid",
    "masked_fill",
    "ones_like",
    "rsub",
    "to",
    "type_as",
    "where",
    "zeros_like",
    "__and__",
    "_to_copy",
}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_SOFTMAX = {"softmax", "log_softmax", "_softmax", "_log_softmax", "glu", "cumsum", "logcumsumexp"}
_OVER_CHANNELS = {"sum", "mean", "amax", "amin", "logsumexp", "prod", "var", "std", "norm"}


def local_form(node: fx.Node, rank: int) -> Form:
    """Return the local form of a recorded operator whose result is a map.

    Args:
        node: the operator; its result is (N, C, *spatial).
        rank: number of spatial axes.

    Raises:
        NotLocal: there is none.
    """
    full = operator_name(node.target)
    if full == "getitem":
        return _part(node, rank)
    namespace, _, name = full.rpartition(".")
    bound = bind(node.target, node.args, node.kwargs)
    rule = _RULES.get(name) if namespace == "aten" else None
    if rule is not None:
        check_rank(name, rank)
        return rule(node, bound, rank)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags or name in _POINTWISE:
        return _pointwise(node, bound, rank)
    raise NotLocal(f"{full} is not known to be local")


# -- the same place ------------------------------------------------------------------------------


def _pointwise(node: fx.Node, bound: Bound, rank: int) -> Form:
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise NotLocal(f"{operator_name(node.target)} draws random numbers")
    out = tuple(node.meta["val"].shape)
    maps = []
    for source in node.all_input_nodes:
        shape = shape_of(source)
        if shape is None:
            continue
        sizes = shape[-rank:] if len(shape) >= rank else shape
        if len(shape) == rank + 2:
            if not all(size in (1, whole) for size, whole in zip(shape[2:], out[2:], strict=True)):
                raise NotLocal(f"it combines maps of {shape[2:]} and {out[2:]}")
            maps.append(source)
        elif len(shape) > rank + 2 or any(size != 1 for size in sizes):
            raise NotLocal(f"it combines a map with a tensor of shape {shape}")
    if not maps:
        raise NotLocal("it makes a map of something that is none")
    return _in_place_undone(Pointwise, node, maps)


def _channelwise(node: fx.Node, maps: list[fx.Node]) -> Form:
    """A form of an operator that mixes channels and leaves every place to itself."""
    return _in_place_undone(Pointwise, node, maps)


def _in_place_undone(kind: type[Pointwise], node: fx.Node, maps: list[fx.Node]) -> Form:
    """Call the operator that returns its result instead of writing it into its input."""
    target: Any = node.target
    if isinstance(target, OpOverload) and schema_of(target).is_mutable:
        packet = getattr(torch.ops.aten, schema_of(target).name.split("::")[1].rstrip("_"), None)
        plain = getattr(packet, schema_of(target).overload_name or "default", None)
        if plain is None or schema_of(plain).is_mutable:
            raise NotLocal(f"{target} writes into its input, and has no twin that does not")
        return Redirected(node, maps, plain)
    return kind(node, maps)


def _dropout(node: fx.Node, bound: Bound, rank: int) -> Form:
    if bound["train"] and bound["p"]:
        raise NotLocal("it draws random numbers for the whole map")
    return _channelwise(node, [bound["input"]])


def _batch_norm(node: fx.Node, bound: Bound, rank: int) -> Form:
    if bound["training"]:
        raise NotLocal("it takes the statistics of the batch")
    return _channelwise(node, [bound["input"]])


def _instance_norm(node: fx.Node, bound: Bound, rank: int) -> Form:
    if bound["use_input_stats"]:
        raise NotLocal("it takes the statistics of the whole map")
    return _channelwise(node, [bound["input"]])


def _prelu(node: fx.Node, bound: Bound, rank: int) -> Form:
    return _channelwise(node, [bound["self"]])


def _along_channels(node: fx.Node, bound: Bound, rank: int) -> Form:
    dim = bound["dim"]
    if dim % (rank + 2) > 1:
        raise NotLocal(f"it runs along the spatial axis {dim}")
    source = next(value for value in bound.values() if isinstance(value, fx.Node))
    return _channelwise(node, [source])


def _reduction(node: fx.Node, bound: Bound, rank: int) -> Form:
    dims = bound.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank + 2))
    if any(dim % (rank + 2) > 1 for dim in dims):
        raise NotLocal("it reduces over space")
    if not bound.get("keepdim"):
        raise NotLocal("it takes an axis away")
    return _channelwise(node, [bound["self"]])


def _cat(node: fx.Node, bound: Bound, rank: int) -> Form:
    if bound["dim"] % (rank + 2) > 1:
        raise NotLocal("it joins maps along a spatial axis")
    return _channelwise(node, list(dict.fromkeys(bound["tensors"])))


def _expand(node: fx.Node, bound: Bound, rank: int) -> Form:
    shape = shape_of(bound["self"])
    if shape is None or len(shape) != rank + 2:
        raise NotLocal("it makes a map of something that is none")
    return Expanded(node, [bound["self"]])


def _part(node: fx.Node, rank: int) -> Form:
    split, index = node.args
    assert isinstance(split, fx.Node)
    name = operator_name(split.target).rpartition(".")[2]
    bound = bind(split.target, split.args, split.kwargs)
    if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        if bound["dim"] % (rank + 2) > 1:
            raise NotLocal("it cuts a map along a spatial axis")
        return Piece(node, [bound["self"]], split, int(index))  # type: ignore[arg-type]
    raise NotLocal(f"{operator_name(split.target)} is not known to be local")


# -- kernels -------------------------------------------------------------------------------------


def _convolution(node: fx.Node, bound: Bound, rank: int) -> Form:
    if bound.get("transposed"):
        return _transposed(node, bound, rank)
    source, weight = bound["input"], bound["weight"]
    kernel = tuple(weight.meta["val"].shape[2:])
    stride, dilation = numbers(bound["stride"], rank), numbers(bound["dilation"], rank)
    if bound["padding"] == "same":
        # with an odd sum, torch pads more behind
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    elif bound["padding"] == "valid":
        padding = (0,) * rank
    else:
        padding = numbers(bound["padding"], rank)
    reaches = _reaches(source, kernel, stride, padding, dilation)
    return Convolution(node, source, weight, bound["bias"], reaches, bound["groups"])


def _transposed(node: fx.Node, bound: Bound, rank: int) -> Form:
    source, weight = bound["input"], bound["weight"]
    reaches = _reaches(
        source,
        tuple(weight.meta["val"].shape[2:]),
        numbers(bound["stride"], rank),
        numbers(bound["padding"], rank),
        numbers(bound["dilation"], rank),
    )
    return Transposed(node, source, weight, bound["bias"], reaches, bound["groups"])


def _max_pool(node: fx.Node, bound: Bound, rank: int) -> Form:
    kernel = numbers(bound["kernel_size"], rank)
    stride = numbers(bound["stride"] or kernel, rank)
    padding, dilation = numbers(bound["padding"], rank), numbers(bound["dilation"], rank)
    reaches = _reaches(bound["self"], kernel, stride, padding, dilation)
    return Pooling(node, bound["self"], reaches, "max")


def _avg_pool(node: fx.Node, bound: Bound, rank: int) -> Form:
    kernel = numbers(bound["kernel_size"], rank)
    stride = numbers(bound["stride"] or kernel, rank)
    padding = numbers(bound["padding"], rank)
    reaches = _reaches(bound["self"], kernel, stride, padding, (1,) * rank)
    return Pooling(
        node,
        bound["self"],
        reaches,
        "mean",
        ends=[reach.size + reach.padding for reach in reaches],
        include_pad=bound["count_include_pad"],
        divisor=bound.get("divisor_override"),
    )


def _adaptive(kind: str) -> _Rule:
    def rule(node: fx.Node, bound: Bound, rank: int) -> Form:
        sizes, lengths = sizes_of(bound["self"]), sizes_of(node)
        if any(size % length for size, length in zip(sizes, lengths, strict=True)):
            raise NotLocal(f"its windows differ: {sizes} to {lengths}")
        kernel = tuple(size // length for size, length in zip(sizes, lengths, strict=True))
        if kernel == sizes:
            raise NotLocal("it pools the whole map")
        reaches = _reaches(bound["self"], kernel, kernel, (0,) * rank, (1,) * rank)
        return Pooling(node, bound["self"], reaches, kind, ends=sizes)

    return rule


def _reaches(
    source: fx.Node,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> list[Reach]:
    rows = zip(sizes_of(source), kernel, stride, padding, dilation, strict=True)
    return [Reach(*row) for row in rows]


_RULES: dict[str, _Rule] = {
    "batch_norm": _batch_norm,
    "cat": _cat,
    "constant_pad_nd": pad,
    "convolution": _convolution,
    "expand": _expand,
    "instance_norm": _instance_norm,
    "narrow": narrow,
    "pad": pad,
    "prelu": _prelu,
    "slice": slice_rule,
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_SOFTMAX, _along_channels),
    **dict.fromkeys(_OVER_CHANNELS, _reduction),
    **{f"conv{d}d": _convolution for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _transposed for d in (1, 2, 3)},
    **{f"max_pool{d}d": _max_pool for d in (1, 2, 3)},
    **{f"avg_pool{d}d": _avg_pool for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _adaptive("mean") for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": _adaptive("max") for d in (1, 2, 3)},
    **{f"upsample_nearest{d}d": nearest(False) for d in (1, 2, 3)},
    **{f"_upsample_nearest_exact{d}d": nearest(True) for d in (1, 2, 3)},
    **{f"{mode}_pad{d}d": pad for d in (1, 2, 3) for mode in ("reflection", "replication")},
    "upsample_linear1d": linear,
    "upsample_bilinear2d": linear,
    "upsample_trilinear3d": linear,
}
