"""What passes tell the trackers that are on, where no operator shows it."""

from __future__ import annotations

__all__ = ["ON", "host_is_apart", "note_followed", "note_move"]

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketize.memory.tracker import LiveTracker


class _On(threading.local):
    """The trackers that are on in a thread; one is there several times where it entered again."""

    def __init__(self) -> None:
        self.trackers: list[LiveTracker] = []


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
    """Count operators that a pass looked at in Python, and tensors that it was asked to save."""
    for tracker in dict.fromkeys(ON.trackers):
        tracker.followed(count)


def host_is_apart() -> bool:
    """Whether a tracker is on for which host memory is not the device's."""
    return any(tracker.host_is_apart for tracker in ON.trackers)
