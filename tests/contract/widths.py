"""How wide a layer is: the number of channels it makes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["tensors_of", "width_of"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def width_of(model: nn.Module, path: str) -> int:
    """Number of output channels of a layer, or the size of an axis for ``"scale@1"``.

    Read off the weights where there are any, since attributes may lie.
    """
    name, _, axis = path.partition("@")
    if axis:
        return tensors_of(model)[name].shape[int(axis)]
    module = model.get_submodule(path)
    weights = _weights(module)
    if isinstance(module, _ConvNd):
        if isinstance(module, _ConvTransposeNd):
            return weights[0].shape[1] * module.groups
        return weights[0].shape[0]
    if isinstance(module, nn.Linear):
        return weights[0].shape[0]
    if isinstance(module, nn.Embedding):
        return weights[0].shape[1]
    if isinstance(module, nn.LSTM | nn.GRU | nn.RNN):
        return module.hidden_size
    if isinstance(module, _NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[-1]
    raise TypeError(f"{path}: no width is defined for {type(module).__name__}")


def _weights(module: nn.Module) -> list[Tensor]:
    """The weight itself, or the tensor it is computed from that has its shape."""
    parametrized = getattr(module, "parametrizations", None)
    if parametrized is not None and "weight" in parametrized:
        originals = list(parametrized["weight"].parameters())
        return [max(originals, key=lambda tensor: tensor.numel())]
    for name in ("weight_v", "weight_orig", "weight"):
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            return [tensor]
    return []
