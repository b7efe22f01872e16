"""Resolution levels and sides of a network, read from its traced graph and not from names.

Every operator moves the resolution by a factor: a stride divides it, a transposed convolution or an
interpolation multiplies it, and everything else (padding, cropping, unpadded convolutions) leaves
it, however the size of the tensor changes by some voxels. The product along the way is the level,
so that nets whose convolutions are unpadded have the levels that their author would count.
"""

from __future__ import annotations

__all__ = [
    "Level",
    "Place",
    "find_levels",
    "find_places",
    "find_sides",
    "is_depthwise",
    "is_layer",
]

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from pocketize.channels.groups import ChannelGroup, ChannelGroups
from pocketize.graph.capture import TracedGraph
from pocketize.ops import CONVOLUTIONS, Kind, bind, is_convolution, operator_of

#: Operators that turn a whole map into one number a channel: what they feed works on that map.
_REDUCTIONS = {Kind.REDUCTION, Kind.ADAPTIVE_POOLING}
#: Operators after which the axes of a tensor no longer tell which of them are spatial.
_MOVES = {Kind.RESHAPE, Kind.PERMUTATION}


@dataclass(frozen=True)
class Place:
    """Where in the pyramid of resolutions an operator's result lies.

    Attributes:
        octave: log2 of the model input's voxels for one voxel here: 0 at full resolution, 3 after
            a 2x2x2 pooling.
        raised: something before it, or itself, raised the resolution: it is in a decoder.
        certain: the axes of the tensor are batch, channels and space.
    """

    octave: float
    raised: bool = False
    certain: bool = True


@dataclass(frozen=True, eq=False)
class Level:
    """One resolution of a network.

    Attributes:
        size: spatial size of what the layers at this level make, for the traced inputs; where
            only linear layers run, their number of positions.
        groups: the channel groups that are made here, frozen ones included; a group that is made
            at several levels belongs to the finest.
        layers: paths of all convolutions and linear layers that run here.
        shared: groups that are made here too, and belong to a finer level.
    """

    size: tuple[int, ...]
    groups: tuple[ChannelGroup, ...]
    layers: tuple[str, ...]
    shared: tuple[ChannelGroup, ...] = ()

    def __str__(self) -> str:
        """The size, as ``"32x32x16"``."""
        return "x".join(map(str, self.size)) or "1"


def find_levels(channels: ChannelGroups) -> tuple[Level, ...]:
    """Return the levels of a model at which convolutions or linear layers run, finest first.

    Layers on pooled vectors (squeeze-and-excitation, a classifier's head) count to the level that
    was pooled.
    """
    traced = channels.traces[0]
    places = find_places(traced)
    made: dict[float, list[fx.Node]] = defaultdict(list)
    for node in _layers(traced):
        if node in places:
            made[places[node].octave].append(node)
    group_of = {int(r): g for g in channels.groups if g.layers for r in g.roots.tolist()}
    taken: set[ChannelGroup] = set()
    levels = []
    for octave in sorted(made):
        here: dict[ChannelGroup, None] = {}
        for node in made[octave]:
            if not is_depthwise(node):
                here.update(dict.fromkeys(_groups(channels, node, group_of)))
        groups = tuple(group for group in here if group not in taken)
        shared = tuple(group for group in here if group in taken)
        taken.update(groups)
        paths = dict.fromkeys(str(node.meta["module"]) for node in made[octave])
        levels.append(Level(_size(made[octave]), groups, tuple(paths), shared))
    return tuple(levels)


def find_sides(traced: TracedGraph) -> dict[str, str]:
    """Return ``"encoder"`` or ``"decoder"`` for the path of each layer.

    A layer is in the decoder where anything before it, or itself, raises the resolution: a strided
    transposed convolution, an interpolation, a pixel shuffle. The layers at the coarsest resolution
    are in the encoder. A layer that runs on both sides is in the decoder.
    """
    places = find_places(traced)
    sides: dict[str, str] = {}
    for node in _layers(traced):
        if node in places:
            path = str(node.meta["module"])
            if places[node].raised:
                sides[path] = "decoder"
            else:
                sides.setdefault(path, "encoder")
    return sides


def find_places(traced: TracedGraph) -> dict[fx.Node, Place]:
    """Return the place of every traced result that depends on an input."""
    surveyor = _Surveyor(traced)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            surveyor.enter(node)
        elif node.op == "call_function":
            surveyor.follow(node)
    return surveyor.places


