"""Tensors that a forward makes from numbers alone, and what they hold.

``arange(n)``, a mask, a table of decays: nothing but literals goes into them, so that what they
hold follows from a trace, though a trace on fake tensors has no values. Which operators
made them does not matter: they are run again, on real memory, when somebody asks.
"""

from __future__ import annotations

__all__ = ["Constants"]

import operator
from typing import Any

import torch
from torch import Tensor, fx

from pocketize._torch import FakeTensor, pytree, schema_of, storage_key, without_dispatch_modes
from pocketize.ops import bind, operator_name
from pocketize.ops.effects import draws_random_numbers, written_arguments

#: What factories fill a tensor with; random numbers and memory that holds anything count as equal.
_FILLED = {"zeros": 0, "ones": 1, "empty": 0, "rand": 1, "randn": 1, "randint": 1}
#: Operators of which the second tensor gives a dtype or a shape, and no values.
_AFTER_ANOTHER = ("to", "_to_copy", "type_as", "expand_as", "view_as", "reshape_as")
#: Elements up to which a constant is made for real.
_MOST = 2**26


class _UnknownValueError(Exception):
    """What a constant holds cannot be told."""


class Constants:
    """The constants of a graph; nodes that are added to it later are seen too.

    A *family* are constants that were made from one another; they are evaluated together.

    Args:
        graph: operators with their results in ``node.meta["val"]``, as a trace has them.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._read = 0
        self._order: dict[fx.Node, int] = {}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._written: set[int] = set()

    def __contains__(self, node: fx.Node) -> bool:
        """Whether a node's result is made from numbers alone."""
        self._update()
        return node in self._parent

    def number(self, node: fx.Node) -> Any:
        """Return the number that a node's result is now; ``None`` if that cannot be told."""
        if node not in self:
            return None
        family = self._family(node)
        if any(
            draws_random_numbers(n.target) or _name(n).endswith("empty")
            for n in family
            if n.op != "get_attr"
        ):
            return None
        value = self.value(node)
        if value is None or value.numel() != 1:
            return None
        with without_dispatch_modes():
            return value.item()

    def value(self, node: fx.Node, reader: fx.Node | None = None) -> Tensor | None:
        """Return what a constant holds, on the CPU; ``None`` if that cannot be told.

        Args:
            node: the constant.
            reader: a node that reads it; what is written into it later does not count.
        """
        family = self._family(node)
        stop = len(self._order) if reader is None else self._order[reader]
        with without_dispatch_modes(), torch.no_grad():
            try:
                return self._run(family, stop)[node]  # type: ignore[no-any-return]
            except Exception:  # whatever a foreign operator may raise on real tensors
                return None

    def base(self, node: fx.Node) -> fx.Node:
        """Return the constant that a view of it was taken of."""
        while _is_view(node):
            node = next(n for n in _sources(node) if _storage(n) == _storage(node))
        return node

    def same(self, node: fx.Node, others: Constants, other: fx.Node) -> bool:
        """Whether a constant of another graph was made in the same way, number by number."""
        one, two = self._family(node), others._family(other)
        if len(one) != len(two) or one.index(node) != two.index(other):
            return False
        places = [{n: i for i, n in enumerate(family)} for family in (one, two)]
        return all(
            _alike(_recipe(a, places[0]), _recipe(b, places[1]))
            for a, b in zip(one, two, strict=True)
        )

    def _update(self) -> None:
        if self._read == len(self._graph.nodes):
            return
        for node in list(self._graph.nodes)[self._read :]:
            self._order[node] = len(self._order)
            if node.op == "call_function" or node.op == "get_attr":
                self._add(node)
        self._read = len(self._order)

    def _add(self, node: fx.Node) -> None:
        sources = _sources(node)
        known = node.op == "call_function" or (
            node.meta.get("tensor") is None and not isinstance(node.meta["val"], FakeTensor)
        )
        if known and all(n in self._parent and _storage(n) not in self._written for n in sources):
            self._parent[node] = node
            for source in sources:
                self._parent[self._root(source)] = self._root(node)
            return
        for name in written_arguments(node.target):
            target = bind(node.target, node.args, node.kwargs)[name]
            if isinstance(target, fx.Node) and target in self._parent:
                self._written.add(_storage(target))

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            node = self._parent[node]
        return node

    def _family(self, node: fx.Node) -> list[fx.Node]:
        self._update()
        root = self._root(node)
        return [n for n in self._parent if self._root(n) is root]

    def _run(self, family: list[fx.Node], stop: int) -> dict[fx.Node, Any]:
        family = [node for node in family if self._order[node] < stop]
        writes = any(written_arguments(node.target) for node in family)
        filled = [node for node in family if _fill(node) is not None]
        dense = family if writes else [node for node in family if node not in filled]
        if sum(_elements(node) for node in dense if not _is_view(node)) > _MOST:
            raise _UnknownValueError
        values: dict[fx.Node, Any] = {}
        for node in family:
            number = _fill(node)
            if number is not None:
                out = node.meta["val"]
                whole = torch.full((), number, dtype=out.dtype).expand(out.shape)
                values[node] = whole.clone() if writes else whole
            else:
                values[node] = _compute(node, values)
        return values


