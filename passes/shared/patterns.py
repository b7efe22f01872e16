"""Patterns of module paths, in options such as ``keep``."""

from __future__ import annotations

__all__ = ["matching"]

import fnmatch
from collections.abc import Sequence

from torch import nn

from pocketize.errors import PatternError, nearest


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
