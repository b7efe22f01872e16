"""Rewrite PyTorch networks so that they need far less memory, and prove it with a report.

::

    from pocketize import compare, pocketize, rewrite

    small = pocketize(model)            # all widths clamped to the finest resolution's (PocketNet)
    print(compare(model, small, inputs=x))

Names are imported when they are first used, and torch with them. Importing this package initialises
no device.
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

from typing import TYPE_CHECKING

from pocketize.lazy import attach
from pocketize.version import VERSION as __version__

if TYPE_CHECKING:
    from pocketize.artifact import load, save
    from pocketize.base import Guarantee, Pass, PassRecord
    from pocketize.capture import Captured, capture
    from pocketize.channels import Analysis, analyse
    from pocketize.errors import PocketizeError
    from pocketize.groups import ChannelGroup, ChannelGroups
    from pocketize.memory import measure
    from pocketize.pipeline import Plan, history, plan, pocketize, replay, rewrite
    from pocketize.report import compare
    from pocketize.rules import channel_rule

attach(
    __name__,
    {
        "Analysis": "channels",
        "Captured": "capture",
        "ChannelGroup": "groups",
        "ChannelGroups": "groups",
        "Guarantee": "base",
        "Pass": "base",
        "PassRecord": "base",
        "Plan": "pipeline",
        "PocketizeError": "errors",
        "analyse": "channels",
        "capture": "capture",
        "channel_rule": "rules",
        "compare": "report",
        "history": "pipeline",
        "load": "artifact",
        "measure": "memory",
        "plan": "pipeline",
        "pocketize": "pipeline",
        "replay": "pipeline",
        "rewrite": "pipeline",
        "save": "artifact",
    },
)
