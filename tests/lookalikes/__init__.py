"""Networks in other people's idioms, written here from scratch.

The originals are not installed where the tests run, and rules must not be written for a model's
name. Channel counts are realistic, depths and images small. ``lookalike_nets()`` lists them.
"""

from __future__ import annotations

from tests.lookalikes import blocks, convolutional, decoders, diffusion, transformers  # noqa: F401
from tests.lookalikes.table import lookalike_nets

__all__ = ["lookalike_nets"]
