"""The tape: follows a forward pass operator by operator and decides what is kept.

It is a dispatch mode, so it sees what really runs, below autocast and autograd, whoever calls it:
modules, functions, TorchScript, C++. While it is on, autograd's saved tensors go through
:meth:`Tape.pack`, which answers with a recipe where the tape knows one.

The model's Python code holds references that it does not need (the argument of every ``forward``
that is at work, for one). Where the plan knows that nobody reads a tensor again, the tape takes the
memory from under it. The tensor is then a shell: whoever does read it, against the plan, makes the
tape build its content again first.
"""

from __future__ import annotations

__all__ = ["Tape"]

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pocketize.passes.runtime.recompute.operators import Kind, Operator, describe
from pocketize.passes.runtime.recompute.statistics import Statistics, normalise, statistics_of
from pocketize.passes.runtime.recompute.values import (
    Geometry,
    Handle,
    Meter,
    Step,
    Value,
    flops_of,
)

aten = torch.ops.aten
#: Operations for each number of a result from which on building it again is costly: those of a
#: 1x1 convolution of 128 channels, or of a 3x3x3 convolution of 5.
_COSTLY = 256
_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
#: Operators through which a weight stays the weight it was.
_CASTS = {aten._to_copy.default, aten.t.default, aten.detach.default, aten.alias.default}
_CASTS |= {aten.transpose.int, aten.view.default, aten.clone.default}


