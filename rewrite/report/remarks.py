"""Sentences on where the second network is worse than the first, and on what was not counted.

A rewrite that saves memory may cost time, and lower precision may cost both: a machine without fast
arithmetic for it converts back and forth, in scratch memory outside of any tensor.
"""

from __future__ import annotations

__all__ = ["remarks"]

from collections.abc import Iterator

from pocketize.report.document import Document, Peak
from pocketize.units import bytes_text, ratio_text, seconds_text

#: How much more a figure that jitters (time, growth of the process) must be to be worth a remark.
_NOTICEABLE = 1.05


def remarks(document: Document) -> tuple[str, ...]:
    """Say what became slower or bigger, and what the figures leave out; empty where nothing did.

    Times count where they differ by more than 5 % and by more than the quartiles of either side
    are apart.
    """
    environment = document.environment
    where = f"on {environment.device}, {environment.dtype} weights, torch {environment.torch}"
    modes = (
        ("training step", document.before.training, document.after.training),
        ("forward pass", document.before.inference, document.after.inference),
    )
    worse = (f"{text} ({where})." for mode in modes for text in _worse(*mode))
    uncounted = sorted({*document.before.not_counted, *document.after.not_counted})
    if not uncounted:
        return tuple(worse)
    return (*worse, f"Not counted in the MACs, as no formula is known: {', '.join(uncounted)}.")


def _worse(mode: str, before: Peak, after: Peak) -> Iterator[str]:
    old, new = before.step_seconds, after.step_seconds
    if old and new and new[0] > _NOTICEABLE * old[0] and new[0] - old[0] > max(old[1], new[1]):
        pair = f"{seconds_text(new[0])} instead of {seconds_text(old[0])}"
        yield f"Slower: a {mode} takes {pair}, {ratio_text(old[0], new[0])} the time"
    if after.bytes > before.bytes:
        pair = f"{bytes_text(after.bytes)} instead of {bytes_text(before.bytes)}"
        yield f"Bigger: the peak of a {mode} is {pair}, {ratio_text(before.bytes, after.bytes)}"
    for name, held, holds in (
        ("the process grows by", before.rss, after.rss),
        ("the allocator reserves", before.reserved, after.reserved),
    ):
        if held is not None and holds is not None and holds > _NOTICEABLE * held:
            pair = f"{bytes_text(holds)} instead of {bytes_text(held)}"
            yield f"Bigger: during a {mode} {name} {pair}, {ratio_text(held, holds)}"