class _Surveyor:
    """Follows the resolution from the inputs to every operator."""

    def __init__(self, traced: TracedGraph) -> None:
        self.places: dict[fx.Node, Place] = {}
        shapes = [
            tuple(node.meta["val"].shape) for node in traced.graph.nodes if node.op == "placeholder"
        ]
        # the largest input is full resolution; others may be embeddings or time steps
        full = max(shapes, key=lambda shape: math.prod(shape[2:]), default=())
        self.batch = full[0] if full else 1
        self.spatial = len(full[2:])
        self.voxels = math.prod(full[2:])
        self.known = {self.voxels: 0.0}
        self.shapes = {tuple(full[2:]): 0.0} if full[2:] else {}

    def enter(self, node: fx.Node) -> None:
        shape = tuple(node.meta["val"].shape)
        self.places[node] = Place(self._octave(math.prod(shape[2:])), certain=len(shape) > 2)

    def follow(self, node: fx.Node) -> None:
        sources = [source for source in node.all_input_nodes if source in self.places]
        out = _first_tensor(node.meta["val"])
        if not sources or out is None:
            return
        base = max(sources, key=lambda source: _voxels(source))
        before = self.places[base]
        octave, certain = self._moved(node, base, before, out)
        raised = any(self.places[source].raised for source in sources)
        self.places[node] = Place(octave, raised or octave < before.octave - 0.5, certain)

    def _moved(
        self, node: fx.Node, base: fx.Node, before: Place, out: Tensor
    ) -> tuple[float, bool]:
        """Return the octave of a result, and whether its axes are known."""
        record, bound = operator_of(node.target), bind(node.target, node.args, node.kwargs)
        kind, window = record.kind, record.window
        strides = window(bound, out.ndim - 2).stride if callable(window) else ()
        steps = round(sum(map(math.log2, strides)), 6)
        if kind in CONVOLUTIONS:
            if not before.certain:
                voxels = _voxels(node)  # a map of just this size may have been seen
                return self.known.get(voxels, self._octave(voxels)), True
            up = kind is Kind.TRANSPOSED_CONVOLUTION or bool(bound.get("transposed"))
            octave = before.octave + (-steps if up else steps)
            self.known.setdefault(_voxels(node), octave)
            self.shapes.setdefault(tuple(out.shape[2:]), octave)
            return octave, True
        if kind is Kind.LINEAR:
            positions = out.numel() // max(1, out.shape[-1] * self.batch)
            return self._of_positions(positions, before.octave), False
        if kind is Kind.POOLING and callable(window) and before.certain:
            return before.octave + steps, True
        source = _first_tensor(base.meta["val"])
        if source is None or not before.certain or kind in _MOVES:
            return self._regained(before, out)
        if kind in _REDUCTIONS and (_voxels(node) == 1 or out.ndim < 3):
            return before.octave, True
        if out.ndim != source.ndim or out.ndim < 3:
            return before.octave, out.ndim > 2
        if kind is Kind.PADDING:
            return before.octave, True
        if kind is Kind.SLICE:
            strided = bound["dim"] >= 2 or -out.ndim + 2 <= bound["dim"] < 0
            return before.octave + (math.log2(bound.get("step", 1)) if strided else 0.0), True
        moved = math.log2(_voxels(base) / max(1, _voxels(node)))
        return before.octave + (0.0 if abs(moved) < 0.5 else float(round(moved))), True

    def _regained(self, before: Place, out: Tensor) -> tuple[float, bool]:
        """Return what can be told after axes may have changed places.

        A map of a size that was seen before is taken to be one: the end of a pixel shuffle, say.
        """
        octave = self.shapes.get(tuple(out.shape[2:]))
        return (before.octave, False) if octave is None else (octave, True)

    def _of_positions(self, positions: int, carried: float) -> float:
        """Return the octave of a linear layer, which may run on windows of a padded map.

        Padding makes a map up to twice as long, which is no halving of the resolution yet.
        """
        if positions <= 1:
            return carried
        if positions in self.known:
            return self.known[positions]
        raw = math.log2(self.voxels / positions) if self.voxels else 0.0
        whole = abs(raw - round(raw)) < 0.01
        return float(round(raw)) if whole or abs(raw - carried) > 0.85 * self.spatial else carried

    def _octave(self, voxels: int) -> float:
        return float(round(math.log2(self.voxels / max(1, voxels)))) if self.voxels else 0.0


def is_layer(node: fx.Node) -> bool:
    """Whether an operator is a convolution or a linear layer."""
    return is_convolution(node) or operator_of(node.target).kind is Kind.LINEAR


def _layers(traced: TracedGraph) -> Iterator[fx.Node]:
    """Yield convolutions and linear layers in the order in which they run."""
    return filter(is_layer, traced.operators())


def is_depthwise(node: fx.Node) -> bool:
    """Whether a convolution keeps its channels apart: it passes them on rather than makes them."""
    groups = bind(node.target, node.args, node.kwargs).get("groups", 1)
    source = _first_tensor(node.all_input_nodes[0].meta["val"])
    return bool(groups > 1 and source is not None and groups == source.shape[1])


def _groups(
    channels: ChannelGroups, node: fx.Node, group_of: dict[int, ChannelGroup]
) -> Iterator[ChannelGroup]:
    value = channels.values[0][node]
    for label in value.labels:
        for root in np.unique(channels.roots[label]).tolist():
            if root in group_of:
                yield group_of[root]


def _size(nodes: list[fx.Node]) -> tuple[int, ...]:
    """Return the size that most of the layers at a level have; of maps, where there are any."""
    maps = Counter(
        tuple(node.meta["val"].shape[2:])
        for node in nodes
        if is_convolution(node) and _voxels(node) > 1
    )
    if maps:
        return maps.most_common(1)[0][0]
    out = nodes[0].meta["val"]
    return tuple(out.shape[2:]) if is_convolution(nodes[0]) else (math.prod(out.shape[1:-1]),)


def _voxels(node: fx.Node) -> int:
    tensor = _first_tensor(node.meta["val"])
    return math.prod(tensor.shape[2:]) if tensor is not None else 0


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple):
        return next((item for item in value if isinstance(item, Tensor)), None)
    return None
