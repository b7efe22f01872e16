"""What an operator does to memory, read from its schema: does it write, is its result a view."""

from __future__ import annotations

__all__ = [
    "Effect",
    "draws_random_numbers",
    "effect_of",
    "in_place_overload",
    "written_arguments",
    "written_nodes",
]

import enum
import functools
from typing import Any

import torch
from torch import fx

from pocketize._torch import OpOverload, schema_of
from pocketize.ops.record import Kind, operator_of
from pocketize.ops.schema import bind


class Effect(enum.Enum):
    """How an operator treats the memory of its arguments."""

    PURE = enum.auto()
    """Makes new tensors and writes to none."""
    VIEW = enum.auto()
    """Returns a tensor on the memory of its first argument."""
    WRITER = enum.auto()
    """Writes to its first argument and returns it."""
    OTHER = enum.auto()
    """Anything else, or what cannot be run again with the same result."""


_TENSORS = ("Tensor", "List[Tensor]", "Tensor[]", "Optional[Tensor]", "Tensor?")


@functools.cache
def effect_of(target: Any) -> Effect:
    """Return the effect of an overload; that of foreign operators is never told, so ``OTHER``.

    Running statistics that a norm updates do not count: only some schemas admit it.
    """
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims"):
        return Effect.OTHER
    schema, kind = schema_of(target), operator_of(target).kind
    if kind is Kind.RECURRENT or torch.Tag.dynamic_output_shape in target.tags:
        return Effect.OTHER
    names = [argument.name for argument in schema.arguments]
    if "running_mean" in names:
        return Effect.PURE
    if written := written_arguments(target):
        returned = [r.alias_info is not None and r.alias_info.is_write for r in schema.returns]
        first_only = written == (names[0],) and returned == [True]
        return Effect.WRITER if first_only and kind is not Kind.STORAGE else Effect.OTHER
    if any(r.alias_info is not None for r in schema.returns):
        aliased = [a.name for a in schema.arguments if a.alias_info is not None]
        alone = aliased == names[:1] and len(schema.returns) == 1
        return Effect.VIEW if alone else Effect.OTHER
    tensors = all(str(returned.type) in _TENSORS for returned in schema.returns)
    return Effect.PURE if schema.returns and tensors else Effect.OTHER


def draws_random_numbers(target: Any) -> bool:
    """Whether torch tags an operator as one that draws from a generator."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def in_place_overload(target: Any) -> Any:
    """Return the overload that writes the same result into its first argument; None without one."""
    packet = getattr(torch.ops.aten, f"{schema_of(target).name.split('::')[1]}_", None)
    return getattr(packet, schema_of(target).overload_name or "default", None)


def written_arguments(target: Any) -> tuple[str, ...]:
    """Return the names of the arguments that an operator writes into, as its schema has it."""
    if not isinstance(target, OpOverload):
        return ()
    arguments = schema_of(target).arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def written_nodes(node: fx.Node) -> list[fx.Node]:
    """Return the nodes of the tensors that an operator in a graph writes into."""
    if node.op != "call_function" or not (names := written_arguments(node.target)):
        return []
    bound = bind(node.target, node.args, node.kwargs)
    found: list[fx.Node] = []
    for given in map(bound.get, names):
        several = given if isinstance(given, list | tuple) else [given]
        found += [each for each in several if isinstance(each, fx.Node)]
    return found
