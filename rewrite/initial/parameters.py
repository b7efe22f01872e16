"""A model's parameters, with what their initialisation may depend on."""

from __future__ import annotations

__all__ = ["ParameterInfo", "find_parameters", "has_values", "real"]

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from pocketize._torch import ConvNd, FakeTensor, NormBase
from pocketize.initial.schemes import SQRT3, Constant, Geometry, Random, Reset, Scheme

_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("conv", (ConvNd,)),
    ("linear", (nn.Linear,)),
    ("bilinear", (nn.Bilinear,)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("norm", (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)),
    ("prelu", (nn.PReLU,)),
    ("rnn", (nn.RNNBase, nn.RNNCellBase)),
    ("attention", (nn.MultiheadAttention,)),
)


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """One parameter, under all its names (tied weights and modules have several).

    Attributes:
        owner: the module that uses it; for a parametrization the module that is parametrized.
        leaf: its name in the owner, ``"weight"`` also where ``weight_v`` or ``original1`` holds it.
        kind: a kind of layer, or ``"raw"``.
        role: ``"weight"`` or ``"bias"``.
        direction: for the magnitude of a weight normalisation, the name of its direction.
        parametrized: whether the owner computes its tensor from this one.
    """

    names: tuple[str, ...]
    tensor: Tensor
    owner: nn.Module
    path: str
    leaf: str
    kind: str
    role: str
    geometry: Geometry
    direction: str | None
    parametrized: bool

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def starts_constant(self) -> bool:
        """Whether torch gives it one value: scales and shifts of norms, slopes, some biases."""
        bias = self.role == "bias"
        projection = isinstance(self.owner, NonDynamicallyQuantizableLinear)
        return self.kind in ("norm", "prelu") or (bias and (projection or self.kind == "attention"))

    def default(self, reason: str) -> Scheme | None:
        """Return how the layer itself initialises it, None for a parameter of no layer."""
        reset = getattr(self.owner, "reset_parameters", None)
        if self.kind == "attention" and self.role == "weight":
            uniform = self.leaf not in ("bias_k", "bias_v")
            return Random("uniform" if uniform else "normal", "fan_avg", 1.0, source=reason)
        if self.starts_constant and self.role == "bias":
            return Constant(0.0)
        if self.parametrized and self.kind in ("conv", "linear"):
            # reset_parameters would fill the computed tensor, to no effect
            return Random("uniform", "fan_in", 1 / SQRT3, source=reason)
        return Reset(reason) if callable(reset) and not self.parametrized else None


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor has memory; not so on the meta device and for fake tensors."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def real(tensor: Tensor) -> Tensor:
    """Return a real view: complex tensors get a last axis of two."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def find_parameters(model: nn.Module) -> list[ParameterInfo]:
    """Return all floating or complex parameters that have elements, in registration order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (
            not isinstance(parameter, UninitializedParameter)
            and parameter.layout == torch.strided
            and (parameter.is_floating_point() or parameter.is_complex())
            and parameter.numel() > 0
        ):
            names.setdefault(id(parameter), []).append(name)
            tensors[id(parameter)] = parameter
    found = [_info(tuple(names[key]), tensors[key], modules) for key in names]
    # a vector reads its fans from the weight of its layer
    weights = {
        info.path: info.geometry.weight
        for info in reversed(found)
        if info.geometry.weight and info.role == "weight"
    }
    return [
        replace(info, geometry=replace(info.geometry, weight=weights.get(info.path, ())))
        if not info.geometry.weight and info.kind != "raw"
        else info
        for info in found
    ]


def _info(names: tuple[str, ...], tensor: Tensor, modules: dict[str, nn.Module]) -> ParameterInfo:
    path, _, leaf = names[0].rpartition(".")
    owner, direction, parametrized = modules[path], None, True
    head, marker, computed = path.rpartition("parametrizations.")
    if marker and leaf.startswith("original"):
        if leaf == "original0" and _is_magnitude(owner, "original0", "original1"):
            direction = f"{path}.original1"
        path, leaf = head.rstrip("."), computed
        owner = modules[path]
    elif leaf.endswith("_g") and _is_magnitude(owner, leaf, f"{leaf[:-2]}_v"):
        direction, leaf = f"{names[0][:-2]}_v", leaf[:-2]
    elif leaf.endswith("_v") and _is_magnitude(owner, f"{leaf[:-2]}_g", leaf):
        leaf = leaf[:-2]
    elif leaf.endswith("_orig") and leaf[:-5] not in owner._parameters:
        leaf = leaf[:-5]
    else:
        parametrized = False
    kind = next((kind for kind, types in _KINDS if isinstance(owner, types)), "raw")
    if direction or (kind not in ("rnn", "attention") and leaf not in ("weight", "bias")):
        kind = "raw"
    # the attention's bias_k and bias_v are rows of keys and values, not added to anything
    bias = "bias" in leaf and not (kind == "attention" and leaf in ("bias_k", "bias_v"))
    groups = getattr(owner, "groups", 1)
    hidden = getattr(owner, "hidden_size", 0) if kind == "rnn" else 0
    geometry = Geometry(
        shape=tuple(tensor.shape),
        weight=tuple(tensor.shape) if tensor.dim() >= 2 else (),
        groups=groups if isinstance(groups, int) and groups > 0 else 1,
        hidden=hidden if isinstance(hidden, int) else 0,
    )
    role = "bias" if bias else "weight"
    return ParameterInfo(
        names, tensor, owner, path, leaf, kind, role, geometry, direction, parametrized
    )


def _is_magnitude(owner: nn.Module, magnitude: str, direction: str) -> bool:
    g, v = owner._parameters.get(magnitude), owner._parameters.get(direction)
    if g is None or v is None:
        return False
    per_axis = g.dim() == v.dim() and all(
        a in (1, b) for a, b in zip(g.shape, v.shape, strict=True)
    )
    return g.numel() == 1 or (per_axis and g.shape != v.shape)
