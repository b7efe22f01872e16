"""A network as the planner sees it: levels, what can be resized there, its size and its peak."""

from __future__ import annotations

__all__ = ["Network", "Sizes", "WeightCounter", "conv_weights", "level_scales"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from pocketize.channels.analysis import analyse
from pocketize.channels.groups import ChannelGroup, ChannelGroups
from pocketize.channels.levels import Level, find_levels
from pocketize.channels.widths import sizes_after
from pocketize.engine.pipeline import plan
from pocketize.errors import OptionError, PlanningError, RewriteError
from pocketize.graph.capture import TracedGraph, settle_inputs
from pocketize.memory import measure
from pocketize.ops import bind, is_convolution
from pocketize.passes.widths.width import Width
from pocketize.plugin.edits import Resize
from pocketize.units import bytes_text


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


class WeightCounter:
    """Counts a model's weights for any widths of its channel groups."""

    def __init__(self, channels: ChannelGroups, levels: Sequence[Level]) -> None:
        self.channels = channels
        parameters = dict(channels.model.named_parameters())
        weights = conv_weights(channels.traces[0])
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
                member.positions.shape[1]
                * (math.prod(buffers[member.tensor]) // buffers[member.tensor][member.axis])
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


def conv_weights(traced: TracedGraph) -> dict[str, str]:
    """Return the convolution weights of a model, with the path of the layer that first reads each.

    A weight that is computed from parameters (weight norm, weight standardisation) stands for the
    one of its own shape among them.
    """
    found: dict[str, str] = {}
    for node in traced.operators():
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


class Network:
    """A model, its levels, and what it would be at other widths.

    Attributes:
        inputs: what it was recorded with.
        levels: its resolution levels, finest first.
        free: for each level, the groups that can be resized; a group made at several levels is at
            the finest.
        stuck: layers that a dry run of a plan found immovable.
        step: what :meth:`peak` is the peak of, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        keep: str | Sequence[str],
        mode: Literal["train", "infer"],
        optimizer: Literal["adam", "adamw", "sgd"] | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.model = model
        self.inputs = settle_inputs(model, inputs)
        self._mode, self._optimizer, self._progress = mode, optimizer, progress
        self._peaks: dict[tuple[tuple[int, int], ...], int] = {}
        step = "inference" if mode == "infer" else f"training step, {optimizer or 'no optimizer'}"
        self.step = f"{step}, {self.inputs.describe()}"
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        self.channels = analyse(model, self.inputs)
        self.levels = find_levels(self.channels)
        kept = {group for pattern in self.keep for group in self.channels.matching(pattern)}
        self.free = [
            [group for group in level.groups if group.frozen is None and group not in kept]
            for level in self.levels
        ]
        if not any(self.free):
            raise PlanningError(
                f"{type(model).__name__} has no width that can change: all its channels are frozen "
                "or kept; `pocketize explain` shows why"
            )
        self.stuck: list[str] = []
        self._counter = WeightCounter(self.channels, self.levels)
        self.sizes = self._counter.count({})

    def count(self, wanted: Mapping[ChannelGroup, int]) -> Sizes:
        """Return the sizes at some units; nothing is rewritten."""
        return self._counter.count(wanted)

    def peak(self, wanted: Mapping[ChannelGroup, int]) -> int:
        """Return the estimated peak at some units: the model is rewritten, and counted on fakes."""
        key = tuple((id(g), units) for g, units in wanted.items() if units < g.units)
        if key not in self._peaks:
            model = self.model
            if key:
                model = plan(model, self.width(wanted), inputs=self.inputs).apply()
            peak = measure(model, self.inputs, self._mode, self._optimizer, estimate=True).peak
            self._peaks[key] = peak
            if self._progress is not None:
                widths = [
                    "/".join(dict.fromkeys(str(wanted.get(g, g.units) * g.step) for g in groups))
                    for groups in self.free
                ]
                self._progress(f"widths {' '.join(filter(None, widths))}: {bytes_text(peak)}")
        return self._peaks[key]

    def width(self, wanted: Mapping[ChannelGroup, int]) -> Width:
        """Return the pass that brings groups to some units: by level if that says it all.

        Args:
            wanted: units of every free group, with at least one that changes.
        """
        numbers = {group: units * group.step for group, units in wanted.items()}
        by_level = [{numbers[group] for group in groups} for groups in self.free]
        if all(len(here) == 1 for here in by_level):
            made = Width(levels=tuple(n for here in by_level for n in here), keep=self.keep)
            if self._asks(made, numbers):
                return made
        return Width(channels=self._by_layer(numbers))

    def _asks(self, made: Width, numbers: Mapping[ChannelGroup, int]) -> bool:
        try:
            demands = made.demands(self.channels)
        except (OptionError, RewriteError):
            return False  # a group that is made at two levels, which are to differ
        return all(demands.get(group, group.channels) == n for group, n in numbers.items())

    def _by_layer(self, numbers: Mapping[ChannelGroup, int]) -> dict[str, int]:
        """Return numbers by a layer that makes each group, where possible only that group."""
        makes: dict[str, int] = {}
        for group in self.channels.groups:
            for layer in group.layers:
                makes[layer] = makes.get(layer, 0) + 1
        found: dict[str, int] = {}
        for group, number in numbers.items():
            if number < group.channels:
                layer = min(group.layers, key=lambda path: makes[path])  # the first of the least
                found[layer] = found.get(layer, 0) + number
        return found

    def immovable(self, wanted: Mapping[ChannelGroup, int]) -> list[ChannelGroup]:
        """Run a plan dry, and return the groups that the engine's check would not let shrink.

        Args:
            wanted: units of every free group, with at least one that changes.
        """
        first = plan(self.model, self.width(wanted), inputs=self.inputs).passes[0]
        resized = {(e.tensor, e.axis): e.keep for e in first.edits if isinstance(e, Resize)}
        return [
            group
            for group, units in wanted.items()
            if units < group.units
            and not any(
                (member.tensor, member.axis) in resized
                and not set(member.positions.ravel().tolist())
                <= set(resized[member.tensor, member.axis])
                for member in group.members
            )
        ]

    def freeze(self, groups: Sequence[ChannelGroup]) -> None:
        """Leave groups out of every further plan."""
        self.stuck += [group.name for group in groups]
        self.free = [[group for group in level if group not in groups] for level in self.free]
        self._peaks.clear()


def level_scales(model: nn.Module, inputs: Any = None) -> tuple[int, ...]:
    """Return for each resolution level the ``s`` with which it sees the images at ``1 / 2^s``.

    A U-Net has 0, 1, 2, ...; one with a strided stem skips some. Where a pooling leaves an axis
    out, as in volumes of few slices, the axes that it does not leave out decide.

    Args:
        model: any module; unchanged.
        inputs: example inputs; ``None`` guesses.

    Raises:
        CaptureError, InputError: the model does not run on the inputs, or none could be guessed.
    """
    settled = settle_inputs(model, inputs)
    full = max((tuple(t.shape[2:]) for t in settled.tensors()), key=_voxels)
    scales = []
    for level in find_levels(analyse(model, settled)):
        if len(level.size) == len(full) and _voxels(level.size):
            ratio = max(whole / part for whole, part in zip(full, level.size, strict=True))
        else:  # positions of a linear layer
            ratio = _voxels(full) / max(1, _voxels(level.size))
            ratio = ratio ** (1 / max(1, len(full)))
        scales.append(max(0, round(math.log2(ratio))))
    return tuple(scales)


def _voxels(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
