"""No two classes of the library have one name: a name in a traceback or a review means one thing.

A leading underscore makes no other name: whoever reads ``Kept`` thinks of ``_Kept`` too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Names that several classes still have. It only gets shorter: rename the classes of one room.
DOUBLE: set[str] = set()


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for folder in ("rewrite", "passes", "zoo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    places[node.name.lstrip("_")].append(place)
    double = {name: found for name, found in places.items() if len(found) > 1}
    new = {name: found for name, found in double.items() if name not in DOUBLE}
    assert new == {}, "give one of them another name"
    assert double.keys() >= DOUBLE, f"take {sorted(DOUBLE - double.keys())} off the list"
