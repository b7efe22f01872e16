"""Which weights read the channels of a network's input.

Each index of the input's channel axis gets a number, and what the traced operators do to the input
is done to an array of these numbers: moving, padding, concatenating. Where a convolution or a
linear layer reads the result, the array has the input channel of each index of the weight. Its
output no longer holds the input's channels, so the walk ends there.

An operator in between that mixes input channels, or that has a parameter for each, would compute
something else on more channels; the walk refuses it by name.
"""

from __future__ import annotations

__all__ = ["FirstReader", "find_first_readers"]

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pocketize.errors import RewriteError
from pocketize.graph.capture import TracedGraph
from pocketize.ops import CONVOLUTIONS, MOVEMENTS, Kind, bind, operator_name, operator_of

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
    """An axis of a weight that reads channels of the input.

    Attributes:
        tensor: name of the parameter.
        axis: the axis.
        channels: for each index the input channel that it reads, counted from 1; 0 for none.
        module: path of the module that reads it.
    """

    tensor: str
    axis: int
    channels: tuple[int, ...]
    module: str


def find_first_readers(
    traced: TracedGraph, argument: int = 0
) -> dict[tuple[str, int], FirstReader]:
    """Find the weights that read the channels of an input.

    Args:
        traced: a traced graph of the model.
        argument: which of its input tensors, in the order of the arguments; channels on axis 1.

    Returns:
        The weights by name and axis, in the order in which they are read.

    Raises:
        RewriteError: something other than a convolution or a linear layer reads the channels; the
            text names the operator and the module.
    """
    return _Walk(traced, argument).run()


