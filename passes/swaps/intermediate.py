"""Which norm and activation follow a convolution, so that a block can have such inside."""

from __future__ import annotations

__all__ = ["Intermediate", "Intermediates"]

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from pocketize._torch import BatchNorm, InstanceNorm
from pocketize.graph.capture import TracedGraph
from pocketize.ops import Kind, bind, is_convolution, operator_of
from pocketize.passes.swaps.conversions import NORMS

#: Operators between a convolution and what is asked for that are no layer of their own.
_IDLE = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "contiguous"}
_NORMS = {Kind.CHANNEL_NORM, Kind.GROUP_NORM}
#: Operator -> kind, and its arguments -> settings of the layer.
_ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "celu": ("CELU", {"alpha": "alpha"}),
    "elu": ("ELU", {"alpha": "alpha"}),
    "gelu": ("GELU", {"approximate": "approximate"}),
    "hardsigmoid": ("Hardsigmoid", {}),
    "hardswish": ("Hardswish", {}),
    "hardtanh": ("Hardtanh", {"min_val": "min_val", "max_val": "max_val"}),
    "leaky_relu": ("LeakyReLU", {"negative_slope": "negative_slope"}),
    "mish": ("Mish", {}),
    "prelu": ("PReLU", {}),
    "relu": ("ReLU", {}),
    "relu6": ("Hardtanh", {}),
    "selu": ("SELU", {}),
    "sigmoid": ("Sigmoid", {}),
    "silu": ("SiLU", {}),
    "softplus": ("Softplus", {"beta": "beta", "threshold": "threshold"}),
    "tanh": ("Tanh", {}),
}
_IN_PLACE = {"celu", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu"}
_IN_PLACE |= {"relu6", "selu", "silu"}
#: How far behind a convolution its norm and its activation are looked for.
_FAR = 6


@dataclass(frozen=True)
class Intermediate:
    """What is to come after the inner layers of a block, as data.

    Attributes:
        norm: kind and settings of the norm, as in
            :data:`pocketize.passes.swaps.conversions.NORMS`; empty for none.
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
        for node in traced.operators():
            if is_convolution(node):
                self._look_behind(node)
        self.usual_norm = _most_frequent(self.norms.values())
        self.usual_activation = _most_frequent(self.activations.values())

    def of(self, path: str) -> Intermediate:
        """Return what follows a convolution; for a part that does not, what is usual in the net."""
        return Intermediate(
            self.norms.get(path, self.usual_norm),
            self.activations.get(path, self.usual_activation),
        )

    def _look_behind(self, conv: fx.Node) -> None:
        path, node = str(conv.meta["module"]), conv
        for _ in range(_FAR):
            step = self._next(node, path)
            if step is None:
                return
            node = step

    def _next(self, node: fx.Node, path: str) -> fx.Node | None:
        """Take in a reader of a node that is a norm or an activation; None where there is none."""
        for reader in node.users:
            if reader.op != "call_function":
                continue
            record = operator_of(reader.target)
            name = record.short
            if name in _IDLE:
                return reader
            if record.kind in _NORMS and path not in self.norms:
                settings = self._norm(reader)
                if settings:
                    self.norms[path] = settings
                    return reader
            if name in _ACTIVATIONS and path not in self.activations:
                self.activations[path] = self._activation(reader)
                return reader
        return None

    def _norm(self, node: fx.Node) -> dict[str, Any]:
        module = self.modules.get(str(node.meta["module"]))
        if isinstance(module, nn.SyncBatchNorm):
            kind = "SyncBatchNorm"
        elif isinstance(module, BatchNorm):
            kind = "BatchNorm"
        elif isinstance(module, InstanceNorm):
            kind = "InstanceNorm"
        elif isinstance(module, nn.GroupNorm):
            kind = "GroupNorm"
        else:
            return {}
        return {"kind": kind} | {name: getattr(module, name) for name in NORMS[kind][1]}

    def _activation(self, node: fx.Node) -> dict[str, Any]:
        name = operator_of(node.target).short
        kind, names = _ACTIVATIONS[name]
        bound = bind(node.target, node.args, node.kwargs)
        settings: dict[str, Any] = {"kind": kind}
        settings |= {mine: bound[theirs] for theirs, mine in names.items() if theirs in bound}
        if name == "relu6":
            settings |= {"min_val": 0.0, "max_val": 6.0}
        if name == "prelu":
            slopes = bound["weight"].meta["val"]
            module = self.modules.get(str(node.meta["module"]))
            settings |= {"shared": slopes.numel() == 1, "init": getattr(module, "init", 0.25)}
        if name in _IN_PLACE and str(node.target).split(".")[1].endswith("_"):
            settings["inplace"] = True
        return settings


def _most_frequent(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(json.dumps(settings, sort_keys=True) for settings in found)
    if not counts:
        return {}
    usual: dict[str, Any] = json.loads(counts.most_common(1)[0][0])
    return usual
