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

__all__ = ["ExtendInputs", "FirstReader", "extend_inputs", "find_first_readers"]

import contextlib
import operator
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
from pocketize.ops import CONVOLUTIONS, MOVEMENTS, Kind, bind, operator_name, operator_of
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
        walk = _Walk(traced, argument)
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
            raise _refusal(one, "computes with numbers that differ with more input channels")
    if len(old) != len(new):
        raise RewriteError("with more input channels the model runs another number of operators")


def _numbers_of(node: fx.Node) -> Any:
    """Return the arguments of an operator without those that it reads."""
    return fx.node.map_arg((node.args, node.kwargs), lambda _: None)


def _refusal(node: fx.Node, why: str) -> RewriteError:
    where = f" at {node.meta['source']}" if node.meta.get("source") else ""
    path = node.meta["module"] or "the model itself"
    return RewriteError(f"{operator_name(node.target)}{where} in {path} {why}")


# -- the weights that read the input --------------------------------------------------------------

#: Operators that treat every channel alone, without parameters.
_SPATIAL = {
    Kind.CHANNEL_NORM,
    Kind.POOLING,
    Kind.ADAPTIVE_POOLING,
    Kind.UNPOOLING,
    Kind.RESIZE,
}


@dataclass(frozen=True)
class FirstReader:
    """An axis of a parameter, by its name ``tensor``, that reads channels of the input.

    ``channels`` has for each index the input channel that it reads, counted from 1, or 0 for none.
    """

    tensor: str
    axis: int
    channels: tuple[int, ...]
    module: str


def find_first_readers(
    traced: TracedGraph, argument: int = 0
) -> dict[tuple[str, int], FirstReader]:
    """Find the weights that read the channels of an input, by name and axis, in order.

    ``argument`` is which of the input tensors, in the order of the arguments; channels are axis 1.

    Raises:
        RewriteError: something other than a convolution or a linear layer reads the channels; the
            text names the operator and the module.
    """
    return _Walk(traced, argument).run()


