"""Find the weights that read the channels of an input."""

from __future__ import annotations

__all__ = ["ChannelWalk", "FirstReader", "find_first_readers", "refusal"]

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
    return ChannelWalk(traced, argument).run()


class ChannelWalk:
    """Follows the channels of an input: ``numbers`` has those in each result, by its node."""

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
        """Return the weights, by name and axis."""
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
                raise refusal(user, f"reads {name}, which would be larger")

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
        raise refusal(node, "reads the input's channels, and more of them might change it")

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
            raise refusal(node, "pads the axis of channels with channels")
        return torch.nn.functional.pad(array, amounts)

    def _spread(self, node: fx.Node) -> Any:
        """Return the numbers after an operator that treats every channel alone."""
        arguments = bind(node.target, node.args, node.kwargs)
        tensors = [key for key, value in arguments.items() if isinstance(value, fx.Node)]
        if len(tensors) > 1:
            raise refusal(node, f"has a {tensors[1]} for every channel of the input")
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
                raise refusal(node, "is a grouped convolution, whose groups would have to grow")
            if array.ndim != weight.meta["val"].ndim:
                raise refusal(node, "runs without a batch axis")
            axis = 0 if arguments.get("transposed", kind is Kind.TRANSPOSED_CONVOLUTION) else 1
        channels = self._of_axis(node, array, array.ndim - 1 if kind is Kind.LINEAR else 1)
        while operator_of(weight.target).kind is Kind.COPY:  # cast by autocast, for instance
            weight = weight.all_input_nodes[0]
        name = weight.meta.get("tensor") if weight.op == "get_attr" else None
        if name is None:
            raise refusal(
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
            raise refusal(node, f"reads other channels with {name} than {held.module} does")

    def _met(self, node: fx.Node) -> Any:
        """Return the numbers after an element-wise operator, which must treat channels alike."""
        shape = _first(node.meta["val"]).shape
        found: Tensor | None = None
        for other in node.all_input_nodes:
            array = self.numbers.get(other)
            if isinstance(array, Tensor) and _any(array):
                if array.shape != shape:
                    raise refusal(node, "repeats the input's channels to meet others")
                if found is not None and not bool(((found == array) | (array == 0)).all()):
                    raise refusal(node, "lets channels of the input meet one another")
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
                raise refusal(node, "joins the input's channels with others one by one")
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
            raise refusal(node, "reads several channels of the input as one")
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


def refusal(node: fx.Node, why: str) -> RewriteError:
    """Return an error that names an operator and its module."""
    where = f" at {node.meta['source']}" if node.meta.get("source") else ""
    path = node.meta["module"] or "the model itself"
    return RewriteError(f"{operator_name(node.target)}{where} in {path} {why}")
