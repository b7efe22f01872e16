"""Rewrite PyTorch networks so that they need far less memory, and prove it with a report.

::

    from pocketize import compare, pocketize, rewrite

    small = pocketize(model)            # all widths clamped to the finest resolution's (PocketNet)
    print(compare(model, small, inputs=x))

Importing this package initialises no device; the report and the saved models are loaded when they
are first used.
"""

from __future__ import annotations

__all__ = [
    "Analysis",
    "Captured",
    "ChannelGroup",
    "ChannelGroups",
    "Guarantee",
    "Pass",
    "PassRecord",
    "Plan",
    "PocketizeError",
    "__version__",
    "analyse",
    "capture",
    "channel_rule",
    "compare",
    "history",
    "load",
    "measure",
    "plan",
    "pocketize",
    "replay",
    "rewrite",
    "save",
]

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pocketize.base import Guarantee, Pass, PassRecord
from pocketize.capture import Captured, capture
from pocketize.channels import Analysis, analyse
from pocketize.errors import PocketizeError
from pocketize.groups import ChannelGroup, ChannelGroups
from pocketize.pipeline import Plan, history, plan, pocketize, replay, rewrite
from pocketize.rules import channel_rule
from pocketize.version import VERSION as __version__

if TYPE_CHECKING:
    from pocketize.artifact import load, save
    from pocketize.memory import measure
    from pocketize.report import compare

_LATER = {
    "compare": "pocketize.report",
    "load": "pocketize.artifact",
    "measure": "pocketize.memory",
    "save": "pocketize.artifact",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
