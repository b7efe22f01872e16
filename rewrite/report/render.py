"""Blocks drawn as terminal text and as Markdown."""

from __future__ import annotations

__all__ = ["markdown", "text"]

import textwrap
from html import escape

from tabulate import tabulate

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
from pocketize.untrusted import markdown as escaped
from pocketize.untrusted import one_line

#: Characters of the last column of a terminal table before it wraps.
_WRAP = 72


def text(blocks: list[Block]) -> str:
    """Draw blocks for a terminal. Bars are left out: the table above them has their figures."""
    return "\n\n".join(drawn for block in blocks if (drawn := _text(block))) + "\n"


def markdown(blocks: list[Block]) -> str:
    """Draw blocks as GitHub-flavoured Markdown; unpadded, so that one figure changes one row."""
    return "\n\n".join(drawn for block in blocks if (drawn := _markdown(block))) + "\n"


def _text(block: Block) -> str:
    if isinstance(block, Heading):
        title = one_line(block.text)
        return f"{title}\n{('=' if block.level == 1 else '-') * len(title)}"
    if isinstance(block, Paragraph):
        return textwrap.fill(
            one_line(block.text), 100, break_long_words=False, break_on_hyphens=False
        )
    if isinstance(block, Bars | Timeline):
        return ""
    if isinstance(block, Section):
        return "\n\n".join(map(_text, (Heading(block.title), *block.blocks)))
    rows = [
        [("  " if i in block.indented else "") + one_line(row[0]), *map(one_line, row[1:])]
        for i, row in enumerate(block.rows)
    ]
    headers = block.columns if any(block.columns) else ()
    return tabulate(
        rows,
        headers=headers,
        tablefmt="simple" if headers else "plain",
        colalign=_aligned(block, "left", "right"),
        disable_numparse=True,
        # tabulate strips leading blanks, and with them the indentation, unless told not to.
        preserve_whitespace=True,
        maxcolwidths=[None] * (len(block.columns) - 1) + [None if block.right else _WRAP],
    )


def _aligned(table: Table, left: str, right: str) -> tuple[str, ...]:
    return (left,) * table.left + (right,) * table.right + (left,) * table.trailing


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escaped(block.text)}"
    if isinstance(block, Paragraph):
        if block.strong:
            return f"**{escaped(block.text)}**"
        return escaped(block.text, paragraph=True)
    if isinstance(block, Bars | Timeline):
        return ""
    if isinstance(block, Section):
        inside = "\n\n".join(map(_markdown, block.blocks))
        return (
            f"<details><summary>{escape(one_line(block.title))}</summary>\n\n{inside}\n\n</details>"
        )
    return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    lines = [
        _markdown_row(table.columns),
        "| " + " | ".join(_aligned(table, "---", "---:")) + " |",
    ]
    for i, row in enumerate(table.rows):
        indent = "&nbsp;&nbsp;" if i in table.indented else ""
        lines.append(_markdown_row(row, indent))
    return "\n".join(lines)


def _markdown_row(cells: tuple[Cell, ...], indent: str = "") -> str:
    drawn = [_markdown_cell(cell) for cell in cells]
    return "| " + " | ".join([indent + drawn[0], *drawn[1:]]) + " |"


def _markdown_cell(cell: Cell) -> str:
    # A pipe would end the cell even inside code, and a backtick the code.
    if isinstance(cell, Code) and "|" not in cell and "`" not in cell:
        return f"`{one_line(cell)}`"
    return escaped(cell)
