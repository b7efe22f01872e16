"""What a report says and in which order, once for all formats.

One measurement or two become a list of blocks (paragraphs, tables, bars), which the formats draw.
"""

from __future__ import annotations

__all__ = ["between", "common_modes", "layout", "remarks", "unlike", "verdict"]

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pocketize.memory import MemoryProfile, top_modules
from pocketize.memory.tracker import CATEGORIES
from pocketize.report.blocks import Bars, Block, Cell, Code, Heading, Paragraph, Table
from pocketize.units import (
    bytes_text,
    count_text,
    large_text,
    percent_text,
    ratio_text,
    seconds_text,
)

if TYPE_CHECKING:
    from pocketize.report.measurement import Measurement, Rewrite, RewriteRow

Sides = Sequence["Measurement"]

#: How much more a figure that jitters (time, growth of the process) must be to be worth a remark.
_NOTICEABLE = 1.05

#: Rows of a pass' changes and refusals that are shown; JSON has all of them.
SHOWN = 12
#: What is printed where a figure does not exist.
NONE = "-"

#: The modes by their names in a measurement.
_MODES = {"train": ("training", "training step"), "infer": ("inference", "forward pass")}

#: Modules that are listed of each side.
_LARGEST = 10


def common_modes(sides: Sides) -> Iterator[tuple[str, list[MemoryProfile]]]:
    """Yield the modes that every side has, with the profile of each side."""
    for mode in _MODES:
        found = [getattr(side, mode) for side in sides]
        if all(found):
            yield mode, found


def unlike(before: Measurement, after: Measurement) -> dict[str, tuple[str, str]]:
    """Return the conditions in which two measurements differ, and so cannot be compared.

    Estimates do not depend on the machine and its threads, figures of an inference not on the
    optimizer.
    """
    old, new = before.conditions, after.conditions
    names = ["figures", "input", "dtype", "device", "optimizer", "loss"]
    if "measured" in (old["figures"], new["figures"]):
        names += ["threads", "machine"]
    pairs = {name: (old.get(name, ""), new.get(name, "")) for name in names}
    pairs["form"] = _form(before), _form(after)
    both = before.train is not None and after.train is not None
    return {
        name: (a, b)
        for name, (a, b) in pairs.items()
        if a != b and (both or name not in ("optimizer", "loss"))
    }


def _form(side: Measurement) -> str:
    return "an exported program" if side.exported else "a module"


def between(before: Measurement, after: Measurement) -> tuple[Rewrite, ...]:
    """Return the passes that were applied to ``after`` and not already to ``before``."""
    old, new = before.passes, after.passes
    alike = [(p.name, p.options) for p in new[: len(old)]] == [(p.name, p.options) for p in old]
    return new[len(old) :] if alike else new


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
        said += [f"{text} ({where})." for text in _worse(_MODES[mode][1], old, new)]
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


def verdict(sides: Sides) -> str:
    """One line: what became of the peaks, and, as a figure of its own, of the parameters."""
    conditions = sides[0].conditions
    peaks = ", ".join(
        f"{_MODES[mode][0]} peak {_change([p.peak for p in profiles], bytes_text)}"
        for mode, profiles in common_modes(sides)
    )
    parameters = _change([side.profiles[0].parameters for side in sides], count_text)
    promise = f" {_function(between(sides[0], sides[1]))}" if len(sides) > 1 else ""
    return (
        f"{conditions['figures'].capitalize()} on {conditions['device']}: {peaks}. "
        f"Counted: parameters {parameters}.{promise}"
    )


def layout(*sides: Measurement) -> list[Block]:
    """Lay one measurement, or two to compare, out as blocks in reading order."""
    names = dict.fromkeys(side.model for side in sides)
    title = "report" if len(sides) > 1 else "measurement"
    said = remarks(*sides) if len(sides) > 1 else _uncounted(sides)
    labels = ("before", "after") if len(sides) > 1 else ("",)
    bars = {
        f"{_MODES[mode][0]}, {label}".rstrip(", "): _ordered(profile.categories)
        for mode, profiles in common_modes(sides)
        for label, profile in zip(labels, profiles, strict=True)
    }
    return [
        Heading(f"pocketize {title}: {' against '.join(names)}", level=1),
        Paragraph(verdict(sides), strong=True),
        *(Paragraph(remark) for remark in said),
        _figures(sides),
        Bars(tuple(bars), tuple(bars.values())),
        *_modules(sides),
        *_rewrites(between(*sides) if len(sides) > 1 else sides[0].passes, alone=len(sides) == 1),
        *_environment(sides),
    ]


