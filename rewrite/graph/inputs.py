"""Example inputs of a model: how a user writes them, how they are guessed, what comes out.

A user gives a tensor, a tuple, a dict, a shape or a text such as ``"1x1x96x96x96"``; the engine
works on one form, :class:`Inputs`.
"""

from __future__ import annotations

__all__ = [
    "Inputs",
    "as_inputs",
    "as_plain",
    "find_tensors",
    "first_parameter",
    "guess_inputs",
    "is_dressed",
    "structure_of",
    "to_model",
]

import contextlib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import pytree
from pocketize.errors import InputError, nearest
from pocketize.graph.settings import settings_on, settings_text

_SHAPE = re.compile(r"(?:(\w+)\s*=\s*)?(\d+(?:x\d+)*)(?::([a-z]+\d*))?")
_GUESSED_SIZES = (32, 64, 96, 128, 224, 256)
_GUESSED_BATCH = 2


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model.

    Attributes:
        args: positional arguments; tensors, or containers of tensors and of anything else.
        kwargs: keyword arguments, likewise.
        settings: attributes of the model's modules that have other values during the call, by
            ``"path.attribute"``: the call is that of a variant of the model.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def call(self, model: Callable[..., Any]) -> Any:
        """Return ``model(*args, **kwargs)``."""
        with self.variant(model):
            return model(*self.args, **self.kwargs)

    def variant(self, model: Any) -> AbstractContextManager[None]:
        """Give the model's attributes the values of ``settings``; put them back in any case."""
        return settings_on(model, self.settings) if self.settings else contextlib.nullcontext()

    def map(self, fn: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the inputs with ``fn`` applied to every tensor, containers kept."""
        args, kwargs = pytree.tree_map_only(Tensor, fn, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def tensors(self) -> list[Tensor]:
        """Return every tensor, in the order of the arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def describe(self) -> str:
        """Say names, shapes and dtypes: ``"2x1x64x64 float32, mask=2x77 int64"``."""
        named = [("", tensor) for tensor in Inputs(self.args).tensors()]
        for name, value in self.kwargs.items():
            named += [(f"{name}=", tensor) for tensor in Inputs((value,)).tensors()]
        text = ", ".join(
            f"{name}{'x'.join(map(str, t.shape)) or 'scalar'} {str(t.dtype).removeprefix('torch.')}"
            for name, t in named
        )
        return f"{text} with {settings_text(self.settings)}" if self.settings else text


def find_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an output: nested containers, dataclasses and plain objects."""
    found: list[Tensor] = []
    _collect_tensors(value, found, set())
    return found


def _collect_tensors(value: Any, found: list[Tensor], seen: set[int]) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
            continue
        opaque = not hasattr(leaf, "__dict__") or isinstance(leaf, type | nn.Module)
        if not opaque and id(leaf) not in seen:  # objects may refer to each other
            seen.add(id(leaf))
            _collect_tensors(list(vars(leaf).values()), found, seen)


def structure_of(value: Any) -> Any:
    """Return nesting and shapes of an output in a form that compares equal across traces."""
    leaves, spec = pytree.tree_flatten(value)
    return (
        str(spec),
        tuple(
            tuple((type(leaf).__name__, t.dtype, tuple(t.shape)) for t in find_tensors(leaf))
            for leaf in leaves
        ),
    )


def as_inputs(inputs: Any, model: nn.Module | None = None) -> Inputs:
    """Bring example inputs into one form, with plain tensors.

    Args:
        inputs: a tensor (one positional argument), a tuple or list (positional arguments), a dict
            (keyword arguments if its keys fit the signature of ``model.forward``, otherwise one
            positional argument), a shape such as ``(1, 1, 96, 96, 96)``, a text such as
            ``"1x1x96x96x96"``, ``"1x3x64x64,1x77:int64"`` or ``"image=1x1x64x64,mask=1x1x64x64"``
            (named ones are passed as a dict is), or :class:`Inputs`. Shapes, and tensors without
            values (on the ``meta`` device, for a model that is not), become random tensors.
        model: the model that will be called; decides how a dict is passed.

    Raises:
        InputError: the text cannot be read, there is no tensor, or the type is none of these.
    """
    if isinstance(inputs, Inputs):
        made = inputs
    elif isinstance(inputs, str):
        made = _from_text(inputs, model)
    elif isinstance(inputs, Tensor):
        made = Inputs((inputs,))
    elif isinstance(inputs, Mapping):
        made = _from_mapping(inputs, model)
    elif isinstance(inputs, tuple | list):
        shape = len(inputs) > 1 and all(type(size) is int for size in inputs)
        made = as_inputs("x".join(map(str, inputs))) if shape else Inputs(tuple(inputs))
    else:
        raise InputError(
            f"example inputs must be a tensor, a tuple, a dict, a shape or a text such as "
            f"'1x1x96x96x96', not {type(inputs).__name__}"
        )
    if not made.tensors():
        raise InputError("example inputs hold no tensor; give at least one, e.g. '1x1x96x96x96'")
    return made.map(as_plain) if any(map(is_dressed, made.tensors())) else made


def is_dressed(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that only adds Python to it, such as MONAI's ``MetaTensor``.

    Parameters, and wrappers around other tensors, are not.
    """
    kind = type(tensor)
    return (
        kind is not Tensor
        and not isinstance(tensor, nn.Parameter)
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def as_plain(tensor: Tensor) -> Tensor:
    """Return the same tensor without the class and the attributes that somebody gave it."""
    return tensor.as_subclass(Tensor) if is_dressed(tensor) else tensor


def to_model(inputs: Inputs, model: nn.Module) -> Inputs:
    """Move inputs to the device of the model, floating ones to its dtype too.

    The first floating-point parameter (or buffer) decides; a model without any leaves them as they
    are. What has no values to move is made anew.
    """
    like = first_parameter(model)
    if like is None:
        return inputs
    device, dtype = like.device, like.dtype

    def move(t: Tensor) -> Tensor:
        if t.is_meta and device.type != "meta":
            t = _example(tuple(t.shape), t.dtype)
        return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

    return inputs.map(move)


def first_parameter(module: nn.Module) -> Tensor | None:
    """Return the first floating-point parameter, or buffer: it tells where a module works."""
    for tensor in chain(
        module.parameters(), module.buffers()
    ):  # torch 2.6 compiles no next(…, None)
        if tensor.is_floating_point():
            return tensor
    return None


def guess_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yield guesses at the inputs of a model with one image input, smallest first.

    Rank and channels are read off the first convolution in registration order (not a transposed
    one), or off the first linear layer of a model without convolutions. The batch is 2: with 1,
    axes that the model adds and axes that it was given look alike.

    Raises:
        InputError: the model has neither a convolution nor a linear layer, or ``forward`` needs
            more than one argument.
    """
    _check_single_input(model)
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            spatial = len(module.kernel_size)
            for size in _GUESSED_SIZES:
                yield Inputs((torch.zeros(_GUESSED_BATCH, module.in_channels, *[size] * spatial),))
            return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield Inputs((torch.zeros(_GUESSED_BATCH, module.in_features),))
            yield Inputs((torch.zeros(_GUESSED_BATCH, 16, module.in_features),))
            return
    raise InputError(
        f"cannot guess inputs for {type(model).__name__}: it has no convolution and no linear "
        "layer to read the number of channels off; pass inputs=..."
    )


def _check_single_input(model: nn.Module) -> None:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise InputError(
            f"cannot guess inputs for {type(model).__name__}: forward needs "
            f"{len(required)} arguments ({', '.join(required)}); pass inputs=(...)"
        )


def _from_mapping(inputs: Mapping[Any, Any], model: nn.Module | None) -> Inputs:
    if model is not None and all(isinstance(key, str) for key in inputs):
        try:
            inspect.signature(model.forward).bind(**inputs)
        except (TypeError, ValueError):
            return Inputs((dict(inputs),))
        return Inputs((), dict(inputs))
    return Inputs((dict(inputs),))


def _from_text(text: str, model: nn.Module | None) -> Inputs:
    parts = [_parse_shape(part.strip(), text) for part in text.split(",")]
    args = tuple(tensor for name, tensor in parts if name is None)
    named = {name: tensor for name, tensor in parts if name is not None}
    if len(args) + len(named) < len(parts):
        raise InputError(f"{text!r} names an input twice")
    if args or not named:
        return Inputs(args, named)
    made = _from_mapping(named, model)
    if made.args and model is not None:  # as one dict, which a name that the model has denies
        takes: list[str] = []
        with contextlib.suppress(TypeError, ValueError):  # a forward written in C
            takes = list(inspect.signature(model.forward).parameters)
        if any(name in takes for name in named):
            wrong = next((name for name in named if name not in takes), None)
            hint = nearest(wrong, takes) if wrong is not None else ""
            raise InputError(
                f"{text!r} does not fit forward of {type(model).__name__}, which takes "
                f"{', '.join(takes)}.{hint}"
            )
    return made


def _parse_shape(text: str, whole: str) -> tuple[str | None, Tensor]:
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise InputError(
            f"cannot read input shape {text!r} in {whole!r}: expected sizes joined by 'x', e.g. "
            "'1x1x96x96x96', several inputs joined by ',', a dtype after ':' as in '1x77:int64', "
            "a name before '=' as in 'mask=1x1x96x96x96'"
        )
    try:
        shape = tuple(int(size) for size in match[2].split("x"))
    except ValueError as error:  # more digits than Python reads
        raise InputError(f"input shape {text:.60}... has a size of too many digits") from error
    dtype = getattr(torch, match[3], None) if match[3] else torch.float32
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"unknown dtype {match[3]!r} in {whole!r}; try float32 or int64")
    return match[1], _example(shape, dtype)


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    text = "x".join(map(str, shape))
    if 0 in shape:
        raise InputError(f"input shape {text!r} has an empty axis; every size must be at least 1")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > _memory():
        raise InputError(
            f"an input of shape {text:.60} takes {nbytes:.3g} bytes, more than this machine has"
        )
    try:
        if dtype.is_floating_point or dtype.is_complex:
            generator = torch.Generator().manual_seed(0)  # the same every time, RNG untouched
            return torch.randn(shape, dtype=dtype, generator=generator)
        return torch.zeros(shape, dtype=dtype)
    except (RuntimeError, TypeError) as error:  # too many axes, or a dtype that has no numbers
        reason = str(error).partition("\n")[0]
        raise InputError(f"no input of shape {text:.60} can be made: {reason}") from error


def _memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf
