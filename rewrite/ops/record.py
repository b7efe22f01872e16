"""One record for each operator: what is known of it, in one place.

A record has the plain name of the operator, ``"aten.conv3d"``: in-place and ``out`` variants are
found by it too. Its *kind* says what it does and with which arguments; most passes ask for nothing
else. What only one pass understands is a *facet* that the pass registers, for one operator or for
all of a kind::

    @register("tile form", Kind.CONVOLUTION, "mylib.conv")
    def convolution(...): ...

    operator_of(node.target).facet("tile form")

What nobody has said of an operator is ``UNKNOWN``, so that a pass refuses instead of guessing.
"""

from __future__ import annotations

__all__ = [
    "CONVOLUTIONS",
    "MOVEMENTS",
    "NORMS",
    "UNKNOWN",
    "Kind",
    "Operator",
    "Window",
    "all_operators",
    "define",
    "is_convolution",
    "operator_of",
    "register",
]

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import fx

from pocketize._torch import OpOverload
from pocketize.errors import RewriteError
from pocketize.ops.schema import operator_name


class _Unknown(enum.Enum):
    UNKNOWN = "unknown"

    def __bool__(self) -> bool:
        return False


UNKNOWN: Final = _Unknown.UNKNOWN


class Kind(enum.Enum):
    """What an operator does; all operators of a kind have the same arguments, or a subset."""

    CONVOLUTION = "convolution"
    TRANSPOSED_CONVOLUTION = "transposed convolution"
    LINEAR = "linear layer"
    PRODUCT = "product of matrices"
    ATTENTION = "attention"
    CHANNEL_NORM = "batch or instance normalisation"
    GROUP_NORM = "group normalisation"
    LAYER_NORM = "layer normalisation"
    RMS_NORM = "normalisation by the root of the mean square"
    ACTIVATION = "activation without parameters"
    GATE = "gated linear unit"
    PRELU = "activation with a slope for each channel"
    POINTWISE = "element by element, with broadcasting"
    ASSIGNMENT = "other numbers in the place of those of its first tensor"
    DROPOUT = "dropout"
    COPY = "the same numbers in other memory, dtype or device"
    LIKE = "a tensor as large as another"
    FACTORY = "a tensor of numbers alone"
    SOFTMAX = "softmax along an axis"
    SCAN = "cumulative sum along an axis"
    POOLING = "pooling with a kernel"
    ADAPTIVE_POOLING = "pooling to a size"
    UNPOOLING = "unpooling by indices"
    RESIZE = "interpolation to a size"
    SAMPLING = "interpolation at given places"
    PADDING = "padding or cropping"
    RESHAPE = "other axes, the same order of entries"
    PERMUTATION = "axes in another order"
    EXPANSION = "axes of size 1 expanded"
    REPETITION = "entries repeated"
    ROTATION = "entries of an axis reversed or rotated"
    SHUFFLE = "channels moved to space or among each other"
    CONCATENATION = "concatenation"
    STACK = "concatenation along a new axis"
    SPLIT = "cut into parts along an axis"
    SLICE = "a part of an axis"
    SELECTION = "one index of an axis"
    INDEXING = "entries at places that a tensor gives"
    REDUCTION = "reduction over axes"
    SORTING = "order along an axis"
    LOSS = "distance of two tensors, averaged"
    SCALAR = "reads a number"
    RECURRENT = "recurrent layer"
    STORAGE = "exchanges or resizes the memory of a tensor"


CONVOLUTIONS: Final = frozenset({Kind.CONVOLUTION, Kind.TRANSPOSED_CONVOLUTION})
NORMS: Final = frozenset({Kind.CHANNEL_NORM, Kind.GROUP_NORM, Kind.LAYER_NORM, Kind.RMS_NORM})
#: The result's entries are entries of the inputs, or 0; which ones, arguments and shapes decide.
MOVEMENTS: Final = frozenset(
    {
        Kind.RESHAPE,
        Kind.PERMUTATION,
        Kind.EXPANSION,
        Kind.REPETITION,
        Kind.ROTATION,
        Kind.SHUFFLE,
        Kind.CONCATENATION,
        Kind.STACK,
        Kind.SPLIT,
        Kind.SLICE,
        Kind.SELECTION,
    }
)


