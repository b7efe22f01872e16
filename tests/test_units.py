from __future__ import annotations

import pytest

from pocketize import units


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (-(2**20), "-1.0 MiB"),
        (2**20 * 1024 - 1, "1.00 GiB"),
        (int(1.886 * 2**30), "1.89 GiB"),
        (2**54, "16384.00 TiB"),
    ],
)
def test_bytes_are_written_in_the_largest_binary_unit(count: int, expected: str) -> None:
    assert units.bytes_text(count) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0"), (950, "950"), (1234, "1.23 k"), (12_314_000_000, "12.31 G"), (999_999, "1.00 M")],
)
def test_large_counts_are_shortened(count: int, expected: str) -> None:
    assert units.large_text(count) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (100, 61, "0.61x"),
        (100, 250, "2.50x"),
        (1000, 27, "0.027x"),
        (10**6, 9, "0.000009x"),
        (100, 9.49, "0.095x"),
        (0, 5, "-"),
        (5, 0, "0x"),
        (7, 7, "1.00x"),
    ],
)
def test_ratios_keep_two_digits_however_small(before: float, after: float, expected: str) -> None:
    assert units.ratio_text(before, after) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(100, 61.4, "-38.6 %"), (100, 102, "+2.0 %"), (10**6, 10**6 - 1, "+0.0 %"), (0, 3, "+0.0 %")],
)
def test_percent_carries_its_sign(before: float, after: float, expected: str) -> None:
    assert units.percent_text(before, after) == expected


def test_durations_below_a_second_are_in_milliseconds() -> None:
    assert units.seconds_text(0.0841) == "84.1 ms"
    assert units.seconds_text(1.3) == "1.30 s"


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("16MiB", "bytes", 16 * 2**20),
        ("16MB", "bytes", 16 * 10**6),
        ("-1.5k", "count", -1500),
        ("20ms", "seconds", 0.02),
        ("20", "count", 20),
        ("20", "bytes", None),
        ("20ms", "bytes", None),
        ("mib", "bytes", None),
        ("1e3B", "bytes", None),
    ],
)
def test_quantities_are_read_with_their_unit_or_not_at_all(
    text: str, kind: str, expected: float | None
) -> None:
    assert units.quantity(text, kind) == (None if expected is None else pytest.approx(expected))
