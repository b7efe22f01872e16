"""The width of the features at the finest resolution: what a pocket network clamps to.

Features are the channels that a convolution or a linear layer makes, or that a pixel shuffle brings
to a finer resolution. Of those at the finest resolution that has any, the first that run count. No
features are the channels of

* an output head: they reach the output of the model, and nothing but the head reads them; so do
  the channels of layers that are as wide as the head and lead only to it;
* the input: a convolution that reads nothing but the input and makes as many channels as it has;
* a depthwise convolution, which passes channels on, of the input or of others. The depthwise half
  of a separable convolution over one channel is known by the 1x1 convolution that alone reads it;
* a gate: a layer that makes one channel;
* a layer that mixes positions, as the token mixing of an MLP-Mixer does.
"""

from __future__ import annotations

__all__ = ["finest_width"]

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import fx

from pocketize.channels.groups import ChannelGroups
from pocketize.channels.labels import Value
from pocketize.channels.levels import find_places, is_depthwise, is_layer
from pocketize.channels.rules import sums_or_maps
from pocketize.errors import RewriteError
from pocketize.ops import NORMS, Kind, bind, is_convolution, operator_of

#: How many skipped layers a plan names.
_SHOWN = 3
_PASSES_INPUT = "passes the input's channels on"
#: Operators that may bring channels to a finer resolution by moving them.
_SHUFFLES = {Kind.SHUFFLE, Kind.RESHAPE, Kind.PERMUTATION}


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer that ran, or a pixel shuffle, with the units of the channels it makes and reads.

    ``octave`` is its resolution, as in :class:`~pocketize.channels.levels.Place`; ``passes`` why
    its channels are no features, where that is known from the layer alone.
    """

    node: fx.Node
    path: str
    width: int
    octave: float
    makes: frozenset[int]
    reads: frozenset[int]
    passes: str = ""

    @property
    def title(self) -> str:
        return self.path or "the model"


def finest_width(channels: ChannelGroups) -> tuple[int, str]:
    """Return the width of the features at the finest resolution, and a sentence that says why.

    Args:
        channels: the analysis of the model.

    Raises:
        RewriteError: the model runs no convolution and no linear layer.
    """
    layers = list(_FeatureLayers(channels).layers())
    if not layers:
        raise RewriteError(
            "pocket: the model runs no convolution and no linear layer, so there is no width to "
            "clamp to; pass width=..."
        )
    heads = _heads(layers, _ends(channels))
    excluded = {
        layer: layer.passes or ("makes the output" if layer in heads else "") for layer in layers
    }
    features = [layer for layer in layers if not excluded[layer]]
    if not features:
        first = layers[0]
        return first.width, f"the first layer, {first.title}, as none makes features"
    finest = min(layer.octave for layer in features)
    chosen = next(layer for layer in features if layer.octave < finest + 0.5)
    others = {
        layer.title: excluded[layer] or "works at a coarser resolution"
        for layer in layers
        if layer is layers[0]
        or layer.octave < finest - 0.5
        or (excluded[layer] and layer in layers[: layers.index(chosen)])
    }
    others.pop(chosen.title, None)
    told = ", nor of ".join(f"{path}, which {why}" for path, why in list(others.items())[:_SHOWN])
    rest = f", nor of {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    passed = f" (not of {told}{rest})" if told else ""
    return chosen.width, f"the first features at the finest resolution, of {chosen.title}{passed}"


class _FeatureLayers:
    """Goes through the recorded operators in the order in which they ran."""

    def __init__(self, channels: ChannelGroups) -> None:
        self.channels, self.values = channels, channels.values[0]
        self.traced = channels.traces[0]
        self.places = find_places(self.traced)
        self.inputs: set[int] = set()
        #: Results that hold the input's channels, each of them changed or not.
        self.raw: set[fx.Node] = set()

    def layers(self) -> Iterator[_Layer]:
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self.raw.add(node)
                shape = node.meta["val"].shape
                self.inputs |= {shape[1]} if len(shape) > 2 else set()
                continue
            sources = [source for source in node.all_input_nodes if source in self.places]
            if not sources or node not in self.places:
                continue
            raw = all(source in self.raw for source in sources)
            layer = None
            if is_layer(node):
                layer = self._layer(node, sources[0], raw)
            elif not raw and operator_of(node.target).kind in _SHUFFLES:
                layer = self._shuffled(node, sources[0])
            if layer is not None:
                yield layer
            if raw and (layer is None or layer.passes == _PASSES_INPUT):
                self.raw.add(node)

    def _layer(self, node: fx.Node, source: fx.Node, raw: bool) -> _Layer:
        out, given = node.meta["val"], source.meta["val"]
        octave, path = self.places[node].octave, str(node.meta["module"])
        if operator_of(node.target).kind is Kind.LINEAR:
            axis, passes = -1, self._mixes_positions(source)
            # tokens of two maps side by side are no finer than either
            octave = max(octave, self.places[source].octave)
        else:
            axis = 1 - node.args[1].meta["val"].ndim  # type: ignore[union-attr]
            passes = self._passed_on(node, given.shape[axis], out.shape[axis], raw)
        width = out.shape[axis]
        if width == 1 and not passes:
            passes = "makes one channel"
        return _Layer(node, path, width, octave, self._units(node), self._units(source), passes)

    def _passed_on(self, node: fx.Node, before: int, after: int, raw: bool) -> str:
        """Say that a convolution passes channels on instead of making some; ``""`` if not."""
        if not raw:
            return "is depthwise" if is_depthwise(node) else ""
        same = before == after and before in self.inputs
        if same or is_depthwise(node) or (before == 1 and _is_half_of_separable(node)):
            return _PASSES_INPUT
        return ""

    def _mixes_positions(self, source: fx.Node) -> str:
        value = self.values[source]
        known = isinstance(value, Value) and value.labels
        return "mixes positions" if known and value.label_on(value.ndim - 1) is None else ""

    def _shuffled(self, node: fx.Node, source: fx.Node) -> _Layer | None:
        """Return what brings channels to a finer resolution by moving them."""
        out, value = node.meta["val"], self.values[node]
        place, before = self.places[node], self.places[source]
        if place.octave > before.octave - 0.5 or not place.certain or out.ndim < 3:
            return None
        if not isinstance(value, Value) or value.label_on(1) is None:
            return None
        units = self._units(node)
        return _Layer(node, str(node.meta["module"]), out.shape[1], place.octave, units, units)

    def _units(self, node: fx.Node) -> frozenset[int]:
        value = self.values.get(node)
        labels = value.labels if isinstance(value, Value) else ()
        return frozenset(int(u) for x in labels for u in np.unique(self.channels.roots[x]))


def _is_half_of_separable(node: fx.Node) -> bool:
    """Whether nothing but a 1x1 convolution reads that of a larger kernel, or a norm in between."""
    if _is_pointwise(node):
        return False
    while len(node.users) == 1:
        (node,) = node.users
        if is_layer(node):
            groups = bind(node.target, node.args, node.kwargs).get("groups", 1)
            return is_convolution(node) and groups == 1 and _is_pointwise(node)
        if operator_of(node.target).kind not in NORMS:
            return False
    return False


def _is_pointwise(node: fx.Node) -> bool:
    return set(node.args[1].meta["val"].shape[2:]) == {1}  # type: ignore[union-attr]


def _ends(channels: ChannelGroups) -> frozenset[int]:
    """Return the units that reach an output, also if they are summed or mapped on the way."""
    values = channels.values[0]
    found: set[int] = set()
    seen: set[fx.Node] = set()
    stack = channels.traces[0].outputs()
    while stack:
        node = stack.pop()
        value = values.get(node)
        if node in seen or not isinstance(value, Value):
            continue
        seen.add(node)
        for label in value.labels:
            found.update(np.unique(channels.roots[label]).tolist())
        if not value.labels and sums_or_maps(node.target):
            stack += node.all_input_nodes
    return frozenset(found)


def _heads(layers: list[_Layer], ends: frozenset[int]) -> set[_Layer]:
    """Return the layers of output heads.

    Features that the model returns too are no head: other layers read them.
    """
    heads: set[_Layer] = set()
    for layer in reversed(layers):
        if not layer.makes:
            continue
        # what is added to the head's channels may read them as well
        readers = [x for x in layers if not x.reads.isdisjoint(layer.makes)]
        readers = [x for x in readers if x.makes.isdisjoint(layer.makes)]
        if layer.makes.isdisjoint(ends):
            tail = bool(readers) and all(x in heads and x.width == layer.width for x in readers)
        else:
            tail = all(x in heads for x in readers)
        if tail:
            heads.add(layer)
    return heads
