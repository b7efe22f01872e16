"""Memory of a model: measured on real tensors, or estimated on fake ones.

::

    profile = measure(model, "1x1x96x96x96")                    # a training step, with Adam
    print(profile)
    measure(model, "1x1x512x512x512", "infer", estimate=True)   # nothing runs: any size fits
"""

from __future__ import annotations

__all__ = ["MemoryProfile", "count_macs", "measure", "top_modules"]

from pocketize.memory.flops import count_macs
from pocketize.memory.meter import measure
from pocketize.memory.profile import MemoryProfile, top_modules
