"""A forward that is run a second time, in the backward pass, as if nothing had happened since."""

from __future__ import annotations

__all__ = ["Run"]

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from pocketize._torch import TorchDispatchMode, innermost_saving, storage_key, version_of
from pocketize.errors import ExecutionError
from pocketize.graph.capture import find_tensors
from pocketize.passes.shared.object_state import copied, has_state, put_state, state_of

#: Buffers up to this many elements are kept whether or not they are known to have been written to:
#: batch norm writes to its running statistics without raising their versions.
_SMALL = 2**16

#: Objects that are looked at: a trainer may hang on a module.
_OBJECTS = 2000

#: Global flags that decide which operators run.
_FLAGS = (
    (torch.backends.cudnn, "enabled"),
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.mkldnn, "enabled"),
)


class Run:
    """One forward of a module, so that it can be run again as it was.

    Noted are the attributes of the module, of those inside it, and of objects that these hold:
    weights, buffers, modes, flags, lists. For the second run they are put back, and after it what
    was there in the meantime. So the second run leaves no trace and reads the tensors that the
    first one read, whoever replaced them since. Buffers that the forward writes to are copied
    before; of all other tensors the version is noted, and the second run raises an error when it
    reads one that was written to since.

    Args:
        module: the module.
        forward: what is run.
        lock: held during the second run.
        args: arguments of the first run.
        kwargs: keyword arguments of the first run.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        lock: AbstractContextManager[Any],
        args: Any,
        kwargs: Any,
    ) -> None:
        self._module, self._forward, self._lock = module, forward, lock
        self._given: Any = args, kwargs  # until the first run
        #: The tensors among the arguments; aliases, for autograd's hooks to keep.
        self.saved: list[Tensor] = []
        self._inputs: list[_Input] = []
        self._held: list[_NotedTensor] = []
        self._arguments = copied(self._given, self._save, {})
        self._names = {id(t): f"parameter {name!r}" for name, t in module.named_parameters()}
        self._names |= {id(t): f"buffer {name!r}" for name, t in module.named_buffers()}
        buffers = [b for m in module.modules() for b in m._buffers.values() if b is not None]
        self._copies = {id(b): b.detach().clone() for b in buffers}  # whatever buffers() answers
        self._memo: dict[int, tuple[Any, Any]] = {}
        #: Modules, and objects that they hold, with their attributes.
        self._states: list[tuple[Any, dict[str, Any]]] = []
        self._known = {id(m) for m in module.modules()}
        for m in module.modules():
            self._states.append((m, copied(state_of(m), self._hold, self._memo)))
        self._memo, self._known = {}, set()
        self._settings = _settings()
        self._open: list[ExitStack] = []

    def __call__(self, *saved: Tensor) -> Any:
        """Run the forward: the first time on what was given, then on what was saved of it."""
        given, self._given = self._given, None
        self.saved = []  # the hooks keep them now, or what they moved them to
        if given is None:
            given = copied(self._arguments, lambda v: _restored(v, saved), {})
        args, kwargs = given
        return self._forward(*args, **kwargs)

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return what surrounds the first run, and what surrounds the second and any further."""
        return self._first(), self

    def _save(self, value: Any) -> Any:
        """Keep a tensor among the arguments in the way that autograd's hooks want it kept."""
        if not isinstance(value, Tensor):
            self._held += [_NotedTensor.of(t, "an input") for t in find_tensors(value)]
            return value
        counter = value.detach()
        if value.layout is torch.strided and not hasattr(value, "device_mesh"):
            counter.data = value.new_empty((0,))  # shares the version counter, holds no memory
        made = _Input(len(self.saved), value, counter)
        self._inputs.append(made)
        self.saved.append(value.data)  # with versions of its own: they are compared here
        return made

    def _hold(self, value: Any) -> Any:
        """Note the version of a tensor among the attributes, and the attributes of an object."""
        if not isinstance(value, Tensor):
            if id(value) not in self._known and has_state(value):
                self._known.add(id(value))
                if len(self._known) <= _OBJECTS:
                    held = copied(state_of(value), self._hold, self._memo)
                    self._states.append((value, held))
            return value
        # Without the graph, which may lead to the graph of the forward before, and so on.
        kept = value if value.is_leaf else value.detach().requires_grad_()
        if id(value) in self._copies:
            self._copies[id(kept)] = self._copies[id(value)]
        self._held.append(_NotedTensor.of(kept, self._names.get(id(value), "a tensor attribute")))
        return kept

    @contextmanager
    def _first(self) -> Iterator[None]:
        hooks = innermost_saving()  # the checkpoint's
        with saved_tensors_hooks(hooks[0], self._explained(hooks[1])) if hooks else ExitStack():
            yield
        self._settle()

    def _explained(self, unpack: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """Say in an error of pocketize's that the second run was another one."""
        kind = type(self._module).__name__

        def explained(held: Any) -> Tensor:
            try:
                return unpack(held)
            except CheckpointError as error:
                raise ExecutionError(
                    f"checkpoint: {kind} kept other tensors when it was run again in the backward "
                    "pass, so it depends on something that changed since the forward: a global "
                    "variable, a cache, an object that it shares. Leave it out with keep"
                ) from error

        return explained

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self) -> None:
        """Keep copies of the buffers only that the first run wrote to, or may have."""
        items = [item for item in self._held if id(item.tensor) in self._copies]
        wanted = {id(i.tensor) for i in items if i.change() or i.tensor.numel() <= _SMALL}
        self._copies = {key: copy for key, copy in self._copies.items() if key in wanted}
        self._held = [item for item in self._held if id(item.tensor) not in wanted]

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            stack.enter_context(self._as_it_was())
            self._open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        changed = {_key(item.tensor): told for item in self._held if (told := item.change())}
        changed |= {item.key: told for item in self._inputs if (told := item.change())}
        toggled = [i.tensor for i in self._held if i.tensor.requires_grad is not i.requires_grad]
        settings = _settings()
        states = [(module, state_of(module)) for module, _ in self._states]
        memo: dict[int, tuple[Any, Any]] = {}
        stand_ins: dict[int, Tensor] = {}

        def stand_in(value: Any) -> Any:
            if id(value) not in self._copies:
                return value
            return stand_ins.setdefault(id(value), self._copies[id(value)].clone())

        try:
            _set(self._settings)
            for tensor in toggled:
                tensor.requires_grad_(not tensor.requires_grad)
            for (module, state), (_, now) in zip(self._states, states, strict=True):
                put_state(module, copied(state, stand_in, memo), now)
            with _RefuseChanged(type(self._module).__name__, changed) if changed else ExitStack():
                yield
        finally:
            for module, state in states:
                put_state(module, state, state)
            for tensor in toggled:
                tensor.requires_grad_(not tensor.requires_grad)
            _set(settings)


