"""What a report says and in which order, once for all formats.

One measurement or two become a list of blocks (paragraphs, tables, bars), which the formats draw.
"""

from __future__ import annotations

__all__ = ["layout", "remarks", "verdict"]

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pocketize.memory import MemoryProfile
from pocketize.report.blocks import (
    Bars,
    Block,
    Cell,
    Heading,
    Paragraph,
    Table,
    Timeline,
)
from pocketize.report.details import MODES, NONE, SHOWN, details, ordered, place, rest_row
from pocketize.report.differences import (
    between,
    changes,
    common_modes,
    same_moment,
    status,
    unlike,
)
from pocketize.report.gate import METRICS, LimitCheck
from pocketize.units import bytes_text, count_text, percent_text, ratio_text, seconds_text

if TYPE_CHECKING:
    from pocketize.report.measurement import Measurement

Sides = Sequence["Measurement"]

#: How much more a figure that jitters (time, growth of the process) must be to be worth a remark.
_NOTICEABLE = 1.05
#: Figures that stand in every report where they were taken.
_MAIN = ("peak", "inference-peak", "parameters", "macs", "flops", "time", "inference-time")


def layout(*sides: Measurement, checks: Sequence[LimitCheck] = ()) -> list[Block]:
    """Lay one measurement, or two to compare, out as blocks in reading order.

    Args:
        sides: one, or before and after.
        checks: limits that were checked on two.
    """
    two = len(sides) > 1
    names = " against ".join(dict.fromkeys(side.model for side in sides))
    bars = {
        f"{MODES[mode][0]}, {label}".rstrip(", "): ordered(profile.categories)
        for mode, profiles in common_modes(sides)
        for label, profile in zip(("before", "after") if two else ("",), profiles, strict=True)
    }
    said = remarks(*sides) if two else tuple(_uncounted(sides))
    return [
        Heading(f"pocketize {'report' if two else 'measurement'}: {names}", level=1),
        Paragraph(verdict(sides, checks), strong=True, tone=_tone(sides, checks)),
        _figures(sides, checks),
        *map(Paragraph, (*_moments(sides), *said)),
        *(_changes(*sides) if two else ()),
        Bars(tuple(bars), tuple(bars.values())),
        *_timelines(sides),
        *details(sides),
    ]


def verdict(sides: Sides, checks: Sequence[LimitCheck] = ()) -> str:
    """One line: how it stands with the limits, both peaks, and the parameters.

    Args:
        sides: one measurement, or before and after.
        checks: limits that were checked.
    """
    conditions = sides[0].conditions
    peaks = ", ".join(
        f"{MODES[mode][0]} peak {_change([p.peak for p in profiles], bytes_text)}"
        for mode, profiles in common_modes(sides)
    )
    parameters = _change([side.profiles[0].parameters for side in sides], count_text)
    figures = (
        f"{conditions['figures'].capitalize()} on {conditions['device']}: {peaks}. "
        f"Counted: parameters {parameters}."
    )
    if len(sides) == 1:
        return figures
    stands = status(sides[0], sides[1], checks)
    if stands == "over the limit":
        over = (f"{check.threshold} allows {check.allowed}" for check in checks if check.over)
        stands += f": {', '.join(over)}"
    elif checks:
        stands += f", within {', '.join(str(check.threshold) for check in checks)}"
    return f"{stands[0].upper()}{stands[1:]}. {figures} {_promise(sides[0], sides[1])}"


def _tone(sides: Sides, checks: Sequence[LimitCheck]) -> str:
    stands = status(sides[0], sides[1], checks) if len(sides) > 1 else ""
    return {"over the limit": "bad", "better": "good", "ok": "good"}.get(stands, "")


def remarks(before: Measurement, after: Measurement) -> tuple[str, ...]:
    """Say what became slower or bigger, and what the figures leave out; empty where nothing did.

    Times count where they differ by more than 5 % and by more than the quartiles of either side
    are apart.
    """
    now = after.conditions
    where = f"on {now['device']}, {now['dtype']} weights, torch {now['torch']}"
    said = [
        f"Compared although they differ: {name} is {old} before and {new} after."
        for name, (old, new) in unlike(before, after).items()
    ]
    for mode, (old, new) in common_modes((before, after)):
        said += [f"{text} ({where})." for text in _worse(MODES[mode][1], old, new)]
    return (*said, *_uncounted((before, after)))


def _uncounted(sides: Sides) -> Iterator[str]:
    if names := sorted({name for side in sides for p in side.profiles for name in p.not_counted}):
        yield f"Not counted in the MACs, as no formula is known: {', '.join(names)}."


def _worse(mode: str, before: MemoryProfile, after: MemoryProfile) -> Iterator[str]:
    old, new = before.step_seconds, after.step_seconds
    if old and new and new[0] > _NOTICEABLE * old[0] and new[0] - old[0] > max(old[1], new[1]):
        pair = f"{seconds_text(new[0])} instead of {seconds_text(old[0])}"
        yield f"Slower: a {mode} takes {pair}, {ratio_text(old[0], new[0])} the time"
    if after.peak > before.peak:
        pair = f"{bytes_text(after.peak)} instead of {bytes_text(before.peak)}"
        yield f"Bigger: the peak of a {mode} is {pair}, {ratio_text(before.peak, after.peak)}"
    for name, held, holds in (
        ("the process grows by", before.rss, after.rss),
        ("the allocator reserves", before.reserved, after.reserved),
    ):
        if held is not None and holds is not None and holds > _NOTICEABLE * held:
            pair = f"{bytes_text(holds)} instead of {bytes_text(held)}"
            yield f"Bigger: during a {mode} {name} {pair}, {ratio_text(held, holds)}"


