"""Where a recorded net has a norm and an activation that can be one, and if not, why not."""

from __future__ import annotations

__all__ = ["NormSite", "NormSites", "find_sites"]

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from pocketize._torch import BatchNorm, InstanceNorm, storage_key
from pocketize.graph.capture import TracedGraph
from pocketize.ops import CONVOLUTIONS, UNKNOWN, Kind, operator_of, register
from pocketize.ops.effects import written_nodes
from pocketize.passes.inplace.activations import Activation
from pocketize.passes.inplace.modules import NormInPlace, activation_of, hooks_of, norm_kind
from pocketize.passes.shared.forwards import obstacle

_NORMS = {Kind.CHANNEL_NORM, Kind.GROUP_NORM}
#: Activations; those that are not dealt with one by one have no inverse.
_ACTIVATIONS = {Kind.ACTIVATION, Kind.GATE, Kind.PRELU, Kind.SOFTMAX}
#: Layers that read the norm's output as it is.
_LAYERS = {*CONVOLUTIONS, Kind.LINEAR, Kind.PRODUCT}


#: The facet of an activation's record: reads its call as an :class:`Activation`, if invertible.
_INVERTIBLE = "invertible activation"
_IDENTITY = Activation("identity")


@dataclass(frozen=True)
class NormSite:
    """A norm and what reads it.

    Attributes:
        norm: path of the norm layer.
        activation: what it is to compute as well; the identity where a convolution reads it.
        reader: path of the module that calls the activation: an activation layer, or a module whose
            forward calls it as a function; empty for the identity.
        call: the activation is called as a function.
        exchange: the activation is a ReLU that is to become leaky.
        saved: bytes that a training step no longer keeps, at the recorded sizes.
        shared: why the norm's input may not be overwritten; ``""`` if it may.
    """

    norm: str
    activation: Activation = _IDENTITY
    reader: str = ""
    call: bool = False
    exchange: bool = False
    saved: int = 0
    shared: str = ""


#: By the path of the norm; or why it is left alone.
NormSites: TypeAlias = "dict[str, NormSite | str]"


def find_sites(
    model: nn.Module, traces: Sequence[TracedGraph], exchange: Activation | None
) -> NormSites:
    """Find every norm layer that a forward calls, in the order in which they run.

    Args:
        model: the model that was recorded.
        traces: in evaluation mode, in training mode, and of variants.
        exchange: what ReLUs after a norm are to become; None to leave them.
    """
    evaluated, trained, *variants = traces
    sites = _Reader(model, trained, exchange).sites()
    for traced in (evaluated, *variants):
        others = _Reader(model, traced, exchange).sites()
        for path, site in sites.items():
            other = others.get(path, f"it does not run in {traced.mode}")
            if isinstance(site, str):
                continue
            if isinstance(other, str):
                sites[path] = other
            elif (site.activation, site.reader) != (other.activation, other.reader):
                sites[path] = f"other code follows it in {traced.mode} than in {trained.mode}"
        for path in others:
            sites.setdefault(path, f"it does not run in {trained.mode}")
    # A ReLU that is called in other places as well is not exchanged.
    exchanging = [s for s in sites.values() if isinstance(s, NormSite) and s.exchange]
    users = Counter(site.reader for site in exchanging)
    calls = [Counter(n.meta["module"] for n in t.operators()) for t in traces]
    for site in exchanging:
        if any(count[site.reader] != users[site.reader] for count in calls):
            sites[site.norm] = (
                f"the ReLU {site.reader} after it is called elsewhere too, where it must stay a "
                "ReLU; give each place one of its own"
            )
    return sites