@dataclass(frozen=True, eq=False)
class _NotedTensor:
    """A tensor that the second run may read, as the first one found it."""

    tensor: Tensor
    name: str
    version: int
    key: int
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor, name: str) -> _NotedTensor:
        return cls(tensor, name, version_of(tensor), _key(tensor), tensor.requires_grad)

    def change(self) -> str:
        """Say how it was changed since; ``""`` if it was not."""
        told = _written(self.name, self.tensor, self.version)
        if not told and _key(self.tensor) != self.key:
            told = f"{self.name} was given other memory, as an assignment to its .data does"
        return told


class _Input:
    """A tensor among the arguments, as the first run found it; the tensor itself is saved aside."""

    def __init__(self, position: int, tensor: Tensor, counter: Tensor) -> None:
        self.position, self.key = position, _key(tensor)
        self._counter, self._version = counter, version_of(tensor)
        self._type, self._attributes = type(tensor), dict(vars(tensor))
        self._requires_grad = tensor.requires_grad

    def change(self) -> str:
        return _written(f"input {self.position}", self._counter, self._version)

    def restored(self, saved: Tensor) -> Tensor:
        """Give what was saved the class and the attributes that the argument had."""
        tensor = saved.detach()
        if type(tensor) is not self._type and self._type is not nn.Parameter:
            tensor = tensor.as_subclass(self._type)
        vars(tensor).update(self._attributes)
        return tensor.requires_grad_(self._requires_grad)


def _restored(value: Any, saved: tuple[Tensor, ...]) -> Any:
    return value.restored(saved[value.position]) if isinstance(value, _Input) else value


def _written(name: str, tensor: Tensor, expected: int) -> str:
    found = version_of(tensor)
    return "" if found == expected else f"{name} was written to (version {found}, not {expected})"


class _RefuseChanged(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises when an operator reads what was changed.

    A change alone is no error: an optimizer may step on a bias as soon as its gradient is there,
    and the second run ends before the bias is read.
    """

    def __init__(self, kind: str, changed: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind, self._changed = kind, changed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in find_tensors((args, kwargs)):
            if told := self._changed.get(_key(tensor)):
                raise self.error(told)
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        other = (ExecutionError, torch.OutOfMemoryError)
        if isinstance(error, RuntimeError) and not isinstance(error, other):
            # Of another dtype or shape, it was refused before an operator read it.
            raise self.error(next(iter(self._changed.values()))) from error

    def error(self, told: str) -> ExecutionError:
        return ExecutionError(
            f"checkpoint: {told} between forward and backward, and the {self._kind} that reads it "
            "runs again in the backward pass. Call backward() first and change it then "
            "(optimizer.step() of another loss, a copy into a static buffer), or give the forward "
            "a clone"
        )


def _settings() -> list[Any]:
    return [torch.get_default_dtype(), *(getattr(place, name) for place, name in _FLAGS)]


def _set(values: list[Any]) -> None:
    torch.set_default_dtype(values[0])
    for (place, name), value in zip(_FLAGS, values[1:], strict=True):
        if getattr(place, name) != value:
            setattr(place, name, value)


def _key(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor from that of others."""
    return storage_key(tensor) if tensor.layout is torch.strided else id(tensor)
