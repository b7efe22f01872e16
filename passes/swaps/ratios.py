"""The option ``ratio``: a number, or a share of the energy to keep."""

from __future__ import annotations

__all__ = ["kept_share", "no_values"]

from pocketize.errors import OptionError


def kept_share(ratio: int | str | None, name: str) -> float | None:
    """Return the share that ``"energy:0.95"`` names; None for a number or for none.

    Args:
        ratio: the option.
        name: of the pass, for the error.

    Raises:
        OptionError: it is neither a number of at least 1 nor a share above 0 and at most 1.
    """
    if ratio is None or (isinstance(ratio, int) and ratio >= 1):
        return None
    if isinstance(ratio, str):
        word, _, number = ratio.partition(":")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if word == "energy" and 0.0 < share <= 1.0:
            return share
    raise OptionError(
        f"{name}: option 'ratio': expected a whole number of at least 1, or 'energy:SHARE' with a "
        f"share above 0 and at most 1 such as 'energy:0.95', got {ratio!r}"
    )


def no_values(ratio: int | str | None) -> str:
    """Return why a share of energy cannot be kept of a weight without memory."""
    return (
        f"ratio={ratio!r} needs the weight's values, and it has none (it is on the meta device); "
        "give a number"
    )