class _Memory:
    """What is known of one storage.

    Attributes:
        values: what tensors on it hold, by their geometry; kept values by weak reference, since
            they hold the storage alive themselves.
        version: the version that this is true of; ``None`` to take the next one seen.
        name: name of the parameter that lies here, or of which this is a cast.
        views: how many views were made of it.
        shell: the value to build again, its geometry and the number of bytes, where the memory has
            been taken away.
    """

    __slots__ = ("name", "shell", "values", "version", "views", "watch")

    def __init__(self, watch: weakref.ref[torch.UntypedStorage]) -> None:
        self.watch = watch
        self.values: dict[Geometry, Value | weakref.ref[Value]] = {}
        self.version: int | None = None
        self.name: str | None = None
        self.views = 0
        self.shell: tuple[Value, Geometry, int] | None = None


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records one forward pass.

    Args:
        model: whose parameters name the convolutions.
        rebuilt: sites whose results are built again instead of kept. A site is the name of the
            weight of a convolution or linear layer; ``"name#1"`` is the second use of it.
        frees: for a site, what nobody reads any more: ``-1`` its input once it has run, ``n`` the
            n-th part of the concatenation that is its input, before it runs.
        min_bytes: tensors of fewer bytes are kept in any case.
        meter: counts what rebuilding costs.
    """

    def __init__(
        self,
        model: nn.Module,
        rebuilt: frozenset[str],
        frees: Mapping[str, tuple[int, ...]],
        min_bytes: int,
        meter: Meter | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rebuilt, self.frees, self.min_bytes, self.meter = rebuilt, frees, min_bytes, meter
        self.stage = 0
        #: Of the last norm that ran with the statistics of its input.
        self.statistics: Statistics | None = None
        self._positions = 0
        self._largest = 0
        self._packed: list[Handle] = []
        self._order = 0
        self._uses: dict[str, int] = {}
        self._quiet = False
        self._memories: dict[int, _Memory] = {}
        for name, parameter in model.named_parameters():
            if _is_plain(parameter):
                self._memory(parameter).name = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and note how to run it again."""
        kwargs = kwargs or {}
        if self._quiet or getattr(func, "namespace", "") == "prim":  # which asks for the device
            return func(*args, **kwargs)
        with self.quietly():
            return self._run(func, describe(func), args, kwargs)

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """What runs inside is the tape's own business and not the model's."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def pack(self, tensor: Tensor) -> Any:
        """Give autograd something in place of a tensor that it wants to save."""
        with self.quietly():
            value = self.value_of(tensor)
            if value is None:
                return tensor.detach()
            if self.meter is not None:
                self.meter.store(value)
            handle = Handle(value, self.stage, self.meter)
            self._packed.append(handle)
            return handle

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """Give autograd the tensor that it had saved."""
        if isinstance(packed, Handle):
            return packed.unpack()
        tensor: Tensor = packed
        return tensor

    def finish(self) -> None:
        """End the recording: shells that somebody still holds get their content back."""
        with self.quietly():
            for memory in list(self._memories.values()):
                storage = memory.watch()
                if storage is not None and memory.shell is not None:
                    value, (_, _, _, dtype), _ = memory.shell
                    self._fill(memory, storage, _blank(storage, dtype))
            self._memories.clear()

    # What runs.

    def _run(
        self, func: Any, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not all(map(_is_plain, tensors)):
            operator = Operator(Kind.OTHER)
        if operator.kind is not Kind.VIEW:
            for tensor in tensors:
                self.bring_back(tensor)
        if operator.kind is Kind.WRITER:
            return self._write(func, operator, args, kwargs)
        if operator.kind is Kind.OTHER:
            return self._other(func, args, kwargs, tensors)
        site = self._site(operator, args) if operator.weight is not None else None
        source = self._free_parts(site, operator, args) if site in self.frees else None
        state = _state_of(tensors, kwargs) if operator.random else None
        recorded = tuple(self._forget_statistics(operator, args))
        made = func(*args, **kwargs)
        results = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor)]
        if _name_goes_on(func, tensors, results):
            self._memory(results[0]).name = self._memory(tensors[0]).name
        found = statistics_of(func, args, made)
        if found is not None:
            self.statistics = found
            self._normed(found, args, made[0])
        elif _share(tensors, results):
            self._view(func, args, kwargs, tensors[0], made)
        else:
            kept = operator.heavy and site not in self.rebuilt
            if operator.random and state is None:
                kept = True
            if not kept and results and max(map(_bytes, results)) >= self.min_bytes:
                step = self._step(func, operator, recorded, kwargs, state)
                if operator.heavy:
                    flops = flops_of(func, args, kwargs, made)
                    step.costly = flops >= _COSTLY * sum(t.numel() for t in results)
                self._note(step, made, self.stage)
        if operator.resamples and results:
            self._advance(results[0])
        self._packed.clear()
        if source is not None and -1 in self.frees[site or ""]:
            for value in source:
                self._take(value)
        return made

    def _step(
        self,
        func: Any,
        operator: Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: tuple[torch.device, Tensor] | None = None,
    ) -> Step:
        values = pytree.tree_map_only(Tensor, self.value_of, (args, kwargs))
        self._order += 1
        return Step(func, operator, *values, self._order, state)

    def _note(self, step: Step, made: Any, stage: int) -> None:
        """Remember that the results of an operator can be had by running it again."""
        several = isinstance(made, tuple | list)
        for index, result in enumerate(made if several else (made,)):
            if not isinstance(result, Tensor) or not _is_plain(result):
                continue
            if _bytes(result) < self.min_bytes:
                continue  # kept when asked for
            memory, geometry = self._memory(result), _geometry(result)
            if step.operator.kind is Kind.VIEW and geometry in memory.values:
                continue  # it lies there just as what it is a view of
            value = Value(stage, step, index if several else None)
            value.home = memory.watch, geometry
            memory.values[geometry] = value
            memory.version = result._version

    def _normed(self, found: Statistics, args: tuple[Any, ...], made: Tensor) -> None:
        """A norm is built again with the statistics of the first time."""
        if _bytes(made) >= self.min_bytes:
            again = (*args[:3], found.mean, found.rstd, found.eps, found.groups)
            self._note(self._step(normalise, Operator(Kind.PURE), again, {}), made, self.stage)

    def _view(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], base: Tensor, made: Any
    ) -> None:
        """A view of what can be built again can be built again; other views share what is kept."""
        self._memory(base).views += 1
        value = self._find(base)
        if value is not None and value.step is not None:
            operator = Operator(Kind.VIEW)
            self._note(self._step(func, operator, args, kwargs), made, value.stage)

    def _write(
        self, func: Any, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        target = args[0]
        memory = self._memory(target)
        old = self._find(target)
        alone = set(memory.values) <= {_geometry(target)} and _covers(target)
        step = None
        if old is not None and old.step is not None and alone:
            state = _state_of([target], kwargs) if operator.random else None
            if state is not None or not operator.random:
                step = self._step(func, operator, args, kwargs, state)
        self._preserve(memory)
        made = func(*args, **kwargs)
        memory.values.clear()
        if step is not None and old is not None:
            self._note(step, target, old.stage)
        memory.version = None  # autograd raises it after this
        return made

    def _other(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        """An operator of which nothing is known may write to anything that it was given."""
        schema = getattr(func, "_schema", None)
        if schema is None or schema.is_mutable:
            for tensor in filter(_is_plain, tensors):
                memory = self._memory(tensor)
                self._preserve(memory)
                memory.values.clear()
                memory.version = None
        return func(*args, **kwargs)

    def _preserve(self, memory: _Memory) -> None:
        """Give kept values a copy of their own, before somebody writes to the memory they share."""
        for held in memory.values.values():
            value = held() if isinstance(held, weakref.ref) else held
            if value is not None and value.tensor is not None:
                value.keep(value.tensor.clone())

    def _forget_statistics(self, operator: Operator, args: tuple[Any, ...]) -> Iterator[Any]:
        """Running statistics are updated once: in a repetition there are none to update."""
        trains = operator.training is not None and args[operator.training] is True
        for position, argument in enumerate(args):
            if trains and position in operator.statistics and isinstance(argument, Tensor):
                yield None
            else:
                yield argument

    def _advance(self, made: Tensor) -> None:
        """A tensor at another resolution begins a stage, unless it is tiny, as a mean is."""
        size, positions = _bytes(made), made.shape[2:].numel()
        if made.ndim < 3 or positions == self._positions or size * 64 < self._largest:
            self._largest = max(self._largest, size)
            return
        if positions < self._positions:  # its input belongs to the reader's stage
            for handle in self._packed:
                handle.restage(self.stage + 1)
        if self._positions:
            self.stage += 1
        self._positions, self._largest = positions, size

    # Names.

    def _site(self, operator: Operator, args: tuple[Any, ...]) -> str | None:
        assert operator.weight is not None
        weight = args[operator.weight] if len(args) > operator.weight else None
        name = self._memory(weight).name if isinstance(weight, Tensor) else None
        if name is None:
            return None
        count = self._uses[name] = self._uses.get(name, -1) + 1
        return f"{name}#{count}" if count else name

    # What lies where.

    def value_of(self, tensor: Tensor) -> Value | None:
        """Return what a tensor holds; it is kept from now on if it cannot be built again.

        ``None`` for tensors whose memory cannot be known (sparse, wrappers).
        """
        if not _is_plain(tensor):
            return None
        value = self._find(tensor)
        if value is None:
            value = Value(self.stage)
            memory = self._memory(tensor)
            value.keep(tensor)
            memory.values[_geometry(tensor)] = weakref.ref(value)
            memory.version = _version(tensor)
        return value

    def views_of(self, tensor: Tensor) -> int:
        """Return how many views were made of the memory of a tensor so far."""
        memory = self._memories.get(tensor.untyped_storage()._cdata) if _is_plain(tensor) else None
        return 0 if memory is None else memory.views

    def _find(self, tensor: Tensor) -> Value | None:
        memory = self._memories.get(tensor.untyped_storage()._cdata)
        if memory is None:
            return None
        version = _version(tensor)
        if memory.version is not None and memory.version != version:
            memory.values.clear()  # written to behind the tape's back
        memory.version = version
        held = memory.values.get(_geometry(tensor))
        return held() if isinstance(held, weakref.ref) else held

    def _memory(self, tensor: Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        memory = self._memories.get(key)
        if memory is None:
            forget = functools.partial(_forget, weakref.ref(self), key)
            memory = self._memories[key] = _Memory(weakref.ref(storage, forget))
        return memory

    # Shells.

    def _free_parts(
        self, site: str | None, operator: Operator, args: tuple[Any, ...]
    ) -> list[Value]:
        """Free the parts of a concatenation; return the values that the site's input consists of."""
        data = args[1 if operator.weight == 2 else 0]
        value = self._find(data)
        chain = []
        while value is not None and value.step is not None:
            chain.append(value)
            if value.step.func is aten.cat.default:
                for position in self.frees[site or ""]:
                    if 0 <= position < len(value.step.parents):
                        self._take(value.step.parents[position])
                break
            simple = value.step.func in _CASTS or value.step.operator.kind is Kind.VIEW
            value = value.step.parents[0] if simple else None
        return chain

    def _take(self, value: Value) -> None:
        """Take the memory from under a tensor that can be built again."""
        if value.home is None or value.step is None:
            return
        watch, geometry = value.home
        storage = watch()
        memory = None if storage is None else self._memories.get(storage._cdata)
        if storage is None or memory is None or memory.shell is not None:
            return
        offset, shape, _, dtype = geometry
        count = 1
        for size in shape:
            count *= size
        whole = offset == 0 and count * dtype.itemsize == storage.nbytes()
        if not whole or memory.values.get(geometry) is not value:
            return  # a part of the memory, or it has been written to since
        if any(isinstance(held, weakref.ref) and held() for held in memory.values.values()):
            return
        memory.shell = value, geometry, storage.nbytes()
        storage.resize_(0)

    def bring_back(self, tensor: Tensor) -> None:
        """Build the content of a shell again, because somebody is going to read it."""
        if not _is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is not None and memory.shell is not None:
            with self.quietly():
                self._fill(memory, storage, tensor)

    def _fill(self, memory: _Memory, storage: torch.UntypedStorage, tensor: Tensor) -> None:
        assert memory.shell is not None
        value, (offset, shape, stride, dtype), nbytes = memory.shell
        memory.shell = None
        content = value.content(self.stage, self.meter)
        storage.resize_(nbytes)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter((tensor,)):
            alias = tensor.detach()
            if alias.dtype != dtype:
                alias = alias.view(dtype)
            alias.as_strided(shape, stride, offset).copy_(content)


