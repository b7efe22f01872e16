"""Which modules options name: by patterns of their paths, or by their side of the network."""

from __future__ import annotations

__all__ = ["SIDES", "matching", "on_side"]

import fnmatch
from collections.abc import Sequence

from torch import nn

from pocketize.channels.levels import find_sides
from pocketize.errors import PatternError, nearest
from pocketize.graph.capture import Captured

#: Words of the option ``where`` that are no patterns.
SIDES = ("all", "encoder", "decoder")


def matching(model: nn.Module, patterns: Sequence[str], option: str) -> dict[str, str]:
    """Return the pattern that names a module, for every module that one names or that is inside.

    Args:
        model: the model.
        patterns: of module paths (fnmatch).
        option: the option that they stand in, for the error, with the name of the pass.

    Raises:
        PatternError: a pattern matches no module.
    """
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = {path for path in paths if fnmatch.fnmatchcase(path, pattern)}
        if not matched:
            raise PatternError(
                f"{option}={pattern!r} matches no module of {type(model).__name__}."
                f"{nearest(pattern, paths)}"
            )
        inside = {id(m) for path in matched for m in model.get_submodule(path).modules()}
        for path, module in model.named_modules():
            if id(module) in inside:
                found.setdefault(path, pattern)
    return found


def on_side(captured: Captured, where: Sequence[str]) -> set[str]:
    """Return the paths of the layers on the sides of a network that are named."""
    wanted = set(where) & {"encoder", "decoder"}
    return {path for path, side in find_sides(captured).items() if side in wanted}
