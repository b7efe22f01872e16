"""Blocks drawn as terminal text, as Markdown and as one HTML page that loads nothing."""

from __future__ import annotations

__all__ = ["html", "markdown", "text"]

import textwrap
from html import escape

from tabulate import tabulate

from pocketize.report.blocks import Bars, Block, Cell, Code, Heading, Paragraph, Section, Table
from pocketize.units import bytes_text
from pocketize.untrusted import markdown as escaped
from pocketize.untrusted import one_line, printable

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
    if isinstance(block, Bars):
        return ""
    if isinstance(block, Section):
        return "\n\n".join(map(_text, (Heading(block.title), *block.blocks)))
    rows = [
        [("  " if i in block.indented else "") + one_line(row[0]), *map(one_line, row[1:])]
        for i, row in enumerate(block.rows)
    ]
    left = len(block.columns) - block.right
    headers = block.columns if any(block.columns) else ()
    return tabulate(
        rows,
        headers=headers,
        tablefmt="simple" if headers else "plain",
        colalign=("left",) * left + ("right",) * block.right,
        disable_numparse=True,
        # tabulate strips leading blanks, and with them the indentation, unless told not to.
        preserve_whitespace=True,
        maxcolwidths=[None] * (len(block.columns) - 1) + [None if block.right else _WRAP],
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escaped(block.text)}"
    if isinstance(block, Paragraph):
        if block.strong:
            return f"**{escaped(block.text)}**"
        return escaped(block.text, paragraph=True)
    if isinstance(block, Bars):
        return ""
    if isinstance(block, Section):
        inside = "\n\n".join(map(_markdown, block.blocks))
        return (
            f"<details><summary>{escape(one_line(block.title))}</summary>\n\n{inside}\n\n</details>"
        )
    return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    left = len(table.columns) - table.right
    lines = [
        _markdown_row(table.columns),
        "| " + " | ".join(["---"] * left + ["---:"] * table.right) + " |",
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


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.verdict { font-size: 1.05rem; border-left: 4px solid #3b7dd8; padding: .4rem .8rem;
  background: var(--faint); }
div.table { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.part td { border-bottom-style: dotted; } tr.part td:first-child { padding-left: 1.2rem; }
figure { margin: 1.2rem 0; } .bar { display: flex; align-items: center; margin: .2rem 0; }
.bar > span { flex: 0 0 9.5rem; } .bar > div { flex: 1; display: flex; height: 1.1rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 .9rem; }
""".strip()

#: Distinguishable under the common colour blindnesses (Okabe and Ito), one for each category.
_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#999999")


def html(blocks: list[Block]) -> str:
    """Draw blocks as a page."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "pocketize report")
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        kind = ' class="verdict"' if block.strong else ""
        return f"<p{kind}>{_escape(block.text)}</p>"
    if isinstance(block, Section):
        return "\n".join(map(_html, (Heading(block.title), *block.blocks)))
    return _bars(block) if isinstance(block, Bars) else _html_table(block)


def _html_table(table: Table) -> str:
    left = len(table.columns) - table.right

    def row(cells: tuple[Cell, ...], tag: str, part: bool = False) -> str:
        opened = [f"<{tag}>"] * left + [f'<{tag} class="figure">'] * table.right
        drawn = "".join(
            f"{start}{_cell(cell)}</{tag}>" for start, cell in zip(opened, cells, strict=True)
        )
        return f'<tr class="part">{drawn}</tr>' if part else f"<tr>{drawn}</tr>"

    lines = [row(cells, "td", i in table.indented) for i, cells in enumerate(table.rows)]
    if any(table.columns):
        lines.insert(0, row(table.columns, "th"))
    return '<div class="table"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(cell: Cell) -> str:
    return f"<code>{_escape(cell)}</code>" if isinstance(cell, Code) else _escape(cell)


def _bars(bars: Bars) -> str:
    widest = max((sum(stack.values()) for stack in bars.stacks), default=0) or 1
    names = list(dict.fromkeys(name for stack in bars.stacks for name in stack))
    colours = {name: _COLOURS[min(i, len(_COLOURS) - 1)] for i, name in enumerate(names)}
    lines = []
    for label, stack in zip(bars.labels, bars.stacks, strict=True):
        pieces = "".join(
            f'<div style="width:{100 * size / widest:.2f}%;background:{colours[name]}" '
            f'title="{_escape(_plain(name))}: {bytes_text(size)}"></div>'
            for name, size in stack.items()
        )
        lines.append(f'<div class="bar"><span>{_escape(label)}</span><div>{pieces}</div></div>')
    legend = "".join(
        f'<i style="background:{colour}"></i>{_escape(_plain(name))}'
        for name, colour in colours.items()
    )
    drawn = "\n".join(lines)
    return f'<figure>\n{drawn}\n<figcaption class="legend">{legend}</figcaption>\n</figure>'


def _escape(text: str) -> str:
    return escape(printable(text))


def _plain(category: str) -> str:
    return category.replace("_", " ")
