"""Weights of a network at other widths, counted and not guessed; nothing is rewritten."""

from __future__ import annotations

__all__ = ["Counter", "Sizes", "conv_weights"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from pocketize.channels.groups import ChannelGroup, ChannelGroups
from pocketize.channels.levels import Level
from pocketize.channels.widths import sizes_after
from pocketize.graph.capture import Captured
from pocketize.ops import bind, is_convolution


@dataclass(frozen=True)
class Sizes:
    """How large a network is.

    Attributes:
        theta: weights of its convolutions, transposed ones included; no biases, no norms, nothing
            linear. The paper's measure.
        levels: the same, level by level, by where the convolutions run.
        parameters: all parameters.
        stored: parameters and buffers, such as running statistics: what a file of it holds.
    """

    theta: int
    levels: tuple[int, ...]
    parameters: int
    stored: int


class Counter:
    """Counts a model's weights for any widths of its channel groups."""

    def __init__(self, channels: ChannelGroups, levels: Sequence[Level]) -> None:
        self.channels = channels
        parameters = dict(channels.model.named_parameters())
        weights = conv_weights(channels.recordings[0])
        self._names: list[list[str]] = []
        for level in levels:  # a weight that runs at several levels counts at the finest
            mine = [name for name, path in weights.items() if path in level.layers]
            self._names.append([name for name in mine if name in parameters])
            weights = {name: path for name, path in weights.items() if name not in mine}
        buffers = {name: buffer.shape for name, buffer in channels.model.named_buffers()}
        self._buffers = sum(math.prod(shape) for shape in buffers.values())
        # what one unit of a group has in buffers, which the engine does not count
        self._each = {
            group: sum(
                member.positions.shape[1] * _rest(buffers[member.tensor], member.axis)
                for member in group.members
                if member.tensor in buffers
            )
            for group in channels.groups
        }

    def count(self, wanted: Mapping[ChannelGroup, int]) -> Sizes:
        """Return the sizes with some groups brought to a number of units."""
        shapes = sizes_after(self.channels, wanted)
        numel = {name: math.prod(shape) for name, shape in shapes.items()}
        levels = tuple(sum(numel[name] for name in names) for names in self._names)
        parameters = sum(numel.values())
        gone = sum((group.units - units) * self._each[group] for group, units in wanted.items())
        return Sizes(sum(levels), levels, parameters, parameters + self._buffers - gone)


def conv_weights(captured: Captured) -> dict[str, str]:
    """Return the convolution weights of a model, with the path of the layer that first reads each.

    A weight that is computed from parameters (weight norm, weight standardisation) stands for the
    one of its own shape among them.
    """
    found: dict[str, str] = {}
    for node in captured.operators():
        if not is_convolution(node):
            continue
        weight = bind(node.target, node.args, node.kwargs).get("weight")
        if isinstance(weight, fx.Node):
            source = _source(weight)
            if source is not None:
                found.setdefault(source, str(node.meta["module"]))
    return found


def _source(weight: fx.Node) -> str | None:
    shape = tuple(weight.meta["val"].shape)
    queue, seen = [weight], {weight}
    while queue:
        node = queue.pop(0)
        held = node.op == "get_attr" and node.meta.get("tensor")
        if held and tuple(node.meta["val"].shape) == shape:
            return str(node.meta["tensor"])
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return None


def _rest(shape: Sequence[int], axis: int) -> int:
    return math.prod(size for number, size in enumerate(shape) if number != axis)
