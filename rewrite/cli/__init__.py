"""The command ``pocketize``: arguments in, text out; everything else is the library's.

Data goes to stdout; progress, warnings and errors go to stderr. Exit codes: 0 done; 1 a check
failed (a budget exceeded, or nothing changed under ``--strict``); 2 the command was given wrongly;
3 the rewrite failed. Distributions add commands of their own: :mod:`pocketize.cli.commands`.
"""

from __future__ import annotations

__all__ = ["main"]

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from pocketize.cli.common import FAILED, USAGE, CheckFailed, UsageError, note
from pocketize.cli.parser import parse
from pocketize.errors import (
    InputError,
    ModelError,
    OptionError,
    OrderError,
    PatternError,
    PocketizeError,
    PocketizeWarning,
    RecipeError,
    RegistryError,
    ReportError,
)
from pocketize.untrusted import printable

_WRONGLY_GIVEN = (
    InputError,
    ModelError,
    OptionError,
    OrderError,
    PatternError,
    RecipeError,
    RegistryError,
    ReportError,
    UsageError,
)
_INTERRUPTED = 130  # what a shell reports of a process that SIGINT ended
_BROKEN_PIPE = 141  # and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    try:
        args = parse(argv)
    except SystemExit as leaving:  # --help, --version, or wrong arguments
        return leaving.code if isinstance(leaving.code, int) else USAGE
    except RegistryError as error:  # before there are any arguments to look at
        if "--debug" in (sys.argv if argv is None else argv):
            _print_traceback()
        note(f"error: {error}")
        return USAGE
    try:
        with _logging(args.verbose), warnings.catch_warnings():
            # copying a program that torch exported makes torch warn of its own code
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            warnings.showwarning = _showing(warnings.showwarning)
            code: int = args.run(args)
            sys.stdout.flush()  # so that a reader that has gone shows here
            return code
    except BrokenPipeError:
        _drop_output()  # whoever read has seen enough, as in `pocketize zoo | head -1`
        return _BROKEN_PIPE
    except OSError as error:
        # a full disk under stdout, or a file that a library opened
        if args.debug:
            _print_traceback()
        _drop_output()
        note(f"error: {error}")
        return FAILED
    except KeyboardInterrupt:
        note("interrupted")
        return _INTERRUPTED
    except (PocketizeError, UsageError) as error:
        if args.debug:
            _print_traceback()
        note(f"{'nothing done' if isinstance(error, CheckFailed) else 'error'}: {_spoken(error)}")
        if isinstance(error, CheckFailed):
            return error.code
        return USAGE if isinstance(error, _WRONGLY_GIVEN) else FAILED


def _showing(others: Any) -> Any:
    """Return what shows warnings: those of pocketize without a line of code."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, PocketizeWarning):
            note(f"warning: {_spoken(message)}")
        else:
            others(message, category, *where)

    return show


#: How the command line writes what the library's errors advise.
_SPOKEN = {
    "pass estimate=True": "add --estimate",
    "estimate=True": "--estimate",
    "use estimate=False": "leave out --estimate",
    "pad_to=": "--pad-to ",
    "say allow_whole=True": "add --allow-whole",
    "pass inputs=(...)": "give --input",
    "pass inputs=...": "give --input",
    "recorded too: variants=": "recorded too, in a recipe: variants=",
}


def _spoken(error: Exception | str) -> str:
    text = str(error)
    for python, shell in _SPOKEN.items():
        text = text.replace(python, shell)
    return text


def _drop_output() -> None:
    """Without this, Python would complain again when it closes stdout."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_traceback() -> None:
    print(printable(traceback.format_exc()), end="", file=sys.stderr)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    logger = logging.getLogger("pocketize")
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("pocketize: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
