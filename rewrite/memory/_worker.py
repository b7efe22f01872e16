"""The fresh process of :mod:`pocketize.memory.isolate`: read a request, measure, answer."""

from __future__ import annotations

__all__ = ["main"]

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocketize.errors import PocketizeError, brief
from pocketize.graph.inputs import Inputs
from pocketize.memory.isolate import Settings
from pocketize.memory.meter import measure_here
from pocketize.memory.step import Request, make_step


def main(settings: str, payload: str, answer: str) -> None:
    """Measure what a file says and write what came out.

    Args:
        settings: JSON of :class:`~pocketize.memory.isolate.Settings`.
        payload: pickle of the fields of a :class:`~pocketize.memory.step.Request`.
        answer: where to write JSON: ``profile``, or ``unreadable``, or ``error`` and ``text``.
    """
    Settings(**json.loads(Path(settings).read_text())).apply()
    Path(answer).write_text(json.dumps(_answer(payload)))


def _answer(payload: str) -> dict[str, Any]:
    _warm_up()
    try:
        # Our own parent wrote this file a moment ago.
        request = Request(**torch.load(payload, weights_only=False))
    except Exception as error:  # a user's __setstate__ may raise anything; so may their imports
        return {"unreadable": brief(error)}
    try:
        return {"profile": measure_here(request, own=True).to_json()}
    except PocketizeError as error:
        return {"error": type(error).__name__, "text": str(error)}


def _warm_up() -> None:
    """Load what torch loads on first use, so that it does not count as the model's memory."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU())
    for optimizer in ("adam", "sgd"):
        step = make_step(
            net, Inputs((torch.ones(2, 1, 8, 8),)), train=True, optimizer=optimizer, loss=None
        )
        step.run()