def _name(node: fx.Node) -> str:
    return operator_name(node.target).removeprefix("aten.")


def _fill(node: fx.Node) -> Any:
    """Return the number that a factory fills a tensor with, ``None`` for any other operator."""
    if node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
        return None
    name = _name(node).removeprefix("new_").removesuffix("_like")
    if name == "full":
        number = bind(node.target, node.args, node.kwargs)["fill_value"]
        return number if isinstance(number, int | float | complex) else None
    if name not in _FILLED or _seeded(node):
        return None
    return _FILLED[name]


def _seeded(node: fx.Node) -> bool:
    """Whether an operator draws numbers that are the same in each forward."""
    given = any(isinstance(x, torch.Generator) for x in pytree.tree_leaves(dict(node.kwargs)))
    return given or bool(node.meta.get("seeded"))


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values go into a result."""
    if node.op == "call_function":
        name = _name(node)
        if name.startswith("new_") or name.endswith("_like"):
            return []
        if name in _AFTER_ANOTHER:
            return [x for x in node.args[:1] if isinstance(x, fx.Node)]
    return list(node.all_input_nodes)


def _storage(node: fx.Node) -> int:
    out = node.meta["val"]
    return storage_key(out) if isinstance(out, Tensor) else 0


def _is_view(node: fx.Node) -> bool:
    return any(_storage(source) == _storage(node) for source in _sources(node))


def _elements(node: fx.Node) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(node.meta["val"]) if isinstance(t, Tensor))


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Run an operator on real tensors.

    Raises:
        _UnknownValueError: it draws random numbers whose positions matter.
    """
    if node.op == "get_attr":
        return node.meta["val"].detach().cpu().clone()
    if node.target is operator.getitem:
        return values[node.args[0]][node.args[1]]  # type: ignore[index]
    name, out = _name(node), node.meta["val"]
    if name in _AFTER_ANOTHER:
        tensor = values[node.args[0]].to(out.dtype)  # type: ignore[index]
        return tensor.expand(out.shape) if name == "expand_as" else tensor.reshape(out.shape)
    if draws_random_numbers(node.target):
        return _draw(node, [values[n] for n in _sources(node)])
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    if any(a.name == "device" for a in schema_of(node.target).arguments):
        kwargs = {**kwargs, "device": "cpu"}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _draw(node: fx.Node, operands: list[Tensor]) -> Tensor:
    """Return what stands for random numbers: those drawn alike are equal."""
    name, out = _name(node), node.meta["val"]
    if _seeded(node) or name == "randperm":
        raise _UnknownValueError
    if "dropout" in name:
        return operands[0]
    if written_arguments(node.target):
        return operands[0].copy_(sum(operands[1:], torch.ones(())))
    return sum(operands, torch.ones(())).expand(out.shape).to(out.dtype)


def _recipe(node: fx.Node, places: dict[fx.Node, int]) -> list[Any]:
    """Return all that decides what a constant holds; other constants by their place."""
    if node.op == "get_attr":
        return [node.meta["val"]]
    sources = _sources(node)
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    shapes = [tuple(t.shape) for t in pytree.tree_leaves(node.meta["val"]) if isinstance(t, Tensor)]
    return [
        node.target,
        shapes,
        *((places[x] if x in sources else None) if isinstance(x, fx.Node) else x for x in leaves),
    ]


def _alike(one: list[Any], two: list[Any]) -> bool:
    return len(one) == len(two) and all(map(_equal, one, two))


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, torch.Generator) and isinstance(two, torch.Generator):
        return one.initial_seed() == two.initial_seed()
    return bool(one == two)
