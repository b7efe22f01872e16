"""What a report says and in which order, once for all formats.

One measurement or two become a list of blocks (paragraphs, tables, bars), which the formats draw.
"""

from __future__ import annotations

__all__ = ["layout", "remarks", "verdict"]

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pocketize.memory import MemoryProfile, top_modules
from pocketize.memory.tracker import CATEGORIES
from pocketize.report.blocks import (
    Bars,
    Block,
    Cell,
    Code,
    Heading,
    Paragraph,
    Section,
    Table,
    Timeline,
)
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
    from pocketize.report.measurement import Measurement, Rewrite, RewriteRow

Sides = Sequence["Measurement"]

#: How much more a figure that jitters (time, growth of the process) must be to be worth a remark.
_NOTICEABLE = 1.05
#: Rows of changes and refusals that are shown; JSON has all of them.
SHOWN = 12
#: Modules that are listed of each side.
_LARGEST = 10
#: What is printed where a figure does not exist, and for the ratio of what cannot be compared.
NONE = "-"
#: The modes by their names in a measurement.
_MODES = {"train": ("training", "training step"), "infer": ("inference", "forward pass")}
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
        f"{_MODES[mode][0]}, {label}".rstrip(", "): _ordered(profile.categories)
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
        Section("What the peaks consist of", (_parts(sides),)),
        *_modules(sides),
        *_rewrites(between(*sides) if two else sides[0].passes),
        *(() if two else (_layers(sides[0]),)),
        _environment(sides),
    ]


def verdict(sides: Sides, checks: Sequence[LimitCheck] = ()) -> str:
    """One line: how it stands with the limits, both peaks, and the parameters.

    Args:
        sides: one measurement, or before and after.
        checks: limits that were checked.
    """
    conditions = sides[0].conditions
    peaks = ", ".join(
        f"{_MODES[mode][0]} peak {_change([p.peak for p in profiles], bytes_text)}"
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


def _ordered(categories: dict[str, int]) -> dict[str, int]:
    known = [name for name in CATEGORIES if name in categories]
    return {name: categories[name] for name in [*known, *sorted(categories.keys() - set(known))]}


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
        name = f"{_MODES[mode][0]} peak"
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
    parts = sorted(_ordered(profile.categories).items(), key=lambda item: -item[1])
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
        title = f"Live tensors over a {_MODES[mode][1]}{label}: peak {bytes_text(peak)}{when}"
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
    rows: list[tuple[Cell, ...]] = [(_place(path), what) for path, what in found[:SHOWN]]
    yield Table(("changed", "how"), (*rows, *_rest(len(found), 2)))


def _rest(found: int, columns: int) -> Iterator[tuple[Cell, ...]]:
    if found > SHOWN:
        yield (f"and {found - SHOWN} more, all of them in the JSON", *[""] * (columns - 1))


def _parts(sides: Sides) -> Table:
    rows: list[tuple[Cell, ...]] = []
    parts: set[int] = set()
    for mode, profiles in common_modes(sides):
        like = same_moment(profiles)
        rows.append(_row(f"{_MODES[mode][0]} peak", [p.peak for p in profiles], bytes_text))
        start = len(rows)
        for name in _ordered({name: 0 for p in profiles for name in p.categories}):
            values = [p.categories.get(name, 0) for p in profiles]
            if any(values):
                rows.append(_row(name.replace("_", " "), values, bytes_text, ratio=like))
        timed = [p.step_seconds or (None, None) for p in profiles]
        further: dict[str, tuple[Sequence[Any], Callable[[Any], str]]] = {
            "reserved by the allocator": ([p.reserved for p in profiles], bytes_text),
            "growth of the process": ([p.rss for p in profiles], bytes_text),
            "quartiles of the time, apart": ([spread for _, spread in timed], seconds_text),
        }
        for label, (held, write) in further.items():
            if any(value is not None for value in held):
                rows.append(_row(label, held, write))
        parts.update(range(start, len(rows)))
    columns = ("before", "after", "ratio") if len(sides) > 1 else ("figure",)
    return Table(("", *columns), tuple(rows), len(columns), frozenset(parts))


def _row(
    label: Cell, values: Sequence[Any], write: Callable[[Any], str], *, ratio: bool = True
) -> tuple[Cell, ...]:
    """A row of one figure for each side, and of the ratio of two."""
    shown = [NONE if value is None else write(value) for value in values]
    if len(values) > 1:
        known = ratio and all(value is not None for value in values)
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
        like = same_moment(profiles)
        rows = tuple(
            _row(_place(path), [each.get(path) for each in held], bytes_text, ratio=like)
            for path in order
        )
        columns = ("before", "after", "ratio") if len(sides) > 1 else ("memory",)
        table = Table(("module", *columns), rows, right=len(columns))
        yield Section(f"Modules that hold most at the {_MODES[mode][0]} peak", (table,))
        return


def _place(path: str) -> Cell:
    return Code(path) if path else "(the network itself)"


def _layers(side: Measurement) -> Section:
    rows = tuple((_place(layer.path), str(layer)) for layer in side.layers)
    return Section("Layers", (Table(("layer", "what"), rows),))


def _rewrites(rewrites: Sequence[Rewrite]) -> Iterator[Block]:
    for rewrite in rewrites:
        blocks: list[Block] = [
            Paragraph(
                f"{rewrite}, {rewrite.guarantee}: {len(rewrite.changed)} changed, "
                f"{len(rewrite.refused)} refused."
            )
        ]
        if rewrite.changed:
            blocks.append(_rows("changed", rewrite.changed))
        if rewrite.refused:
            blocks.append(_rows("refused", rewrite.refused))
        yield Section(f"What {rewrite.name} did", (*blocks, *map(Paragraph, rewrite.notes)))


def _rows(title: str, rows: tuple[RewriteRow, ...]) -> Table:
    """A table of what was changed or refused, without empty columns."""
    columns: list[tuple[str, list[Cell]]] = [(title, [_place(row.path) for row in rows])]
    for name in ("what", "why"):
        cells: list[Cell] = [getattr(row, name) for row in rows]
        if any(cells):
            columns.append((name, cells))
    shown = [tuple(cells) for cells in zip(*(cells[:SHOWN] for _, cells in columns), strict=True)]
    shown += _rest(len(rows), len(columns))
    return Table(tuple(name for name, _ in columns), tuple(shown))


def _environment(sides: Sides) -> Section:
    conditions = [side.conditions for side in sides]
    merged: dict[str, str] = {}
    for name in conditions[0] | conditions[-1]:
        merged[name] = " / ".join(dict.fromkeys(each.get(name, NONE) for each in conditions))
        if name == "loss" or (name == "device" and "optimizer" not in conditions[0]):
            merged["processes"] = _processes(sides)
    table = Table(("", ""), tuple(merged.items()))
    return Section("What the figures hold for", (table, Paragraph(_meaning(sides[0]))))


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
