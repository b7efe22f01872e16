"""Values: what a tensor held at one moment, and how to have it again without having kept it.

A :class:`GraphValue` is kept (it holds its tensor) or can be built again from other values by a
:class:`GraphStep`, the operator that made it. Autograd is given a :class:`Handle` in place of every
tensor that it would save; in the backward pass the handle gives the tensor back.

What is built again is built for one reader and dropped, except where it was costly and another
reader of the same segment of the forward pass is still to come: then it is held for that one. (A
segment is a stretch of the forward pass at one resolution.) Readers in other segments come so much
later that building anew costs less than holding.
"""

from __future__ import annotations

__all__ = [
    "CASTS",
    "Geometry",
    "GraphStep",
    "GraphValue",
    "Handle",
    "Replay",
    "describe",
    "in_place_variant",
]

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pocketize._torch import pytree, schema_of, version_of, watching_alias
from pocketize.errors import ExecutionError
from pocketize.ops import CONVOLUTIONS, Kind, operator_of
from pocketize.ops.effects import Effect, draws_random_numbers, effect_of, in_place_overload
from pocketize.passes.shared.forwards import refuse_exchanged

Geometry = tuple[Any, ...]
"""Where in its storage a tensor lies: offset, shape, strides, dtype."""

#: Operators through which a weight stays the weight it was; autocast makes use of them.
CASTS = frozenset({Kind.COPY, Kind.PERMUTATION, Kind.RESHAPE})
#: Operators that may give another resolution than they were given.
_RESAMPLES = {
    *CONVOLUTIONS,
    Kind.POOLING,
    Kind.ADAPTIVE_POOLING,
    Kind.UNPOOLING,
    Kind.RESIZE,
}


@dataclass(frozen=True)
class Replay:
    """An operator as the graph sees it.

    Attributes:
        effect: how it treats its arguments.
        heavy: it is a convolution, a matrix product or the like, whose result is worth keeping.
        resamples: it may give another resolution than it was given.
        random: it draws random numbers.
        weight: position of the argument that is the weight of a convolution or matrix product.
        data: position of the argument that it is applied to.
        statistics: positions of running statistics that it updates in training.
        training: position of the argument that says whether it trains.
    """

    effect: Effect
    heavy: bool = False
    resamples: bool = False
    random: bool = False
    weight: int | None = None
    data: int = 0
    statistics: tuple[int, ...] = ()
    training: int | None = None


def in_place_variant(func: Any) -> Any:
    """Return the overload of an activation that overwrites its input, or ``None``."""
    plain = operator_of(func).kind is Kind.ACTIVATION and not draws_random_numbers(func)
    return in_place_overload(func) if plain else None


@functools.cache
def describe(func: Any) -> Replay:
    """Look an operator up by its record and its schema."""
    effect = effect_of(func)
    if effect is Effect.OTHER:
        return Replay(effect)
    record = operator_of(func)
    names = [argument.name for argument in schema_of(func).arguments]
    updated = [names.index(n) for n in ("running_mean", "running_var") if n in names]
    training = next((names.index(n) for n in ("training", "train") if n in names), None)
    return Replay(
        effect,
        bool(record.heavy),
        record.kind in _RESAMPLES,
        draws_random_numbers(func),
        names.index(record.weight) if record.weight else None,
        names.index(record.data) if record.weight and record.data else 0,
        tuple(updated),
        training if updated else None,
    )


