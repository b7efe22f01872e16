"""Numbers as people read them: bytes, counts, seconds and ratios, and the way back from text."""

from __future__ import annotations

__all__ = [
    "UNITS",
    "bytes_text",
    "count_text",
    "large_text",
    "percent_text",
    "quantity",
    "ratio_text",
    "seconds_text",
]

import re

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")

#: The units that a quantity of each kind may be written in.
UNITS: dict[str, dict[str, float]] = {
    "bytes": {
        **{unit: 1 << 10 * power for power, unit in enumerate(_BINARY)},
        **{"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    },
    "count": {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
}


def bytes_text(count: int) -> str:
    """Write a number of bytes in the largest binary unit that leaves it at least 1.

    Args:
        count: Bytes, of either sign.

    Returns:
        ``"512 B"``, ``"1.5 KiB"``, ``"710.0 MiB"``, ``"1.89 GiB"``. From GiB upwards two decimals
        are kept, because there a tenth of the unit is already a hundred MiB.
    """
    value, unit = float(count), 0
    # 1023.95 would be rounded to "1024.0": it belongs to the next unit.
    while abs(value) >= 1023.95 and unit < len(_BINARY) - 1:
        value /= 1024
        unit += 1
    decimals = 0 if unit == 0 else 1 if unit < 3 else 2
    return f"{value:.{decimals}f} {_BINARY[unit]}"


def count_text(count: int) -> str:
    """Write a count in full, with separators: ``"5,470,850"``."""
    return f"{count:,}"


def large_text(count: int) -> str:
    """Write a large count in short: ``"12.31 G"``, ``"950"``."""
    value, suffix = float(count), ""
    for suffix_above in ("k", "M", "G", "T"):
        if abs(value) < 999.995:
            break
        value /= 1000
        suffix = suffix_above
    return f"{value:.2f} {suffix}" if suffix else f"{count}"


def seconds_text(seconds: float) -> str:
    """Write a duration: ``"1.30 s"`` or, below one second, ``"84.1 ms"``."""
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.1f} ms"


def ratio_text(before: float, after: float) -> str:
    """Write ``after / before``: ``"0.61x"``, two digits kept below 0.1 (``"0.027x"``).

    Returns:
        ``"-"`` where there is nothing to divide by; ``"0x"`` where nothing is left.
    """
    if before == 0:
        return "-"
    ratio = after / before
    if ratio == 0:
        return "0x"
    return f"{ratio:.2f}x" if ratio >= 0.095 else f"{float(f'{ratio:.2g}'):.10f}".rstrip("0") + "x"


def percent_text(before: float, after: float) -> str:
    """Write the change in percent with its sign: ``"-38.6 %"``, ``"+2.0 %"``, ``"+0.0 %"``."""
    change = round(100 * (after - before) / before, 1) if before else 0.0
    # Adding zero turns the negative zero that rounding can leave into a plain one.
    return f"{change + 0.0:+.1f} %"


def quantity(text: str, kind: str) -> float | None:
    """Read a quantity with its unit.

    Args:
        text: A number followed by a unit of ``kind``: ``"16MiB"``, ``"-1.5k"``, ``"20ms"``.
        kind: ``"bytes"``, ``"count"`` or ``"seconds"``.

    Returns:
        Bytes, a count or seconds, or ``None`` where the text is no quantity of that kind.
    """
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in UNITS[kind]:
        return None
    return float(match[1]) * UNITS[kind][match[2]]
