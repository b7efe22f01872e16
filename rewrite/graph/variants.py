"""Variants of a model: the same modules with other settings of plain attributes.

A network may be trained with ``decoder.deep_supervision=True`` and predict with ``False``. A
rewrite that is to hold for both must see both.
"""

from __future__ import annotations

__all__ = ["read_variants"]

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from pocketize.errors import OptionError, nearest
from pocketize.graph.inputs import Inputs

_PLAIN = bool | int | float | str | None


def read_variants(
    model: nn.Module, inputs: Inputs, variants: Sequence[Mapping[str, Any]]
) -> tuple[Inputs, ...]:
    """Return the calls of a model's variants, but for those that are the model as it is.

    Args:
        model: the model; unchanged.
        inputs: what it is called with.
        variants: for each the values of attributes, by ``"path.attribute"``.

    Raises:
        OptionError: they are no list of mappings, a variant names an attribute that is not there,
            or one that holds no number, text or truth value, or gives it a value of another type.
    """
    if isinstance(variants, Mapping | str) or not all(isinstance(v, Mapping) for v in variants):
        raise OptionError(
            "variants= takes a list of mappings, such as "
            "[{'decoder.deep_supervision': True}, {'decoder.deep_supervision': False}], "
            f"got {variants!r:.200}"
        )
    found: list[Inputs] = []
    for settings in variants:
        other = {}
        for name, value in settings.items():
            old = _held(model, name)
            kinds = {type(value), type(old)}
            if len(kinds) > 1 and type(None) not in kinds and kinds != {int, float}:
                raise OptionError(
                    f"variant {name}={value!r}: the model has {name}={old!r} there, "
                    f"a {type(old).__name__}"
                )
            if value != old:
                other[name] = value
        call = replace(inputs, settings=other)
        if other and all(other != seen.settings for seen in found):
            found.append(call)
    return tuple(found)


def _held(model: nn.Module, name: Any) -> Any:
    """Return the value of an attribute of the model.

    Raises:
        OptionError: there is none, or it is not plain.
    """
    path, _, attribute = str(name).rpartition(".")
    modules = dict(model.named_modules())
    if path not in modules:
        raise OptionError(
            f"variant {name!r}: {type(model).__name__} has no module {path!r}."
            f"{nearest(path, modules)}"
        )
    module = modules[path]
    if not hasattr(module, attribute):
        plain = [key for key, value in vars(module).items() if isinstance(value, _PLAIN)]
        raise OptionError(
            f"variant {name!r}: {path or 'the model'} ({type(module).__name__}) has no attribute "
            f"{attribute!r}.{nearest(attribute, plain)}"
        )
    value = getattr(module, attribute)
    if not isinstance(value, _PLAIN):
        raise OptionError(
            f"variant {name!r}: it holds a {type(value).__name__}; a variant sets numbers, texts, "
            "True, False or None"
        )
    return value
