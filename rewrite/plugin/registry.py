"""Entry points: passes and commands by name, as installed distributions declare them.

The built-in passes register in the same way as those of others, in ``pyproject.toml``::

    [project.entry-points."pocketize.passes"]
    halve = "halving.passes:Halve"

Nothing is imported until a pass is asked for by name or the passes are listed. A third-party pass
that cannot be imported is listed as broken, with the reason, and affects nothing else. Commands
(:mod:`pocketize.cli.commands`) are found in the same way.
"""

from __future__ import annotations

__all__ = [
    "GROUP",
    "PassInfo",
    "discover",
    "distribution_of",
    "get_pass",
    "is_installed",
    "list_passes",
    "load_entry",
    "only_entry",
    "parse_pass",
]

import importlib.metadata
import inspect
import re
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from pocketize.errors import OptionError, RegistryError, nearest
from pocketize.plugin.base import Guarantee, OptionInfo, Pass, check_declaration
from pocketize.plugin.options import split_options


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
    # One distribution may be found twice, for instance installed and editable: Python imports the
    # first one on sys.path.
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
        # importing code of others may raise anything; only this entry point cannot be used
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


GROUP = "pocketize.passes"
"""The entry point group in which distributions declare their passes."""


@dataclass(frozen=True)
class PassInfo:
    """What is known of one registered pass.

    Attributes:
        name: what the command line and recipes call it.
        summary: one line; ``""`` for a broken pass.
        guarantee: what it keeps with default options; None for a broken pass and for one with an
            option that has no default, or that needs one of several options.
        distribution: the distribution it came with, and its version: ``"pocketize 0.1.0"``.
        options: its options; empty for a broken pass.
        error: why it cannot be used; None for a pass that can.
    """

    name: str
    summary: str
    guarantee: Guarantee | None
    distribution: str
    options: tuple[OptionInfo, ...]
    error: str | None = None


def list_passes() -> list[PassInfo]:
    """Describe every registered pass, by name; broken ones with the reason.

    Raises:
        RegistryError: two distributions register the same name.
    """
    return [
        _describe(only_entry("pass", name, entries))
        for name, entries in sorted(discover(GROUP).items())
    ]


def get_pass(name: str) -> type[Pass]:
    """Return the class of the pass that is registered as ``name``.

    Raises:
        RegistryError: the name is unknown (the nearest known one is suggested), registered by two
            distributions, or its pass is broken.
    """
    known = discover(GROUP)
    if name not in known:
        names = ", ".join(sorted(known)) or "none; is pocketize installed?"
        raise RegistryError(f"no pass is called {name!r}.{nearest(name, known)} Passes: {names}")
    return _load(only_entry("pass", name, known[name]))


def parse_pass(spec: str) -> Pass:
    """Make a pass from the text form of the command line.

    ``"name"``, or ``"name:option=value,option=value"``. Values are read by the option's type:
    ``none``, ``true`` and ``false``, numbers, text; a list is ``a|b|c`` or JSON ``["a","b"]``, a
    mapping is a JSON object. Text in double quotes may hold commas::

        pocket:width=16,keep=encoder.*|decoder.0

    Raises:
        RegistryError: no such pass, or it is broken.
        OptionError: the options cannot be read; the message quotes ``spec``.
    """
    name, _, options = spec.partition(":")
    several, known = [each.strip() for each in name.split(",")], discover(GROUP)
    if len(several) > 1 and all(each in known for each in several):
        raise RegistryError(
            f"{spec!r} names several passes; give each by itself, as "
            + " ".join(f"--pass {each}" for each in several)
        )
    cls = get_pass(name.strip())
    try:
        return cls.from_options(split_options(options), text=True)
    except OptionError as error:
        raise OptionError(f"{error} (in {spec!r})") from None


def _load(entry: EntryPoint) -> type[Pass]:
    loaded, where = load_entry("pass", entry)
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise RegistryError(f"{where} is not a subclass of pocketize.Pass but {loaded!r:.100}")
    try:
        check_declaration(loaded)
    except (TypeError, NameError) as error:  # NameError: an annotation that cannot be resolved
        raise RegistryError(f"{where} is not declared as a pass should be: {error}") from error
    if inspect.isabstract(loaded):
        missing = ", ".join(sorted(loaded.__abstractmethods__))
        raise RegistryError(f"{where} does not define {missing}")
    if loaded.name != entry.name:
        raise RegistryError(f"{where} calls itself {loaded.name!r}; both names must be the same")
    return loaded


def _describe(entry: EntryPoint) -> PassInfo:
    distribution = distribution_of(entry)
    try:
        cls = _load(entry)
    except RegistryError as error:
        return PassInfo(entry.name, "", None, distribution, (), error=str(error))
    options = cls.describe_options()
    if any(option.default is None for option in options):
        return PassInfo(entry.name, cls.summary, None, distribution, options)
    try:
        guarantee = cls().guarantee
    except OptionError:  # it needs one of several options, as Width does
        return PassInfo(entry.name, cls.summary, None, distribution, options)
    except Exception as error:
        # code of others: one broken pass must not hide the rest
        why = f"pass {entry.name!r} cannot be made with its defaults: {error}"
        return PassInfo(entry.name, "", None, distribution, (), error=why)
    return PassInfo(entry.name, cls.summary, guarantee, distribution, options)