@dataclass(eq=False, slots=True)
class GraphStep:
    """One operator that ran and can run again.

    Attributes:
        func: the operator.
        operator: what is known of it.
        args: its arguments, tensors replaced by values.
        kwargs: likewise.
        order: its place in the forward pass.
        random_state: the state of the generator it drew from, with the device.
        use: the use of a weight that it is, as in :class:`~.weight_uses.WeightUse`, if it is one.
        flops: of a convolution or product, otherwise 0.
        costly: running it again takes much longer than reading and writing its tensors.
        default_dtype: of the forward pass; that of results of integers, and of ``linspace``.
        parents: the values among its arguments.
    """

    func: Any
    operator: Replay
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    order: int
    random_state: tuple[torch.device, Tensor] | None = None
    use: str | None = None
    flops: int = 0
    costly: bool = False
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    parents: tuple[GraphValue, ...] = field(init=False)

    def __post_init__(self) -> None:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        self.parents = tuple(leaf for leaf in leaves if isinstance(leaf, GraphValue))

    def run(self, contents: dict[GraphValue, Tensor], spare: set[GraphValue]) -> Any:
        """Run the operator again.

        Args:
            contents: the tensors of the values it reads.
            spare: values whose tensors are not read after this, so that they may be written to.
        """
        args, kwargs = pytree.tree_map_only(
            GraphValue, contents.__getitem__, (self.args, self.kwargs)
        )
        func, first = self.func, self.args[0] if self.args else None
        if self.operator.effect is Effect.WRITER:
            if first not in spare:
                args = (args[0].clone(), *args[1:])
        elif isinstance(first, GraphValue) and first in spare:
            func = in_place_variant(func) or func
        with _random_state(self.random_state), _default_dtype(self.default_dtype):
            return func(*args, **kwargs)


@dataclass(eq=False)
class GraphValue:
    """What a tensor held at one moment of the forward pass.

    Attributes:
        segment: the segment of the forward pass that made it.
        step: how to build it again, ``None`` where it is kept.
        index: which result of the step it is, ``None`` for the only one.
        home: the storage it was in, and how it lay there.
        tensor: the tensor, where it is kept.
        version: the tensor's version when it was kept.
        parameter: the parameter whose memory it is in, and an alias of that as it was.
        pending: readers to come, by segment.
        cached: its tensor, built again and still to be read.
    """

    segment: int
    step: GraphStep | None = None
    index: int | None = None
    home: tuple[weakref.ref[torch.UntypedStorage], Geometry] | None = None
    tensor: Tensor | None = None
    version: int = 0
    parameter: tuple[Tensor, Tensor] | None = None
    pending: dict[int, int] = field(default_factory=dict)
    cached: Tensor | None = None

    def keep(self, tensor: Tensor) -> None:
        """Hold the tensor itself from now on, without its history."""
        self.tensor = watching_alias(tensor)
        self.version = version_of(self.tensor)  # a fake tensor shares it with no alias

    def content(self, segment: int) -> Tensor:
        """Return the tensor, built again where it is not kept.

        Args:
            segment: the segment of the reader.

        Raises:
            ExecutionError: a tensor that is needed was modified in place since.
        """
        ready = self.ready()
        return self._build(segment) if ready is None else ready

    def ready(self) -> Tensor | None:
        """Return the tensor if it is at hand.

        Raises:
            ExecutionError: it was modified in place, or exchanged, since it was kept.
        """
        if self.cached is not None:
            return self.cached
        if self.tensor is not None and version_of(self.tensor) != self.version:
            raise ExecutionError(
                "recompute: a tensor that is needed to build activations again has been modified "
                f"by an in-place operation since the forward pass: a {self.tensor.dtype} tensor of "
                f"shape {list(self.tensor.shape)} is at version {version_of(self.tensor)}, "
                f"expected {self.version}. Results of convolutions and the model's inputs and "
                "weights are needed until the backward pass; clone a tensor before writing to it"
            )
        if self.parameter is not None:
            refuse_exchanged("recompute", *self.parameter)
        return self.tensor

    def _build(self, segment: int) -> Tensor:
        order = _missing(self)
        reads: dict[GraphValue, int] = {}
        for step in order:
            for parent in step.parents:
                reads[parent] = reads.get(parent, 0) + 1
        made: dict[GraphStep, list[GraphValue]] = {}
        for value in [self, *reads]:
            if value.step is not None:
                made.setdefault(value.step, []).append(value)
        contents: dict[GraphValue, Tensor] = {}
        own: set[GraphValue] = set()  # whose memory is ours alone
        reads[self] = reads.get(self, 0) + 1
        with torch.no_grad(), _without_autocast():
            for step in order:
                for parent in step.parents:
                    if parent not in contents:
                        ready = parent.ready()
                        assert ready is not None  # or it would have been among the missing
                        contents[parent] = ready
                spare = {p for p in own if p in step.parents and reads[p] == step.parents.count(p)}
                results = step.run(contents, spare)
                for value in made.get(step, ()):
                    tensor = results if value.index is None else results[value.index]
                    contents[value] = tensor
                    alone = step.operator.effect is not Effect.VIEW or step.parents[0] in spare
                    if alone and value.index is None:
                        own.add(value)
                    if value is not self and value.is_awaited(segment):
                        value.cached = tensor
                        own.discard(value)
                if step.operator.effect is Effect.VIEW:
                    own.difference_update(step.parents)
                results = None
                for parent in step.parents:
                    reads[parent] -= 1
                    if not reads[parent]:
                        contents.pop(parent, None)
                        own.discard(parent)
        return contents[self]

    def is_awaited(self, segment: int) -> bool:
        """Whether it is worth holding for readers in the segment that made it, still to come.

        The backward pass comes to the segments in falling order: now it is in ``segment``. What is
        costly is held from the segment before on.
        """
        if self.step is None or not self.step.operator.heavy or not self.pending.get(self.segment):
            return False
        return segment == self.segment or (self.step.costly and segment == self.segment + 1)


