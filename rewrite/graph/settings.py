"""Attributes of a model's modules that have other values for a while."""

from __future__ import annotations

__all__ = ["settings_on", "settings_text"]

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


@contextlib.contextmanager
def settings_on(model: nn.Module, settings: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes, by ``"path.attribute"``, and put the old values back in any case."""
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            held, old = vars(module), getattr(module, attribute)
            own = attribute in held
            setattr(module, attribute, value)
            if own or attribute not in held:  # its own, or that of a property
                stack.callback(setattr, module, attribute, old)
            else:  # its class's
                stack.callback(delattr, module, attribute)
        yield


def settings_text(settings: Mapping[str, Any]) -> str:
    """Write settings as ``"decoder.deep_supervision=True"``."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
