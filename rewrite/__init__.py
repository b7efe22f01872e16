"""Rewrite PyTorch networks so that they need far less memory, and prove it with a report.

::

    from pocketize import compare, fit, pocketize

    found = fit(model, "1x1x128x128x128", memory="8GiB")    # the same function in less memory
    small = pocketize(model)            # all widths clamped to the finest resolution's (PocketNet)
    print(compare(model, small, inputs=x))

Names are imported when they are first used, and torch with them. Importing this package initialises
no device.
"""

from __future__ import annotations

__all__ = [
    "Analysis",
    "Calibration",
    "ChannelGroup",
    "ChannelGroups",
    "Distillation",
    "Guarantee",
    "Pass",
    "PassRecord",
    "Plan",
    "PocketizeError",
    "TracedGraph",
    "__version__",
    "analyse",
    "apply_recipe",
    "calibrate",
    "capture",
    "channel_rule",
    "compare",
    "fit",
    "history",
    "largest_input",
    "load",
    "measure",
    "plain",
    "plan",
    "pocketize",
    "rebind",
    "recipe",
    "replay",
    "rewrite",
    "run_volume",
    "save",
    "step_in_backward",
]

from typing import TYPE_CHECKING

from pocketize.lazy import attach
from pocketize.version import VERSION as __version__

if TYPE_CHECKING:
    from pocketize.artifact import load, save
    from pocketize.artifact.carried import apply_recipe, recipe
    from pocketize.calibration import Calibration, calibrate
    from pocketize.channels.analysis import Analysis, analyse
    from pocketize.channels.groups import ChannelGroup, ChannelGroups
    from pocketize.channels.rules import channel_rule
    from pocketize.distill import Distillation
    from pocketize.engine.pipeline import Plan, history, plan, pocketize, replay, rewrite
    from pocketize.engine.plain import plain
    from pocketize.errors import PocketizeError
    from pocketize.graph.capture import TracedGraph, capture
    from pocketize.memory import measure
    from pocketize.optim import step_in_backward
    from pocketize.passes.fit.largest import largest_input
    from pocketize.passes.fit.search import fit
    from pocketize.passes.tiling.volumes import run_volume
    from pocketize.plugin.base import Guarantee, Pass, PassRecord
    from pocketize.rebind import rebind
    from pocketize.report import compare

attach(
    __name__,
    {
        "calibration": "Calibration calibrate",
        "distill": "Distillation",
        "channels.analysis": "Analysis analyse",
        "graph.capture": "TracedGraph capture",
        "channels.groups": "ChannelGroup ChannelGroups",
        "plugin.base": "Guarantee Pass PassRecord",
        "engine.pipeline": "Plan history plan pocketize replay rewrite",
        "engine.plain": "plain",
        "errors": "PocketizeError",
        "channels.rules": "channel_rule",
        "report": "compare",
        "artifact": "load save",
        "artifact.carried": "apply_recipe recipe",
        "memory": "measure",
        "optim": "step_in_backward",
        "rebind": "rebind",
        "passes.fit.largest": "largest_input",
        "passes.fit.search": "fit",
        "passes.tiling.volumes": "run_volume",
    },
)