class Handle:
    """Stands in autograd's graph for a tensor that would have been saved.

    Args:
        value: what is to be given back.
        segment: the segment in which it was saved.
    """

    def __init__(self, value: GraphValue, segment: int) -> None:
        self.value, self.segment = value, segment
        self._awaits: tuple[GraphValue, ...] = tuple(_bases(value))
        self._count(segment, 1)

    def unpack(self) -> Tensor:
        """Give the tensor back."""
        tensor = self.value.content(self.segment)
        self._close()
        if self.value.is_awaited(self.segment):
            self.value.cached = tensor
        return tensor

    def move_to(self, segment: int) -> None:
        """Say that it belongs to a later segment than it seemed when it was made."""
        self._count(self.segment, -1)
        self._count(segment, 1)
        self.segment = segment

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        self._count(self.segment, -1)
        for value in self._awaits:
            if not value.pending.get(value.segment):
                value.cached = None
        self._awaits = ()

    def _count(self, segment: int, change: int) -> None:
        for value in self._awaits:
            value.pending[segment] = value.pending.get(segment, 0) + change


def _bases(value: GraphValue) -> Iterator[GraphValue]:
    """Yield a value and what it is a view of, as far as that is built and not kept."""
    while value.step is not None:
        yield value
        if value.step.operator.effect is not Effect.VIEW:
            return
        value = value.step.parents[0]


def _missing(value: GraphValue) -> list[GraphStep]:
    """Return the steps that have to run again for a value, in the order of the forward pass."""
    steps: dict[GraphStep, None] = {}
    queue: list[GraphValue] = [value]
    while queue:
        step = queue.pop().step
        if step is None or step in steps:
            continue
        steps[step] = None
        queue += [parent for parent in step.parents if parent.ready() is None]
    return sorted(steps, key=lambda step: step.order)


@contextlib.contextmanager
def _random_state(state: tuple[torch.device, Tensor] | None) -> Iterator[None]:
    if state is None:
        yield
        return
    device, numbers = state
    cuda: Iterable[int] = (
        [device.index] if device.type == "cuda" and device.index is not None else []
    )
    with torch.random.fork_rng(devices=list(cuda)):
        if device.type == "cuda":
            torch.cuda.set_rng_state(numbers, device)
        else:
            torch.set_rng_state(numbers)
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    if before is dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Disable autocast: operators were recorded below it."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
