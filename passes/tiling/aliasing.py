"""Which recorded tensors lie in the same memory, what reads it after it was written, and views."""

from __future__ import annotations

__all__ = ["Memory", "leave_views_out", "viewed", "written_by"]

from torch import Tensor, fx

from pocketize._torch import OpOverload, schema_of, storage_key


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that an operator writes into, results of others."""
    target = node.target
    if not (isinstance(target, OpOverload) and schema_of(target).is_mutable):
        return []
    found: list[fx.Node] = []
    for index, argument in enumerate(schema_of(target).arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.kwargs.get(argument.name)
        if index < len(node.args):
            given = node.args[index]
        several = given if isinstance(given, list | tuple) else [given]
        found += [each for each in several if isinstance(each, fx.Node)]
    return found


def viewed(node: fx.Node) -> fx.Node | None:
    """Return what a result is a view of, made by its operator; None where it is none."""
    target, base = node.target, next(iter(node.args), None)
    if not isinstance(target, OpOverload) or schema_of(target).is_mutable:
        return None
    if not isinstance(base, fx.Node) or node.all_input_nodes != [base]:
        return None
    values = node.meta["val"], base.meta["val"]
    if not all(isinstance(value, Tensor) for value in values):
        return None
    return base if _storage(values[0]) == _storage(values[1]) else None


def leave_views_out(graph: fx.Graph) -> None:
    """Leave out of a recording's outputs those that are inputs, or views of other outputs.

    Whoever writes into one is to find it in the other, so that they are not computed by tiles, but
    made of each other by :func:`viewed` operators.
    """
    (end,) = graph.find_nodes(op="output")
    outputs = list(end.args[0])
    given = {node for node in [*outputs, *graph.nodes] if node.op == "placeholder"}
    left = []
    for node in outputs:
        base = None if node in given else viewed(node)
        while base is not None and base not in given and base not in outputs:
            base = viewed(base)
        if base is None and node not in given:
            left.append(node)
    if left:
        end.args = (left,)


class Memory:
    """The tensors of a recording, by the memory that they lie in.

    Args:
        graph: the recording, all tensors of which are alive.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes: dict[int, list[fx.Node]] = {}
        self._same: dict[int, int] = {}
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                for alias in node.meta.get("aliases", ()):
                    self._same[_storage(alias)] = self._place(value)
                self._nodes.setdefault(self._place(value), []).append(node)

    def beside(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that have memory in common with one, itself among them."""
        value: Tensor = node.meta["val"]
        others = self._nodes[self._place(value)]
        return [other for other in others if not _apart(value, other.meta["val"])]

    def _place(self, tensor: Tensor) -> int:
        storage = _storage(tensor)
        return self._same.get(storage, storage)

    def read_after(self, node: fx.Node, written: fx.Node) -> fx.Node | None:
        """Return a tensor in written memory that is read later as it was made; None for none.

        The written tensor itself is known by its new name afterwards, that of the result.

        Args:
            node: the operator that writes.
            written: what it writes into.
        """
        for other in self.beside(written):
            if other < node and any(user > node for user in other.users):
                return other
        return None


def _storage(tensor: Tensor) -> int:
    return storage_key(tensor)


def _apart(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are boxes in a dense one that have no entry in common."""
    if x.dtype != y.dtype or x.stride() != y.stride() or _storage(x) != _storage(y):
        return False
    axes = sorted(range(x.ndim), key=x.stride, reverse=True)
    starts, rests, limit = [], [x.storage_offset(), y.storage_offset()], None
    for axis in axes:
        step = x.stride(axis)
        if step == 0:
            return False
        begin = [rest // step for rest in rests]
        ends = [begin[0] + x.shape[axis], begin[1] + y.shape[axis]]
        if limit is not None and max(ends) * step > limit:
            return False  # a row runs over into the next
        rests = [rest % step for rest in rests]
        starts.append((begin, ends))
        limit = step
    return any(e[0] <= b[1] or e[1] <= b[0] for b, e in starts)
