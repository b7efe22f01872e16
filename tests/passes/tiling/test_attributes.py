"""A value that a forward reads is seen to change, wherever a module holds it."""

from __future__ import annotations

import array
import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.errors import ExecutionError
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.tiling import attributes
from pocketize.passes.tiling.attributes import Description
from pocketize.passes.tiling.exact import ExactForward
from tests.passes.tiling.test_same_or_refused import by_tiles


class Slotted:
    __slots__ = ("__own", "value")

    def __init__(self) -> None:
        self.value, self.__own = 1.0, 1.0

    def own(self) -> float:
        return self.__own

    def set_own(self, value: float) -> None:
        self.__own = value


class Settings(dict[str, Any]):
    """A dict with attributes."""

    value = 1.0


def _nested(levels: int) -> Any:
    held = types.SimpleNamespace(value=1.0)
    for _ in range(levels):
        held = types.SimpleNamespace(inner=[held])
    return held


def _innermost(held: Any) -> Any:
    while hasattr(held, "inner"):
        held = held.inner[0]
    return held


def _closing_over(value: list[float]) -> Callable[[], float]:
    return lambda: value[0]


def _first(values: list[float]) -> float:
    return values[0]


def _cyclic() -> Any:
    held = types.SimpleNamespace(value=1.0)
    held.itself = held
    return held


def _set(name: str) -> Callable[[Any], None]:
    return lambda held: setattr(held, name, 2.0)


def _put(held: Any) -> None:
    held[0] = 2


#: How a module holds a value, how its forward reads it, and how a user changes it.
HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], None]]] = {
    "list": (lambda: [1.0], _first, _put),
    "deque": (lambda: collections.deque([1.0]), _first, _put),
    "bytearray": (lambda: bytearray([1]), _first, _put),
    "array": (lambda: array.array("d", [1.0]), _first, _put),
    "numpy": (lambda: np.ones(1), _first, _put),
    "numpy of objects": (
        lambda: np.array([[1.0], None], dtype=object),
        lambda held: held[0][0],
        lambda held: _put(held[0]),
    ),
    "set": (lambda: {1.0}, lambda held: sum(held), lambda held: held.add(2.0)),
    "object": (lambda: _nested(0), lambda held: held.value, _set("value")),
    "objects in objects": (
        lambda: _nested(8),
        lambda held: _innermost(held).value,
        lambda held: _set("value")(_innermost(held)),
    ),
    "object that holds itself": (_cyclic, lambda held: held.itself.value, _set("value")),
    "slots": (Slotted, lambda held: held.value, _set("value")),
    "private slots": (Slotted, Slotted.own, lambda held: held.set_own(2.0)),
    "attribute of a dict": (Settings, lambda held: held.value, _set("value")),
    "closure": (
        lambda: _closing_over([1.0]),
        lambda held: held(),
        lambda held: _put(held.__closure__[0].cell_contents),
    ),
    "partial": (
        lambda: functools.partial(_first, [1.0]),
        lambda held: held(),
        lambda held: _put(held.args[0]),
    ),
    "method": (
        lambda: types.MethodType(_first, [1.0]),
        lambda held: held(),
        lambda held: _put(held.__self__),
    ),
    "module that is not registered": (
        lambda: [nn.LeakyReLU(1.0)],
        lambda held: held[0].negative_slope,
        lambda held: setattr(held[0], "negative_slope", 2.0),
    ),
}


class Reader(nn.Module):
    def __init__(self, held: Any, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.held, self.read = held, read

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.leaky_relu(self.conv(x)[:, :1], float(self.read(self.held))))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", HOLDERS)
def test_a_changed_value_is_read_and_one_that_stays_costs_no_trace(kind: str, train: bool) -> None:
    make, read, change = HOLDERS[kind]
    torch.manual_seed(0)
    model = Reader(make(), read).train(train)
    made: Any = by_tiles(model, (4,), train=train)
    made.held = model.held
    x = torch.randn(1, 1, 8, 8)
    for changed in (False, True):
        if changed:
            change(model.held)
        for _ in range(2):
            with torch.set_grad_enabled(train):
                assert torch.allclose(made(x), model(x), atol=1e-6)
        forward = wrapping(made, ExactForward)
        assert len(forward._prepared) == 1 + changed


def test_too_much_to_look_at_is_traced_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held = _nested(3)
    assert Description().of(held) == Description().of(held)
    monkeypatch.setattr(attributes, "_LEVELS", 3)
    assert Description().of(held) != Description().of(held)
    monkeypatch.setattr(attributes, "_LEVELS", 50)
    monkeypatch.setattr(attributes, "_OBJECTS", 3)
    assert Description().of(held) != Description().of(held)


def _count(held: Any) -> float:
    held.inner[0].value += 1.0
    return 1.0


def _append(held: Any) -> float:
    held.append(1.0)
    return 1.0


@pytest.mark.parametrize(
    ("held", "read"),
    [(_nested(1), _count), (collections.deque(), _append)],
    ids=["object", "deque"],
)
def test_a_forward_that_changes_what_an_attribute_holds_is_refused(held: Any, read: Any) -> None:
    made = by_tiles(Reader(held, read).eval(), (4,))
    with torch.no_grad(), pytest.raises(ExecutionError, match="changes the attribute held"):
        made(torch.randn(1, 1, 8, 8))
