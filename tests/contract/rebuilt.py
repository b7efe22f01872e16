"""Modules that a conversion has made anew: other parameters stand there, and the plan says so."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pocketize.plugin.edits import Convert
from tests.contract.case import Case

__all__ = ["collapsed", "rebuilt", "told_once"]


def rebuilt(case: Case) -> frozenset[str]:
    """Paths of the modules that the plan converts and that are of another kind afterwards.

    All paths of each: a module may stand in several places.
    """
    if case.plan is None:
        return frozenset()
    converted = {e.module for e in case.plan.edits if isinstance(e, Convert) and e.module}
    before = dict(case.original.named_modules(remove_duplicate=False))
    after = dict(case.rewritten.named_modules(remove_duplicate=False))
    modules = {id(before[path]) for path in converted if path in before}
    return frozenset(
        path
        for path, module in before.items()
        if id(module) in modules and path in after and not isinstance(after[path], type(module))
    )


def collapsed(name: str, paths: Collection[str]) -> str:
    """The path of the module that a tensor or module is in, where that is one of the paths."""
    return next((p for p in paths if f"{name}.".startswith(f"{p}.")), name)


def told_once(names: Iterable[str], paths: Collection[str]) -> list[str]:
    """Names in order, with one for all that is in a module of the paths."""
    return list(dict.fromkeys(collapsed(name, paths) for name in names))
