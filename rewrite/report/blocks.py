"""What a report is made of: the blocks that every format draws."""

from __future__ import annotations

__all__ = ["Bars", "Block", "Cell", "Code", "Heading", "Paragraph", "Section", "Table", "Timeline"]

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
    """Running text.

    Attributes:
        strong: for the verdict.
        tone: ``"good"`` or ``"bad"``, for the formats that have colours.
    """

    text: str
    strong: bool = False
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        columns: Headings.
        rows: Cells, as many in each row as there are columns.
        right: How many columns hold figures and are aligned right: the last ones, but for
            ``trailing`` columns of text.
        trailing: Columns of text behind the figures.
        indented: Rows (by index) that are parts of the row above them.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: int = 0
    indented: frozenset[int] = frozenset()
    trailing: int = 0

    @property
    def left(self) -> int:
        """How many columns stand before the figures."""
        return len(self.columns) - self.right - self.trailing


@dataclass(frozen=True)
class Bars:
    """Stacked bars on one scale, for the formats that can draw."""

    labels: tuple[str, ...]
    stacks: tuple[dict[str, int], ...]


@dataclass(frozen=True)
class Timeline:
    """Live memory over a step, for the formats that can draw.

    Attributes:
        title: what is drawn, and its peak.
        events: stage of the step, module and bytes, in order.
        scale: bytes at the top edge.
    """

    title: str
    events: tuple[tuple[str, str, int], ...]
    scale: int


@dataclass(frozen=True)
class Section:
    """Blocks under a title. In a comment only the title shows, until the reader opens it."""

    title: str
    blocks: tuple[Block, ...]


Block = Heading | Paragraph | Table | Bars | Timeline | Section
