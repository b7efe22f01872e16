"""The parts of a report that a comment folds: what the peaks consist of, and the conditions."""

from __future__ import annotations

__all__ = ["MODES", "NONE", "SHOWN", "details", "ordered", "place", "rest_row"]

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pocketize.memory import top_modules
from pocketize.memory.tracker import CATEGORIES
from pocketize.report.blocks import Block, Cell, Code, Paragraph, Section, Table
from pocketize.report.differences import between, common_modes, same_moment
from pocketize.units import bytes_text, ratio_text, seconds_text

if TYPE_CHECKING:
    from pocketize.report.measurement import Measurement, Rewrite, RewriteRow

Sides = Sequence["Measurement"]

#: Rows of changes and refusals that are shown; JSON has all of them.
SHOWN = 12
#: Modules that are listed of each side.
_LARGEST = 10
#: What is printed where a figure does not exist, and for the ratio of what cannot be compared.
NONE = "-"
#: The modes by their names in a measurement.
MODES = {"train": ("training", "training step"), "infer": ("inference", "forward pass")}


def details(sides: Sides) -> Iterator[Section]:
    """Yield the folded parts of a report on one measurement or two."""
    two = len(sides) > 1
    yield Section("What the peaks consist of", (_parts(sides),))
    yield from _modules(sides)
    yield from _rewrites(between(sides[0], sides[1]) if two else sides[0].passes)
    if not two:
        yield _layers(sides[0])
    yield _environment(sides)


def ordered(categories: dict[str, int]) -> dict[str, int]:
    """Return the categories of a peak in the order of the reports."""
    known = [name for name in CATEGORIES if name in categories]
    return {name: categories[name] for name in [*known, *sorted(categories.keys() - set(known))]}


def rest_row(found: int, columns: int) -> Iterator[tuple[Cell, ...]]:
    """Yield the last row of a table that does not show all that was found."""
    if found > SHOWN:
        yield (f"and {found - SHOWN} more, all of them in the JSON", *[""] * (columns - 1))


def _parts(sides: Sides) -> Table:
    rows: list[tuple[Cell, ...]] = []
    indented: set[int] = set()
    for mode, profiles in common_modes(sides):
        like = same_moment(profiles)
        rows.append(_row(f"{MODES[mode][0]} peak", [p.peak for p in profiles], bytes_text))
        start = len(rows)
        for name in ordered({name: 0 for p in profiles for name in p.categories}):
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
        indented.update(range(start, len(rows)))
    columns = ("before", "after", "ratio") if len(sides) > 1 else ("figure",)
    return Table(("", *columns), tuple(rows), len(columns), frozenset(indented))


def _row(
    label: Cell, values: Sequence[Any], write: Callable[[Any], str], *, ratio: bool = True
) -> tuple[Cell, ...]:
    """A row of one figure for each side, and of the ratio of two."""
    shown = [NONE if value is None else write(value) for value in values]
    if len(values) > 1:
        known = ratio and all(value is not None for value in values)
        shown.append(ratio_text(values[0], values[1]) if known else NONE)
    return (label, *shown)


def _modules(sides: Sides) -> Iterator[Section]:
    """The largest of either side, by their bytes before; ties by name, so that reports diff."""
    for mode, profiles in common_modes(sides):
        held = [p.modules for p in profiles]
        paths = dict.fromkeys(
            path for p in profiles for path, size in top_modules(p, _LARGEST) if size > 0
        )
        order = sorted(paths, key=lambda path: (*(-each.get(path, 0) for each in held), path))
        like = same_moment(profiles)
        rows = tuple(
            _row(place(path), [each.get(path) for each in held], bytes_text, ratio=like)
            for path in order
        )
        columns = ("before", "after", "ratio") if len(sides) > 1 else ("memory",)
        table = Table(("module", *columns), rows, right=len(columns))
        yield Section(f"Modules that hold most at the {MODES[mode][0]} peak", (table,))
        return


def place(path: str) -> Cell:
    """Return the cell that names a module."""
    return Code(path) if path else "(the network itself)"


def _layers(side: Measurement) -> Section:
    rows = tuple((place(layer.path), str(layer)) for layer in side.layers)
    return Section("Layers", (Table(("layer", "what"), rows),))


def _rewrites(rewrites: Sequence[Rewrite]) -> Iterator[Section]:
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
    columns: list[tuple[str, list[Cell]]] = [(title, [place(row.path) for row in rows])]
    for name in ("what", "why"):
        cells: list[Cell] = [getattr(row, name) for row in rows]
        if any(cells):
            columns.append((name, cells))
    shown = [tuple(cells) for cells in zip(*(cells[:SHOWN] for _, cells in columns), strict=True)]
    shown += rest_row(len(rows), len(columns))
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
        f"{label}{MODES[profile.mode][0]}": profile.why_not_isolated or "not asked for"
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
