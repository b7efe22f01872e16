"""Sizes that a ``GraphModule`` has as literals in its graph, as exported programs do."""

from __future__ import annotations

__all__ = ["find_literal", "numbers_in", "set_argument"]

from typing import Any

from torch import fx, nn

from pocketize._torch import schema_of
from pocketize.errors import RewriteError
from pocketize.ops.schema import bind
from pocketize.plugin.edits import SetArgument


def numbers_in(value: Any) -> tuple[int, ...] | None:
    """Return the numbers of an argument that is one or a list of them, ``None`` for any other."""
    values = value if isinstance(value, list | tuple) else [value]
    if values and all(isinstance(x, int) and not isinstance(x, bool) for x in values):
        return tuple(values)
    return None


def find_literal(module: nn.Module, edit: SetArgument) -> fx.Node:
    """Return the node that an edit names.

    Raises:
        RewriteError: the module has no such node, or its argument is another.
    """
    where = f"cannot set {edit.argument} of node {edit.node} in {edit.module or 'the model'}"
    if not isinstance(module, fx.GraphModule):
        raise RewriteError(f"{where}: it is a {type(module).__name__}, not a GraphModule")
    node: fx.Node | None = next((n for n in module.graph.nodes if n.name == edit.node), None)
    if node is None:
        raise RewriteError(f"{where}: the graph has no such node")
    value = bind(node.target, node.args, node.kwargs).get(edit.argument)
    if numbers_in(value) != edit.old:
        raise RewriteError(f"{where}: expected {edit.old}, found {value!r}")
    return node


def set_argument(module: fx.GraphModule, edit: SetArgument) -> None:
    """Carry out an edit; the caller compiles the graph again when all are done.

    Raises:
        RewriteError: the module has no such node, or its argument is another.
    """
    node = find_literal(module, edit)
    value = bind(node.target, node.args, node.kwargs)[edit.argument]
    new: Any = list(edit.new) if isinstance(value, list | tuple) else edit.new[0]
    if edit.argument in node.kwargs:
        node.update_kwarg(edit.argument, new)
    else:
        schema = schema_of(node.target)
        node.update_arg([a.name for a in schema.arguments].index(edit.argument), new)
