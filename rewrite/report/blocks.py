"""What a report is made of: the blocks that every format draws."""

from __future__ import annotations

__all__ = ["Bars", "Block", "Cell", "Code", "Heading", "Paragraph", "Section", "Table"]

from dataclasses import dataclass


class Code(str):
    """A cell or a piece of text that names something in the model: drawn as code."""

    __slots__ = ()


Cell = str | Code


@dataclass(frozen=True)
class Heading:
    """A title: of the first level for the report, of the second for a part of it."""

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


@dataclass(frozen=True)
class Section:
    """Blocks under a title. In a comment only the title shows, until the reader opens it."""

    title: str
    blocks: tuple[Block, ...]


Block = Heading | Paragraph | Table | Bars | Section
