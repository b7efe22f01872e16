"""Saved models: weights and the recipe that made their structure, in one safetensors file.

A file never decides what code runs: there is no pickle in it, and the factory is the caller's.
"""

from __future__ import annotations

__all__ = ["FORMAT", "load", "load_weights", "read_header", "save"]

from typing import TYPE_CHECKING

from pocketize.lazy import attach

if TYPE_CHECKING:
    from pocketize.artifact.safefile import read_header
    from pocketize.artifact.store import FORMAT, load, save
    from pocketize.artifact.weights import load_weights

attach(
    __name__,
    {
        "store": "FORMAT load save",
        "weights": "load_weights",
        "safefile": "read_header",
    },
)
