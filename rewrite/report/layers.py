"""The layers of a network in short, so that two revisions can be compared layer by layer."""

from __future__ import annotations

__all__ = ["LayerSummary", "layers_of"]

import inspect
import re
from dataclasses import dataclass

from torch import nn

from pocketize.untrusted import scrub

_CHANNELS = {"in_features": "in", "out_features": "out"}


@dataclass(frozen=True)
class LayerSummary:
    """A module that holds parameters or buffers, or a leaf that has settings.

    Attributes:
        path: as in ``model.get_submodule(path)``.
        kind: name of its class.
        settings: what its ``extra_repr`` says, by name; the channels of convolutions and linear
            layers are ``"in"`` and ``"out"``.
    """

    path: str
    kind: str
    settings: dict[str, str]

    def __str__(self) -> str:
        """Write the layer in short: ``"Conv3d 64 -> 96, 3x3x3, stride 2x2x2"``."""
        settings = dict(self.settings)
        parts = []
        if "in" in settings and "out" in settings:
            parts.append(f"{settings.pop('in')} -> {settings.pop('out')}")
        parts += [settings.pop(name) for name in ("", "kernel_size") if name in settings]
        parts += [f"{name} {value}" for name, value in sorted(settings.items())]
        return f"{self.kind} {', '.join(parts)}".strip()


def layers_of(model: nn.Module) -> tuple[LayerSummary, ...]:
    """Describe the layers of a network, in the order of ``named_modules``."""
    found = []
    for path, module in model.named_modules():
        own = [*module.parameters(False), *module.buffers(False)]
        settings = _settings(module)
        if own or (settings and not any(True for _ in module.children())):
            found.append(LayerSummary(path, type(module).__name__, settings))
    return tuple(found)


def _settings(module: nn.Module) -> dict[str, str]:
    try:
        shown = scrub(module.extra_repr())
    except Exception:  # a user's code may raise anything
        shown = ""
    of_torch = type(module).__module__.startswith("torch.nn.")
    defaults = _defaults(type(module)) if of_torch else {}
    settings, unnamed = {}, []
    for part in re.split(r",\s*(?![^()\[\]{}]*[)\]}])", shown):
        name, named, value = part.strip().partition("=")
        if not named:
            unnamed.append(name)
            continue
        value = re.sub(r"^\((\d+(?:, \d+)*),?\)$", lambda m: m[1].replace(", ", "x"), value)
        if {defaults.get(name)} != set(value.split("x")):
            settings[_CHANNELS.get(name, name)] = value
    if len(unnamed) == 2 and hasattr(module, "out_channels"):
        settings = {"in": unnamed[0], "out": unnamed[1], **settings}
    elif any(unnamed):
        settings = {"": ", ".join(unnamed), **settings}
    own = list(module.named_parameters("", False))
    if not (of_torch and settings):
        settings |= {name: "x".join(map(str, p.shape)) or "scalar" for name, p in own}
    if own and not any(p.requires_grad for _, p in own):
        settings["frozen"] = "yes"
    return settings


def _defaults(kind: type[nn.Module]) -> dict[str, str]:
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):  # written in C
        return {}
    return {name: str(p.default) for name, p in parameters.items() if p.default is not p.empty}