class Window(NamedTuple):
    """Receptive field of an operator that moves a kernel, one number for each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@dataclass(eq=False)
class Operator:
    """What is known of an operator.

    Attributes:
        name: namespace and name without overload and without the underscore of in-place variants.
        kind: what it does.
        data: name of the argument that it works on; ``""`` where all tensors are alike.
        weight: name of the argument that is its matrix or kernel; ``""`` if it has none.
        keeps: what autograd keeps for its backward: some of ``"input"`` (the data), ``"output"``,
            ``"mask"`` and ``"statistics"``. Parameters do not count.
        heavy: it costs more than reading and writing its tensors once.
        window: returns its receptive field for its arguments by name (tensors as anything that has
            a ``shape``) and a number of spatial axes; ``None`` if no kernel moves.
    """

    name: str
    kind: Kind | _Unknown = UNKNOWN
    data: str | _Unknown = UNKNOWN
    weight: str | _Unknown = UNKNOWN
    keeps: frozenset[str] | _Unknown = UNKNOWN
    heavy: bool | _Unknown = UNKNOWN
    window: Callable[[Mapping[str, Any], int], Window] | _Unknown | None = UNKNOWN

    @property
    def short(self) -> str:
        """The name without namespace: ``"conv3d"``."""
        return self.name.rpartition(".")[2]

    @property
    def rank(self) -> int | None:
        """The number of spatial axes that the name states: 3 of ``conv3d``."""
        stated = re.search(r"(?<!atleast_)(\d)d(?:_|$)", self.name)
        return int(stated[1]) if stated else None

    def facet(self, facet: str) -> Any:
        """Return what was registered for this operator, or else for its kind, or ``UNKNOWN``."""
        of_kind = _FACETS.get((facet, self.kind), UNKNOWN)
        return _FACETS.get((facet, self.name), of_kind)


_OPERATORS: dict[str, Operator] = {}
#: What is registered, by facet and by name or kind of operator.
_FACETS: dict[tuple[str, str | Kind | _Unknown], Any] = {}

T = TypeVar("T")


def define(
    kind: Kind | _Unknown,
    *names: str,
    data: str | _Unknown,
    weight: str | _Unknown,
    keeps: str | _Unknown,
    heavy: bool,
    window: Callable[[Mapping[str, Any], int], Window] | _Unknown | None,
) -> None:
    """Write the records of some operators of ``aten``; see :class:`Operator`.

    Args:
        names: without namespace, separated by spaces.
        keeps: words separated by spaces; ``""`` for nothing.
    """
    kept = UNKNOWN if keeps is UNKNOWN else frozenset(str(keeps).split())
    for short in " ".join(names).split():
        name = f"aten.{short}"
        assert name not in _OPERATORS, f"{name} has two records"
        _OPERATORS[name] = Operator(name, kind, data, weight, kept, heavy, window)


def register(facet: str, *operators: str | Kind, replace: bool = False) -> Callable[[T], T]:
    """Register a function, or what else a pass wants to know, as a facet of operators.

    Args:
        facet: its name.
        operators: names such as ``"aten.conv2d"`` or ``"mylib.my_op"``, without overload; or kinds.
            What is said of an operator goes before what is said of its kind.
        replace: allow to take the place of what is already there.

    Raises:
        RewriteError: an operator already has that facet, and ``replace`` is false.
    """

    def add(value: T) -> T:
        for operator in operators:
            known = _FACETS.get((facet, operator), UNKNOWN)
            if isinstance(operator, str):
                known = _OPERATORS.setdefault(operator, Operator(operator)).facet(facet)
            if known is not UNKNOWN and not replace:
                name = getattr(known, "__qualname__", None)
                title = f"{known.__module__}.{name}" if name else repr(known)
                raise RewriteError(
                    f"operator {operator} already has the {facet} {title}; "
                    "pass replace=True to take its place"
                )
            _FACETS[facet, operator] = value
        return value

    return add


def operator_of(target: Any) -> Operator:
    """Return the record of an operator; of an unknown one, that nothing is known.

    Operators that torch tags as element-wise are of the kind ``POINTWISE`` without being listed.

    Args:
        target: an overload such as ``torch.ops.aten.relu_.default``, as in ``node.target``.
    """
    name = operator_name(target)
    record = _OPERATORS.get(name)
    if record is None:
        record = Operator(name)
        if isinstance(target, OpOverload):
            _OPERATORS[name] = record
    if record.kind is UNKNOWN and torch.Tag.pointwise in getattr(target, "tags", ()):
        record.kind = Kind.POINTWISE
    return record


def is_convolution(node: fx.Node) -> bool:
    """Whether a node of a graph is a convolution, transposed ones included."""
    return operator_of(node.target).kind in CONVOLUTIONS


def all_operators() -> tuple[Operator, ...]:
    """Return all records."""
    return tuple(_OPERATORS.values())
