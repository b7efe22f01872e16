"""What :func:`~pocketize.compare` gives back."""

from __future__ import annotations

__all__ = ["Comparison"]

from collections.abc import Iterable
from dataclasses import dataclass

from pocketize.report.document import Document, dump, load
from pocketize.report.gate import Threshold, Violation, check
from pocketize.report.html import html
from pocketize.report.layout import layout, verdict
from pocketize.report.remarks import remarks
from pocketize.report.render import markdown, text


@dataclass(frozen=True)
class Comparison:
    """Two networks side by side.

    The JSON document is the source: text, Markdown and HTML are drawn from it and nothing else, so
    ``Comparison.from_json(comparison.to_json())`` renders to the same characters. No rendering has
    a date or a file's path in it: two reports of the same networks differ in figures only.

    ``print(comparison)`` draws it for a terminal.

    Attributes:
        document: The figures, as dataclasses in the JSON's shape. Memory in bytes, time in seconds.
    """

    document: Document

    @property
    def verdict(self) -> str:
        """One line: both peaks, the parameters as a figure of their own, and what is promised."""
        return verdict(self.document)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What became slower or bigger on the machine that was measured, a sentence each."""
        return remarks(self.document)

    def check(self, thresholds: str | Iterable[Threshold | str]) -> list[Violation]:
        """Find the thresholds that the second network is over.

        Args:
            thresholds: each a :class:`~pocketize.report.Threshold` or its text, as in
                ``"peak 2% 16MiB"``; a text alone is one threshold.

        Returns:
            The violations, in the order of the thresholds; empty where all hold.

        Raises:
            ReportError: A text is no threshold, or is on a figure that was not taken.
        """
        return check(self.document, [thresholds] if isinstance(thresholds, str) else thresholds)

    def __str__(self) -> str:
        """Draw the report for a terminal."""
        return text(layout(self.document)).rstrip("\n")

    def to_markdown(self) -> str:
        """Draw the report as Markdown, for a review."""
        return markdown(layout(self.document))

    def to_html(self) -> str:
        """Draw the report as one self-contained HTML page."""
        return html(layout(self.document))

    def to_json(self) -> str:
        """Write the document as JSON: sorted keys, memory as integers in bytes."""
        return dump(self.document)

    @classmethod
    def from_json(cls, source: str) -> Comparison:
        """Read what :meth:`to_json` wrote.

        Raises:
            ReportError: The text is no such JSON, or was written by another schema.
        """
        return cls(load(source))

    def _repr_markdown_(self) -> str:
        """Draw the report in a notebook."""
        return self.to_markdown()
