"""Rules of layers: convolution, linear, normalisation, pooling, interpolation, element-wise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketize.channels.labels import Indices, Value, along
from pocketize.channels.rules.table import Call, Result, channel_rule
from pocketize.ops import Kind


@channel_rule(
    Kind.POINTWISE,
    Kind.ACTIVATION,
    Kind.ASSIGNMENT,
    Kind.COPY,
    Kind.DROPOUT,
    Kind.LIKE,
    Kind.SOFTMAX,
    "aten._prelu_kernel",  # whose slopes have the input's axes
    "aten.broadcast_tensors",
    "aten.cumprod",
    "aten.cumsum",
)
def pointwise(call: Call) -> Result:
    """Operands that meet element by element share their channels."""
    shape = call.shapes[0] if call.several else call.shape
    out = call.unions.align(call.values(), shape, call.reason)
    return [out] * len(call.shapes) if call.several else out


@channel_rule("aten.where", replace=True)
def where(call: Call) -> Result:
    """With one tensor alone, the places where it is not zero."""
    if not call.several:
        return pointwise(call)
    call.freeze(call.values()[0], "tells where it is not zero")
    return [Value(shape) for shape in call.shapes]


@channel_rule("aten.to", "aten.type_as", replace=True)
def convert(call: Call) -> Result:
    """Another tensor says the dtype and the device; no channel comes of it."""
    return Value(call.shape, call.values()[0].labels)


@channel_rule(Kind.CONVOLUTION, Kind.TRANSPOSED_CONVOLUTION)
def convolution(call: Call) -> Result:
    """Convolutions join the weight's in-axis with the input and emit the weight's out-axis.

    Grouped ones keep the number of groups, each of which drops the same positions; depthwise ones
    drop whole groups.
    """
    x: Value = call[str(call.record.data)]
    weight: Value = call["weight"]
    bias: Value | None = call.get("bias")
    groups: int = call.get("groups", 1)
    transposed = bool(call.get("transposed", call.record.kind is Kind.TRANSPOSED_CONVOLUTION))
    channel = x.ndim - weight.ndim + 1
    x = call.tie_axes(x, range(channel + 1, x.ndim))
    indices = call.vector_on(x, channel)
    for axis in range(2, weight.ndim):
        kernel = weight.label_on(axis)
        if kernel is not None:
            call.unions.freeze(kernel, f"{call.where} has it as a kernel axis")
    first, second = call.vector_on(weight, 0), call.vector_on(weight, 1)
    into, out = (first, second) if transposed else (second, first)
    if groups > 1:
        out = _grouped(call, indices, into, out, weight.shape, groups, transposed)
    elif weight.shape[0 if transposed else 1] > 1:
        call.unite(indices, into)
    if bias is not None:
        call.unite(out, call.vector_on(bias, 0))
    call.read(indices)
    call.produce(out)
    rest = x.off(channel)
    return Value(call.shape, (*rest, along(out, channel, x.ndim)) if out is not None else rest)


def _grouped(
    call: Call,
    indices: Indices | None,
    into: Indices | None,
    out: Indices | None,
    shape: Sequence[int],
    groups: int,
    transposed: bool,
) -> Indices | None:
    """Return the output's channels of a grouped convolution."""
    per_in = shape[0] // groups if transposed else shape[1]
    per_out = shape[1] if transposed else shape[0] // groups
    if transposed:
        call.unite(indices, into)
    if per_in == 1:
        if indices is not None:
            call.count("groups", indices)
        if not transposed:
            call.unite(
                None if indices is None else np.repeat(indices, per_out),
                out,
            )
            return out
        if out is not None:
            call.unions.freeze(out, f"{call.where} has several outputs for each channel")
        return None if into is None else np.repeat(into, per_out)
    if indices is not None:
        runs = indices.reshape(groups, per_in)
        call.unite(runs, runs[:1])
        if not transposed:
            call.unite(runs[0], into)
    elif not transposed:
        call.unite(None, into)
    if transposed:
        return None if out is None else np.tile(out, groups)
    if out is not None:
        runs = out.reshape(groups, per_out)
        call.unite(runs, runs[:1])
    return out


@channel_rule(Kind.LINEAR)
def linear(call: Call) -> Result:
    """A linear layer acts on the last axis; the others pass."""
    x: Value = call["input"]
    weight: Value = call["weight"]
    bias: Value | None = call.get("bias")
    if weight.ndim != 2:
        call.freeze(x)
        call.freeze(weight)
        return Value(call.shape)
    last = x.ndim - 1
    if weight.shape[1] > 1:
        indices = call.vector_on(x, last)
        call.unite(indices, call.vector_on(weight, 1))
        call.read(indices)
    out = call.vector_on(weight, 0)
    if bias is not None:
        call.unite(out, call.vector_on(bias, 0))
    call.produce(out)
    rest = x.off(last)
    return Value(call.shape, (*rest, along(out, last, x.ndim)) if out is not None else rest)


