"""Blocks drawn as one HTML page that loads nothing: no script, no font, no picture."""

from __future__ import annotations

__all__ = ["fragment", "html"]

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TypeVar

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
from pocketize.units import bytes_text
from pocketize.untrusted import printable

_K = TypeVar("_K")
Event = tuple[str, str, int]

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2126; --line: #d5dade; --faint: #f3f5f7;
  --area: #56b4e9; --peak: #d55e00; --good: #009e73; --bad: #d55e00; --plain: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --ink: #dfe4e8; --line: #3a4149;
  --faint: #1f252b; --area: #2a6f98; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--page); color: var(--ink); overflow-wrap: break-word; }
code { font-size: .92em; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.verdict { border-left: 4px solid var(--plain); padding: .5rem .9rem; background: var(--faint); }
p.good { border-color: var(--good); } p.bad { border-color: var(--bad); }
table { border-collapse: collapse; margin: 0 0 1.4rem; }
th, td { text-align: left; padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th.figure, td.figure { text-align: right; font-variant-numeric: tabular-nums; }
tr.part td:first-child { padding-left: 1.2rem; }
figure { margin: 1.6rem 0; } figcaption { margin: .3rem 0; font-size: .9rem; }
.bar { display: flex; align-items: center; margin: .35rem 0; }
.bar > span { flex: 0 0 15rem; } .bar > span b { float: right; padding-right: .8rem; }
.bar > div { flex: 1; display: flex; height: 1.6rem; font-size: .8rem; line-height: 1.6rem; }
.bar div div { overflow: hidden; white-space: nowrap; text-align: center; }
.legend span { display: inline-block; margin-right: 1rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; }
.plot { position: relative; height: 9rem; background: var(--faint);
  border-bottom: 1px solid var(--line); }
.plot svg { position: absolute; width: 100%; height: 100%; fill: var(--area); }
.plot > i { position: absolute; width: 10px; height: 10px; margin: -5px; border-radius: 5px;
  background: var(--peak); }
.moments, .strip { display: flex; } .moments { position: absolute; inset: 0; }
.moments span, .strip span { min-width: 0; overflow: hidden; text-overflow: ellipsis; }
.moments span:hover { background: #8883; }
.strip span { white-space: nowrap; font-size: .75rem; padding: 0 .2rem; min-height: 1.2rem;
  border: 1px solid var(--line); border-width: 0 1px 1px 0; }
@media (max-width: 36rem) { body { font-size: 14px; margin: 1rem auto; padding: 0 .7rem; }
  table { font-size: 13px; } th, td { padding-right: .4rem; }
  th:last-child, td:last-child { padding-right: 0; }
  .bar { display: block; } .bar > span { display: block; } .bar .narrow { font-size: 0; } }
""".strip()

#: Distinguishable under the common colour blindnesses (Okabe and Ito), with the colour of text.
_COLOURS = (
    ("#0072b2", "#fff"),
    ("#56b4e9", "#000"),
    ("#009e73", "#000"),
    ("#e69f00", "#000"),
    ("#d55e00", "#000"),
    ("#cc79a7", "#000"),
    ("#999999", "#000"),
)
#: Shares of the width from which a piece is labelled, on a wide and on a narrow page.
_LABELLED, _WIDE = 0.08, 0.16
#: The share of a step that is told by one name under the timeline.
_STRETCH = 0.05


def html(blocks: list[Block]) -> str:
    """Draw blocks as a page."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "pocketize report")
    body = "\n".join(map(_block, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def fragment(blocks: list[Block]) -> str:
    """Draw blocks for a notebook, which has styles of its own: no picture, and parts are folded."""
    drawn = []
    for block in blocks:
        if isinstance(block, Section):
            inside = fragment(list(block.blocks))
            drawn.append(f"<details><summary>{_escape(block.title)}</summary>{inside}</details>")
        elif not isinstance(block, Bars | Timeline):
            drawn.append(_block(block).replace('class="figure"', 'style="text-align: right"'))
    return "\n".join(drawn)


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        kind = f' class="verdict {block.tone}"' if block.strong else ""
        return f"<p{kind}>{_escape(block.text)}</p>"
    if isinstance(block, Section):
        return "\n".join(map(_block, (Heading(block.title), *block.blocks)))
    if isinstance(block, Table):
        return _table(block)
    return _bars(block) if isinstance(block, Bars) else _timeline(block)


def _table(table: Table) -> str:
    figures = range(table.left, table.left + table.right)

    def row(cells: tuple[Cell, ...], tag: str, part: bool = False) -> str:
        drawn = "".join(
            f'<{tag} class="figure">{_figure(cell)}</{tag}>'
            if column in figures
            else f"<{tag}>{_cell(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f'<tr class="part">{drawn}</tr>' if part else f"<tr>{drawn}</tr>"

    lines = [row(cells, "td", i in table.indented) for i, cells in enumerate(table.rows)]
    if any(table.columns):
        lines.insert(0, row(table.columns, "th"))
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _cell(cell: Cell) -> str:
    return f"<code>{_escape(cell)}</code>" if isinstance(cell, Code) else _escape(cell)


def _figure(cell: Cell) -> str:
    """A number stays on one line with its unit."""
    return _escape(cell).replace(" ", "&nbsp;") if len(cell) < 14 else _escape(cell)


def _bars(bars: Bars) -> str:
    widest = max((sum(stack.values()) for stack in bars.stacks), default=0) or 1
    names = list(dict.fromkeys(name for stack in bars.stacks for name in stack))
    colours = {name: _COLOURS[min(i, len(_COLOURS) - 1)] for i, name in enumerate(names)}
    lines = []

    def piece(name: str, size: int) -> str:
        text = bytes_text(size)
        narrow = ' class="narrow"' if size < _WIDE * widest else ""
        return (
            f'<div{narrow} style="width:{100 * size / widest:.2f}%;background:{colours[name][0]};'
            f'color:{colours[name][1]}" title="{_escape(_plain(name))}: {text}">'
            f"{text if size > _LABELLED * widest else ''}</div>"
        )

    for label, stack in zip(bars.labels, bars.stacks, strict=True):
        pieces = "".join(piece(name, size) for name, size in stack.items())
        total = bytes_text(sum(stack.values()))
        name = f"<span>{_escape(label)} <b>{total}</b></span>"
        lines.append(f'<div class="bar">{name}<div>{pieces}</div></div>')
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{_escape(_plain(name))}</span>'
        for name, (colour, _) in colours.items()
    )
    drawn = "\n".join(lines)
    return f'<figure>\n{drawn}\n<figcaption class="legend">{legend}</figcaption>\n</figure>'


def _timeline(timeline: Timeline) -> str:
    """An area that stretches with the page; its labels, which do not, lie over and under it."""
    events, count = timeline.events, len(timeline.events)
    heights = [100 - 100 * size / timeline.scale for _, _, size in events]
    top = min(range(count), key=heights.__getitem__)
    points = " ".join(f"H{100 * i / count:.2f}V{y:.2f}" for i, y in enumerate(heights))
    moments = "".join(
        f'<span style="flex:{len(run)}" title="{_escape(f"{stage} {module}".strip())}: '
        f'{bytes_text(max(size for _, _, size in run))}"></span>'
        for (stage, module), run in _runs(events, lambda event: event[:2])
    )
    strips = "\n".join(
        '<div class="strip">'
        + "".join(
            f'<span style="flex:{n}">{_escape(name) if n >= _STRETCH * count else ""}</span>'
            for name, n in strip
        )
        + "</div>"
        for strip in (_phases(events), _parts(events))
    )
    return (
        f"<figure>\n<figcaption>{_escape(timeline.title)}</figcaption>\n"
        '<div class="plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'aria-hidden="true"><path d="M0 100{points}H100V100z"/></svg>'
        f'<i style="left:{100 * (top + 0.5) / count:.2f}%;top:{heights[top]:.2f}%"></i>'
        f'<div class="moments">{moments}</div></div>\n{strips}\n</figure>'
    )


def _runs(events: Sequence[Event], key: Callable[[Event], _K]) -> Iterator[tuple[_K, list[Event]]]:
    return ((name, list(run)) for name, run in itertools.groupby(events, key))


def _phases(events: Sequence[Event]) -> list[tuple[str, int]]:
    return [(stage, len(run)) for stage, run in _runs(events, lambda event: event[0])]


def _parts(events: Sequence[Event]) -> list[tuple[str, int]]:
    """The part of the network that runs most in each short stretch, for labels."""
    paths = [module.split(".") for _, module, _ in events if module]
    columns = enumerate(zip(*paths, strict=False))
    shared = next((i for i, names in columns if len(set(names)) > 1), 0)
    width = max(1, round(_STRETCH * len(events)))
    stretches: list[tuple[str, str, int]] = []
    for stage, run in _runs(events, lambda event: event[0]):
        for start in range(0, len(run), width):
            modules = [module for _, module, _ in run[start : start + width]]
            names = Counter(".".join(m.split(".")[: shared + 1]) for m in modules if m)
            name = names.most_common(1)[0][0] if names else ""
            stretches.append((stage, name, len(modules)))
    return [
        (name, sum(count for _, _, count in run))
        for (_, name), run in _runs(stretches, lambda stretch: stretch[:2])
    ]


def _escape(text: str) -> str:
    return escape(printable(text)).replace("-&gt;", "→")


def _plain(category: str) -> str:
    return category.replace("_", " ")
