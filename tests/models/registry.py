"""What a test net is, and the tables they register in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pocketize.errors import PocketizeError

__all__ = ["Net", "Table", "get", "image", "net", "nets", "register"]

T = TypeVar("T", bound="Callable[[], nn.Module]")
_SEED = 20


@dataclass(frozen=True, eq=False)
class Net:
    """One test net and what a width clamp must do to it.

    The convention: channel groups that reach an input or an output of the model stay as they are.

    Attributes:
        name: Unique; the test id.
        factory: Builds the module; call :meth:`build`, which seeds it.
        example: Makes the inputs; call :meth:`inputs`, which seeds it.
        tags: For selecting.
        width: The clamp that the expectations below are stated for.
        movable: Paths of layers that must come out with exactly ``width`` channels. A path may
            also name a parameter and its axis, ``"scale@1"``.
        shrinks: Paths that must lose channels, without the final number being ``width``:
            concatenated or fused outputs, groups that can only shrink in steps.
        frozen: Paths that must keep every channel, with a fragment of the reason the plan must give
            (``""``: any reason).
        error: The error that a rewrite must raise instead, if the net cannot be rewritten.
        repeatable: Two runs in eval mode give the same values (False: it draws random numbers).
    """

    name: str
    factory: Callable[[], nn.Module]
    example: Callable[[], Any]
    tags: frozenset[str] = frozenset()
    width: int = 4
    movable: tuple[str, ...] = ()
    shrinks: tuple[str, ...] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    error: type[PocketizeError] | None = None
    repeatable: bool = True

    def build(self) -> nn.Module:
        """The same weights every time, whatever the caller's random state, which is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return self.factory()

    def inputs(self) -> Any:
        """The same inputs every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED + 1)
            return self.example()

    def __str__(self) -> str:
        return self.name


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """A factory of random inputs, 2x3x16x16 unless told."""
    return lambda: torch.randn(*(shape or (2, 3, 16, 16)), dtype=dtype)


class Table:
    """Nets by name, in order of registration."""

    def __init__(self) -> None:
        self._nets: dict[str, Net] = {}

    def register(
        self,
        name: str,
        factory: Callable[[], nn.Module],
        tags: str = "",
        *,
        inputs: Callable[[], Any] | None = None,
        width: int = 4,
        movable: Iterable[str] = (),
        shrinks: Iterable[str] = (),
        frozen: Mapping[str, str] | None = None,
        error: type[PocketizeError] | None = None,
        repeatable: bool = True,
    ) -> None:
        """Add a net; ``tags`` are words separated by spaces."""
        if name in self._nets:
            raise ValueError(f"two test nets are called {name!r}")
        self._nets[name] = Net(
            name=name,
            factory=factory,
            example=inputs or image(),
            tags=frozenset(tags.split()),
            width=width,
            movable=tuple(movable),
            shrinks=tuple(shrinks),
            frozen=dict(frozen or {}),
            error=error,
            repeatable=repeatable,
        )

    def net(self, tags: str = "", **expects: Any) -> Callable[[T], T]:
        """Decorate a module class or a factory without arguments, named in snake case."""

        def add(factory: T) -> T:
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", factory.__name__)
            self.register(name.lower(), factory, tags, **expects)
            return factory

        return add

    def nets(self, tag: str | None = None) -> list[Net]:
        """Every net, or those with a tag; for ``parametrize(ids=str)``."""
        return [one for one in self._nets.values() if tag is None or tag in one.tags]

    def get(self, name: str) -> Net:
        return self._nets[name]


_AWKWARD = Table()
register, net, nets, get = _AWKWARD.register, _AWKWARD.net, _AWKWARD.nets, _AWKWARD.get
