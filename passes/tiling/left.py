"""What a forward changes beside its outputs: attributes of modules.

Tensors that it leaves in them for later are not there after a forward by tiles.
"""

from __future__ import annotations

__all__ = ["Left", "NotComputed", "check_state", "is_simple", "is_table", "leave", "state_of"]

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from torch import Tensor, nn

from pocketize.errors import ExecutionError
from pocketize.passes.tiling.network import TilingError

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
#: What torch or the recorder writes into a module without changing what it computes.
_OWN = {"training", "forward", "_is_full_backward_hook"}

#: Path of an attribute, and an index or key in the list or dict that it is; None for itself.
Left: TypeAlias = tuple[str, Any]


class NotComputed:
    """Stands where the whole volume's forward leaves a tensor; using it is an error.

    What the last whole forward left there would be of another volume, or of other weights.

    Args:
        name: of the attribute.
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


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    setattr(NotComputed, f"__{_name}__", NotComputed._refuse)
    setattr(NotComputed, f"__r{_name}__", NotComputed._refuse)
for _name in ("getitem", "len", "iter", "neg", "float", "lt", "gt", "le", "ge"):
    setattr(NotComputed, f"__{_name}__", NotComputed._refuse)


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return [value]
    return [leaf for item in value for leaf in _flat(item)]


def leave(model: nn.Module, left: Iterable[Left]) -> None:
    """Mark where a forward that ran by tiles has left nothing."""
    for name, key in left:
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
    """Whether an attribute is one of the tables of a module, told by other means."""
    return name in ("_parameters", "_buffers", "_modules") or name.endswith(
        ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
    )


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return what the attributes of all modules hold, in a form that compares by identity."""
    return dict(_walk(model))


def _walk(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        held = {**vars(module), **module._buffers, **module._parameters}
        for name, value in held.items():
            if name in _OWN or is_table(name):
                continue
            where = f"{path}.{name}" if path else name
            if isinstance(value, list | tuple | set):
                yield where, [_token(item) for item in value]
            elif isinstance(value, dict):
                yield where, {key: _token(item) for key, item in value.items()}
            else:
                yield where, _token(value)


@dataclass(frozen=True)
class _Token:
    """Stands for a value whose class and identity are all that is compared."""

    identity: int
    is_tensor: bool


def _token(value: Any) -> Any:
    return value if is_simple(value) else _Token(id(value), isinstance(value, Tensor))


def check_state(
    model: nn.Module, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[Left, ...]:
    """Refuse a forward that changes attributes; return where it leaves tensors."""
    left: list[Left] = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if name in before and _same(old, new):
            continue
        path, _, attribute = name.rpartition(".")
        module, changed = model.get_submodule(path), _changed(old, new)
        held = attribute in module._buffers or attribute in module._parameters
        if held or not all(isinstance(v, _Token) and v.is_tensor for v in changed.values()):
            raise TilingError(
                f"its forward changes the attribute {name}, which a forward by tiles would not"
            )
        hooks = module._forward_pre_hooks.values()
        if attribute not in [getattr(hook, "name", None) for hook in hooks]:  # a weight norm's
            left += [(name, key) for key in changed]
    return tuple(left)


def _changed(old: Any, new: Any) -> dict[Any, Any]:
    """Return the new values in a container by place, or the one value, that are not the old."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return {i: b for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() <= new.keys():
        return {key: value for key, value in new.items() if old.get(key) != value}
    return {None: new}


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or bool(a != a and b != b)
