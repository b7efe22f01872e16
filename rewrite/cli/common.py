"""What the commands share: arguments that name models and passes, and output."""

from __future__ import annotations

__all__ = [
    "CHECK_FAILED",
    "DONE",
    "FAILED",
    "USAGE",
    "CheckFailed",
    "UsageError",
    "add_model",
    "check_output",
    "inputs_of",
    "note",
    "parse_kwargs",
    "passes_of",
    "progress",
    "resolve_model",
    "seed",
    "show",
    "write_out",
]

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketize.artifact.files import atomic_write
from pocketize.errors import PocketizeError
from pocketize.untrusted import printable, read_json

# torch takes seconds to import, and the help and the version need none: functions import it
if TYPE_CHECKING:
    from pocketize.artifact.models import ResolvedModel
    from pocketize.plugin.base import Pass

_MODEL_HELP = "package.module:factory, zoo:NAME, or FILE.pt2 (with --trust-pickle)"
DONE, CHECK_FAILED, USAGE, FAILED = range(4)


class UsageError(Exception):
    """The command was given wrongly."""


class CheckFailed(PocketizeError):
    """A check that the user asked for did not hold."""

    code = CHECK_FAILED


def show(text: str) -> None:
    """Print data, without control characters."""
    text = printable(text)
    if isinstance(sys.stdout.encoding, str):
        # a terminal without the characters of a table gets question marks rather than a traceback
        text = text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding)
    print(text)


def note(text: str) -> None:
    """Print a warning or an error."""
    print(f"pocketize: {printable(text)}", file=sys.stderr)


def progress(text: str) -> None:
    """Print what takes time, if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"{printable(text)} ...", file=sys.stderr, flush=True)


def write_out(text: str, path: str | None, *, force: bool = False) -> None:
    """Print text, or write it to a file; where that exists, only by force."""
    if path is None:
        show(text)
        return
    with atomic_write(path, overwrite=force) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def check_output(path: str, *, force: bool) -> None:
    """Check before the work that the result can be written.

    Raises:
        UsageError: the file exists and ``--force`` was not given, or its folder does not exist.
    """
    # not the methods of paths, which raise where a name is too long
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder; name a file")
    if os.path.exists(path) and not force:
        raise UsageError(f"{path} exists already; choose another name or add --force")
    folder, name = os.path.split(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {Path(path).parent} to write {Path(path).name} to")
    if len(os.fsencode(name)) > 255:  # the limit of nearly all file systems
        raise UsageError(f"the name of {path} is too long for a file")


def parse_kwargs(text: str | None, option: str = "--kwargs") -> dict[str, Any]:
    """Read keyword arguments from JSON.

    Raises:
        UsageError: the text is no JSON object.
    """
    if text is None:
        return {}
    try:
        kwargs = read_json(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r:.200} is not JSON: {error}") from error
    if not isinstance(kwargs, dict):
        raise UsageError(
            f'{option} {text!r} must be a JSON object such as {{"in_channels": 1}}, '
            f"not {type(kwargs).__name__}"
        )
    return kwargs


def seed(text: str) -> int:
    """Read a seed that torch takes."""
    value = int(text)
    if not -(1 << 63) <= value < 1 << 64:
        raise argparse.ArgumentTypeError("a seed has at most 64 bits")
    return value


def add_model(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Declare MODEL and what :func:`resolve_model` and :func:`inputs_of` read with it."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP, **options)
    parser.add_argument("--kwargs", metavar="JSON", help="keyword arguments of the factory")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a state_dict to load (.safetensors, .pt), or a model saved by `pocketize apply`",
    )
    parser.add_argument(
        "--input",
        metavar="SHAPE",
        help="example input, such as 1x1x96x96x96, or 1x3x64x64,1x77:int64 (default: guessed)",
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="for the files of passes in a model saved by `apply`"
    )
    parser.add_argument("--seed", type=seed, help="seed of new weights and of what passes draw")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="open MODEL (.pt2 or a pickle) and --weights although they can run code they contain",
    )


def resolve_model(args: argparse.Namespace) -> ResolvedModel:
    """Build or read the MODEL of a command, with ``--kwargs``, ``--weights`` and ``--seed``."""
    progress(f"building {args.model}")
    import torch

    from pocketize.artifact.models import resolve

    if args.seed is not None:
        torch.manual_seed(args.seed)
    return resolve(
        args.model,
        kwargs=parse_kwargs(args.kwargs),
        weights=args.weights,
        trust=args.trust_pickle,
        folder=args.folder,
    )


def inputs_of(args: argparse.Namespace, resolved: ResolvedModel) -> Any:
    """Return the example inputs: ``--input``, or what the model came with, or None to guess."""
    return args.input if args.input is not None else resolved.inputs


def passes_of(args: argparse.Namespace) -> list[Pass]:
    """Return the passes of ``--recipe`` and then those of ``--pass``, in order.

    Raises:
        UsageError: neither was given.
    """
    from pocketize.plugin.recipe import load_recipe
    from pocketize.plugin.registry import parse_pass

    passes = load_recipe(args.recipe) if args.recipe is not None else []
    passes += [parse_pass(spec) for spec in args.passes]
    if not passes:
        raise UsageError("say what to do: --pass pocket, for instance; see `pocketize passes`")
    return passes
