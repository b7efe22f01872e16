"""A model's parameters with what their initialisation may depend on, and torch's own defaults."""

from __future__ import annotations

__all__ = ["Slot", "find_slots", "has_own_reset", "has_values", "real", "stock_law"]

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from pocketize._torch import ConvNd, FakeTensor, NormBase
from pocketize.initial.families import NORMAL, UNIFORM
from pocketize.initial.laws import Constant, Geometry, Law, Random

_NORMS: tuple[type[nn.Module], ...] = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("conv", (ConvNd,)),
    ("linear", (nn.Linear,)),
    ("bilinear", (nn.Bilinear,)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("norm", _NORMS),
    ("prelu", (nn.PReLU,)),
    ("rnn", (nn.RNNBase, nn.RNNCellBase)),
    ("attention", (nn.MultiheadAttention,)),
)


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter, under all its names.

    Attributes:
        names: Every name; more than one for tied weights and modules. The first one rules.
        tensor: The parameter.
        owner: The module that uses it; for a parametrization the module that is parametrized.
        path: The owner's path.
        leaf: Its name in the owner, ``"weight"`` also where ``weight_v`` or ``original1`` holds it.
        kind: The owner's kind, ``"conv"`` or ``"linear"`` for example, or ``"raw"``.
        role: ``"weight"``, ``"bias"`` or ``"magnitude"``.
        geometry: Shapes that the scale may depend on.
        direction: For a magnitude, the name of the direction it belongs to.
        parametrized: Whether the owner computes its tensor from this one.
    """

    names: tuple[str, ...]
    tensor: Tensor
    owner: nn.Module
    path: str
    leaf: str
    kind: str
    role: str
    geometry: Geometry
    direction: str | None = None
    parametrized: bool = False

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def population(self) -> tuple[str, str]:
        """Tensors of one population are expected to have been initialised alike."""
        if self.kind != "raw":
            return self.kind, self.role
        return "raw", "vector" if max(self.tensor.shape, default=1) == self.tensor.numel() else ""


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers behind the tensor; not so on the meta device and for fakes."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def real(tensor: Tensor) -> Tensor:
    """A real view: complex tensors get a last axis of two."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def find_slots(model: nn.Module) -> list[Slot]:
    """All floating or complex parameters that have elements, in registration order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        usable = (
            not isinstance(parameter, UninitializedParameter)
            and parameter.layout == torch.strided
            and (parameter.is_floating_point() or parameter.is_complex())
            and parameter.numel() > 0
        )
        if usable:
            names.setdefault(id(parameter), []).append(name)
            tensors[id(parameter)] = parameter
    slots = [_slot(tuple(names[key]), tensors[key], modules) for key in names]
    siblings: dict[str, list[Slot]] = {}
    for slot in slots:
        siblings.setdefault(slot.path, []).append(slot)
    return [_with_weight(slot, siblings[slot.path]) for slot in slots]


def _slot(names: tuple[str, ...], tensor: Tensor, modules: dict[str, nn.Module]) -> Slot:
    path, _, leaf = names[0].rpartition(".")
    owner, direction, parametrized = modules[path], None, False
    head, marker, inner = path.rpartition("parametrizations.")
    if marker and leaf.startswith("original"):
        parametrized = True
        if leaf == "original0" and _is_magnitude(owner, "original0", "original1"):
            direction = f"{path}.original1"
        path, leaf = head.rstrip("."), inner
        owner = modules[path]
    elif leaf.endswith("_g") and _is_magnitude(owner, leaf, f"{leaf[:-2]}_v"):
        direction, leaf, parametrized = f"{names[0][:-2]}_v", leaf[:-2], True
    elif leaf.endswith("_v") and _is_magnitude(owner, f"{leaf[:-2]}_g", leaf):
        leaf, parametrized = leaf[:-2], True
    elif leaf.endswith("_orig") and leaf[:-5] not in owner._parameters:
        leaf, parametrized = leaf[:-5], True
    kind = next((kind for kind, types in _KINDS if isinstance(owner, types)), "raw")
    if kind not in ("rnn", "attention", "raw") and leaf not in ("weight", "bias"):
        kind = "raw"
    groups = getattr(owner, "groups", 1)
    hidden = getattr(owner, "hidden_size", 0) if kind == "rnn" else 0
    return Slot(
        names=names,
        tensor=tensor,
        owner=owner,
        path=path,
        leaf=leaf,
        kind="raw" if direction else kind,
        role="magnitude" if direction else "bias" if _is_bias(kind, leaf) else "weight",
        geometry=Geometry(
            shape=tuple(tensor.shape),
            weight=tuple(tensor.shape) if tensor.dim() >= 2 else (),
            groups=groups if isinstance(groups, int) and groups > 0 else 1,
            hidden=hidden if isinstance(hidden, int) else 0,
        ),
        direction=direction,
        parametrized=parametrized,
    )


def _is_bias(kind: str, leaf: str) -> bool:
    # the attention's bias_k and bias_v are rows of keys and values, not added to anything
    return "bias" in leaf and not (kind == "attention" and leaf in ("bias_k", "bias_v"))


def _is_magnitude(owner: nn.Module, magnitude: str, direction: str) -> bool:
    g, v = owner._parameters.get(magnitude), owner._parameters.get(direction)
    if g is None or v is None:
        return False
    per_axis = g.dim() == v.dim() and all(
        a in (1, b) for a, b in zip(g.shape, v.shape, strict=True)
    )
    return g.numel() == 1 or (per_axis and g.shape != v.shape)


def _with_weight(slot: Slot, siblings: list[Slot]) -> Slot:
    """Let a vector read its fans from the weight of its layer."""
    if slot.geometry.weight:
        return slot
    weights = [other for other in siblings if other.tensor.dim() >= 2 and other.role == "weight"]
    named = [other for other in weights if other.leaf in ("weight", "weight_hh", "weight_hh_l0")]
    if named or len(weights) == 1:
        weight = (named or weights)[0].geometry.weight
        return replace(slot, geometry=replace(slot.geometry, weight=weight))
    return slot


def has_own_reset(slot: Slot) -> bool:
    """Whether the owner brings a ``reset_parameters`` that is not torch's."""
    reset = getattr(type(slot.owner), "reset_parameters", None)
    # a parametrized owner would fill a computed tensor, to no effect
    if not callable(reset) or slot.parametrized:
        return False
    return not getattr(reset, "__module__", "").startswith("torch.")


def stock_law(slot: Slot) -> Law | None:
    """How torch initialises this parameter in a new layer; None if the layer is not torch's."""
    if slot.kind == "raw" or has_own_reset(slot):
        return None
    kind, bias = slot.kind, slot.role == "bias"
    third = 1 / math.sqrt(3.0)
    if kind in ("conv", "linear"):
        if bias and isinstance(slot.owner, NonDynamicallyQuantizableLinear):
            # the output projection of multi-head attention
            return Constant(0.0)
        return Random(UNIFORM, "fan_in", third)
    if kind == "bilinear":
        return Random(UNIFORM, "second axis", third)
    if kind == "rnn":
        return Random(UNIFORM, "hidden_size", third)
    if kind == "embedding":
        return Random(NORMAL, "constant", 1.0)
    if kind == "attention" and not bias:
        rows = slot.leaf in ("bias_k", "bias_v")
        return Random(NORMAL if rows else UNIFORM, "fan_avg", 1.0)
    if kind == "prelu":
        initial = getattr(slot.owner, "init", 0.25)
        return Constant(float(initial) if isinstance(initial, (int, float)) else 0.25)
    return Constant(0.0 if bias else 1.0)
