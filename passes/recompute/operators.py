"""What the tape has to know of an operator: whether and how it can run a second time."""

from __future__ import annotations

__all__ = ["Kind", "Operator", "describe", "in_place_variant"]

import enum
import functools
from dataclasses import dataclass
from typing import Any

import torch

from pocketize._torch import OpOverload, schema_of

aten = torch.ops.aten


class Kind(enum.Enum):
    """How an operator treats its arguments."""

    PURE = enum.auto()
    """Makes new tensors and writes to none."""
    VIEW = enum.auto()
    """Returns a tensor on the memory of its first argument."""
    WRITER = enum.auto()
    """Writes to its first argument and returns it."""
    OTHER = enum.auto()
    """Anything else: its results can only be kept."""


@dataclass(frozen=True)
class Operator:
    """An operator as the tape sees it.

    Attributes:
        kind: how it treats its arguments.
        heavy: it is a convolution, a matrix product or the like, whose result is worth keeping.
        resamples: it may give another resolution than it was given.
        random: it draws random numbers.
        weight: position of the argument that is the weight of a convolution or matrix product.
        statistics: positions of running statistics that it updates when told to train.
        training: position of the argument that tells it so.
    """

    kind: Kind
    heavy: bool = False
    resamples: bool = False
    random: bool = False
    weight: int | None = None
    statistics: tuple[int, ...] = ()
    training: int | None = None


#: Operators that cost more than reading and writing their tensors once, with the position of the
#: weight where there is one.
_HEAVY: dict[Any, int | None] = {
    aten.convolution: 1,
    aten._convolution: 1,
    aten.cudnn_convolution: 1,
    aten.cudnn_convolution_transpose: 1,
    aten.mkldnn_convolution: 1,
    aten.mm: 1,
    aten.addmm: 2,
    aten.bmm: 1,
    aten.baddbmm: 2,
    aten.mv: None,
    aten.linear: 1,
    aten.matmul: 1,
    aten._scaled_dot_product_flash_attention: None,
    aten._scaled_dot_product_flash_attention_for_cpu: None,
    aten._scaled_dot_product_efficient_attention: None,
    aten._scaled_dot_product_cudnn_attention: None,
    aten._scaled_dot_product_attention_math: None,
    aten._scaled_dot_product_fused_attention_overrideable: None,
    aten._fft_c2c: None,
    aten._fft_r2c: None,
    aten._fft_c2r: None,
    aten.grid_sampler_2d: None,
    aten.grid_sampler_3d: None,
    aten._cdist_forward: None,
    aten.sort: None,
    aten.topk: None,
}

#: Results of these may differ from one run to the next although they draw no random numbers in
#: torch's sense, or they look at the world outside.
_UNREPEATABLE = {
    aten._cudnn_rnn,
    aten.lstm,
    aten.gru,
    aten.mkldnn_rnn_layer,
    aten._thnn_fused_lstm_cell,
}

#: Elementwise operators whose in-place variant does the same to memory of our own.
_IN_PLACE = {
    aten.relu.default: aten.relu_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.elu.default: aten.elu_.default,
    aten.silu.default: aten.silu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
}


def in_place_variant(func: Any) -> Any:
    """Return the variant of an elementwise operator that overwrites its input, or ``None``."""
    return _IN_PLACE.get(func)


@functools.cache
def describe(func: Any) -> Operator:
    """Look an operator up by its schema and tags."""
    if not isinstance(func, OpOverload) or func.namespace not in ("aten", "prims"):
        return Operator(Kind.OTHER)
    schema, packet = schema_of(func), func.overloadpacket
    heavy, weight = packet in _HEAVY, _HEAVY.get(packet)
    name = packet.__name__
    resamples = "conv" in name or "pool" in name or name.startswith("upsample")
    random = torch.Tag.nondeterministic_seeded in func.tags
    if packet in _UNREPEATABLE or torch.Tag.dynamic_output_shape in func.tags:
        return Operator(Kind.OTHER)
    names = [argument.name for argument in schema.arguments]
    if "running_mean" in names:
        # Only some schemas admit that these are written to.
        positions = tuple(names.index(name) for name in ("running_mean", "running_var"))
        told = next((n for n in ("training", "train") if n in names), None)
        training = None if told is None else names.index(told)
        return Operator(Kind.PURE, heavy, resamples, random, weight, positions, training)
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    if any(written):
        first_only = written[0] and not any(written[1:])
        returned = [r.alias_info is not None and r.alias_info.is_write for r in schema.returns]
        if first_only and returned == [True] and packet not in (aten.resize_, aten.set_):
            return Operator(Kind.WRITER, heavy, resamples, random, weight)
        return Operator(Kind.OTHER)
    aliases = [r.alias_info is not None for r in schema.returns]
    if any(aliases):
        whole = [a.alias_info is not None for a in schema.arguments]
        if whole[0] and not any(whole[1:]) and len(aliases) == 1:
            return Operator(Kind.VIEW, heavy, resamples, random, weight)
        return Operator(Kind.OTHER)
    if not all(_is_tensor(returned.type) for returned in schema.returns) or not schema.returns:
        return Operator(Kind.OTHER)
    return Operator(Kind.PURE, heavy, resamples, random, weight)


def _is_tensor(kind: Any) -> bool:
    return str(kind) in ("Tensor", "List[Tensor]", "Tensor[]", "Optional[Tensor]", "Tensor?")
