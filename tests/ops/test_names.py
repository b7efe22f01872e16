"""Operators are named in ``rewrite/ops`` and where something is registered for them, only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from pocketize.ops import all_operators

ROOT = Path(__file__).parent.parent.parent
#: Functions that register something for the operators that they are called with.
REGISTER = {"register", "channel_rule"}
#: Short names that are no ordinary words.
SHORT = {known.short for known in all_operators() if not known.short.isalpha()}
#: Files that name operators still; one that no longer does is to be taken off the list.
STILL = {
    "passes/inplace/activations.py",
    "passes/recompute/norms.py",
    "passes/recompute/recompute_graph.py",
    "passes/shared/regions.py",
    "passes/swaps/intermediate.py",
    "passes/tiling/tiled_graph.py",
    "rewrite/graph/constants.py",
    "rewrite/memory/in_place.py",
    "rewrite/memory/flops.py",
    "rewrite/memory/tracker.py",
    "rewrite/memory/work.py",
}


def _names(path: Path) -> Iterator[str]:
    """Operators that a file names other than to register something for them, or to call them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    fine: set[ast.AST] = set()
    for call in calls:
        name = ast.unparse(call.func).rpartition(".")[2]
        if name in REGISTER:
            fine |= set(ast.walk(call))
        fine |= set(ast.walk(call.func))
    uses_ops = "pocketize.ops" in path.read_text(encoding="utf-8")
    for node in ast.walk(tree):
        if node in fine:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if (text.startswith("aten.") and text != "aten.") or (uses_ops and text in SHORT):
                yield f"line {node.lineno}: {text}"
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in ("aten", "torch.ops.aten"):
                yield f"line {node.lineno}: aten.{node.attr}"


def test_operators_are_named_in_one_place() -> None:
    found = {}
    for folder in ("rewrite", "passes", "zoo"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            names = [] if place.startswith("rewrite/ops/") else list(_names(path))
            if names:
                found[place] = names
    new = {place: names for place, names in found.items() if place not in STILL}
    assert new == {}, "put what is known of an operator on its record, see rewrite/ops/record.py"
    assert STILL - found.keys() == set(), "these no longer name operators: take them off the list"