def _change(values: Sequence[int], write: Callable[[int], str]) -> str:
    first, last = values[0], values[-1]
    if len(values) == 1:
        return write(first)
    if first == last:
        return f"{write(first)}, unchanged"
    return f"{write(first)} -> {write(last)} ({percent_text(first, last)})"


def _function(rewrites: Sequence[Rewrite]) -> str:
    """What the passes promise about the function; the weakest of them decides."""
    if not rewrites:
        return "No pass is recorded between the two networks."
    promises = {
        "RETRAIN": "RETRAIN: the function changed, and has to be trained.",
        "APPROXIMATE": "APPROXIMATE: same shapes, weights carried over; outputs differ.",
        "EXACT": "EXACT: the same function and gradients, up to rounding.",
    }
    kept = {rewrite.guarantee for rewrite in rewrites}
    return next((text for name, text in promises.items() if name in kept), ", ".join(sorted(kept)))


def _ordered(categories: dict[str, int]) -> dict[str, int]:
    known = [name for name in CATEGORIES if name in categories]
    return {name: categories[name] for name in [*known, *sorted(categories.keys() - set(known))]}


def _columns(sides: Sides) -> tuple[str, ...]:
    return ("before", "after", "ratio") if len(sides) > 1 else ("memory",)


def _figures(sides: Sides) -> Table:
    first = [side.profiles[0] for side in sides]
    rows = [
        _row("parameters", [p.parameters for p in first], count_text),
        _row("weights' bytes", [p.weight_bytes for p in first], bytes_text),
        _row("MACs of a forward", [p.macs for p in first], large_text),
    ]
    times = {"train": "training step's time", "infer": "inference time"}
    parts: set[int] = set()
    for mode, profiles in common_modes(sides):
        if mode == "train":
            rows.append(_row("FLOPs of a training step", [p.flops for p in profiles], large_text))
        rows.append(_row(f"{_MODES[mode][0]} peak", [p.peak for p in profiles], bytes_text))
        details = _peak_rows(profiles)
        parts.update(range(len(rows), len(rows) + len(details)))
        rows += details
        timed = [p.step_seconds or (None, None) for p in profiles]
        if any(p.step_seconds for p in profiles):
            rows.append(_row(times[mode], [median for median, _ in timed], seconds_text))
            parts.add(len(rows))
            rows.append(_row("quartiles apart", [spread for _, spread in timed], seconds_text))
    columns = ("", *(_columns(sides) if len(sides) > 1 else ("figure",)))
    return Table(columns, tuple(rows), len(columns) - 1, frozenset(parts))


def _peak_rows(profiles: Sequence[MemoryProfile]) -> list[tuple[Cell, ...]]:
    """Rows of a peak's parts, and of the figures that cross-check it."""
    rows = []
    for name in _ordered({name: 0 for p in profiles for name in p.categories}):
        values = [p.categories.get(name, 0) for p in profiles]
        if any(values):
            rows.append(_row(name.replace("_", " "), values, bytes_text))
    checks = {
        "reserved by the allocator": [p.reserved for p in profiles],
        "growth of the process": [p.rss for p in profiles],
    }
    for label, held in checks.items():
        if any(value is not None for value in held):
            rows.append(_row(label, held, bytes_text))
    return rows


def _row(label: str, values: Sequence[Any], write: Callable[[Any], str]) -> tuple[Cell, ...]:
    """A row of one figure for each side, and of the ratio of two."""
    shown = [NONE if value is None else write(value) for value in values]
    if len(values) > 1:
        known = all(value is not None for value in values)
        shown.append(ratio_text(values[0], values[1]) if known else NONE)
    return (label, *shown)


