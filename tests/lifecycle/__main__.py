"""Write the table of ``docs/situations.md``: ``python -m tests.lifecycle``."""

from __future__ import annotations

import re

from tests.lifecycle.networks import PASSES
from tests.lifecycle.situations import SITUATIONS
from tests.lifecycle.test_lifecycle import CELLS, PAGE, outcome


def main() -> None:
    """Try everything once, and put what happens into the page."""
    found: dict[str, dict[str, list[str]]] = {}
    for given in SITUATIONS.values():
        row = found.setdefault(given.title, {column: [] for column in PASSES})
        for column, rewrite in PASSES.items():
            cell = CELLS[outcome(given, rewrite)]
            if cell not in row[column]:
                row[column].append(cell)
    head = ["situation", *(f"`{column}`" for column in PASSES)]
    rows = [head, ["---"] * len(head)]
    for title, cells in found.items():
        rows.append([title, *(" or ".join(sorted(cell, reverse=True)) for cell in cells.values())])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"(^\|.*\n)+", lambda _: text, page, count=1, flags=re.M), "utf-8")


if __name__ == "__main__":
    main()