class _Walk:
    """Propagates the numbers of the input's channels through a graph."""

    def __init__(self, traced: TracedGraph, argument: int) -> None:
        self.graph = traced.graph
        self.outputs = traced.outputs()
        self.numbers: dict[fx.Node, Any] = {}
        self.readers: dict[tuple[str, int], FirstReader] = {}
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
        return self.readers

    def _follow(self, node: fx.Node) -> Any:
        """Return the numbers in an operator's result; ``None`` where it holds none."""
        if node.target is operator.getitem:
            return self.numbers[node.all_input_nodes[0]][node.args[1]]
        kind = operator_of(node.target).kind
        if kind is Kind.RESHAPE:
            return self._array(node.all_input_nodes[0]).reshape(node.meta["val"].shape)
        if kind in MOVEMENTS:
            return self._moved(node, node.args, node.kwargs)
        if kind is Kind.PADDING:
            return self._padded(node)
        if kind in _SPATIAL:
            return self._spread(node)
        if kind in CONVOLUTIONS:
            return self._convolved(node)
        if kind is Kind.LINEAR:
            return self._projected(node)
        if kind in (Kind.COPY, Kind.DROPOUT, Kind.POINTWISE, Kind.ACTIVATION):
            return self._met(node)
        raise self._refusal(node, "reads the input's channels, and more of them might change it")

    def _moved(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_arg((args, kwargs), self._array)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _array(self, node: fx.Node) -> Tensor:
        found = self.numbers.get(node)
        if isinstance(found, Tensor):
            return found
        return torch.zeros((), dtype=torch.int32).expand(node.meta["val"].shape)

    def _padded(self, node: fx.Node) -> Tensor:
        arguments = bind(node.target, node.args, node.kwargs)
        array = self._array(arguments["self"])
        amounts = arguments["pad" if "pad" in arguments else "padding"]
        if len(amounts) // 2 < array.ndim - 1:  # in space: channels stay as they are
            spread: Tensor = self._spread(node)
            return spread
        if arguments.get("mode", "constant") != "constant":
            raise self._refusal(node, "pads the axis of channels with channels")
        return torch.nn.functional.pad(array, amounts)

    def _spread(self, node: fx.Node) -> Any:
        """Return the numbers after an operator that treats every channel alone."""
        arguments = bind(node.target, node.args, node.kwargs)
        tensors = [key for key, value in arguments.items() if isinstance(value, fx.Node)]
        if len(tensors) > 1:
            raise self._refusal(node, f"has a {tensors[1]} for every channel of the input")
        array = self._array(arguments[tensors[0]])
        channels = self._of_axis(node, array, 1)
        values = node.meta["val"]
        made = [
            channels.view(-1, *[1] * (value.ndim - 2)).expand(value.shape)
            for value in (values if isinstance(values, tuple | list) else [values])
        ]
        return made if isinstance(values, tuple | list) else made[0]

    def _convolved(self, node: fx.Node) -> None:
        arguments = bind(node.target, node.args, node.kwargs)
        weight = arguments["weight"]
        if arguments.get("groups", 1) != 1:
            raise self._refusal(node, "is a grouped convolution, whose groups would have to grow")
        array = self._array(arguments["input"])
        rank = weight.meta["val"].ndim
        if array.ndim != rank:
            raise self._refusal(node, "runs without a batch axis")
        kind = operator_of(node.target).kind
        transposed = arguments.get("transposed", kind is Kind.TRANSPOSED_CONVOLUTION)
        self._note(node, weight, 0 if transposed else 1, self._of_axis(node, array, 1))

    def _projected(self, node: fx.Node) -> None:
        arguments = bind(node.target, node.args, node.kwargs)
        array = self._array(arguments["input"])
        self._note(node, arguments["weight"], 1, self._of_axis(node, array, array.ndim - 1))

    def _note(self, node: fx.Node, weight: fx.Node, axis: int, channels: Tensor) -> None:
        while operator_of(weight.target).kind is Kind.COPY:  # cast by autocast, for instance
            weight = weight.all_input_nodes[0]
        name = weight.meta.get("tensor") if weight.op == "get_attr" else None
        if name is None:
            raise self._refusal(
                node,
                "has a weight that is computed from others (weight_norm, spectral_norm); "
                "remove the parametrization first",
            )
        reader = FirstReader(name, axis, tuple(channels.tolist()), str(node.meta["module"]))
        held = self.readers.setdefault((name, axis), reader)
        if held.channels != reader.channels or any(
            n == name and a != axis for n, a in self.readers
        ):
            raise self._refusal(node, f"reads other channels with {name} than {held.module} does")

    def _met(self, node: fx.Node) -> Any:
        """Return the numbers after an element-wise operator, which must treat channels alike."""
        shape = _first(node.meta["val"]).shape
        found: Tensor | None = None
        for other in node.all_input_nodes:
            array = self.numbers.get(other)
            if isinstance(array, Tensor) and _any(array):
                if array.shape != shape:
                    raise self._refusal(node, "repeats the input's channels to meet others")
                if found is not None and not bool(((found == array) | (array == 0)).all()):
                    raise self._refusal(node, "lets channels of the input meet one another")
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
                raise self._refusal(node, "joins the input's channels with others one by one")
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
            raise self._refusal(node, "reads several channels of the input as one")
        return highest.reshape(-1)

    def _refusal(self, node: fx.Node, why: str) -> RewriteError:
        source = node.meta.get("source")
        where = f" at {source}" if source else ""
        path = node.meta["module"] or "the model itself"
        return RewriteError(f"{operator_name(node.target)}{where} in {path} {why}")


def _any(numbers: Tensor | Sequence[Tensor]) -> bool:
    if isinstance(numbers, Tensor):
        return bool(_seen(numbers).any())
    return any(_any(one) for one in numbers)


def _first(value: Any) -> Tensor:
    first: Tensor = value[0] if isinstance(value, tuple | list) else value
    return first


def _seen(numbers: Tensor) -> Tensor:
    """Return one entry of each expanded axis, so that large inputs cost nothing."""
    return numbers[tuple(slice(0, 1) if s == 0 else slice(None) for s in numbers.stride())]