class _Walk:
    def __init__(self, traced: TracedGraph, argument: int) -> None:
        self.graph, self.outputs = traced.graph, traced.outputs()
        self.numbers: dict[fx.Node, Any] = {}
        self.readers: dict[tuple[str, int], FirstReader] = {}
        self.layers: set[fx.Node] = set()
        places = list(self.graph.find_nodes(op="placeholder"))
        if not 0 <= argument < len(places):
            raise RewriteError(f"the model has {len(places)} input tensors, none is {argument}")
        shape = tuple(places[argument].meta["val"].shape)
        if len(shape) < 2:
            raise RewriteError(f"an input of shape {shape} has no axis of channels")
        channels = torch.arange(1, shape[1] + 1, dtype=torch.int32)
        self.numbers[places[argument]] = channels.view(-1, *[1] * (len(shape) - 2)).expand(shape)

    def run(self) -> dict[tuple[str, int], FirstReader]:
        for node in self.graph.nodes:
            if node.op == "call_function" and any(
                n in self.numbers and _any(self.numbers[n]) for n in node.all_input_nodes
            ):
                made = self._follow(node)
                if made is not None:
                    self.numbers[node] = made
        for node in self.outputs:
            if node in self.numbers and _any(self.numbers[node]):
                raise RewriteError("the model returns channels of its input, which would be more")
        if not self.readers:
            raise RewriteError("no convolution and no linear layer reads the input")
        names = {name for name, _ in self.readers}
        for node in self.graph.find_nodes(op="get_attr"):
            if node.meta.get("tensor") in names:
                self._check_users(node, node.meta["tensor"])
        return self.readers

    def _check_users(self, weight: fx.Node, name: str) -> None:
        """Refuse other operators that read a weight, as it will be larger."""
        for user in weight.users:
            kind = operator_of(user.target).kind
            if kind is Kind.COPY:
                self._check_users(user, name)
            elif user not in self.layers:
                raise _refusal(user, f"reads {name}, which would be larger")

    def _follow(self, node: fx.Node) -> Any:
        """Return the numbers in an operator's result; ``None`` where it holds none."""
        if node.target is operator.getitem:
            return self.numbers[node.all_input_nodes[0]][node.args[1]]
        kind = operator_of(node.target).kind
        if kind is Kind.RESHAPE:
            return self._array(node.all_input_nodes[0]).reshape(node.meta["val"].shape)
        if kind in MOVEMENTS:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._array)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if kind is Kind.PADDING:
            return self._padded(node)
        if kind in _SPATIAL:
            return self._spread(node)
        if kind in CONVOLUTIONS or kind is Kind.LINEAR:
            return self._read(node)
        if kind in (Kind.COPY, Kind.DROPOUT, Kind.POINTWISE, Kind.ACTIVATION):
            return self._met(node)
        raise _refusal(node, "reads the input's channels, and more of them might change it")

    def _array(self, node: fx.Node) -> Tensor:
        found = self.numbers.get(node)
        empty = torch.zeros((), dtype=torch.int32).expand(node.meta["val"].shape)
        return found if isinstance(found, Tensor) else empty

    def _padded(self, node: fx.Node) -> Any:
        arguments = bind(node.target, node.args, node.kwargs)
        array = self._array(arguments["self"])
        amounts = arguments["pad" if "pad" in arguments else "padding"]
        if len(amounts) // 2 < array.ndim - 1:  # in space: channels stay as they are
            return self._spread(node)
        if arguments.get("mode", "constant") != "constant":
            raise _refusal(node, "pads the axis of channels with channels")
        return torch.nn.functional.pad(array, amounts)

    def _spread(self, node: fx.Node) -> Any:
        """Return the numbers after an operator that treats every channel alone."""
        arguments = bind(node.target, node.args, node.kwargs)
        tensors = [key for key, value in arguments.items() if isinstance(value, fx.Node)]
        if len(tensors) > 1:
            raise _refusal(node, f"has a {tensors[1]} for every channel of the input")
        array = self._array(arguments[tensors[0]])
        channels = self._of_axis(node, array, 1)
        values = node.meta["val"]
        several = isinstance(values, tuple | list)
        made = [
            channels.view(-1, *[1] * (value.ndim - 2)).expand(value.shape)
            for value in (values if several else [values])
        ]
        return made if several else made[0]

    def _read(self, node: fx.Node) -> None:
        """Note the weight of a convolution or a linear layer, with the channels that it reads."""
        arguments = bind(node.target, node.args, node.kwargs)
        weight, array = arguments["weight"], self._array(arguments["input"])
        kind, axis = operator_of(node.target).kind, 1
        if kind in CONVOLUTIONS:
            if arguments.get("groups", 1) != 1:
                raise _refusal(node, "is a grouped convolution, whose groups would have to grow")
            if array.ndim != weight.meta["val"].ndim:
                raise _refusal(node, "runs without a batch axis")
            axis = 0 if arguments.get("transposed", kind is Kind.TRANSPOSED_CONVOLUTION) else 1
        channels = self._of_axis(node, array, array.ndim - 1 if kind is Kind.LINEAR else 1)
        while operator_of(weight.target).kind is Kind.COPY:  # cast by autocast, for instance
            weight = weight.all_input_nodes[0]
        name = weight.meta.get("tensor") if weight.op == "get_attr" else None
        if name is None:
            raise _refusal(
                node,
                "has a weight that is computed from others (weight_norm, spectral_norm); "
                "remove the parametrization first",
            )
        reader = FirstReader(name, axis, tuple(channels.tolist()), str(node.meta["module"]))
        self.layers.add(node)
        held = self.readers.setdefault((name, axis), reader)
        if held.channels != reader.channels or any(
            n == name and a != axis for n, a in self.readers
        ):
            raise _refusal(node, f"reads other channels with {name} than {held.module} does")

    def _met(self, node: fx.Node) -> Any:
        """Return the numbers after an element-wise operator, which must treat channels alike."""
        shape = _first(node.meta["val"]).shape
        found: Tensor | None = None
        for other in node.all_input_nodes:
            array = self.numbers.get(other)
            if isinstance(array, Tensor) and _any(array):
                if array.shape != shape:
                    raise _refusal(node, "repeats the input's channels to meet others")
                if found is not None and not bool(((found == array) | (array == 0)).all()):
                    raise _refusal(node, "lets channels of the input meet one another")
                found = array
        assert found is not None  # only operators that read the channels get here
        seen = _seen(found)
        several = [a for a in range(seen.ndim) if bool((seen != seen.narrow(a, 0, 1)).any())]
        for other in node.all_input_nodes:
            array = self.numbers.get(other)
            if isinstance(array, Tensor) and _any(array):
                continue
            sizes = (*[1] * len(shape), *_first(other.meta["val"]).shape)[-len(shape) :]
            if any(sizes[axis] != 1 for axis in several):
                raise _refusal(node, "joins the input's channels with others one by one")
        values = node.meta["val"]
        return [found] * len(values) if isinstance(values, tuple | list) else found

    def _of_axis(self, node: fx.Node, array: Tensor, axis: int) -> Tensor:
        """Return the channel of each index of an axis, 0 for none; padding does not count."""
        seen = _seen(array)
        others = [a for a in range(array.ndim) if a != axis]
        shape = [1] * array.ndim
        shape[axis] = array.shape[axis]
        highest = seen.amax(dim=others, keepdim=True).expand(shape)
        if not bool(((seen == highest) | (seen == 0)).all()):
            raise _refusal(node, "reads several channels of the input as one")
        return highest.reshape(-1)


def _any(numbers: Tensor | Sequence[Tensor]) -> bool:
    if isinstance(numbers, Tensor):
        return bool(_seen(numbers).any())
    return any(_any(one) for one in numbers)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) else value


def _seen(numbers: Tensor) -> Tensor:
    """Return one entry of each expanded axis, so that large inputs cost nothing."""
    return numbers[tuple(slice(0, 1) if s == 0 else slice(None) for s in numbers.stride())]
