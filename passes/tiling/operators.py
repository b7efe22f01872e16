"""Tile forms of operators, registered on the operators' records.

An operator without a form is not local: it needs its inputs whole. So is one whose arguments make
it so, such as a softmax over space; the plan shows the reason.
"""

from __future__ import annotations

__all__ = ["NotLocal", "check_rank", "draws", "local_form"]

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from pocketize._torch import OpOverload, schema_of
from pocketize.ops import UNKNOWN, Kind, Window, bind, operator_name, operator_of, register
from pocketize.passes.tiling.forms import (
    Convolution,
    Expanded,
    Form,
    Pointwise,
    Pooling,
    ResampleForm,
    Shuffled,
    Transposed,
)
from pocketize.passes.tiling.intervals import (
    ReceptiveField,
    Resampling,
    crop_resampling,
    is_contested,
    linear_resampling,
    nearest_resampling,
    pad_resampling,
)

Bound: TypeAlias = Mapping[str, Any]
_FACET = "tile form"


class NotLocal(Exception):
    """An operator needs its inputs whole, and the text says why; if hopeless, it is refused."""

    def __init__(self, text: str, *, hopeless: bool = False) -> None:
        super().__init__(text)
        self.hopeless = hopeless


def local_form(node: fx.Node, rank: int) -> Form:
    """Return the local form of an operator whose result is a map, of some number of spatial axes.

    Raises:
        NotLocal: there is none.
    """
    rule = operator_of(node.target).facet(_FACET)
    if rule is UNKNOWN:
        raise NotLocal(f"{operator_name(node.target)} is not known to be local")
    check_rank(node, rank)
    form: Form = rule(node, bind(node.target, node.args, node.kwargs), rank)
    return form


def check_rank(node: fx.Node, rank: int) -> None:
    """Raise NotLocal for another rank in the name: without a batch, axes would be mistaken."""
    record = operator_of(node.target)
    if record.rank not in (None, rank):
        raise NotLocal(
            f"{record.short} works on {record.rank} spatial axes, and the input has {rank} besides "
            "batch and channels"
        )


def draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers, as it is called."""
    bound = bind(node.target, node.args, node.kwargs)
    if bound.get("train", bound.get("training")) is False:
        return False
    chances = [bound[name] for name in ("p", "dropout_p", "dropout") if name in bound]
    if chances and not chances[0]:
        return False
    name = operator_name(node.target).rpartition(".")[2]
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return seeded or "dropout" in name or "dropout" in bound


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _sizes(node: fx.Node) -> tuple[int, ...]:
    shape = _shape(node)
    if shape is None or math.prod(shape) == 0:
        raise NotLocal("it reads something that is no map")
    return shape[2:]


def _first_node(bound: Bound) -> fx.Node:
    return next(value for value in bound.values() if isinstance(value, fx.Node))


# -- no entry moves ------------------------------------------------------------------------------


@register(
    _FACET,
    Kind.ACTIVATION,
    Kind.ASSIGNMENT,
    Kind.COPY,
    Kind.POINTWISE,
    *("aten.full_like", "aten.ones_like", "aten.zeros_like"),
)
def _pointwise(node: fx.Node, bound: Bound, rank: int) -> Form:
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise NotLocal(f"{operator_name(node.target)} draws random numbers")
    out = tuple(node.meta["val"].shape)
    maps = []
    for source in node.all_input_nodes:
        shape = _shape(source)
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
    return _out_of_place(node, maps)


def _out_of_place(node: fx.Node, maps: list[fx.Node]) -> Form:
    """Return the form of an operator that mixes channels at most, never written into its input."""
    target: Any = node.target
    if isinstance(target, OpOverload) and schema_of(target).is_mutable:
        packet = getattr(torch.ops.aten, schema_of(target).name.split("::")[1].rstrip("_"), None)
        plain = getattr(packet, schema_of(target).overload_name or "default", None)
        if plain is None or schema_of(plain).is_mutable:
            raise NotLocal(f"{target} writes into its input, and there is no overload without")
        return Pointwise(node, maps, plain)
    return Pointwise(node, maps)


@register(_FACET, Kind.DROPOUT)
def _dropout(node: fx.Node, bound: Bound, rank: int) -> Form:
    if bound["train"] and bound["p"]:
        raise NotLocal("it draws random numbers for the whole map")
    return _out_of_place(node, [bound["input"]])


@register(_FACET, "aten.batch_norm", "aten.instance_norm")
def _channel_norm(node: fx.Node, bound: Bound, rank: int) -> Form:
    if bound.get("training"):
        raise NotLocal("it takes the statistics of the batch")
    if bound.get("use_input_stats"):
        raise NotLocal("it takes the statistics of the whole map")
    return _out_of_place(node, [bound["input"]])


@register(_FACET, Kind.PRELU, "aten.channel_shuffle", "aten.native_channel_shuffle")
def _mixes_channels(node: fx.Node, bound: Bound, rank: int) -> Form:
    return _out_of_place(node, [_first_node(bound)])


@register(_FACET, Kind.SOFTMAX, "aten.glu", "aten.cumsum", "aten.logcumsumexp")
def _along_channels(node: fx.Node, bound: Bound, rank: int) -> Form:
    dim = bound["dim"]
    if dim % (rank + 2) > 1:
        raise NotLocal(f"it runs along the spatial axis {dim}")
    return _out_of_place(node, [_first_node(bound)])


@register(
    _FACET,
    *("aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.logsumexp", "aten.prod"),
    *("aten.var", "aten.std", "aten.norm"),
)
def _reduction(node: fx.Node, bound: Bound, rank: int) -> Form:
    dims = bound.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank + 2))
    if any(dim % (rank + 2) > 1 for dim in dims):
        raise NotLocal("it reduces over space")
    if not bound.get("keepdim"):
        raise NotLocal("it removes an axis")
    return _out_of_place(node, [bound["self"]])


@register(_FACET, Kind.CONCATENATION)
def _cat(node: fx.Node, bound: Bound, rank: int) -> Form:
    if bound["dim"] % (rank + 2) > 1:
        raise NotLocal("it concatenates maps along a spatial axis")
    return _out_of_place(node, list(dict.fromkeys(bound["tensors"])))


@register(_FACET, "aten.expand")
def _expand(node: fx.Node, bound: Bound, rank: int) -> Form:
    shape = _shape(bound["self"])
    if shape is None or len(shape) != rank + 2:
        raise NotLocal("it makes a map of something that is none")
    return Expanded(node, [bound["self"]])


# -- kernels -------------------------------------------------------------------------------------


@register(_FACET, Kind.CONVOLUTION, Kind.TRANSPOSED_CONVOLUTION)
def _convolution(node: fx.Node, bound: Bound, rank: int) -> Form:
    record = operator_of(node.target)
    transposed = bound.get("transposed", record.kind is Kind.TRANSPOSED_CONVOLUTION)
    cls = Transposed if transposed else Convolution
    source = bound[str(record.data)]
    fields = _fields(node, source, bound, rank)
    return cls(node, source, bound["weight"], bound.get("bias"), fields, bound["groups"])


@register(_FACET, *(f"aten.{kind}_pool{d}d" for kind in ("max", "avg") for d in (1, 2, 3)))
def _pool(node: fx.Node, bound: Bound, rank: int) -> Form:
    fields = _fields(node, bound["self"], bound, rank)
    return Pooling(
        node,
        bound["self"],
        fields,
        "mean" if "count_include_pad" in bound else "max",
        ends=[each.size + each.padding for each in fields],
        include_pad=bound.get("count_include_pad", True),
        divisor=bound.get("divisor_override"),
    )


def _adaptive(kind: str) -> Callable[[fx.Node, Bound, int], Form]:
    def rule(node: fx.Node, bound: Bound, rank: int) -> Form:
        sizes, lengths = _sizes(bound["self"]), _sizes(node)
        if any(size % length for size, length in zip(sizes, lengths, strict=True)):
            raise NotLocal(f"its windows differ: {sizes} to {lengths}")
        kernel = tuple(size // length for size, length in zip(sizes, lengths, strict=True))
        if kernel == sizes:
            raise NotLocal("it pools the whole map")
        fields = [ReceptiveField(n, k, k) for n, k in zip(sizes, kernel, strict=True)]
        return Pooling(node, bound["self"], fields, kind, ends=sizes)

    return rule


register(_FACET, *(f"aten.adaptive_avg_pool{d}d" for d in (1, 2, 3)))(_adaptive("mean"))
register(_FACET, *(f"aten.adaptive_max_pool{d}d" for d in (1, 2, 3)))(_adaptive("max"))


def _fields(node: fx.Node, source: fx.Node, bound: Bound, rank: int) -> list[ReceptiveField]:
    """Return the receptive field along each axis, by the operator's record."""
    window = operator_of(node.target).window
    assert callable(window)
    found: Window = window(bound, rank)
    return [ReceptiveField(*row) for row in zip(_sizes(source), *found, strict=True)]


# -- interpolation, padding and slices -----------------------------------------------------------


