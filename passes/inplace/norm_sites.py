"""Where a recorded net has a norm and an activation that can be one, and if not, why not."""

from __future__ import annotations

__all__ = ["NormSite", "find_sites"]

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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
        refused: why it is left alone; ``""`` if it is not.
    """

    norm: str
    activation: Activation = _IDENTITY
    reader: str = ""
    call: bool = False
    exchange: bool = False
    saved: int = 0
    shared: str = ""
    refused: str = ""


def find_sites(
    model: nn.Module, evaluated: TracedGraph, trained: TracedGraph, exchange: Activation | None
) -> list[NormSite]:
    """Find every norm layer that a forward calls.

    Args:
        model: the model that was recorded.
        evaluated: the trace in evaluation mode.
        trained: the trace in training mode.
        exchange: what ReLUs after a norm are to become; None to leave them.

    Returns:
        One site for each norm layer, in the order in which they run.
    """
    both = [_Reader(model, traced, exchange).sites() for traced in (trained, evaluated)]
    sites = []
    for path, site in both[0].items():
        other = both[1].get(path)
        if site.refused:
            sites.append(site)
        elif other is None:
            sites.append(NormSite(path, refused="it runs in training mode only"))
        elif other.refused:
            sites.append(other)
        elif (site.activation, site.reader) != (other.activation, other.reader):
            sites.append(
                NormSite(path, refused="other code follows it in training than in evaluation")
            )
        else:
            sites.append(site)
    sites += [
        NormSite(path, refused="it runs in evaluation mode only")
        for path in both[1].keys() - both[0]
    ]
    return _exchange_whole_modules(sites, (evaluated, trained))


def _exchange_whole_modules(
    sites: list[NormSite], traces: tuple[TracedGraph, ...]
) -> list[NormSite]:
    """Refuse to exchange a ReLU layer that is called in other places as well."""
    wanted = defaultdict(list)
    for site in sites:
        if site.exchange and not site.refused:
            wanted[site.reader].append(site)
    reused = set()
    for path, users in wanted.items():
        for traced in traces:
            calls = [n for n in traced.operators() if n.meta["module"] == path]
            if len(calls) != len(users):
                reused.add(path)
    return [
        NormSite(
            site.norm,
            refused=f"the ReLU {site.reader} after it is called elsewhere too, where it must stay "
            "a ReLU; give each place one of its own",
        )
        if site.exchange and site.reader in reused
        else site
        for site in sites
    ]


class _Reader:
    """Reads one trace."""

    def __init__(self, model: nn.Module, traced: TracedGraph, exchange: Activation | None) -> None:
        self.modules = dict(model.named_modules())
        self.nodes = traced.operators()
        self.exchange = exchange

    def sites(self) -> dict[str, NormSite]:
        found: dict[str, NormSite] = {}
        calls = defaultdict(list)
        for node in self.nodes:
            if operator_of(node.target).kind in _NORMS:
                calls[str(node.meta["module"])].append(node)
        for path, nodes in calls.items():
            why = self._layer_obstacle(path, nodes)
            found[path] = NormSite(path, refused=why) if why else self._site(path, nodes[0])
        return found

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

    def _site(self, path: str, node: fx.Node) -> NormSite:
        last, reader, why = _follow(node)
        if reader is None:
            return NormSite(path, refused=why)
        site = self._activation(path, reader)
        if site.refused:
            return site
        if site.activation.kind != "identity":
            last = reader
        why = self._hooked(path, node, reader, site) or self._overwritten(node, last)
        if why:
            return NormSite(path, refused=why)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        others = [user for user in source.users if user is not node]
        kept = next((_operator(user) for user in others if _keeps(user)), None)
        saved = 0 if kept else _bytes(source)
        if site.activation.kind != "identity" and not _operator(reader).endswith("_"):
            saved += _bytes(node)  # an activation that is not in place keeps its input as well
        if not saved:
            return NormSite(path, refused=f"nothing to save: its input is kept for {kept} anyway")
        return replace(site, saved=saved, shared=self._shared(source, others))

    def _activation(self, path: str, reader: fx.Node) -> NormSite:
        """Return what the reader computes, and whether it can be part of the norm."""
        name = _operator(reader)
        plain = name.removesuffix("_")
        where = str(reader.meta["module"])
        module = self.modules[where]
        read = operator_of(reader.target).facet(_INVERTIBLE)
        activation: Activation | None = None if read is UNKNOWN else read(reader)
        if plain == "relu" and self.exchange is not None:
            if type(module).forward is nn.ReLU.forward:
                return NormSite(path, self.exchange, where, exchange=True)
            return NormSite(
                path,
                refused=f"the ReLU after it is called as a function by {where or 'the model'}; "
                "only layers can be exchanged, so make it an nn.ReLU",
            )
        if plain == "prelu" and activation_of(module) == Activation("prelu"):
            activation = Activation("prelu")
        if activation is not None:
            return self._invertible(path, where, activation)
        kind = operator_of(reader.target).kind
        if kind in _LAYERS:
            return NormSite(path)
        if kind in _ACTIVATIONS:
            more = ", or activation='leaky_relu:0.01' exchanges it" if plain == "relu" else ""
            why = "is called as a function" if plain == "prelu" else "is not invertible"
            return NormSite(path, refused=f"activation {plain} {why}; Recompute does it{more}")
        return NormSite(path, refused=f"{name} reads it, not an activation")

    def _invertible(self, path: str, where: str, activation: Activation) -> NormSite:
        if not activation.slope > 0:
            return NormSite(
                path, refused=f"activation {activation} is not invertible; Recompute does it"
            )
        module = self.modules[where]
        if activation_of(module) == activation:
            return NormSite(path, activation, where)
        why = obstacle(module)
        if why:
            return NormSite(path, refused=f"{where or 'the model'} calls the activation, and {why}")
        return NormSite(path, activation, where, call=True)

    def _hooked(self, path: str, node: fx.Node, reader: fx.Node, site: NormSite) -> str:
        """Say which hook sees the tensor between norm and activation."""
        if site.activation.kind == "identity":
            return ""
        left, entered = set(_parents(path)), set(_parents(site.reader))
        passed = [str(n.meta["module"]) for n in _between(node, reader)]
        for outside in sorted(left - entered) + passed:
            hook = hooks_of(self.modules[outside])
            if hook:
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


def _follow(node: fx.Node) -> tuple[fx.Node, fx.Node | None, str]:
    """Go from a norm past idle dropout.

    Returns:
        The last node before the reader, the reader or None, and why there is none.
    """
    last = node
    while True:
        readers = list(last.users)
        if len(readers) != 1:
            times = f"read {len(readers)} times" if readers else "not read at all"
            return last, None, f"the tensor between norm and activation is {times}"
        (reader,) = readers
        if reader.op == "output":
            return last, None, "its output is an output of the model"
        if operator_of(reader.target).kind is not Kind.DROPOUT:
            return last, reader, ""
        if float(_argument(reader, 1, "p", 0.5)) > 0 and _argument(reader, 2, "train", False):
            return last, None, "dropout is active between norm and activation"
        last = reader


@register(_INVERTIBLE, "aten.leaky_relu")
def _leaky_relu(node: fx.Node) -> Activation:
    return Activation(
        _operator(node).rstrip("_"), float(_argument(node, 1, "negative_slope", 0.01))
    )


@register(_INVERTIBLE, "aten.elu")
def _elu(node: fx.Node) -> Activation | None:
    scaled = any(_argument(node, i, key, 1) != 1 for i, key in ((2, "scale"), (3, "input_scale")))
    return None if scaled else Activation("elu", float(_argument(node, 1, "alpha", 1.0)))


def _between(node: fx.Node, reader: fx.Node) -> Iterator[fx.Node]:
    current = next(iter(node.users))
    while current is not reader:
        yield current
        current = next(iter(current.users))


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
