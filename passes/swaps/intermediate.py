"""Norms and activations inside a block: read from what follows a convolution, and made again."""

from __future__ import annotations

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "Intermediate",
    "Intermediates",
    "activation_layer",
    "groups_for",
    "norm_layer",
]

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor, fx, nn

from pocketize._torch import BatchNorm, ConvNd, InstanceNorm
from pocketize.errors import RewriteError
from pocketize.graph.capture import TracedGraph
from pocketize.ops import Kind, bind, is_convolution, operator_of

_M = TypeVar("_M", bound=nn.Module)
_T = TypeVar("_T")

_RUNNING = ("eps", "momentum", "affine", "track_running_stats")
#: Kind of a norm -> its classes by spatial rank, and the settings that are copied.
NORMS: dict[str, tuple[tuple[type[nn.Module], ...], tuple[str, ...]]] = {
    "BatchNorm": ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _RUNNING),
    "SyncBatchNorm": ((nn.SyncBatchNorm,) * 3, _RUNNING),
    "InstanceNorm": ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _RUNNING),
    "GroupNorm": ((nn.GroupNorm,) * 3, ("num_groups", "eps", "affine")),
}

#: Kind of an activation -> its class, and the settings that are copied.
ACTIVATIONS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "CELU": (nn.CELU, ("alpha", "inplace")),
    "ELU": (nn.ELU, ("alpha", "inplace")),
    "GELU": (nn.GELU, ("approximate",)),
    "Hardsigmoid": (nn.Hardsigmoid, ("inplace",)),
    "Hardswish": (nn.Hardswish, ("inplace",)),
    "Hardtanh": (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    "LeakyReLU": (nn.LeakyReLU, ("negative_slope", "inplace")),
    "Mish": (nn.Mish, ("inplace",)),
    "PReLU": (nn.PReLU, ("shared", "init")),
    "ReLU": (nn.ReLU, ("inplace",)),
    "SELU": (nn.SELU, ("inplace",)),
    "SiLU": (nn.SiLU, ("inplace",)),
    "Sigmoid": (nn.Sigmoid, ()),
    "Softplus": (nn.Softplus, ("beta", "threshold")),
    "Tanh": (nn.Tanh, ()),
}
#: Operator -> kind of the activation; its arguments have the names of the settings.
_OPERATORS = {kind.lower(): kind for kind in ACTIVATIONS}
_OPERATORS |= {"leaky_relu": "LeakyReLU", "relu6": "Hardtanh"}
#: Operators between a convolution and what is asked for that are no layer of their own.
_IDLE = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "contiguous"}
#: How far behind a convolution its norm and its activation are looked for.
_FAR = 6


@dataclass(frozen=True)
class Intermediate:
    """What is to come after the inner layers of a block, as data: empty for none.

    Attributes:
        norm: kind and settings of the norm, as in :data:`NORMS`.
        activation: the same of the activation.
    """

    norm: Mapping[str, Any]
    activation: Mapping[str, Any]

    def __str__(self) -> str:
        kinds = [str(part["kind"]) for part in (self.norm, self.activation) if part]
        return " and ".join(kinds)


