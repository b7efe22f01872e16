"""Reading the arguments of recorded operators on maps."""

from __future__ import annotations

__all__ = [
    "Bound",
    "NotLocal",
    "check_rank",
    "draws",
    "first_node",
    "numbers",
    "shape_of",
    "sizes_of",
]

import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from pocketize.ops.schema import bind, operator_name

Bound: TypeAlias = Mapping[str, Any]


class NotLocal(Exception):
    """An operator needs its inputs whole; the text says why.

    Args:
        text: the reason.
        hopeless: whole inputs would not do either.
    """

    def __init__(self, text: str, *, hopeless: bool = False) -> None:
        super().__init__(text)
        self.hopeless = hopeless


def numbers(given: Any, rank: int) -> tuple[int, ...]:
    """Return one number for each spatial axis, where one may stand for all."""
    many = [int(n) for n in given] if isinstance(given, list | tuple) else [int(given)]
    return tuple(many * rank if len(many) == 1 else many)


def first_node(bound: Bound) -> fx.Node:
    """Return the first argument that is a recorded result."""
    return next(value for value in bound.values() if isinstance(value, fx.Node))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a result; None where it is no tensor."""
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, Tensor) else None


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """Return the spatial sizes of a map.

    Raises:
        NotLocal: the result is empty, or no tensor.
    """
    shape = shape_of(node)
    if shape is None or math.prod(shape) == 0:
        raise NotLocal("it reads something that is no map")
    return shape[2:]


def check_rank(name: str, rank: int) -> None:
    """Refuse operators on another number of axes: without a batch, axes would be mistaken.

    Args:
        name: of the operator, such as ``max_pool2d``.
        rank: number of spatial axes of the network's input.

    Raises:
        NotLocal: the name tells another rank.
    """
    told = re.search(r"(\d)d$", name)
    if told is not None and int(told[1]) != rank:
        raise NotLocal(
            f"{name} works on {told[1]} spatial axes, and the input has {rank} beside batch and "
            "channels"
        )


def draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers, as it is called."""
    bound = bind(node.target, node.args, node.kwargs)
    if bound.get("train", bound.get("training")) is False:
        return False
    chances = [bound[name] for name in ("p", "dropout_p", "dropout") if name in bound]
    if chances and not chances[0]:
        return False
    name = operator_name(node.target).rpartition(".")[2]
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return seeded or "dropout" in name or "dropout" in bound
