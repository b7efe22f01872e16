"""The table of channel rules, and how a rule is written and looked up.

A rule says, for one operator, what the labels of its result are and which channel indices it
unites. Third parties add their own::

    from pocketize.channels.rules import channel_rule

    @channel_rule("mylib.swish_conv")
    def swish_conv(call):
        return call.like("input")

The name is that of the operator without overload, ``"aten.conv2d"``; in-place variants (a trailing
underscore) are found by the name of the plain one.
"""

from __future__ import annotations

__all__ = ["Call", "LayerChannels", "Rule", "apply_rule", "channel_rule", "has_rule", "unlabelled"]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, fx

from pocketize.channels.labels import Indices, UnionFind, Value
from pocketize.ops import UNKNOWN, Kind, Operator, operator_of, register

Result: TypeAlias = "Value | Sequence[Value]"
Rule: TypeAlias = "Callable[[Call], Result]"

#: The facet of an operator's record that holds its channel rule.
_FACET = "channel rule"
_SUMS_OR_MAPS = {
    Kind.ACTIVATION,
    Kind.ASSIGNMENT,
    Kind.COPY,
    Kind.DROPOUT,
    Kind.LIKE,
    Kind.LOSS,
    Kind.POINTWISE,
    Kind.REDUCTION,
    Kind.SCAN,
    Kind.SOFTMAX,
}


