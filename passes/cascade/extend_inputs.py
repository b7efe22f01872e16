"""More input channels: guidance from another network, a prior, a second modality.

The weights that read the input are found in the traced graph, and again in a graph at the wider
input, which also tells where in each weight the new channels are: behind the others for a
convolution, among them for a linear layer over flattened patches. All new weights are zero, so that
the network computes what it did before.

To find them, each index of the input's channel axis gets a number. What the traced operators do to
the input is done to an array of these numbers, up to a convolution or a linear layer: there the
array has the input channel of each index of the weight. An operator in between that mixes channels,
or has a parameter for each, would compute something else on more of them, and is refused by name.
"""

from __future__ import annotations

__all__ = ["ExtendInputs", "extend_inputs"]

import contextlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from pocketize._torch import FakeTensor, FakeTensorMode
from pocketize.engine.surgery import apply_edits
from pocketize.errors import CaptureError, OptionError, RewriteError
from pocketize.graph.capture import TracedGraph, trace_module
from pocketize.graph.clone import clone, fake_clone
from pocketize.ops import MOVEMENTS, Kind, operator_of
from pocketize.passes.cascade.first_readers import (
    ChannelWalk,
    FirstReader,
    find_first_readers,
    refusal,
)
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Target
from pocketize.plugin.edits import Extend


@dataclass(frozen=True, kw_only=True)
class ExtendInputs(Pass):
    """Let a network read more input channels, behind those it has.

    Every weight that reads the input is extended by zeros: the first convolution, the shortcut
    beside it, a patch embedding, a later layer that the input is concatenated to. Parameters remain
    the same objects, with their gradients and ``requires_grad``; an optimiser that has taken a step
    has moments of the old shape, so make a new one.

    Registered passes keep a network's inputs and outputs. This one does not, so it is given in
    Python only, and alone: ``rewrite(model, ExtendInputs(4), inputs=x)`` with an ``x`` of the
    present channels.

    Attributes:
        channels: how many channels are added behind those that the network reads.
        argument: which of the network's input tensors, in the order of the arguments.
    """

    name: ClassVar[str] = "extend-inputs"
    summary: ClassVar[str] = "Read more input channels, with weights that start at zero"
    positional: ClassVar[str] = "channels"

    channels: int = field(kw_only=False)
    argument: int = 0

    def validate(self) -> None:
        """Refuse to add nothing."""
        if self.channels < 1:
            raise OptionError(f"extend-inputs: channels must be at least 1, not {self.channels}")
        if self.argument < 0:
            raise OptionError(
                f"extend-inputs: argument counts input tensors from 0, got {self.argument}"
            )

    @property
    def guarantee(self) -> Guarantee:
        """The same function of the channels that the network had."""
        return Guarantee.EXACT

    def propose(self, target: Target) -> Proposal:
        """Extend every weight that reads the input.

        Raises:
            RewriteError: the input is read by something that cannot be extended.
        """
        graphs = target.traces()
        try:
            edits = extend_inputs(target.model, graphs, self.channels, argument=self.argument)
        except RewriteError as error:
            name = type(target.model).__name__
            raise RewriteError(
                f"extend-inputs: {name} cannot read {self.channels} more channels: {error}"
            ) from error
        changes = []
        for e in edits:
            what = f"{e.size} -> {e.size + len(e.new)} on axis {e.axis} of {e.tensor}"
            changes.append(Change(e.path, what, "it reads the input"))
        return Proposal(edits=edits, changes=tuple(changes))


def extend_inputs(
    model: nn.Module, graphs: Sequence[TracedGraph], extra: int, *, argument: int = 0
) -> tuple[Extend, ...]:
    """Return one edit for each weight that reads an input, to read ``extra`` more channels.

    The graphs are those of the model in evaluation and in training mode; ``argument`` is which of
    its input tensors, in the order of the arguments.

    Raises:
        RewriteError: an operator that reads the input would compute something else, or the model
            does not run on more channels.
    """
    edits: dict[str, Extend] = {}
    for traced in graphs:
        walk = ChannelWalk(traced, argument)
        found = walk.run()
        had = traced.inputs.tensors()[argument].shape[1]
        grown = {key: _behind(reader, had, extra) for key, reader in found.items()}
        wide = _record_wide(model, traced, tuple(grown.values()), extra, argument)
        _check_same(traced, wide, walk.numbers)
        for edit in _placed(found, find_first_readers(wide, argument), had):
            if edits.setdefault(edit.tensor, edit) != edit:
                raise RewriteError(f"{edit.tensor} reads other channels in training mode")
    return tuple(edits.values())


