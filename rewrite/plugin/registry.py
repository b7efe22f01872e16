"""Passes by name, found through the entry point group ``pocketize.passes``.

The built-in passes register in just the way a stranger's do, in ``pyproject.toml``::

    [project.entry-points."pocketize.passes"]
    halve = "halving.passes:Halve"

Nothing is imported until a pass is asked for by name or the passes are listed. A third-party pass
that cannot be imported is listed as broken, with the reason, and is in nobody's way until somebody
asks for it.
"""

from __future__ import annotations

__all__ = ["GROUP", "PassInfo", "get_pass", "list_passes", "parse_pass"]

import inspect
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from pocketize.errors import OptionError, RegistryError, nearest
from pocketize.plugin.base import Guarantee, OptionInfo, Pass, check_declaration
from pocketize.plugin.entries import discover, distribution_of, load_entry, only_entry
from pocketize.plugin.options import split_options

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
        # a stranger's code again: one pass that cannot be made must not hide the others
        why = f"pass {entry.name!r} cannot be made with its defaults: {error}"
        return PassInfo(entry.name, "", None, distribution, (), error=why)
    return PassInfo(entry.name, cls.summary, guarantee, distribution, options)