class _Reader:
    """Reads one trace."""

    def __init__(self, model: nn.Module, traced: TracedGraph, exchange: Activation | None) -> None:
        self.modules = dict(model.named_modules())
        self.nodes = traced.operators()
        self.exchange = exchange

    def sites(self) -> NormSites:
        calls = defaultdict(list)
        for node in self.nodes:
            if operator_of(node.target).kind in _NORMS:
                calls[str(node.meta["module"])].append(node)
        return {
            path: self._layer_obstacle(path, nodes) or self._site(path, nodes[0])
            for path, nodes in calls.items()
        }

    def _layer_obstacle(self, path: str, nodes: list[fx.Node]) -> str:
        """Say why a layer cannot be converted, whatever follows it."""
        module = self.modules[path]
        if isinstance(module, NormInPlace):
            return "already in place"
        if norm_kind(module) is None:
            if isinstance(module, (BatchNorm, InstanceNorm, nn.GroupNorm)):
                return f"{type(module).__name__} has a forward of its own"
            return f"the forward of {type(module).__name__} calls {_operator(nodes[0])} itself"
        if len(nodes) > 1:
            return f"the norm is used {len(nodes)} times in one forward"
        hook = hooks_of(module)
        return f"a {hook} reads the tensor between norm and activation" if hook else ""

    def _site(self, path: str, node: fx.Node) -> NormSite | str:
        passed = _follow(node)
        if isinstance(passed, str):
            return passed
        *idle, reader = passed
        site = self._activation(path, reader)
        if isinstance(site, str):
            return site
        activated = site.activation.kind != "identity"
        why = self._hooked(idle, site) if activated else ""
        last = reader if activated else idle[-1] if idle else node
        if why := why or self._overwritten(node, last):
            return why
        source = node.args[0]
        assert isinstance(source, fx.Node)
        others = [user for user in source.users if user is not node]
        kept = next((_operator(user) for user in others if _keeps(user)), None)
        saved = 0 if kept else _bytes(source)
        if activated and not _operator(reader).endswith("_"):
            saved += _bytes(node)  # an activation that is not in place keeps its input as well
        if not saved:
            return f"nothing to save: its input is kept for {kept} anyway"
        return replace(site, saved=saved, shared=self._shared(source, others))

    def _activation(self, path: str, reader: fx.Node) -> NormSite | str:
        """Return what the reader computes, or why it cannot be part of the norm."""
        name = _operator(reader)
        plain = name.removesuffix("_")
        where = str(reader.meta["module"])
        module = self.modules[where]
        record = operator_of(reader.target)
        if plain == "relu" and self.exchange is not None:
            if type(module).forward is nn.ReLU.forward:
                return NormSite(path, self.exchange, where, exchange=True)
            return (
                f"the ReLU after it is called as a function by {where or 'the model'}; only layers "
                "can be exchanged, so make it an nn.ReLU"
            )
        read = record.facet(_INVERTIBLE)
        activation: Activation | None = None if read is UNKNOWN else read(reader)
        if plain == "prelu" and activation_of(module) == Activation("prelu"):
            activation = Activation("prelu")
        if activation is not None:
            if not activation.slope > 0:
                return f"activation {activation} is not invertible; use recompute instead"
            if activation_of(module) == activation:
                return NormSite(path, activation, where)
            if why := obstacle(module):
                return f"{where or 'the model'} calls the activation, and {why}"
            return NormSite(path, activation, where, call=True)
        if record.kind in _LAYERS:
            return NormSite(path)
        if record.kind in _ACTIVATIONS:
            more = ", or activation='leaky_relu:0.01', which replaces it" if plain == "relu" else ""
            why = "is called as a function" if plain == "prelu" else "is not invertible"
            return f"activation {plain} {why}; use recompute instead{more}"
        return f"{name} reads it, not an activation"

    def _hooked(self, idle: list[fx.Node], site: NormSite) -> str:
        """Say which hook sees the tensor between norm and activation."""
        left, entered = set(_parents(site.norm)), set(_parents(site.reader))
        passed = [str(n.meta["module"]) for n in idle]
        for outside in sorted(left - entered) + passed:
            if hook := hooks_of(self.modules[outside]):
                return f"a {hook} of {outside} reads the tensor between norm and activation"
        inner = set() if site.call else {site.reader}
        for inside in sorted(entered - left - {site.reader} | inner):
            module = self.modules[inside]
            hook = hooks_of(module) if inside == site.reader else ""
            if module._forward_pre_hooks and not hook:
                hook = "forward pre-hook"
            if hook:
                return f"a {hook} of {inside} reads the tensor between norm and activation"
        return ""

    def _overwritten(self, node: fx.Node, last: fx.Node) -> str:
        """Say who writes into the activated tensor later, which has to stay as it is."""
        memory = _storages(node) | _storages(last)
        after = self.nodes[self.nodes.index(last) + 1 :]
        for later in after:
            if any(not memory.isdisjoint(_storages(n)) for n in written_nodes(later)):
                at = f" at {later.meta['source']}" if later.meta.get("source") else ""
                return f"{_operator(later)}{at} writes into the tensor that would be kept"
        return ""

    def _shared(self, source: fx.Node, others: list[fx.Node]) -> str:
        """Say why the norm's input may not be overwritten."""
        if source.op != "call_function":
            return "its input is not made by the model"
        if others:
            return f"its input is read by {_operator(others[0])} too"
        memory = _storages(source)
        if any(n is not source and not memory.isdisjoint(_storages(n)) for n in self.nodes):
            return "its input shares memory with another tensor"
        return ""


def _follow(node: fx.Node) -> list[fx.Node] | str:
    """Return idle dropouts after a norm, and what reads them; or why nothing can."""
    passed: list[fx.Node] = []
    reader = node
    while True:
        readers = list(reader.users)
        if len(readers) != 1:
            times = f"read {len(readers)} times" if readers else "not read at all"
            return f"the tensor between norm and activation is {times}"
        (reader,) = readers
        passed.append(reader)
        if reader.op == "output":
            return "its output is an output of the model"
        if operator_of(reader.target).kind is not Kind.DROPOUT:
            return passed
        if float(_argument(reader, 1, "p", 0.5)) > 0 and _argument(reader, 2, "train", False):
            return "dropout is active between norm and activation"


@register(_INVERTIBLE, "aten.leaky_relu")
def _leaky_relu(node: fx.Node) -> Activation:
    return Activation(
        _operator(node).rstrip("_"), float(_argument(node, 1, "negative_slope", 0.01))
    )


@register(_INVERTIBLE, "aten.elu")
def _elu(node: fx.Node) -> Activation | None:
    scaled = any(_argument(node, i, key, 1) != 1 for i, key in ((2, "scale"), (3, "input_scale")))
    return None if scaled else Activation("elu", float(_argument(node, 1, "alpha", 1.0)))


def _operator(node: fx.Node) -> str:
    """``aten.leaky_relu_.default`` is ``leaky_relu_``."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _argument(node: fx.Node, index: int, name: str, default: float) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _keeps(node: fx.Node) -> bool:
    kept = operator_of(node.target).keeps
    return kept is not UNKNOWN and "input" in kept


def _bytes(node: fx.Node) -> int:
    value: Tensor = node.meta["val"]
    return math.prod(value.shape) * value.element_size()


def _storages(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    return {storage_key(value)} if isinstance(value, Tensor) else set()


def _parents(path: str) -> Iterator[str]:
    """A path and all that contain it, the model aside."""
    while path:
        yield path
        path = path.rpartition(".")[0]
