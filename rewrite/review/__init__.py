"""Compare the memory of a repository's networks between two git revisions: ``pocketize diff``."""

from __future__ import annotations

__all__: list[str] = []
