"""What a forward does besides its operators: set attributes, run hooks, change gradients.

Running the operators by tiles does nothing of it, so it is refused. Only tensors that a forward
stores in attributes for later are allowed: reading one after a forward by tiles is an error.
"""

from __future__ import annotations

__all__ = [
    "Identity",
    "Lost",
    "NotComputed",
    "check_gradients",
    "check_hooks",
    "check_state",
    "is_simple",
    "is_table",
    "mark_lost",
    "state_of",
]

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pocketize._torch import (
    autograd_function_of,
    global_forward_hooks,
    in_autograd_function,
    user_frames,
)
from pocketize.errors import ExecutionError
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.backward import differentiable
from pocketize.passes.tiling.tiled_graph import TilingError

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
#: What torch or the tracer writes into a module without changing what it computes.
_OWN = {"training", "forward", "_is_full_backward_hook"}
_MODULE_HOOKS = {
    "forward": ("_forward_pre_hooks", "_forward_hooks"),
    "backward": ("_backward_hooks", "_backward_pre_hooks"),
}
_TENSOR_HOOKS = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook")
_DETACHING = {"detach", "detach_", "data", "grad"}  # explicit: no gradient follows

#: Path of an attribute, and an index or key in the list or dict that it is; None for itself.
Lost: TypeAlias = tuple[str, Any]


# -- attributes ----------------------------------------------------------------------------------


class NotComputed:
    """Replaces a tensor that the whole volume's forward stores in an attribute; using it raises.

    What the last whole forward stored would be of another volume, or of other weights.
    """

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def __repr__(self) -> str:
        return f"NotComputed({self._name!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying and pickling ask for
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse functions and operators of tensors."""
        next(arg for arg in _flat((args, kwargs)) if isinstance(arg, NotComputed))._refuse()

    def _refuse(self, *_: Any) -> NoReturn:
        raise ExecutionError(
            f"patchwise: the forward leaves a tensor in {self._name}, which a forward by tiles "
            "does not compute as a whole; return it from the network, or run the volume whole"
        )


_BINARY = ("add", "sub", "mul", "truediv", "pow", "matmul")
_OTHERS = ("getitem", "len", "iter", "neg", "float", "lt", "gt", "le", "ge")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS):
    setattr(NotComputed, f"__{_name}__", NotComputed._refuse)


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return [value]
    return [leaf for item in value for leaf in _flat(item)]


def mark_lost(model: nn.Module, lost: Iterable[Lost]) -> None:
    """Replace tensors in attributes that a forward by tiles has not computed."""
    for name, key in lost:
        path, _, attribute = name.rpartition(".")
        held = vars(model.get_submodule(path))
        place: Any = held.get(attribute)
        if key is None or not isinstance(place, list | dict):
            held[attribute] = NotComputed(name)
        else:
            place[key] = NotComputed(name)


def is_simple(value: Any) -> bool:
    """Whether a value is a number, a text or the like, or a tuple of them."""
    return isinstance(value, _SIMPLE) or (
        isinstance(value, tuple) and all(is_simple(item) for item in value)
    )


def is_table(name: str) -> bool:
    """Whether an attribute is one of a module's dicts of parameters, buffers, modules or hooks."""
    return name in ("_parameters", "_buffers", "_modules") or name.endswith(
        ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
    )