def _modules(sides: Sides) -> Iterator[Block]:
    """The largest of either side, by their bytes before; ties by name, so that reports diff."""
    for mode, profiles in common_modes(sides):
        held = [p.modules for p in profiles]
        paths = dict.fromkeys(
            path for p in profiles for path, size in top_modules(p, _LARGEST) if size > 0
        )
        order = sorted(paths, key=lambda path: (*(-each.get(path, 0) for each in held), path))
        rows = [
            (_place(path), *_row("", [each.get(path) for each in held], bytes_text)[1:])
            for path in order
        ]
        yield Heading(f"Modules that hold most at the {_MODES[mode][0]} peak")
        columns = _columns(sides)
        yield Table(("module", *columns), tuple(rows), right=len(columns))
        return


def _place(path: str) -> Cell:
    return Code(path) if path else "(the network itself)"


def _rewrites(rewrites: Sequence[Rewrite], *, alone: bool) -> Iterator[Block]:
    if alone and not rewrites:
        return
    yield Heading("What was rewritten")
    if not rewrites:
        yield Paragraph("No pass of pocketize is recorded in the second network.")
    for rewrite in rewrites:
        yield Paragraph(
            f"{rewrite}, {rewrite.guarantee}: {len(rewrite.changed)} changed, "
            f"{len(rewrite.refused)} refused."
        )
        if rewrite.changed:
            yield _rows("changed", rewrite.changed)
        if rewrite.refused:
            yield _rows("refused", rewrite.refused)
        for note in rewrite.notes:
            yield Paragraph(note)


def _rows(title: str, rows: tuple[RewriteRow, ...]) -> Table:
    """A table of what was changed or refused, without empty columns."""
    columns: list[tuple[str, list[Cell]]] = [(title, [_place(row.path) for row in rows])]
    for name in ("what", "why"):
        cells: list[Cell] = [getattr(row, name) for row in rows]
        if any(cells):
            columns.append((name, cells))
    shown = [tuple(cells) for cells in zip(*(cells[:SHOWN] for _, cells in columns), strict=True)]
    if len(rows) > SHOWN:
        rest = f"and {len(rows) - SHOWN} more, all of them in the JSON"
        shown.append((rest, *[""] * (len(columns) - 1)))
    return Table(tuple(name for name, _ in columns), tuple(shown))


def _environment(sides: Sides) -> Iterator[Block]:
    conditions = [side.conditions for side in sides]
    merged: dict[str, str] = {}
    for name in conditions[0] | conditions[-1]:
        merged[name] = " / ".join(dict.fromkeys(each.get(name, NONE) for each in conditions))
        if name == "loss" or (name == "device" and "optimizer" not in conditions[0]):
            merged["processes"] = _processes(sides)
    yield Heading("What the figures hold for")
    yield Table(("", ""), tuple(merged.items()))
    yield Paragraph(_meaning(sides[0]))


def _processes(sides: Sides) -> str:
    if sides[0].profiles[0].estimated:
        return "none started: an estimate runs no operator"
    labels = ("before ", "after ") if len(sides) > 1 else ("",)
    shared = {
        f"{label}{_MODES[profile.mode][0]}": profile.why_not_isolated or "not asked for"
        for label, side in zip(labels, sides, strict=True)
        for profile in side.profiles
        if not profile.isolated
    }
    if not shared:
        return "each figure in a fresh one"
    return f"this one for {', '.join(shared)} ({'; '.join(sorted(set(shared.values())))})"


def _meaning(side: Measurement) -> str:
    profile = side.profiles[0]
    if profile.estimated:
        meaning = "Peaks are estimated: live tensors of a step under fake tensors; nothing was run."
    elif profile.device.startswith("cuda"):
        meaning = "Peaks are measured: the allocator's maximum of allocated bytes over a step."
    else:
        meaning = (
            "Peaks are measured: bytes of live tensors over a step. Scratch memory inside the "
            "operators is not in them; the growth of the process is the cross-check."
        )
    return meaning + " Parameters are counted; neither figure follows from the other."
