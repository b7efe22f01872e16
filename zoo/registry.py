"""Networks by name: ``@register`` puts a class or a function on the list, ``build`` calls it.

The signature *is* the list of options: names and defaults are read off it and written nowhere else.
One class can stand under several names, each with some of its arguments fixed.
"""

from __future__ import annotations

__all__ = [
    "ModelInfo",
    "ModelOptionError",
    "UnknownModelError",
    "ZooError",
    "build",
    "describe",
    "example_input",
    "list_models",
    "register",
]

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])


class ZooError(ValueError):
    """Base class of what the zoo raises; its text says what to write instead."""


class UnknownModelError(ZooError):
    """A name under which the zoo has no network."""


class ModelOptionError(ZooError):
    """An option that a network does not have, or a value that it cannot take."""


@dataclass(frozen=True)
class ModelInfo:
    """What the zoo knows about one network.

    Attributes:
        name: The name that `build` takes.
        summary: One line.
        paper: Authors, title, venue.
        options: Option names with their defaults.
        input_shape: A shape of the paper's scale, batch and channels first, at the default options.
        small_shape: A shape that a laptop trains on in seconds.
        parameters: Number of parameters at the default options where the paper's count is
            reproduced exactly, else None.
        factory: What `build` calls.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Any]
    input_shape: tuple[int, ...]
    small_shape: tuple[int, ...]
    parameters: int | None
    factory: Callable[..., nn.Module] = field(repr=False)


_MODELS: dict[str, ModelInfo] = {}


def register(
    name: str,
    *,
    summary: str,
    paper: str,
    input_shape: tuple[int, ...],
    small_shape: tuple[int, ...],
    parameters: int | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Callable[[Factory], Factory]:
    """Put the decorated class or function into the zoo.

    Every argument that is not fixed becomes an option. It needs a default, and `build` checks
    values against the type of that default; integers, alone or in a tuple, are counts and at
    least 1.

    Args:
        name: What `build` will call it.
        summary: One line.
        paper: Authors, title, venue.
        input_shape: A shape of the paper's scale, batch and channels first. The channels follow
            the option `in_channels` where there is one.
        small_shape: The same for tests and demonstrations.
        parameters: Exact number of parameters at the default options, if there is one.
        fixed: Arguments that this name stands for.

    Returns:
        A decorator that gives its argument back unchanged.

    Raises:
        ZooError: The name is taken, or an option has no default.
    """
    fixed = fixed or {}

    def add(factory: Factory) -> Factory:
        if name in _MODELS:
            raise ZooError(f"zoo: {name!r} is registered already: {_MODELS[name].summary}")
        options = {
            option: parameter.default
            for option, parameter in inspect.signature(factory).parameters.items()
            if option not in fixed
        }
        for option, default in options.items():
            if default is inspect.Parameter.empty:
                raise ZooError(f"zoo: option {option!r} of {name!r} needs a default value.")
        _MODELS[name] = ModelInfo(
            name=name,
            summary=summary,
            paper=paper,
            options=MappingProxyType(options),
            input_shape=input_shape,
            small_shape=small_shape,
            parameters=parameters,
            factory=partial(factory, **fixed),
        )
        return factory

    return add


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names that match an fnmatch pattern, such as ``"*3d*"``."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def describe(name: str) -> ModelInfo:
    """Return what is known about a network.

    Raises:
        UnknownModelError: There is none of that name; the text offers the nearest.
    """
    if name not in _MODELS:
        raise UnknownModelError(
            f"zoo: no network is called {name!r}.{_nearest(name, _MODELS)} "
            f"There are: {', '.join(list_models())}."
        )
    return _MODELS[name]


def build(name: str, **options: Any) -> nn.Module:
    """Build a network, freshly initialised by torch's global random generator.

    Args:
        name: One of `list_models()`.
        **options: Options of that network, see ``describe(name).options``. Lists are taken for
            tuples, so options can come from JSON.

    Returns:
        The network, in train mode, on torch's default device.

    Raises:
        UnknownModelError: There is no network of that name.
        ModelOptionError: The network has no such option, or cannot take the value.
    """
    info = describe(name)
    return info.factory(**_checked(info, options))


def example_input(name: str, *, small: bool = False, **options: Any) -> Tensor:
    """Return a random batch of one that fits ``build(name, **options)``.

    Args:
        name: One of `list_models()`.
        small: Take `small_shape` rather than `input_shape`. The latter can be gigabytes in work.
        **options: The options given to `build`; of these `in_channels` matters.

    Returns:
        A float32 tensor from a generator of its own: always the same values, and the global
        random state stays as it was.

    Raises:
        UnknownModelError: There is no network of that name.
        ModelOptionError: The network has no such option, or cannot take the value.
    """
    info = describe(name)
    batch, channels, *size = info.small_shape if small else info.input_shape
    channels = _checked(info, options).get("in_channels", channels)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, *size, generator=generator, device="cpu")


def _checked(info: ModelInfo, options: Mapping[str, Any]) -> dict[str, Any]:
    checked = {}
    for option, value in options.items():
        if option not in info.options:
            known = ", ".join(f"{key}={default!r}" for key, default in info.options.items())
            raise ModelOptionError(
                f"zoo: {info.name!r} has no option {option!r}.{_nearest(option, info.options)} "
                f"Its options are: {known}."
            )
        default = info.options[option]
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        if not _fits(value, default):
            raise ModelOptionError(
                f"zoo: option {option!r} of {info.name!r} takes {_kind(default)}, "
                f"such as {default!r}; got {value!r}."
            )
        checked[option] = value
    return checked


def _fits(value: Any, default: Any) -> bool:
    """Tell whether a value is of the kind of the option's default."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, int):
        return isinstance(value, int) and value >= 1
    if isinstance(default, tuple):
        fits = isinstance(value, tuple) and len(value) == len(default)
        return fits and all(map(_fits, value, default))
    return isinstance(value, type(default))


def _kind(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int):
        return "a whole number, at least 1"
    if isinstance(default, tuple):
        return f"{len(default)} whole numbers, each at least 1"
    return f"a {type(default).__name__}"


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