@channel_rule("aten.embedding")
def embedding(call: Call) -> Result:
    """The table's second axis are the channels; its first is the vocabulary."""
    weight: Value = call["weight"]
    kept = call.tie_axes(weight, [0])
    out = call.vector_on(kept, 1)
    call.produce(out)
    rank = len(call.shape)
    rows = tuple(label[..., None] for label in call["indices"].labels)
    return Value(call.shape, (*rows, along(out, rank - 1, rank)) if out is not None else rows)


@channel_rule(Kind.CHANNEL_NORM)
def channel_norm(call: Call) -> Result:
    """Batch and instance normalisation have one parameter for each channel."""
    x: Value = call["input"]
    indices = call.vector_on(x, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        parameter: Value | None = call.get(name)
        if isinstance(parameter, Value) and parameter.ndim and parameter.shape[0] > 1:
            call.unite(indices, call.vector_on(parameter, 0))
    call.read(indices)
    call.count("num_features", indices)
    return call.like("input")


@channel_rule("aten.group_norm")
def group_norm(call: Call) -> Result:
    """Each group drops the same positions; groups of one channel are dropped whole."""
    x: Value = call["input"]
    indices = call.vector_on(x, 1)
    groups: int = call["num_groups"]
    for name in ("weight", "bias"):
        parameter: Value | None = call.get(name)
        if parameter is not None:
            call.unite(indices, call.vector_on(parameter, 0))
    if indices is not None and groups == indices.size:
        call.count("num_groups", indices)
    elif indices is not None and groups > 1:
        runs = indices.reshape(groups, -1)
        call.unite(runs, runs[:1])
    call.read(indices)
    call.count("num_channels", indices)
    return call.like("input")


@channel_rule(Kind.LAYER_NORM, Kind.RMS_NORM)
def layer_norm(call: Call) -> Result:
    """Parameters align with the last axes."""
    x: Value = call["input"]
    normalized = list(call["normalized_shape"])
    for name in ("weight", "bias"):
        parameter: Value | None = call.get(name)
        if parameter is not None:
            call.unions.align([x, parameter], x.shape, call.reason)
    for offset in range(len(normalized)):
        axis = x.ndim - len(normalized) + offset
        if x.label_on(axis) is not None:
            call.count(f"normalized_shape.{offset}", call.vector_on(x, axis))
    return call.like("input")


@channel_rule(Kind.PRELU)
def prelu(call: Call) -> Result:
    """PReLU has one slope for all channels or one for each."""
    x: Value = call["self"]
    weight: Value = call["weight"]
    if max(weight.shape, default=1) > 1 and x.ndim > 1:
        call.unite(call.vector_on(x, 1), call.vector_on(weight, 0))
    return call.like("self")


@channel_rule("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(call: Call) -> Result:
    """Direction and magnitude share the axis that the magnitude lives on."""
    direction: Value = call["v"]
    out = call.unions.align([direction, call["g"]], direction.shape, call.reason)
    return [out, call["g"]] if call.several else out


@channel_rule(Kind.POOLING, Kind.ADAPTIVE_POOLING, Kind.RESIZE)
def spatial(call: Call) -> Result:
    """Pooling and interpolation act on the last axes; channels pass."""
    x: Value = call.values()[0]
    rank = call.record.rank or 2
    samples: Value | None = call.get("random_samples")  # (batch, channels, axis): where to pool
    if samples is not None:
        call.unite(call.vector_on(x, x.ndim - rank - 1), call.vector_on(samples, 1))
        if x.ndim == rank + 2:
            call.unite(call.vector_on(x, 0), call.vector_on(samples, 0))
    labels = call.tie_axes(x, range(x.ndim - rank, x.ndim)).labels
    return call.results(labels)


@channel_rule(Kind.UNPOOLING)
def max_unpool(call: Call) -> Result:
    """Every channel goes where its own indices say."""
    x, places = call.values()[:2]
    joined = call.unions.align([x, places], x.shape, call.reason)
    rank = call.record.rank or 2
    return Value(call.shape, call.tie_axes(joined, range(x.ndim - rank, x.ndim)).labels)


@channel_rule(Kind.FACTORY)
def factory(call: Call) -> Result:
    """A tensor made in the forward takes its size from what it meets, until a check says no."""
    return Value(call.shape, call.unions.fresh(call.shape, range(len(call.shape))))


@channel_rule("aten.eye", replace=True)
def eye(call: Call) -> Result:
    """A square unit matrix stays square."""
    labels = call.unions.fresh(call.shape, range(len(call.shape)))
    if len(labels) == 2 and len(set(call.shape)) == 1:
        call.unite(labels[0].reshape(-1), labels[1].reshape(-1))
    return Value(call.shape, labels)


@channel_rule(Kind.SCALAR)
def scalar(call: Call) -> Result:
    """Reads a number; no channel goes on."""
    return Value(())