def _nearest(exact: bool) -> Callable[[fx.Node, Bound, int], Form]:
    def rule(node: fx.Node, bound: Bound, rank: int) -> Form:
        source = _first_node(bound)
        wide = source.meta["val"].dtype == torch.float64
        axes = []
        for size, length, scale in _scales(node, bound, rank):
            if is_contested(size, length, scale, exact=exact, wide=wide):
                # the memory format decides which kernel runs, and tiles do not preserve it
                raise NotLocal(
                    f"torch picks other entries of {size} for {length} from one kernel to the next",
                    hopeless=rank == 3 and not source.meta["val"].is_contiguous(),
                )
            axes.append(nearest_resampling(size, length, scale, exact=exact))
        return ResampleForm(node, source, axes)

    return rule


register(_FACET, *(f"aten.upsample_nearest{d}d" for d in (1, 2, 3)))(_nearest(False))
register(_FACET, *(f"aten._upsample_nearest_exact{d}d" for d in (1, 2, 3)))(_nearest(True))


@register(_FACET, "aten.upsample_linear1d", "aten.upsample_bilinear2d", "aten.upsample_trilinear3d")
def _linear(node: fx.Node, bound: Bound, rank: int) -> Form:
    corners = bound["align_corners"]
    axes = []
    for size, length, scale in _scales(node, bound, rank):
        if size == length and scale not in (None, 1.0) and not corners:
            raise NotLocal(
                f"a scale of {scale:g} keeps the size of {size}, and torch's kernels disagree "
                "about the result"
            )
        axes.append(linear_resampling(size, length, scale, align_corners=corners))
    return ResampleForm(node, _first_node(bound), axes)


def _scales(node: fx.Node, bound: Bound, rank: int) -> list[tuple[int, int, float | None]]:
    """Return input size, output size and the caller's scale factor of each axis."""
    if "scale_factors" in bound:
        factors = list(bound["scale_factors"] or [None] * rank)
    else:
        names = ("scales_d", "scales_h", "scales_w")[-rank:]
        factors = [bound.get("scales")] if rank == 1 else [bound.get(name) for name in names]
    return list(zip(_sizes(_first_node(bound)), _sizes(node), factors, strict=True))


@register(
    _FACET,
    *("aten.constant_pad_nd", "aten.pad"),
    *(f"aten.{mode}_pad{d}d" for d in (1, 2, 3) for mode in ("reflection", "replication")),
)
def _pad(node: fx.Node, bound: Bound, rank: int) -> Form:
    """A padding of any mode, which may crop as well."""
    pads = list(bound.get("pad") or bound["padding"])
    if len(pads) > 2 * rank and any(pads[2 * rank :]):
        raise NotLocal("it pads channels")
    source, name = _first_node(bound), operator_of(node.target).short
    mode = bound.get("mode") or "constant"
    for start, meant in (("reflect", "reflect"), ("replicat", "replicate")):
        mode = meant if name.startswith(start) else mode
    pads += [0] * (2 * rank - len(pads))
    pairs = [(pads[2 * axis], pads[2 * axis + 1]) for axis in range(rank)][::-1]
    axes = []
    for size, (before, after) in zip(_sizes(source), pairs, strict=True):
        left = size + min(before, 0) + min(after, 0)
        if mode == "circular" and max(before, after) > left:
            raise NotLocal(f"it wraps around the {left} remaining entries more than once")
        axes.append(pad_resampling(size, before, after, mode))
    return ResampleForm(node, source, axes, constant=bound.get("value") or 0.0)


@register(_FACET, "aten.slice", "aten.narrow")
def _slice(node: fx.Node, bound: Bound, rank: int) -> Form:
    source, axis = bound["self"], bound["dim"] % (rank + 2) - 2
    if axis < 0:
        return Pointwise(node, [source])
    sizes, start = _sizes(source), bound["start"]
    if "length" in bound:
        if not isinstance(start, int):
            raise NotLocal("its start depends on values")
        start %= sizes[axis]
        cut = range(start, start + int(bound["length"]))
    else:
        cut = range(sizes[axis])[start : bound["end"] : bound["step"]]
    axes: list[Resampling] = [crop_resampling(range(size)) for size in sizes]
    axes[axis] = crop_resampling(cut)
    return ResampleForm(node, source, axes)


@register(_FACET, "aten.pixel_shuffle", "aten.pixel_unshuffle")
def _pixel_shuffle(node: fx.Node, bound: Bound, rank: int) -> Form:
    if rank != 2:
        raise NotLocal(f"it shuffles two spatial axes, and the input has {rank}")
    up = bound.get("upscale_factor")
    return Shuffled(node, bound["self"], up or bound["downscale_factor"], up=up is not None)
