"""Patterns of module paths, in options such as ``keep``."""

from __future__ import annotations

__all__ = ["matched", "matching"]

import fnmatch
from collections.abc import Sequence

from torch import nn

from pocketize.errors import PatternError, nearest


def matched(model: nn.Module, patterns: Sequence[str], option: str) -> dict[str, str]:
    """Return the first pattern that names a module, by the module's path.

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
        named = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        if not named:
            raise PatternError(
                f"{option}={pattern!r} matches no module of {type(model).__name__}."
                f"{nearest(pattern, paths)}"
            )
        for path in named:
            found.setdefault(path, pattern)
    return found


def matching(model: nn.Module, patterns: Sequence[str], option: str) -> dict[str, str]:
    """Return the same as :func:`matched`, also for every module inside one that is named."""
    patterns_of: dict[int, str] = {}
    for path, pattern in matched(model, patterns, option).items():
        for module in model.get_submodule(path).modules():
            patterns_of.setdefault(id(module), pattern)
    return {
        path: patterns_of[id(module)]
        for path, module in model.named_modules()
        if id(module) in patterns_of
    }
