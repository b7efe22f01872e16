"""The recompute graph: follows a forward pass operator by operator and decides what is kept.

It is a dispatch mode, so it sees the operators that run below autocast and autograd, called from
modules, functions, TorchScript or C++. While it is active, autograd's saved tensors go through
:meth:`RecomputeGraph.pack`, which returns how to compute the tensor again where that is known.

The model's Python code holds references that it does not need, such as the argument of every
running ``forward``. Where the plan says that nothing reads a tensor again, its memory is released
(a *freed tensor*). If something does read it, the graph computes its content again first.
"""

from __future__ import annotations

__all__ = ["RecomputeGraph"]

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import (
    TorchDispatchMode,
    pytree,
    schema_of,
    storage_key,
    transforms_active,
    version_of,
)
from pocketize.memory.flops import flops_of
from pocketize.memory.hints import note_followed
from pocketize.ops import Kind, operator_of
from pocketize.ops.effects import Effect
from pocketize.passes.recompute.norms import Statistics, normalise, statistics_of
from pocketize.passes.recompute.storage_table import (
    StorageRecord,
    StorageTable,
    bytes_of,
    covers,
    geometry_of,
    is_plain,
)
from pocketize.passes.recompute.values import (
    CASTS,
    GraphStep,
    GraphValue,
    Handle,
    Replay,
    describe,
)

aten = torch.ops.aten
#: Operations for each number of a result from which on building it again is costly: those of a
#: 1x1 convolution of 128 channels, or of a 3x3x3 convolution of 5.
_COSTLY = 256
#: Operators that do not look at the memory at all, not even at its size.
_SHALLOW = {aten.detach.default, aten.alias.default}


