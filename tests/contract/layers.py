"""What torch's layers say about their sizes, against the sizes of their tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["disagreements"]


def disagreements(model: nn.Module) -> list[str]:
    """Say which attribute of which layer does not fit; empty if all do."""
    return [
        f"{path or 'the model'}.{name} is {said}, its tensors have {found}"
        for path, module in model.named_modules()
        for name, said, found in _claims(module)
        if said != found
    ]


def _shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Shape of a tensor of a layer, of its computed form where the weight is parametrized.

    Read in eval mode: reading a spectral-normed weight in training advances its buffers.
    """
    modes = {inner: inner.training for inner in module.modules()}
    try:
        for inner in modes:
            inner.training = False
        tensor = getattr(module, name, None)
    finally:
        for inner, mode in modes.items():
            inner.training = mode
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None


def _claims(module: nn.Module) -> Iterator[tuple[str, object, object]]:
    """Attribute, its value, the value that the tensors demand."""
    weight, bias = _shape(module, "weight"), _shape(module, "bias")
    if isinstance(module, _ConvNd) and weight is not None:
        yield from _conv(module, weight)
        if bias is not None:
            yield "out_channels", module.out_channels, bias[0]
    elif isinstance(module, nn.Linear) and weight is not None:
        yield "out_features", module.out_features, weight[0]
        yield "in_features", module.in_features, weight[1]
        if bias is not None:
            yield "out_features", module.out_features, bias[0]
    elif isinstance(module, _NormBase):
        for name in ("weight", "bias", "running_mean", "running_var"):
            shape = _shape(module, name)
            if shape is not None:
                yield "num_features", module.num_features, shape[0]
    elif isinstance(module, nn.GroupNorm):
        if weight is not None:
            yield "num_channels", module.num_channels, weight[0]
        yield "num_channels % num_groups", module.num_channels % module.num_groups, 0
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if weight is not None:
            yield "normalized_shape", tuple(module.normalized_shape), weight
    elif isinstance(module, nn.PReLU) and weight is not None:
        yield "num_parameters", module.num_parameters, weight[0]
    elif isinstance(module, nn.Embedding) and weight is not None:
        yield "embedding_dim", module.embedding_dim, weight[1]
        yield "num_embeddings", module.num_embeddings, weight[0]
    elif isinstance(module, nn.MultiheadAttention):
        yield from _attention(module)
    elif isinstance(module, nn.RNNBase):
        first = _shape(module, "weight_ih_l0")
        if first is not None:
            yield "input_size", module.input_size, first[1]


def _conv(module: _ConvNd, weight: tuple[int, ...]) -> Iterator[tuple[str, object, object]]:
    if isinstance(module, _ConvTransposeNd):
        yield "in_channels", module.in_channels, weight[0]
        yield "out_channels", module.out_channels, weight[1] * module.groups
    else:
        yield "in_channels", module.in_channels, weight[1] * module.groups
        yield "out_channels", module.out_channels, weight[0]
    yield "in_channels % groups", module.in_channels % module.groups, 0
    yield "out_channels % groups", module.out_channels % module.groups, 0
    yield "kernel_size", tuple(module.kernel_size), weight[2:]


def _attention(module: nn.MultiheadAttention) -> Iterator[tuple[str, object, object]]:
    out = tuple(module.out_proj.weight.shape)
    yield "embed_dim", module.embed_dim, out[0]
    yield "embed_dim", module.embed_dim, out[1]
    yield "head_dim", module.head_dim * module.num_heads, module.embed_dim
    packed = module.in_proj_weight
    if packed is not None:
        yield "embed_dim", (3 * module.embed_dim, module.embed_dim), tuple(packed.shape)
    else:
        yield "kdim", module.kdim, module.k_proj_weight.shape[1]
        yield "vdim", module.vdim, module.v_proj_weight.shape[1]
    if module.in_proj_bias is not None:
        yield "embed_dim", 3 * module.embed_dim, module.in_proj_bias.shape[0]