def _change(values: Sequence[int], write: Callable[[int], str]) -> str:
    first, last = values[0], values[-1]
    if len(values) == 1:
        return write(first)
    if first == last:
        return f"{write(first)}, unchanged"
    return f"{write(first)} -> {write(last)} ({percent_text(first, last)})"


def _promise(before: Measurement, after: Measurement) -> str:
    """What the passes promise about the function; the weakest of them decides."""
    names = {rewrite.name for rewrite in after.passes}
    if gone := dict.fromkeys(each.name for each in before.passes if each.name not in names):
        return f"Without {', '.join(gone)}, which the first network has."
    rewrites = between(before, after)
    if not rewrites:
        return "No pass is recorded between the two networks."
    promises = {
        "RETRAIN": "RETRAIN: the function changed, and has to be trained.",
        "APPROXIMATE": "APPROXIMATE: same shapes, weights carried over; outputs differ.",
        "EXACT": "EXACT: the same function and gradients, up to rounding.",
    }
    kept = {rewrite.guarantee for rewrite in rewrites}
    return next((text for name, text in promises.items() if name in kept), ", ".join(sorted(kept)))


def _figures(sides: Sides, checks: Sequence[LimitCheck]) -> Table:
    """The main table: figures before and after, with their limits."""
    rows: list[tuple[Cell, ...]] = []
    for name in dict.fromkeys([*_MAIN, *(check.threshold.metric for check in checks)]):
        metric = METRICS[name]
        values = [metric.read(side) for side in sides]
        if all(value is None for value in values):
            continue
        row = [metric.label, *(NONE if v is None else metric.write(v) for v in values)]
        if len(sides) > 1:
            row.append(_percent(*values))
        if checks:
            row.append("; ".join(map(_limit, (c for c in checks if c.threshold.metric == name))))
        rows.append(tuple(row))
    columns = ("", "before", "after", "change") if len(sides) > 1 else ("", "figure")
    if not checks:
        return Table(columns, tuple(rows), len(columns) - 1)
    return Table((*columns, "limit"), tuple(rows), len(columns) - 1, trailing=1)


def _percent(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return NONE
    return "=" if before == after else percent_text(before, after) if before else NONE


def _limit(check: LimitCheck) -> str:
    allowance = str(check.threshold).partition(" ")[2]
    return f"{'OVER' if check.over else 'ok'}: {allowance} allows {check.allowed}"


def _moments(sides: Sides) -> Iterator[str]:
    """Say when the peaks are, and what they consist of where that moved."""
    for mode, profiles in common_modes(sides):
        name = f"{MODES[mode][0]} peak"
        if not all(profile.moment[0] for profile in profiles):
            continue
        if same_moment(profiles):
            both = ", before and after" if len(sides) > 1 else ""
            yield f"The {name} is {_when(profiles[0])}{both}."
        else:
            before, after = (f"{_when(p)}, mostly {_mostly(p)}" for p in profiles)
            yield f"The {name} moved. Before: {before}. After: {after}."


def _when(profile: MemoryProfile) -> str:
    stage, module = profile.moment
    if stage == "optimizer":
        return "in the optimizer's step"
    name = {"forward": "the forward pass", "backward": "the backward pass"}.get(stage, stage)
    return f"in {name} of {module or 'the network itself'}"


def _mostly(profile: MemoryProfile) -> str:
    parts = sorted(ordered(profile.categories).items(), key=lambda item: -item[1])
    largest = [part for part in parts[:2] if 10 * part[1] > profile.peak] or parts[:1]
    return " and ".join(f"{name.replace('_', ' ')} ({bytes_text(n)})" for name, n in largest)


def _timelines(sides: Sides) -> Iterator[Block]:
    """The timelines of the training step, or of the forward if there is none, on one scale."""
    mode, profiles = next(common_modes(sides))
    labels = (", before", ", after") if len(sides) > 1 else ("",)
    scale = max((size for p in profiles for _, size in p.timeline), default=0)
    for label, profile in zip(labels, profiles, strict=True):
        events = tuple((*_split(name), size) for name, size in profile.timeline)
        peak = max((size for _, size in profile.timeline), default=0)
        when = f", {_when(profile)}" if profile.moment[0] else ""
        title = f"Live tensors over a {MODES[mode][1]}{label}: peak {bytes_text(peak)}{when}"
        if scale > 0:
            yield Timeline(title, events, scale)


def _split(label: str) -> tuple[str, str]:
    stage, _, module = label.partition(" ")
    return stage, module


def _changes(before: Measurement, after: Measurement) -> Iterator[Block]:
    found = changes(before, after)
    if not found:
        yield Paragraph("No layer changed, and no pass.")
        return
    rows: list[tuple[Cell, ...]] = [(place(path), what) for path, what in found[:SHOWN]]
    yield Table(("changed", "how"), (*rows, *rest_row(len(found), 2)))