def _forget(tape: weakref.ref[Tape], key: int, _: object) -> None:
    alive = tape()
    if alive is not None:
        alive._memories.pop(key, None)


def _blank(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """Return a tensor of no elements on a storage."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, 0, (0,), (1,))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor owns its memory as ordinary ones do."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    kind = type(tensor)
    return kind in _PLAIN or kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def _geometry(tensor: Tensor) -> Geometry:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _covers(tensor: Tensor) -> bool:
    return _bytes(tensor) == tensor.untyped_storage().nbytes()


def _share(given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether results lie in the memory of the first argument."""
    if not given or not made or not _is_plain(made[0]):
        return False
    return made[0].untyped_storage()._cdata == given[0].untyped_storage()._cdata


def _name_goes_on(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    return func in _CASTS and len(given) == 1 and len(made) == 1 and not _share(given, made)


def _state_of(tensors: list[Tensor], kwargs: dict[str, Any]) -> tuple[torch.device, Tensor] | None:
    """Return the state of the generator that an operator is about to draw from, where it is known."""
    if kwargs.get("generator") is not None:
        return None
    device = kwargs.get("device") or (tensors[0].device if tensors else torch.device("cpu"))
    device = torch.device(device)
    if device.type == "cpu":
        return device, torch.get_rng_state()
    if device.type == "cuda":
        return device, torch.cuda.get_rng_state(device)
    return None
