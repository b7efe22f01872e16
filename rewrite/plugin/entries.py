"""Entry points: what installed distributions declare under a name, found without importing it.

Shared by the passes (:mod:`pocketize.plugin.registry`) and the commands
(:mod:`pocketize.cli.commands`), so that both answer alike to a name given twice
and to a stranger's module that cannot be imported.
"""

from __future__ import annotations

__all__ = ["discover", "distribution_of", "is_installed", "load_entry", "only_entry"]

import importlib.metadata
import re
import sys
from importlib.metadata import EntryPoint

from pocketize.errors import RegistryError


def discover(group: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points of a group by name, in the order of sys.path; imports nothing."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    return found


def only_entry(kind: str, name: str, entries: list[EntryPoint]) -> EntryPoint:
    """Return the one entry point that is meant by ``name``.

    Args:
        kind: what the group declares, for the error: ``"pass"``.
        name: the name.
        entries: all that are registered under it.

    Raises:
        RegistryError: two distributions register the name.
    """
    # One distribution may be found twice, for instance installed and editable; the first one on
    # sys.path is the one that Python would import, and is no quarrel.
    owners = {re.sub(r"[-_.]+", "-", _owner(entry).lower()): entry for entry in reversed(entries)}
    if len(owners) > 1:
        both = " and ".join(sorted(distribution_of(entry) for entry in owners.values()))
        raise RegistryError(
            f"two distributions register a {kind} called {name!r}: {both}. Uninstall one of them"
        )
    return entries[0]


def load_entry(kind: str, entry: EntryPoint) -> tuple[object, str]:
    """Import what an entry point names.

    Returns:
        The object, and what to call it in an error.

    Raises:
        RegistryError: it cannot be imported.
    """
    where = f"{kind} {entry.name!r} of {distribution_of(entry)} ({entry.value})"
    try:
        return entry.load(), where
    except (Exception, SystemExit) as error:
        # Importing a stranger's module may raise anything at all; what matters to the caller is
        # that this one, and only this one, cannot be used.
        raise RegistryError(
            f"{where} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def distribution_of(entry: EntryPoint) -> str:
    """Return the distribution an entry point came with, and its version: ``"pocketize 0.1.0"``."""
    return f"{_owner(entry)} {entry.dist.version}" if entry.dist is not None else _owner(entry)


def _owner(entry: EntryPoint) -> str:
    # the name is None where a distribution's METADATA file is damaged
    return (entry.dist.name if entry.dist is not None else None) or "an unknown distribution"


def is_installed(module_name: str) -> bool:
    """Whether a module's package is on ``sys.path``; that it was imported before does not count."""
    top = module_name.partition(".")[0]
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    specs = [finder.find_spec(top, None) for finder in finders]
    # any folder is a package without an origin
    return any(spec is not None and spec.origin is not None for spec in specs)
