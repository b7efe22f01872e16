"""How many examples the property tests try: ``pytest --hypothesis-profile=thorough`` tries all."""

from __future__ import annotations

from hypothesis import settings

__all__ = ["examples"]

settings.register_profile("thorough", max_examples=100)
settings.register_profile("quick", max_examples=30)
settings.load_profile("quick")


def examples(number: int) -> int:
    """``max_examples`` of a test that tries this many in the thorough profile, three at least."""
    return max(3, number * settings.default.max_examples // 100)
