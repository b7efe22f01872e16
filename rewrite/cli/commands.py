"""Commands of other packages, found through the entry point group ``pocketize.commands``.

The commands of pocketize's own passes register in the same way, in ``pyproject.toml``::

    [project.entry-points."pocketize.commands"]
    count = "counting.command:Count"

where ``counting/command.py`` has::

    class Count:
        summary = "count the layers of a model"

        def add_arguments(self, parser: argparse.ArgumentParser) -> None:
            parser.add_argument("model")

        def run(self, args: argparse.Namespace) -> int:
            show(...)  # of pocketize.cli.common: data on stdout, note() and progress() on stderr
            return 0  # the exit code; errors are raised, as PocketizeError or UsageError

Every command has ``-v/--verbose`` and ``--debug`` already. A command is imported when it is called,
or when ``pocketize --help`` lists all. So its module must import quickly, and import optional
packages in ``run``. ``pocketize --help`` lists commands that cannot be used, with the reason;
calling one is an error. The names of the engine's own commands are reserved.
"""

from __future__ import annotations

__all__ = ["GROUP", "Command", "command_names", "load_command"]

import argparse
import inspect
from collections.abc import Collection
from typing import Protocol, runtime_checkable

from pocketize.errors import RegistryError
from pocketize.plugin.registry import discover, distribution_of, load_entry, only_entry

GROUP = "pocketize.commands"
"""The entry point group in which distributions declare their commands."""


@runtime_checkable
class Command(Protocol):
    """What an entry point of :data:`GROUP` names: an object, or a class made with no arguments.

    Attributes:
        summary: one line for ``pocketize --help``, in lower case and without a full stop.
    """

    summary: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's own arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it, and return the exit code."""


def command_names() -> list[str]:
    """Return the names that are registered, usable or not; imports none of them."""
    return sorted(discover(GROUP))


def load_command(name: str, own: Collection[str] = ()) -> Command:
    """Import a command.

    Args:
        name: one of :func:`command_names`.
        own: the names of the engine's commands.

    Raises:
        RegistryError: the command cannot be used; the message says whose it is and why.
    """
    entry = only_entry("command", name, discover(GROUP)[name])
    if name in own:
        raise RegistryError(
            f"command {name!r} of {distribution_of(entry)} ({entry.value}) has the name of one of "
            "pocketize's own, which stays what it is; the other one needs a new name"
        )
    loaded, where = load_entry("command", entry)
    if inspect.isclass(loaded):
        try:
            loaded = loaded()
        except Exception as error:
            # code of others may raise anything: only this command cannot be used
            raise RegistryError(
                f"{where} cannot be made: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(loaded, Command) or not isinstance(loaded.summary, str):
        wanted = "a text `summary` and the functions `add_arguments(parser)` and `run(args)`"
        raise RegistryError(f"{where} is no command: expected {wanted}, got {loaded!r:.100}")
    return loaded
