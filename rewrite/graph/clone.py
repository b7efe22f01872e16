"""Copies of a model: a real one to rewrite, and a fake one to trace.

``copy.deepcopy`` alone fails on modules that keep computed tensors (the older ``weight_norm`` does,
and so does a network with deep supervision that has run), and it copies every weight even where
only shapes are wanted. Both are cured with the memo of ``deepcopy``.
"""

from __future__ import annotations

__all__ = ["clone", "clone_modules", "fake_clone", "kept_random_states", "quiet_code"]

import contextlib
import copy
import functools
import gc
import operator
import random
import types
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pocketize.errors import CaptureError
from pocketize.graph.code_reads import code_reads, names_in

#: What ``deepcopy`` does not look into.
_ATOMIC = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, weakref.ref)
#: Attributes of every module.
_TABLES = frozenset(vars(nn.Module()))
#: How far from a hook what it writes into may be, and how much is looked at.
_STEPS, _OBJECTS = 6, 100_000
_LRU_CACHE = type(functools.lru_cache(len))
#: Modules of classes whose objects other threads change.
_LIVE = {"_thread", "asyncio", "concurrent", "logging", "multiprocessing", "queue", "threading"}


def clone(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model with weights, buffers, hooks, modes and ties.

    As with ``copy.deepcopy``, parameters come without gradients and without hooks of their own.
    Tensors with a graph, such as outputs that a forward has left in a list, are copied without it.

    Raises:
        CaptureError: the model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    # What is made under inference_mode can never be trained; a user's __deepcopy__ that builds the
    # module anew draws random numbers, which must not be the caller's.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for tensor in _computed_tensors(model):
            memo[id(tensor)] = tensor.detach().clone()
        return _deepcopy(model, memo)


def clone_modules(model: nn.Module) -> nn.Module:
    """Return a copy that shares every tensor with the model, for what wants their shapes only.

    Raises:
        CaptureError: the model holds something that cannot be copied.
    """
    return _deepcopy(model, {id(tensor): tensor for tensor in _reached_tensors(model)})


def fake_clone(
    model: nn.Module, mode: AbstractContextManager[Any], *, device: torch.device | None = None
) -> nn.Module:
    """Return a copy whose tensors are fake: shapes and dtypes, no memory.

    Args:
        model: the model; untouched.
        mode: the fake mode that the tensors of the copy belong to; none for the meta device.
        device: where the fake tensors say they are; where the model's are by default. A model on
            the meta device needs one.

    Raises:
        CaptureError: the model holds something that cannot be copied, or lazy parameters.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter | UninitializedBuffer):
            raise CaptureError(
                f"{name} of {type(model).__name__} is not initialised yet (a lazy module); "
                "run the model once on real data, then pass it here"
            )
        memo[id(parameter)] = nn.Parameter(
            _fake(parameter, mode, device), requires_grad=parameter.requires_grad
        )
    for tensor in [*model.buffers(), *_plain_tensors(model), *_computed_tensors(model)]:
        if id(tensor) not in memo:
            memo[id(tensor)] = _fake(tensor, mode, device)
    return _deepcopy(model, memo)


def _reached_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors wherever in a model ``deepcopy`` would find them."""
    found: list[Tensor] = []
    seen: set[int] = set()
    stack: list[Any] = [model]
    while stack:
        held = stack.pop()
        if isinstance(held, _ATOMIC) or id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            found.append(held)
            stack += vars(held).values()
        else:
            stack += gc.get_referents(held)
    return found


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Put back the states of Python's, NumPy's and torch's generators, where code sets seeds."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = torch.cuda.get_rng_state_all() if cuda else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextlib.contextmanager
def quiet_code(*models: nn.Module) -> Iterator[None]:
    """Undo what hooks and forwards write into globals, lists, dicts, sets and attributes.

    A copy of a model shares these with the original, so that tracing the copy would leave fake
    tensors in, say, a user's list of features, or a cache of masks. ``functools.lru_cache`` cannot
    be put back: one that was added to is cleared.
    """
    reads = [read for model in models for read in code_reads(model)]
    caches = [r.value for r in reads if isinstance(r.value, _LRU_CACHE)]
    misses = [cache.cache_info().misses for cache in caches]
    before = [(held, _items(held)) for held in _containers(models, [r.value for r in reads])]
    try:
        yield
    finally:
        for read in reads:
            if isinstance(read.place, dict) and read.place.get(read.name) is not read.value:
                read.place[read.name] = read.value
        for cache, count in zip(caches, misses, strict=True):
            if cache.cache_info().misses != count:
                cache.cache_clear()
        for container, items in before:
            if len(now := _items(container)) == len(items) and all(map(operator.is_, now, items)):
                continue  # others, such as threads, may write to it at any time
            if isinstance(container, list):
                container[:] = items
            elif isinstance(container, set):
                container.clear()
                container.update(items)
            else:
                old = dict(zip(items[::2], items[1::2], strict=True))
                for key in container.keys() - old:
                    del container[key]
                container.update(old)


def _items(container: list[Any] | dict[Any, Any] | set[Any]) -> list[Any]:
    """Return what a container holds; of a dict each key and its value."""
    if isinstance(container, dict):
        return [each for pair in container.items() for each in pair]
    return list(container)


def _containers(
    models: tuple[nn.Module, ...], reads: list[Any]
) -> list[list[Any] | dict[Any, Any] | set[Any]]:
    """Return the containers that hooks and what code reads reach in a few steps, also attributes.

    Only functions are shared by a copy; it has its own copy of a hook that is an object.
    """
    found: list[list[Any] | dict[Any, Any] | set[Any]] = []
    seen: set[int] = set()
    reached: list[Any] = reads + [
        hook
        for model in models
        for module in model.modules()
        for hooks in _hook_tables(module)
        for hook in hooks.values()
        if isinstance(hook, types.FunctionType)
    ]
    for _ in range(_STEPS):
        new = [v for v in {id(v): v for v in reached}.values() if id(v) not in seen]
        seen |= {id(v) for v in new}
        found += [value for value in new if isinstance(value, list | dict | set)]
        if len(seen) > _OBJECTS:
            break
        reached = [held for value in new for held in _held(value)]
    return found


def _held(value: Any) -> Iterator[Any]:
    """Values that a hook can reach from another one in a step."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | set):
        yield from value
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield cell.cell_contents
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        for name in names_in(value.__code__):
            read = value.__globals__.get(name)
            if not isinstance(read, types.FunctionType):  # whose library has a state of its own
                yield read
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, nn.Module):  # its weights and layers are not the hook's
        yield from (held for name, held in vars(value).items() if name not in _TABLES)
    elif type(value).__module__.partition(".")[0] in _LIVE or isinstance(value, (*_ATOMIC, Tensor)):
        pass
    elif hasattr(value, "__dict__"):
        yield vars(value)


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        # Without no_grad, TorchScript modules come out with parameters that are no leaves.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch copies its own exported programs with warnings
            copied = copy.deepcopy(model, memo)
        shared = _shared(model, copied)
        if not shared:
            _copy_notes(model, copied, memo)
            _copy_functions(copied, memo)
    except CaptureError:
        raise
    except Exception as error:  # a user's __deepcopy__ or __reduce__ may raise anything
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. "
            "pocketize works on a copy, so copy.deepcopy(model) must work; remove or replace the "
            "attribute that cannot be copied (an open file, a lock, a generator), and let a "
            "__deepcopy__ of its own copy the layers as they are"
        ) from error
    if shared:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {shared} of the copy is that of the model. "
            "pocketize works on a copy, so that the model stays as it is: let __deepcopy__ return "
            "a new module"
        )
    return copied


def _shared(model: nn.Module, copied: nn.Module) -> str:
    """Return the path of a module that a copy shares with the model; ``""`` if there is none."""
    known = {id(module) for module in nn.Module.modules(model)}
    for path, module in nn.Module.named_modules(copied):
        if id(module) in known:
            return path or "the whole"
    return ""


def _copy_notes(model: nn.Module, copied: nn.Module, memo: dict[int, Any]) -> None:
    """Copy attributes of parameters, such as an optimiser's marks, and slots; torch does not."""
    for old, new in zip(model.parameters(), copied.parameters(), strict=False):
        if new.is_leaf and new.requires_grad != old.requires_grad:  # of a TorchScript module
            new.requires_grad_(old.requires_grad)
        for name, value in vars(old).items():
            if name not in vars(new):
                setattr(new, name, copy.deepcopy(value, memo))
    for module, made in zip(model.modules(), copied.modules(), strict=False):
        for base in type(module).__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(module, name) and not hasattr(made, name):
                    object.__setattr__(made, name, copy.deepcopy(getattr(module, name), memo))


def _copy_functions(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Let hooks and functions that are attributes refer to the copy; ``deepcopy`` shares them.

    Raises:
        CaptureError: such an attribute reads a layer or a parameter of the model as a global.
    """
    for module in nn.Module.modules(copied):
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType):
                vars(module)[name] = _of_copy(value, memo)
                _check_globals(module, name, value, memo)
        for hooks in _hook_tables(module):
            for number, hook in hooks.items():
                hooks[number] = _of_copy(hook, memo)


def _of_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return what a value of a model is in its copy; a function with its closure and defaults."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        owner = memo.get(id(value.__self__))
        return value if owner is None else types.MethodType(value.__func__, owner)
    if not isinstance(value, types.FunctionType):
        return value
    cells = [types.CellType() for _ in value.__closure__ or ()]
    made = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, closure=tuple(cells)
    )
    memo[id(value)] = made  # its own closure may hold it
    changed = False

    def of_copy(old: Any) -> Any:
        nonlocal changed
        new = _of_copy(old, memo)
        changed |= new is not old and new is not made
        return new

    for cell, old in zip(cells, value.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            cell.cell_contents = of_copy(old.cell_contents)
    defaults, keywords = value.__defaults__, value.__kwdefaults__
    made.__defaults__ = None if defaults is None else tuple(map(of_copy, defaults))
    made.__kwdefaults__ = keywords and {key: of_copy(old) for key, old in keywords.items()}
    if not changed:
        del memo[id(value)]
        return value
    vars(made).update(vars(value))
    return made


def _check_globals(
    module: nn.Module, name: str, function: types.FunctionType, memo: dict[int, Any]
) -> None:
    for read in sorted(names_in(function.__code__)):
        held = function.__globals__.get(read)
        owner = held.__self__ if isinstance(held, types.MethodType) else held
        if isinstance(owner, nn.Module | nn.Parameter) and id(owner) in memo:
            raise CaptureError(
                f"{type(module).__name__}.{name} is a function that reads the global {read!r}, "
                "which is of the model itself: in a copy it would still run the model. Make it a "
                f"method of a class, or give it {read} as a default of an argument"
            )


def _fake(tensor: Tensor, mode: AbstractContextManager[Any], device: torch.device | None) -> Tensor:
    with torch.no_grad(), mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device
        )


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep as plain attributes, neither parameter nor buffer."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                yield value


def _computed_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors with a graph, which ``deepcopy`` refuses."""
    return [tensor for tensor in _reached_tensors(model) if not tensor.is_leaf]


def _hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Hooks of a forward and a backward."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
