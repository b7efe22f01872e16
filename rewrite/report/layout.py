"""What a report says and in which order, once for all formats.

A document becomes a list of blocks (paragraphs, tables, bars), which the formats draw.
"""

from __future__ import annotations

__all__ = [
    "Bars",
    "Block",
    "Cell",
    "Code",
    "Heading",
    "Paragraph",
    "Table",
    "layout",
    "remarks",
    "verdict",
]

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pocketize.memory.tracker import CATEGORIES
from pocketize.report.document import Document, Peak, Rewrite, RewriteRow
from pocketize.units import (
    bytes_text,
    count_text,
    large_text,
    percent_text,
    ratio_text,
    seconds_text,
)

#: How much more a figure that jitters (time, growth of the process) must be to be worth a remark.
_NOTICEABLE = 1.05


def remarks(document: Document) -> tuple[str, ...]:
    """Say what became slower or bigger, and what the figures leave out; empty where nothing did.

    Times count where they differ by more than 5 % and by more than the quartiles of either side
    are apart.
    """
    environment = document.environment
    where = f"on {environment.device}, {environment.dtype} weights, torch {environment.torch}"
    modes = (
        ("training step", document.before.training, document.after.training),
        ("forward pass", document.before.inference, document.after.inference),
    )
    worse = (f"{text} ({where})." for mode in modes for text in _worse(*mode))
    uncounted = sorted({*document.before.not_counted, *document.after.not_counted})
    if not uncounted:
        return tuple(worse)
    return (*worse, f"Not counted in the MACs, as no formula is known: {', '.join(uncounted)}.")


def _worse(mode: str, before: Peak, after: Peak) -> Iterator[str]:
    old, new = before.step_seconds, after.step_seconds
    if old and new and new[0] > _NOTICEABLE * old[0] and new[0] - old[0] > max(old[1], new[1]):
        pair = f"{seconds_text(new[0])} instead of {seconds_text(old[0])}"
        yield f"Slower: a {mode} takes {pair}, {ratio_text(old[0], new[0])} the time"
    if after.bytes > before.bytes:
        pair = f"{bytes_text(after.bytes)} instead of {bytes_text(before.bytes)}"
        yield f"Bigger: the peak of a {mode} is {pair}, {ratio_text(before.bytes, after.bytes)}"
    for name, held, holds in (
        ("the process grows by", before.rss, after.rss),
        ("the allocator reserves", before.reserved, after.reserved),
    ):
        if held is not None and holds is not None and holds > _NOTICEABLE * held:
            pair = f"{bytes_text(holds)} instead of {bytes_text(held)}"
            yield f"Bigger: during a {mode} {name} {pair}, {ratio_text(held, holds)}"


N = TypeVar("N", int, float)

#: Rows of a pass' changes and refusals that are shown; JSON has all of them.
SHOWN = 12
#: What is printed where a figure does not exist.
NONE = "-"


class Code(str):
    """A cell or a piece of text that names something in the model: drawn as code."""

    __slots__ = ()


Cell = str | Code


@dataclass(frozen=True)
class Heading:
    """A title of the first (the report) or second level."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text; ``strong`` for the verdict."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        columns: Headings.
        rows: Cells, as many in each row as there are columns.
        right: How many of the last columns hold figures and are aligned right.
        indented: Rows (by index) that are parts of the row above them.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: int = 0
    indented: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Bars:
    """Stacked bars on one scale, for the formats that can draw."""

    labels: tuple[str, ...]
    stacks: tuple[dict[str, int], ...]


Block = Heading | Paragraph | Table | Bars


def verdict(document: Document) -> str:
    """One line: what became of the peaks, and, as a figure of its own, of the parameters."""
    before, after, environment = document.before, document.after, document.environment
    training = before.training.bytes, after.training.bytes
    inference = before.inference.bytes, after.inference.bytes
    parameters = before.parameters, after.parameters
    return (
        f"{environment.method.capitalize()} on {environment.device}: "
        f"training peak {_change(training, bytes_text)}, "
        f"inference peak {_change(inference, bytes_text)}. "
        f"Counted: parameters {_change(parameters, count_text)}. {_function(document.rewrites)}"
    )


def layout(document: Document) -> list[Block]:
    """Lay a document out as blocks, in reading order."""
    names = document.before.model, document.after.model
    title = names[0] if names[0] == names[1] else f"{names[0]} against {names[1]}"
    return [
        Heading(f"pocketize report: {title}", level=1),
        Paragraph(verdict(document), strong=True),
        *(Paragraph(remark) for remark in remarks(document)),
        _figures(document),
        Bars(
            ("training, before", "training, after", "inference, before", "inference, after"),
            tuple(
                _ordered(peak.categories)
                for peak in (
                    document.before.training,
                    document.after.training,
                    document.before.inference,
                    document.after.inference,
                )
            ),
        ),
        *_modules(document),
        *_rewrites(document.rewrites),
        *_environment(document),
    ]


def _change(pair: tuple[int, int], write: Callable[[int], str]) -> str:
    before, after = pair
    if before == after:
        return f"{write(before)}, unchanged"
    return f"{write(before)} -> {write(after)} ({percent_text(before, after)})"


def _function(rewrites: tuple[Rewrite, ...]) -> str:
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


def _figures(document: Document) -> Table:
    before, after = document.before, document.after
    rows = [
        _row("parameters", before.parameters, after.parameters, count_text),
        _row("weights' bytes", before.weight_bytes, after.weight_bytes, bytes_text),
        _row("MACs of a forward", before.macs, after.macs, large_text),
    ]
    times = {"training": "training step's time", "inference": "inference time"}
    parts: set[int] = set()
    for mode in ("training", "inference"):
        old: Peak = getattr(before, mode)
        new: Peak = getattr(after, mode)
        rows.append(_row(f"{mode} peak", old.bytes, new.bytes, bytes_text))
        details = _peak_rows(old, new)
        parts.update(range(len(rows), len(rows) + len(details)))
        rows += details
        if old.step_seconds or new.step_seconds:
            rows.append(_row(times[mode], _median(old), _median(new), seconds_text))
            parts.add(len(rows))
            rows.append(_row("quartiles apart", _spread(old), _spread(new), seconds_text))
    return Table(("", "before", "after", "ratio"), tuple(rows), right=3, indented=frozenset(parts))


def _peak_rows(old: Peak, new: Peak) -> list[tuple[Cell, ...]]:
    """Rows of a peak's parts, and of the figures that cross-check it."""
    rows = []
    for name in _ordered(old.categories | new.categories):
        pair = old.categories.get(name, 0), new.categories.get(name, 0)
        if any(pair):
            rows.append(_row(name.replace("_", " "), *pair, bytes_text))
    checks = {
        "reserved by the allocator": (old.reserved, new.reserved),
        "growth of the process": (old.rss, new.rss),
    }
    for label, (before, after) in checks.items():
        if before is not None or after is not None:
            rows.append(_row(label, before, after, bytes_text))
    return rows


