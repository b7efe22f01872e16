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
    "as_usage",
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
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketize.errors import ArtifactError, PocketizeError
from pocketize.untrusted import printable, read_json, read_toml

# what the help and the version do not need is imported in functions; torch alone takes seconds
if TYPE_CHECKING:
    from pocketize.artifact.models import ResolvedModel
    from pocketize.graph.inputs import Inputs
    from pocketize.plugin.base import Pass

_log = logging.getLogger(__name__)

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
    """Print what takes time, if stderr is a terminal; elsewhere with ``--verbose``."""
    if sys.stderr.isatty():
        print(f"{printable(text)} ...", file=sys.stderr, flush=True)
    else:
        _log.info("%s", text)


def write_out(text: str, path: str | None, *, force: bool = False) -> None:
    """Print text, or write it to a file; where that exists, only by force."""
    if path is None:
        show(text)
        return
    from pocketize.artifact.files import atomic_write

    with atomic_write(path, overwrite=force) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def check_output(path: str, *, force: bool, suffixes: Sequence[str] = ()) -> None:
    """Check before the work that the result can be written.

    Args:
        path: the file.
        force: it may be there already.
        suffixes: what its name may end with; nothing for any name.

    Raises:
        UsageError: the file exists and ``--force`` was not given, or its folder does not exist, or
            the name tells no format.
    """
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise UsageError(f"cannot tell what to write to {path!r}: expected {', '.join(suffixes)}")
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
    """Read keyword arguments from JSON, or from a file of JSON or TOML.

    Raises:
        UsageError: the text is no JSON object, or the file cannot be read.
    """
    if text is None:
        return {}
    kind, content = "JSON", text
    if Path(text).suffix.lower() in (".json", ".toml"):  # which JSON itself does not end with
        kind = Path(text).suffix[1:].upper()
        try:
            content = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
            raise UsageError(f"{option}: cannot read {text}: {reason}") from error
    try:
        kwargs = read_toml(content) if kind == "TOML" else read_json(content)
    except ValueError as error:
        raise UsageError(f"{option} {text!r:.200} is not {kind}: {error}") from error
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
    parser.add_argument(
        "--kwargs",
        metavar="JSON",
        help="keyword arguments of the factory: JSON, or a file of them (.json, .toml); a class is "
        "written torch.nn.Conv3d, or !torch.nn.Conv3d where the factory does not say that it "
        "takes a class",
    )
    parser.add_argument(
        "--classes-from",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package besides torch.nn that --kwargs may name classes and functions of",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE[:KEY]",
        help="a state_dict to load (.safetensors, .pt, .pth, .bin, .ckpt), in a checkpoint found "
        "by itself or under KEY; or a model saved by `pocketize apply`",
    )
    parser.add_argument(
        "--input",
        metavar="SHAPE",
        help="example input, such as 1x1x96x96x96, 1x3x64x64,1x77:int64 for several, or "
        "image=1x1x64x64,mask=1x1x64x64 by name (default: guessed)",
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
    with as_usage():
        return resolve(
            args.model,
            kwargs=parse_kwargs(args.kwargs),
            weights=args.weights,
            trust=args.trust_pickle,
            folder=args.folder,
            classes_from=args.classes_from,
        )


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Turn the error of a file that cannot be read, or does not fit, into one of usage."""
    try:
        yield
    except ArtifactError as error:
        raise UsageError(str(error)) from error


def inputs_of(args: argparse.Namespace, resolved: ResolvedModel) -> Inputs:
    """Return the example inputs: ``--input``, or what the model came with, or a guess."""
    from pocketize.graph.capture import settle_inputs

    given = args.input if args.input is not None else resolved.inputs
    inputs = settle_inputs(resolved.model, given)
    if given is None:
        note(f"without --input, {inputs.describe()} was guessed")
    return inputs


def passes_of(args: argparse.Namespace) -> list[Pass]:
    """Return the passes of ``--recipe`` and then those of ``--pass``, in order.

    The variants of the recipe become ``args.variants``.

    Raises:
        UsageError: neither was given.
    """
    from pocketize.plugin.recipe import load_variants
    from pocketize.plugin.registry import parse_pass

    passes: list[Pass] = []
    args.variants = ()
    if args.recipe is not None:
        passes, args.variants = load_variants(args.recipe)
    passes += [parse_pass(spec) for spec in args.passes]
    if not passes:
        raise UsageError("say what to do: --pass pocket, for instance; see `pocketize passes`")
    return passes