class Intermediates:
    """Knows, for every convolution of a recorded net, what follows it, and what is usual in it.

    Args:
        model: the model that was recorded.
        traced: the trace.
    """

    def __init__(self, model: nn.Module, traced: TracedGraph) -> None:
        self.modules = dict(model.named_modules())
        self.norms: dict[str, dict[str, Any]] = {}
        self.activations: dict[str, dict[str, Any]] = {}
        for conv in filter(is_convolution, traced.operators()):
            node: fx.Node | None = conv
            for _ in range(_FAR):
                node = node and self._next(node, str(conv.meta["module"]))
        self.usual_norm = _most_frequent(self.norms.values())
        self.usual_activation = _most_frequent(self.activations.values())

    def of(self, path: str) -> Intermediate:
        """Return what follows a convolution; for a part that does not, what is usual in the net."""
        return Intermediate(
            self.norms.get(path, self.usual_norm),
            self.activations.get(path, self.usual_activation),
        )

    def _next(self, node: fx.Node, path: str) -> fx.Node | None:
        """Take in a reader of a node that is a norm or an activation; None where there is none."""
        for reader in node.users:
            if reader.op != "call_function":
                continue
            record = operator_of(reader.target)
            if record.short in _IDLE:
                return reader
            if record.kind in (Kind.CHANNEL_NORM, Kind.GROUP_NORM) and path not in self.norms:
                settings = self._norm(reader)
                if settings:
                    self.norms[path] = settings
                    return reader
            if record.short in _OPERATORS and path not in self.activations:
                self.activations[path] = self._activation(reader)
                return reader
        return None

    def _norm(self, node: fx.Node) -> dict[str, Any]:
        module = self.modules.get(str(node.meta["module"]))
        classes = {
            "SyncBatchNorm": nn.SyncBatchNorm,
            "BatchNorm": BatchNorm,
            "InstanceNorm": InstanceNorm,
            "GroupNorm": nn.GroupNorm,
        }
        for kind, made_by in classes.items():
            if isinstance(module, made_by):
                return {"kind": kind} | {name: getattr(module, name) for name in NORMS[kind][1]}
        return {}

    def _activation(self, node: fx.Node) -> dict[str, Any]:
        name = operator_of(node.target).short
        kind = _OPERATORS[name]
        names = ACTIVATIONS[kind][1]
        bound = bind(node.target, node.args, node.kwargs)
        settings: dict[str, Any] = {"kind": kind} | {
            key: bound[key] for key in names if key in bound
        }
        if name == "relu6":
            settings |= {"min_val": 0.0, "max_val": 6.0}
        if name == "prelu":
            slopes = bound["weight"].meta["val"]
            module = self.modules.get(str(node.meta["module"]))
            settings |= {"shared": slopes.numel() == 1, "init": getattr(module, "init", 0.25)}
        if "inplace" in names and str(node.target).split(".")[1].endswith("_"):
            settings["inplace"] = True
        return settings


def _most_frequent(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(json.dumps(settings, sort_keys=True) for settings in found)
    if not counts:
        return {}
    usual: dict[str, Any] = json.loads(counts.most_common(1)[0][0])
    return usual


def norm_layer(settings: Mapping[str, Any], channels: int, like: ConvNd) -> nn.Module:
    """Return a norm.

    Args:
        settings: "kind" and the settings in :data:`NORMS`; of a group norm as many groups as
            divide the channels, at most as many as are set.
        channels: how many it norms.
        like: the convolution that is replaced.

    Raises:
        RewriteError: there is no such kind.
    """
    classes, options = _looked_up(NORMS, settings, "a norm")
    if classes[0] is nn.GroupNorm:
        groups = groups_for(int(options.pop("num_groups", 1)), channels)
        return _with_tensors(nn.GroupNorm(groups, channels, **options, device="meta"), like)
    made = classes[len(like.kernel_size) - 1](channels, **options, device="meta")
    return _with_tensors(made, like)


def groups_for(groups: int, channels: int) -> int:
    """Return the largest number of groups that divides the channels, at most the one given."""
    return next(n for n in range(min(groups, channels), 0, -1) if channels % n == 0)


def activation_layer(settings: Mapping[str, Any], channels: int, like: ConvNd) -> nn.Module:
    """Return an activation.

    Args:
        settings: "kind" and the settings in :data:`ACTIVATIONS`; a PReLU that is not "shared" has a
            slope for every channel.
        channels: how many come in.
        like: the convolution that is replaced.

    Raises:
        RewriteError: there is no such kind.
    """
    made_by, options = _looked_up(ACTIVATIONS, settings, "an activation")
    if made_by is nn.PReLU:
        slopes = 1 if options.pop("shared", True) else channels
        return _with_tensors(nn.PReLU(slopes, **options, device="meta"), like)
    return made_by(**options)


def _looked_up(
    table: Mapping[str, tuple[_T, tuple[str, ...]]], settings: Mapping[str, Any], what: str
) -> tuple[_T, dict[str, Any]]:
    kind: Any = settings.get("kind")
    if kind not in table:
        raise RewriteError(f"expected {what} out of {', '.join(table)}, got {kind!r}")
    made_by, names = table[kind]
    return made_by, {name: settings[name] for name in names if name in settings}


def _with_tensors(made: _M, like: ConvNd) -> _M:
    """Give a layer that was built without memory tensors beside the weight, as they begin."""
    for tables in (made._parameters, made._buffers):
        held = cast(dict[str, Tensor | None], tables)
        for name, tensor in held.items():
            if tensor is None:
                continue
            dtype = like.weight.dtype if tensor.is_floating_point() else tensor.dtype
            new = like.weight.new_empty(tensor.shape, dtype=dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=like.weight.requires_grad)
            held[name] = new
    cast(Any, made).reset_parameters()
    return made