def _row(
    label: str, before: N | None, after: N | None, write: Callable[[N], str]
) -> tuple[Cell, ...]:
    return (
        label,
        NONE if before is None else write(before),
        NONE if after is None else write(after),
        NONE if before is None or after is None else ratio_text(before, after),
    )


def _median(peak: Peak) -> float | None:
    return peak.step_seconds[0] if peak.step_seconds else None


def _spread(peak: Peak) -> float | None:
    return peak.step_seconds[1] if peak.step_seconds else None


def _modules(document: Document) -> Iterator[Block]:
    rows = []
    for held in document.modules:
        _, *figures = _row("", held.before, held.after, bytes_text)
        rows.append((_place(held.path), *figures))
    yield Heading("Modules that hold most at the training peak")
    yield Table(("module", "before", "after", "ratio"), tuple(rows), right=3)


def _place(path: str) -> Cell:
    return Code(path) if path else "(the network itself)"


def _rewrites(rewrites: tuple[Rewrite, ...]) -> Iterator[Block]:
    yield Heading("What was rewritten")
    if not rewrites:
        yield Paragraph("No pass of pocketize is recorded in the second network.")
    for rewrite in rewrites:
        options = ", ".join(f"{name}={value!r}" for name, value in sorted(rewrite.options.items()))
        call = f"{rewrite.name}({options})" if options else rewrite.name
        yield Paragraph(
            f"{call}, {rewrite.guarantee}: {len(rewrite.changed)} changed, "
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


def _environment(document: Document) -> Iterator[Block]:
    environment = document.environment
    yield Heading("What the figures hold for")
    facts = (
        ("figures", environment.method),
        ("input", environment.input),
        ("dtype", environment.dtype),
        ("device", environment.device),
        ("optimizer", environment.optimizer),
        ("loss", environment.loss),
        ("processes", _processes(document)),
        ("threads", str(environment.threads)),
        ("torch", environment.torch),
        ("python", environment.python),
        ("machine", environment.machine),
        ("pocketize", environment.pocketize),
    )
    yield Table(("", ""), facts)
    yield Paragraph(_meaning(environment.method, environment.device))


def _processes(document: Document) -> str:
    if document.environment.method == "estimated":
        return "none started: an estimate runs no operator"
    peaks = {
        f"{side} {mode}": getattr(getattr(document, side), mode)
        for side in ("before", "after")
        for mode in ("training", "inference")
    }
    shared = {label: peak for label, peak in peaks.items() if not peak.isolated}
    if not shared:
        return "each figure in a fresh one"
    reasons = sorted({peak.why_not_isolated or "not asked for" for peak in shared.values()})
    return f"this one for {', '.join(shared)} ({'; '.join(reasons)})"


def _meaning(method: str, device: str) -> str:
    if method == "estimated":
        meaning = "Peaks are estimated: live tensors of a step under fake tensors; nothing was run."
    elif device.startswith("cuda"):
        meaning = "Peaks are measured: the allocator's maximum of allocated bytes over a step."
    else:
        meaning = (
            "Peaks are measured: bytes of live tensors over a step. Scratch memory inside the "
            "operators is not in them; the growth of the process is the cross-check."
        )
    return meaning + " Parameters are counted; neither figure follows from the other."