def _behind(reader: FirstReader, had: int, extra: int) -> Extend:
    """Return an edit of the right size, with the new channels at the end for now."""
    times = [reader.channels.count(channel) for channel in range(1, had + 1)]
    if len(set(times)) > 1:
        raise RewriteError(
            f"{reader.tensor} reads some channels of the input {max(times)} times and some "
            f"{min(times)} times, so there is no telling how often it would read new ones"
        )
    size = len(reader.channels)
    new = tuple(range(size, size + times[0] * extra))
    return Extend(reader.tensor, reader.axis, new, size)


def _placed(
    narrow: Mapping[tuple[str, int], FirstReader],
    wide: Mapping[tuple[str, int], FirstReader],
    had: int,
) -> list[Extend]:
    """Return the edits with the positions of the new channels in the wider graph."""
    placed = []
    for key, reader in narrow.items():
        again = wide.get(key)
        channels = again.channels if again is not None else ()
        kept = tuple(channel for channel in channels if channel <= had)
        if kept != reader.channels or len(wide) != len(narrow):
            raise RewriteError(
                f"with more input channels {reader.tensor} does not read those that it reads now"
            )
        new = tuple(index for index, channel in enumerate(channels) if channel > had)
        placed.append(Extend(reader.tensor, reader.axis, new, len(reader.channels)))
    return placed


def _record_wide(
    model: nn.Module, traced: TracedGraph, edits: Sequence[Extend], extra: int, argument: int
) -> TracedGraph:
    """Trace the extended model at the wider input, without memory where the first was."""
    tensors = traced.inputs.tensors()
    fakes = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
    mode = fakes or FakeTensorMode(allow_non_fake_inputs=True)
    copy = clone(model) if traced.real else fake_clone(model, mode)
    apply_edits(copy, edits)

    def widened(tensor: Tensor) -> Tensor:
        if tensor is not tensors[argument]:
            return tensor
        shape = (tensor.shape[0], extra, *tensor.shape[2:])
        return torch.cat([tensor, tensor.new_zeros(shape)], 1)

    try:
        with contextlib.nullcontext() if traced.real else mode:
            return trace_module(copy, traced.inputs.map(widened), train=traced.train)
    except CaptureError as error:
        raise RewriteError(
            f"{type(model).__name__} does not run on {extra} more input channels, probably because "
            f"its code counts them: {error}"
        ) from error


def _check_same(before: TracedGraph, after: TracedGraph, of_channels: Container[fx.Node]) -> None:
    """Refuse a model that does something else with more channels.

    Operators ``of_channels`` make results that hold channels of the input: they may move more.
    """
    if before.structure != after.structure:
        raise RewriteError("with more input channels the outputs have other shapes")
    old, new = before.operators(), after.operators()
    for one, other in zip(old, new, strict=False):
        if one.target != other.target:
            raise RewriteError(
                f"with more input channels {other.target} runs where {one.target} did, "
                f"in {one.meta['module'] or 'the model itself'}"
            )
        moves = operator_of(one.target).kind in (Kind.RESHAPE, Kind.PADDING, *MOVEMENTS)
        if not (moves and one in of_channels) and _numbers_of(one) != _numbers_of(other):
            raise refusal(one, "computes with numbers that differ with more input channels")
    if len(old) != len(new):
        raise RewriteError("with more input channels the model runs another number of operators")


def _numbers_of(node: fx.Node) -> Any:
    """Return the arguments of an operator without those that it reads."""
    return fx.node.map_arg((node.args, node.kwargs), lambda _: None)