class Identity:
    """Compares by the identity of an object, and keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        """The same in every process: name and code, without addresses."""
        named = self.value if hasattr(self.value, "__qualname__") else type(self.value)
        code = getattr(getattr(self.value, "__code__", None), "co_code", b"")
        return f"{named.__module__}.{named.__qualname__} {code.hex()}"


def _token(value: Any) -> Any:
    return value if is_simple(value) else Identity(value)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return what the attributes of all modules hold, in a form that compares by identity."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._buffers, **module._parameters}.items():
            if name in _OWN or is_table(name):
                continue
            where = f"{path}.{name}" if path else name
            if isinstance(value, list | tuple | set):
                state[where] = [_token(item) for item in value]
            elif isinstance(value, dict):
                state[where] = {key: _token(item) for key, item in value.items()}
            else:
                state[where] = _token(value)
    return state


def check_state(
    model: nn.Module, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[Lost, ...]:
    """Refuse a forward that changes attributes; return where it stores tensors.

    Raises:
        TilingError: it changes something else than a tensor in an attribute.
    """
    lost: list[Lost] = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if name in before and (old == new or (old != old and new != new)):  # NaN
            continue
        path, _, attribute = name.rpartition(".")
        module, changed = model.get_submodule(path), _changed(old, new)
        held = attribute in module._buffers or attribute in module._parameters
        if held or not all(
            isinstance(v, Identity) and isinstance(v.value, Tensor) for v in changed.values()
        ):
            raise TilingError(
                f"its forward changes the attribute {name}, which a forward by tiles would not"
            )
        hooks = module._forward_pre_hooks.values()
        if attribute not in [getattr(hook, "name", None) for hook in hooks]:  # a weight norm's
            lost += [(name, key) for key in changed]
    return tuple(lost)


def _changed(old: Any, new: Any) -> dict[Any, Any]:
    """Return the new values of a container by index or key, or the one value, that differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return {i: b for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() <= new.keys():
        return {key: value for key, value in new.items() if old.get(key) != value}
    return {None: new}


# -- hooks ---------------------------------------------------------------------------------------


def check_hooks(model: nn.Module, *, training: bool = False) -> None:
    """Refuse hooks of the user's on inner modules, which tiles do not run.

    The model's own hooks run around its forward. Hooks of the backward pass count in ``training``.

    Raises:
        TilingError: there is one.
    """
    kinds = ("forward", "backward") if training else ("forward",)
    found = [("every module", "forward", hook) for hook in global_forward_hooks()]
    for path, module in model.named_modules():
        for kind in kinds if path else ():
            tables = [vars(module).get(name, {}) for name in _MODULE_HOOKS[kind]]
            found += [(path, kind, hook) for table in tables for hook in table.values()]
    for path, kind, hook in found:
        if not _is_own(getattr(hook, "__module__", None) or type(hook).__module__):
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            raise TilingError(
                f"{path} has a {kind} hook ({name}), which tiles would not run; remove it, "
                "and register it again afterwards"
            )


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "pocketize")


# -- gradients -----------------------------------------------------------------------------------


def check_gradients(model: nn.Module, inputs: Inputs) -> None:
    """Refuse a forward whose gradients are not those of its operators.

    A trace has the operators, and not what keeps gradients from following them: parts that run
    under ``torch.no_grad()``, autograd functions with a backward of their own, hooks that change a
    gradient. Model and inputs are without memory.

    Raises:
        TilingError: the text says what keeps or changes gradients, and where.
    """
    # not leaves, as a network may write into its input
    given = inputs.map(lambda t: t.detach().requires_grad_().clone() if differentiable(t) else t)
    with torch.enable_grad(), _GradientWatch(model) as watch:
        outputs = find_tensors(given.call(model))
    for cls in _functions(outputs):
        if not _is_own(cls.__module__):
            raise TilingError(
                f"{cls.__name__} has a backward of its own, which training by tiles does not run; "
                "train the volume whole (train=False)"
            )
    if watch.inside:  # under torch.no_grad(), or of torch.utils.checkpoint: outputs do not tell
        raise TilingError(
            f"{watch.inside} in an autograd function, whose backward training by tiles does not "
            "run; detach what it reads instead of calling it under torch.no_grad(), give "
            "torch.utils.checkpoint use_reentrant=False, or train the volume whole (train=False)"
        )


class _GradientWatch(TorchFunctionMode):
    """Checks every call on tensors that require gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        #: The first call in an autograd function: where, and of what.
        self.inside = ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse hooks of tensors, and calls that keep gradients from their results."""
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute such as .T or .data
            name = getattr(func.__self__, "__name__", "")
        if name in _TENSOR_HOOKS:
            raise TilingError(
                f"{self._where()} calls {name} on a tensor, which training by tiles would not run; "
                "train the volume whole (train=False)"
            )
        out = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() or name in _DETACHING:
            return out
        asks = any(t.requires_grad for t in find_tensors((args, kwargs)))
        keeps = any(differentiable(t) and not t.requires_grad for t in find_tensors(out))
        if not asks or not keeps or _is_of_a_pass():
            return out
        if in_autograd_function():
            self.inside = self.inside or f"{self._where()} computes {name}"
        else:
            raise TilingError(
                f"{self._where()} computes {name} under torch.no_grad(), and training by tiles "
                "would give it gradients; detach what it reads instead, or train the volume whole "
                "(train=False)"
            )
        return out

    def _where(self) -> str:
        """Return the module and the line of the call."""
        line = ""
        for frame in user_frames():
            if frame.f_code.co_filename == __file__:
                continue
            line = line or f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
            path = self.paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                return f"{path or 'the model'} at {line}"
        return f"the model at {line}"


def _is_of_a_pass() -> bool:
    """Whether the call is in a pass whose gradients are known."""
    user = next(frame for frame in user_frames() if frame.f_code.co_filename != __file__)
    return _is_own(str(user.f_globals.get("__name__", "")))


def _functions(outputs: list[Tensor]) -> Iterator[Any]:
    """Yield the autograd functions written in Python that outputs depend on."""
    stack: list[Any] = [t.grad_fn for t in outputs]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        cls = autograd_function_of(node)
        if cls is not None:
            yield cls
        stack += [before for before, _ in node.next_functions]