class RecomputeGraph(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records one forward pass.

    Args:
        model: whose parameters name the convolutions.
        rebuilt: uses of weights whose results are built again instead of kept. A use is the name
            of the weight of a convolution or linear layer; ``"name#1"`` is the second use of it.
        frees: for a use, what nothing reads later: ``-1`` its input once it has run, ``n`` the
            n-th part of the concatenation that is its input, before it runs.
        min_bytes: tensors of fewer bytes are kept in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        rebuilt: frozenset[str],
        frees: Mapping[str, tuple[int, ...]],
        min_bytes: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rebuilt, self.frees, self.min_bytes = rebuilt, frees, min_bytes
        self.segment = 0
        #: Of the last norm that ran with the statistics of its input.
        self.statistics: Statistics | None = None
        self._positions = 0
        self._largest = 0
        self._packed: list[Handle] = []
        self._order = 0
        self._uses: dict[str, int] = {}
        self._quiet = False
        self._followed = 0
        self.storages = StorageTable()
        for name, parameter in model.named_parameters():
            if is_plain(parameter):
                record = self.storages.record(parameter)
                record.name, record.parameter = name, (parameter, parameter.detach())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and note how to run it again."""
        kwargs = kwargs or {}
        if self._quiet or getattr(func, "namespace", "") == "prim":  # which asks for the device
            return func(*args, **kwargs)
        self._followed += 1
        with self.quietly():
            return self._run(func, describe(func), args, kwargs)

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """Operators that run inside are not recorded."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def pack(self, tensor: Tensor) -> Any:
        """Give autograd something in place of a tensor that it wants to save."""
        with self.quietly():
            value = None if transforms_active() else self._value(tensor)
            if value is None:
                return tensor.detach()
            handle = self.handle(value, self.segment)
            self._followed += 1
            self._packed.append(handle)
            return handle

    def handle(self, value: GraphValue, segment: int) -> Handle:
        """Make what autograd gets."""
        return Handle(value, segment)

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """Give autograd the tensor that it had saved."""
        if isinstance(packed, Handle):
            return packed.unpack()
        tensor: Tensor = packed
        return tensor

    def finish(self) -> None:
        """End the recording; freed tensors still referenced get their content back."""
        self._packed.clear()
        note_followed(self._followed)
        with self.quietly():
            self.storages.close(self.segment)

    def expose(self, tensor: Tensor) -> None:
        """Never free a tensor: code outside torch gets a pointer to its memory."""
        with self.quietly():
            self.storages.bring_back(tensor, self.segment)
            record = self.record_of(tensor)
            if record is not None:
                record.exposed = True

    def exchange(self, tensor: Tensor, content: Tensor) -> None:
        """Give a tensor other memory (``p.data = ...``); a weight is known by that from now on."""
        before = self.record_of(tensor)
        with self.quietly():
            tensor.data = content
            after, alias = self.record_of(tensor), tensor.detach()
        if before is None or after is None or before.parameter is None:
            return
        if before.parameter[0] is tensor:
            after.name, after.parameter = before.name, (tensor, alias)
            after.values.clear()  # it is kept, as weights are

    def record_of(self, tensor: Any) -> StorageRecord | None:
        """Return what is known of a tensor's memory; ``None`` for what is no ordinary tensor."""
        if not isinstance(tensor, Tensor) or not is_plain(tensor):
            return None
        return self.storages.record(tensor)

    # What runs.

    def _run(
        self, func: Any, operator: Replay, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not all(map(is_plain, tensors)):
            operator = Replay(Effect.OTHER)
        if func not in _SHALLOW:
            for tensor in tensors:
                self.storages.bring_back(tensor, self.segment)
        if operator.effect is Effect.WRITER:
            return self._write(func, operator, args, kwargs)
        if operator.effect is Effect.OTHER:
            return self._other(func, args, kwargs, tensors)
        use = self._use(operator, args) if operator.weight is not None else None
        source = self._free_parts(use, operator, args) if use in self.frees else None
        state = _state_of(tensors, kwargs) if operator.random else None
        recorded = tuple(self._forget_statistics(operator, args))
        made = func(*args, **kwargs)
        results = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor)]
        if _name_goes_on(func, tensors, results):
            self.storages.record(results[0]).name = self.storages.record(tensors[0]).name
        found = statistics_of(func, args, made)
        if found is not None:
            self.statistics = found
            self._normed(found, args, made[0])
        elif _share(tensors, results):
            self._view(func, args, kwargs, tensors[0], made)
        else:
            kept = operator.heavy and use not in self.rebuilt
            if operator.random and state is None:
                kept = True
            if not kept and results and max(map(bytes_of, results)) >= self.min_bytes:
                step = self._step(func, operator, recorded, kwargs, state)
                if operator.heavy:
                    step.use = use
                    step.flops = flops_of(func, args, kwargs, made) or 0
                    step.costly = step.flops >= _COSTLY * sum(t.numel() for t in results)
                self._note(step, made, self.segment)
        if operator.resamples and results:
            self._advance(results[0])
        self._packed.clear()
        if source is not None and -1 in self.frees[use or ""]:
            for value in source:
                self.storages.take(value)
        return made

    def _step(
        self,
        func: Any,
        operator: Replay,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: tuple[torch.device, Tensor] | None = None,
    ) -> GraphStep:
        values, named = pytree.tree_map_only(Tensor, self._value, (args, kwargs))
        self._order += 1
        return GraphStep(func, operator, values, named, self._order, state)

    def _value(self, tensor: Tensor) -> GraphValue | None:
        return self.storages.value_of(tensor, self.segment)

    def _note(self, step: GraphStep, made: Any, segment: int) -> None:
        """Remember that the results of an operator can be had by running it again."""
        several = isinstance(made, tuple | list)
        for index, result in enumerate(made if several else (made,)):
            if not isinstance(result, Tensor) or not is_plain(result):
                continue
            if bytes_of(result) < self.min_bytes:
                continue  # kept when asked for
            record, geometry = self.storages.record(result), geometry_of(result)
            if step.operator.effect is Effect.VIEW and geometry in record.values:
                continue  # the same region as what it is a view of
            value = GraphValue(segment, step, index if several else None)
            value.home = record.watch, geometry
            record.values[geometry] = value
            record.version = version_of(result)

    def _normed(self, found: Statistics, args: tuple[Any, ...], made: Tensor) -> None:
        """A norm is built again with the statistics of the first time."""
        if bytes_of(made) >= self.min_bytes:
            again = (*args[:3], found.mean, found.invstd, found.eps, found.groups)
            self._note(self._step(normalise, Replay(Effect.PURE), again, {}), made, self.segment)

    def _view(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], base: Tensor, made: Any
    ) -> None:
        """A view of what can be built again can be built again; other views share what is kept."""
        self.storages.record(base).views += 1
        value = self.storages.find(base)
        if value is not None and value.step is not None:
            operator = Replay(Effect.VIEW)
            self._note(self._step(func, operator, args, kwargs), made, value.segment)

    def _write(
        self, func: Any, operator: Replay, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        target = args[0]
        record = self.storages.record(target)
        old = self.storages.find(target)
        alone = set(record.values) <= {geometry_of(target)} and covers(target)
        step = None
        if old is not None and old.step is not None and alone:
            state = _state_of([target], kwargs) if operator.random else None
            if state is not None or not operator.random:
                step = self._step(func, operator, args, kwargs, state)
        self.storages.preserve(record)
        made = func(*args, **kwargs)
        record.values.clear()
        if step is not None and old is not None:
            self._note(step, target, old.segment)
        record.version = None  # autograd raises it after this
        return made

    def _other(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """An operator of which nothing is known may write to anything that it was given.

        Autograd reads what it saved for that operator as the operator leaves it: ``rrelu`` fills
        its noise.
        """
        schema = schema_of(func)
        filled = []
        if schema is None or schema.is_mutable:
            saved = {id(handle.value) for handle in self._packed}
            for tensor in filter(is_plain, tensors):
                value = self.storages.find(tensor)
                if value is not None and id(value) in saved:
                    filled.append((value, tensor))
                record = self.storages.record(tensor)
                self.storages.preserve(record)
                record.values.clear()
                record.version = None
        made = func(*args, **kwargs)
        for value, tensor in filled:
            value.step = None
            value.keep(tensor)
        return made

    def _forget_statistics(self, operator: Replay, args: tuple[Any, ...]) -> Iterator[Any]:
        """Running statistics are updated once: in a repetition there are none to update.

        Where they are used, copies are kept: a forward in training mode may write to them before
        the backward pass, and does not raise their version.
        """
        trains = operator.training is not None and args[operator.training] is True
        for position, argument in enumerate(args):
            if position in operator.statistics and isinstance(argument, Tensor):
                if not trains:
                    kept = self._value(argument)
                    self.storages.preserve(self.storages.record(argument))
                yield None if trains else kept
            else:
                yield argument

    def _advance(self, made: Tensor) -> None:
        """A tensor at another resolution begins a segment, unless it is tiny, as a mean is."""
        size, positions = bytes_of(made), made.shape[2:].numel()
        if made.ndim < 3 or positions == self._positions or size * 64 < self._largest:
            self._largest = max(self._largest, size)
            return
        if positions < self._positions:  # its input belongs to the reader's segment
            for handle in self._packed:
                handle.move_to(self.segment + 1)
        if self._positions:
            self.segment += 1
        self._positions, self._largest = positions, size

    # Names.

    def _use(self, operator: Replay, args: tuple[Any, ...]) -> str | None:
        assert operator.weight is not None
        weight = args[operator.weight] if len(args) > operator.weight else None
        name = self.storages.record(weight).name if isinstance(weight, Tensor) else None
        if name is None:
            return None
        count = self._uses[name] = self._uses.get(name, -1) + 1
        return f"{name}#{count}" if count else name

    # Freed tensors.

    def _free_parts(
        self, use: str | None, operator: Replay, args: tuple[Any, ...]
    ) -> list[GraphValue]:
        """Free the parts of a concatenation; return the values that the input consists of."""
        data = args[operator.data]
        value = self.storages.find(data)
        chain = []
        while value is not None and value.step is not None:
            chain.append(value)
            if operator_of(value.step.func).kind is Kind.CONCATENATION:
                for position in self.frees[use or ""]:
                    if 0 <= position < len(value.step.parents):
                        self.storages.take(value.step.parents[position])
                break
            cast = operator_of(value.step.func).kind in CASTS
            simple = cast or value.step.operator.effect is Effect.VIEW
            value = value.step.parents[0] if simple else None
        return chain


def _share(given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether results lie in the memory of the first argument."""
    if not given or not made or not is_plain(made[0]):
        return False
    return storage_key(made[0]) == storage_key(given[0])


def _name_goes_on(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    cast = operator_of(func).kind in CASTS
    return cast and len(given) == 1 and len(made) == 1 and not _share(given, made)


def _state_of(tensors: list[Tensor], kwargs: dict[str, Any]) -> tuple[torch.device, Tensor] | None:
    """Return the state of the generator that an operator is about to draw from, if known."""
    if kwargs.get("generator") is not None:
        return None
    device = kwargs.get("device") or (tensors[0].device if tensors else torch.device("cpu"))
    device = torch.device(device)
    if device.type == "cpu":
        return device, torch.get_rng_state()
    if device.type == "cuda":
        return device, torch.cuda.get_rng_state(device)
    return None