def channel_rule(*operators: str | Kind, replace: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the channel rule of one or more operators.

    Args:
        operators: names such as ``"aten.conv2d"`` or ``"mylib.my_op"``, without overload; or kinds
            of operators.
        replace: allow to take the place of a rule that is already there.

    Raises:
        RewriteError: an operator already has a rule and ``replace`` is false.
    """
    return register(_FACET, *operators, replace=replace)


@dataclass(frozen=True)
class LayerChannels:
    """Channels that a layer makes, reads or counts, as a rule has noted it.

    Attributes:
        module: path of the module whose forward ran.
        indices: their channel indices.
        attribute: for counts, the attribute of the module that equals the number of indices.
    """

    module: str
    indices: Indices
    attribute: str = ""


@dataclass
class Call:
    """One operator call, as a rule sees it.

    Attributes:
        node: the traced node; ``node.meta["val"]`` is the fake result.
        unions: unites and freezes indices.
        arguments: the arguments by their schema names, tensors as :class:`Value`.
        producers: where new channels come from (convolutions, linear layers).
        readers: layers with the channels that they read.
        counts: module attributes that must follow a number of channels.
        expected: arguments that must follow a number of channels, for the check.
    """

    node: fx.Node
    unions: UnionFind
    arguments: dict[str, Any]
    producers: list[LayerChannels] = field(default_factory=list)
    readers: list[LayerChannels] = field(default_factory=list)
    counts: list[LayerChannels] = field(default_factory=list)
    expected: dict[fx.Node, dict[str, Indices]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` where the operator has none of that name."""
        return self.arguments.get(name, default)

    @property
    def operator(self) -> str:
        """Name of the operator without overload and without the underscore of in-place variants."""
        return self.record.name

    @property
    def record(self) -> Operator:
        """What is known of the operator."""
        return operator_of(self.node.target)

    @property
    def module(self) -> str:
        """Path of the module whose forward ran.

        In a model that is one graph (an exported program) that is always the root; there it is the
        owner of the first parameter.
        """
        path = str(self.node.meta["module"])
        for node in () if path else self.node.all_input_nodes:
            owner = str(node.meta.get("tensor") or "").rpartition(".")[0]
            if owner:
                return owner
        return path

    @property
    def where(self) -> str:
        """The operator and the line that called it: ``"aten.view at net.py:88"``."""
        source = self.node.meta.get("source")
        return f"{self.operator} at {source}" if source else self.operator

    @property
    def reason(self) -> str:
        """Why channels freeze that this operator joins with an axis of fixed size."""
        return f"{self.where} joins it with an axis that cannot change, such as the input's"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.node.meta["val"].shape)

    @property
    def several(self) -> bool:
        """Whether the operator has several results."""
        return isinstance(self.node.meta["val"], tuple | list)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the results of an operator that has several."""
        return [tuple(v.shape) if isinstance(v, Tensor) else () for v in self.node.meta["val"]]

    def values(self) -> list[Value]:
        """Return every tensor argument, those in lists too."""
        return list(_flat_values(self.arguments.values()))

    def results(self, labels: Iterable[Indices]) -> Result:
        """Return the result, or each of several results, with the same labels."""
        held = tuple(labels)
        if self.several:
            return [Value(shape, held) for shape in self.shapes]
        return Value(self.shape, held)

    def like(self, name: str) -> Result:
        """Return the result of an operator that keeps the shape and the channels of one input.

        Of several results that is the first; the others have no channels.
        """
        value: Value = self[name]
        if self.several:
            return [Value(self.shapes[0], value.labels), *map(Value, self.shapes[1:])]
        return Value(self.shape, value.labels)

    def freeze(self, value: Value, why: str = "") -> None:
        """Freeze all channels of a value, because of this operator."""
        self.unions.freeze_value(value, f"{self.where} {why or 'has no channel rule'}")

    def unite(self, a: Indices | None, b: Indices | None) -> None:
        """Unite two vectors of indices; where one is missing (a fixed axis) freeze the other."""
        if a is not None and b is not None:
            self.unions.unite(a, b, self.reason)
        elif a is not None or b is not None:
            indices = a if a is not None else b
            assert indices is not None
            self.unions.freeze(indices, self.reason)

    def vector_on(self, value: Value, axis: int) -> Indices | None:
        """Return the indices along one axis as a vector, ``None`` if it has none."""
        return self.unions.vector_on(value, axis, f"{self.where} needs the axis whole")

    def tie_axes(self, value: Value, axes: Sequence[int]) -> Value:
        """Return a value none of whose labels lives on these axes."""
        reason = f"{self.where} needs the axis whole"
        here = {value.axis(axis) for axis in axes}
        labels = [self.unions.tie_axes(label, here, reason) for label in value.labels]
        return Value(value.shape, tuple(x for x in labels if x.size > 1))

    def produce(self, indices: Indices | None) -> None:
        """Note that this layer makes these channels."""
        if indices is not None:
            self.producers.append(LayerChannels(self.module, indices))

    def read(self, indices: Indices | None) -> None:
        """Note that this layer reads these channels."""
        if indices is not None:
            self.readers.append(LayerChannels(self.module, indices))

    def count(self, attribute: str, indices: Indices | None) -> None:
        """Note that an attribute of the module equals the number of these channels."""
        if indices is not None:
            self.counts.append(LayerChannels(self.module, indices, attribute))

    def expect(self, argument: str, indices: Indices) -> None:
        """Note that an argument of this call must equal the number of these indices that stay."""
        self.expected.setdefault(self.node, {})[argument] = indices


def has_rule(target: Any) -> bool:
    """Whether an operator has a rule."""
    return operator_of(target).facet(_FACET) is not UNKNOWN


def sums_or_maps(target: Any) -> bool:
    """Whether an operator is a reduction or element-wise."""
    return operator_of(target).kind in _SUMS_OR_MAPS


def apply_rule(call: Call) -> Result:
    """Apply the rule of an operator; freeze its inputs where there is none."""
    rule = call.record.facet(_FACET)
    if rule is not UNKNOWN:
        return _checked(call, rule(call))
    for value in call.values():
        call.freeze(value)
    return unlabelled(call.node.meta["val"])


def unlabelled(out: Any) -> Result:
    """Return the value of a result, or of several, of which nothing is known."""
    if isinstance(out, tuple | list):
        return [Value(tuple(v.shape) if isinstance(v, Tensor) else ()) for v in out]
    return Value(tuple(out.shape) if isinstance(out, Tensor) else ())


def _checked(call: Call, result: Any) -> Result:
    """Return what a rule has answered, if it can be true of what the operator returned."""
    out = call.node.meta["val"]
    several = isinstance(out, tuple | list)
    pairs = zip(out, result, strict=True) if several else [(out, result)]
    for tensor, value in pairs:
        if not isinstance(value, Value):
            raise TypeError(f"expected a Value for each result, got {type(value).__name__}")
        if isinstance(tensor, Tensor) and not value.fits(tuple(tensor.shape)):
            raise ValueError(f"expected labels that fit shape {tuple(tensor.shape)}, got {value}")
    return list(result) if several else result


def _flat_values(items: Any) -> Any:
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, tuple | list):
            yield from _flat_values(item)
