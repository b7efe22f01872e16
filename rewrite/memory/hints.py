"""What passes tell the trackers that are on, where no operator shows it."""

from __future__ import annotations

__all__ = ["ON", "host_is_apart", "is_rehearsal", "note_followed", "note_move", "rehearsal"]

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketize.memory.tracker import LiveTracker


class _On(threading.local):
    """The trackers that are on in a thread; one is there several times where it entered again."""

    def __init__(self) -> None:
        self.trackers: list[LiveTracker] = []
        self.rehearsal = False


ON = _On()


def note_move(nbytes: int, place: str, holder: object = None) -> None:
    """Count bytes that a pass moves, such as into a file.

    Args:
        nbytes: how many.
        place: "host" or "disk".
        holder: the object with which what was moved there is freed; ``None``: they come back.
    """
    for tracker in dict.fromkeys(ON.trackers):
        tracker.moved(nbytes, place, holder)


def note_followed(count: int) -> None:
    """Count what a pass does in Python: looks at operators, modules or tiles, or saves tensors."""
    for tracker in dict.fromkeys(ON.trackers):
        tracker.followed(count)


def host_is_apart() -> bool:
    """Whether a tracker is on for which host memory is not the device's."""
    return any(tracker.host_is_apart for tracker in ON.trackers)


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Run a step on fake tensors that only leaves behind what later steps find, such as states."""
    before, ON.rehearsal = ON.rehearsal, True
    try:
        yield
    finally:
        ON.rehearsal = before


def is_rehearsal() -> bool:
    """Whether repetitions, such as all tiles of a loop but one, may be left out."""
    return ON.rehearsal
