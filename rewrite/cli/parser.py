"""The arguments of every command."""

from __future__ import annotations

__all__ = ["build_parser", "parse"]

import argparse
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pocketize.cli.commands import Command, command_names, load_command
from pocketize.cli.common import add_model, seed
from pocketize.errors import RegistryError
from pocketize.plugin.registry import GROUP as PASSES
from pocketize.plugin.registry import discover
from pocketize.untrusted import printable
from pocketize.version import VERSION

_EXAMPLES = """\
MODEL is package.module:factory (a function or class that builds the network; the current folder is
searched last), zoo:NAME (see `pocketize zoo`), or an exported program, FILE.pt2 (--trust-pickle).

examples:
  pocketize demo
  pocketize passes
  pocketize plan zoo:pocketnet_unet3d --pass pocket
  pocketize report monai.networks.nets:UNet --kwargs '{...}' --input 1x1x96x96x96 --pass pocket
  pocketize apply my.nets:UNet --weights best.pt --pass pocket:width=16 -o small.safetensors

exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 the rewrite failed
"""


_LAST_WORDS = {
    "diff": ("base", "head"),
    "passes": ("name",),
    "report": ("after",),
    "zoo": ("pattern",),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; argparse leaves with SystemExit where they are wrong.

    Until Python 3.12, argparse settles an optional positional as soon as it meets an option, and
    then does not know the word in ``report A --input 1x1x8x8 B``.

    Raises:
        RegistryError: the command is a distribution's own, and cannot be used.
    """
    parser = build_parser(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(argv)
    names = _LAST_WORDS.get(args.command, ())
    free = [name for name in names if getattr(args, name) in (None, "*")]
    if len(unknown) <= len(free) and not any(word.startswith("-") for word in unknown):
        vars(args).update(zip(free, unknown, strict=False))
        unknown = []
    if unknown:
        passes = [word for word in unknown if word.partition(":")[0] in discover(PASSES)]
        hint = f"; passes are given as --pass {' --pass '.join(passes)}" if passes else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


class _Parser(argparse.ArgumentParser):
    """Prints arguments safely, such as names of files."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(printable(message), file)


def build_parser(words: Sequence[str] = ("--help",)) -> argparse.ArgumentParser:
    """Make the parser; ``run`` of what it returns is the function of the command.

    Args:
        words: what will be parsed. Commands from outside the engine are imported only if the words
            ask for them; by default all are.

    Raises:
        RegistryError: the words ask for such a command, and it cannot be used.
    """
    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    common.add_argument("--debug", action="store_true", help="show tracebacks of errors")

    parser = _Parser(
        prog="pocketize",
        description="Rewrite PyTorch networks so that they need less memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pocketize {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, module: str, help: str) -> argparse.ArgumentParser:
        def run(args: argparse.Namespace) -> int:
            # imported only now: the help needs no torch
            code: int = getattr(import_module(f"pocketize.cli.{module}"), f"run_{name}")(args)
            return code

        made = commands.add_parser(
            name, parents=[common], help=help, description=f"{help[0].upper()}{help[1:]}."
        )
        made.set_defaults(run=run)
        return made

    demo = command("demo", "reporting", "rewrite a bundled 3D U-Net and report what it saves")
    demo.add_argument("--seed", type=seed, default=0, help="seed of the weights (default 0)")

    passes = command("passes", "listing", "list the passes, what they keep, and their options")
    passes.add_argument("name", nargs="?", help="tell about this pass only")

    zoo = command("zoo", "listing", "list the bundled networks")
    zoo.add_argument("pattern", nargs="?", default="*", help="which, such as '*3d*'; quote it")

    plan = command("plan", "rewriting", "tell what passes would do to a model, and change nothing")
    add_model(plan)
    _add_passes(plan)
    plan.add_argument("--format", choices=("text", "markdown"), default="text")

    explain = command("explain", "listing", "tell why a layer can be resized, or why not")
    add_model(explain)
    explain.add_argument("path", help="a module or parameter, such as encoder.2.conv")

    apply = command("apply", "rewriting", "rewrite a model and save the result")
    add_model(apply)
    _add_passes(apply)
    _add_output(
        apply,
        ".safetensors (weights and recipe; keeps every pass), .pt2 (exported program of "
        "inference) or .pt, .pth (state_dict)",
    )
    apply.add_argument(
        "--strict", action="store_true", help="fail (exit code 1) where a pass changes nothing"
    )
    apply.add_argument(
        "--calibrate",
        metavar="DIR",
        help="solve the layers of the result on images of this folder, so that it computes what "
        "MODEL does: NIfTI, .npy, PNG, JPEG, TIFF; one crop of each, of the size of the input",
    )
    apply.add_argument(
        "--crops", type=int, metavar="N", help="of how many of its images (default 8)"
    )
    apply.add_argument(
        "--scale",
        choices=("standard", "unit", "none"),
        help="values of the images: standard is mean 0 and variance 1 of each (default), unit is 0 "
        "to 1, none is as they are; as in the training of MODEL",
    )
    export = command("export", "exporting", "write a network for other programs, and compare it")
    add_model(export)
    _add_output(
        export,
        ".onnx, .pt2 (exported program) or .ts (TorchScript): the network in evaluation mode, "
        "without what passes do while it runs",
    )
    export.add_argument(
        "--no-check", action="store_true", help="do not compare its outputs with the network's"
    )
    _add_measure(
        command("measure", "reporting", "measure one model; its JSON is a baseline for `report`")
    )
    _add_report(
        command("report", "reporting", "measure two models and put the figures side by side")
    )
    _add_commands_from_outside(parser, commands, common, words)
    return parser


def _add_commands_from_outside(
    parser: argparse.ArgumentParser,
    commands: argparse._SubParsersAction[_Parser],
    common: _Parser,
    words: Sequence[str],
) -> None:
    """Add what :mod:`pocketize.cli.commands` finds; list in the help what cannot be used."""
    own = frozenset(commands.choices)
    asked = next((word for word in words if not word.startswith("-")), None)
    listed = asked is None and any(word.startswith(("-h", "--h")) for word in words)
    if listed:
        parser.epilog = f"{parser.epilog}{_list_commands_from_outside(commands, own)}"
        return
    for name in command_names():
        if name not in own:
            # also those not asked for: the error for a word that is no command lists all names
            made = commands.add_parser(name, parents=[common])
            if name == asked:
                _declare(name, load_command(name), made)


def _list_commands_from_outside(
    commands: argparse._SubParsersAction[_Parser], own: frozenset[str]
) -> str:
    unusable = ""
    for name in command_names():
        try:
            help = load_command(name, own).summary.replace("%", "%%")
        except RegistryError as error:
            why = textwrap.fill(str(error), 100, initial_indent="  ", subsequent_indent="    ")
            unusable += f"{why}\n"
            continue
        commands.add_parser(name, help=help)
    return unusable and f"\ncommands that cannot be used:\n{unusable}"


def _declare(name: str, command: Command, parser: argparse.ArgumentParser) -> None:
    try:
        command.add_arguments(parser)
    except Exception as error:
        # code of others may raise anything: most likely two options have one name
        raise RegistryError(
            f"command {name!r} cannot declare its arguments: {type(error).__name__}: {error}"
        ) from error
    parser.description = f"{command.summary[:1].upper()}{command.summary[1:]}."
    parser.set_defaults(run=command.run)


def _add_passes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pass",
        dest="passes",
        action="append",
        default=[],
        metavar="PASS",
        help="name or name:option=value,option=value; repeat for several, applied in this order",
    )
    parser.add_argument("--recipe", metavar="FILE", help="a TOML file of passes, applied first")


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the file that is written, and the leave to replace one."""
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help=what)
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    _add_passes(parser)
    _add_measuring(parser)
    parser.add_argument("--mode", choices=("train", "infer", "both"), default="both")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "after",
        nargs="?",
        metavar="AFTER",
        help="a second MODEL, or one that `pocketize apply` saved from the first; or use --pass. "
        "MODEL and AFTER may also be JSON files of `pocketize measure`",
    )
    parser.add_argument(
        "--after-kwargs", metavar="JSON", help="keyword arguments of AFTER's factory"
    )
    _add_passes(parser)
    parser.add_argument(
        "--fail-over",
        dest="thresholds",
        action="append",
        default=[],
        metavar="LIMIT",
        help="fail (exit code 1) if a figure grows by more than this: 'peak 2%% 16MiB' allows the "
        "larger of the two, 'peak -30%%' asks for a decrease; repeat for several",
    )
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="also compare figures of different inputs, dtypes, optimizers, devices or machines",
    )
    _add_measuring(parser)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "markdown", "json", "html"))
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write here (.txt, .md, .json, .html)"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--estimate", action="store_true", help="count without running: any size, no time"
    )
    choices = ("adam", "adamw", "sgd", "none")
    parser.add_argument("--optimizer", choices=choices, help="default: adam")
    parser.add_argument(
        "--step-in-backward",
        action="store_true",
        help="the backward pass updates each parameter when its gradient is complete",
    )
    parser.add_argument("--device", help="where to measure, such as cuda (default: the model's)")
    parser.add_argument(
        "--time-steps", type=int, default=5, metavar="N", help="steps to time (default 5; 0: none)"
    )
