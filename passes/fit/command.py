"""``pocketize fit``: make a model fit a memory budget, and write the model and the recipe."""

from __future__ import annotations

__all__ = ["FitCommand"]

import argparse
import json
from typing import TYPE_CHECKING, Any

from pocketize.cli.common import (
    DONE,
    CheckFailed,
    UsageError,
    add_model,
    check_output,
    inputs_of,
    note,
    progress,
    resolve_model,
    write_out,
)
from pocketize.errors import FitError

# torch takes seconds to import, and a list of commands needs none: functions import it
if TYPE_CHECKING:
    from pocketize.passes.fit.result import Fit


class FitCommand:
    """The command."""

    summary = "make a model fit a memory budget, exactly if that can be, and prove it"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add_model(parser)
        parser.add_argument(
            "--memory", metavar="SIZE", required=True, help="the budget, such as 8GiB or 700MB"
        )
        parser.add_argument(
            "--mode", choices=("train", "infer"), default="train", help="default: train"
        )
        parser.add_argument(
            "--allow",
            choices=("exact", "approximate", "retrain"),
            default="exact",
            help="the weakest acceptable guarantee (default: exact, the same function)",
        )
        parser.add_argument("--optimizer", choices=("adam", "adamw", "sgd"), default="adam")
        parser.add_argument(
            "--max-time", type=float, metavar="X", help="the longest step, relative to untouched"
        )
        parser.add_argument("--device", help="where the model will run, such as cuda")
        parser.add_argument(
            "--largest-input",
            action="store_true",
            help="find the largest N that fits; write --input with N, as 1x1xNxNxN",
        )
        parser.add_argument(
            "--resident",
            action="store_true",
            help="on the CPU, --memory is what the process may grow by, not live tensors",
        )
        parser.add_argument("--no-proof", action="store_true", help="take no real step")
        parser.add_argument(
            "--format", choices=("text", "markdown", "html", "json"), default="text"
        )
        parser.add_argument("-o", "--output", metavar="FILE", help="write the model here")
        parser.add_argument("--recipe", metavar="FILE", help="write the recipe here (.toml)")
        parser.add_argument("--report", metavar="FILE", help="write what was found here")
        parser.add_argument("--force", action="store_true", help="replace files that are there")

    def run(self, args: argparse.Namespace) -> int:
        """Search, print what was found and write what was asked for."""
        from pocketize.passes.fit.largest import largest_input
        from pocketize.passes.fit.limits import read_budget, read_max_time
        from pocketize.passes.fit.search import fit

        for path, suffixes in (
            (args.output, (".safetensors",)),
            (args.recipe, (".toml",)),
            (args.report, ()),
        ):
            if path is not None:
                check_output(path, force=args.force, suffixes=suffixes)
        try:
            read_budget(args.memory)
            read_max_time(args.max_time)
        except FitError as error:
            raise UsageError(str(error).replace("max_time", "--max-time")) from error
        resolved = resolve_model(args)
        options: dict[str, Any] = {
            "memory": args.memory,
            "mode": args.mode,
            "allow": args.allow,
            "optimizer": args.optimizer,
            "max_time": args.max_time,
            "device": args.device,
            "prove": not args.no_proof,
            "resident": args.resident,
            "progress": progress,
        }
        try:
            if args.largest_input:
                if args.input is None:
                    raise UsageError("--largest-input needs --input with N, such as 1x1xNxNxN")
                found = largest_input(resolved.model, args.input, **options)
            else:
                found = fit(resolved.model, inputs_of(args, resolved), **options)
        except FitError as error:
            raise CheckFailed(str(error)) from error
        write_out(_render(found, args.format), args.report, force=args.force)
        if args.recipe is not None and found.passes:
            write_out(found.recipe.rstrip("\n"), args.recipe, force=args.force)
        elif args.recipe is not None:
            note(f"{args.recipe} is not written: the model fits as it is, without any pass")
        if args.output is not None:
            from pocketize.artifact import save

            save(found.model, args.output, overwrite=args.force)
        return DONE


def _render(found: Fit, style: str) -> str:
    if style == "json":
        return json.dumps(found.to_json(), indent=2)
    if style == "html":
        return found.to_html()
    recipe = found.recipe.rstrip("\n")
    if style == "markdown":
        return found.to_markdown() + (f"\n```toml\n{recipe}\n```" if recipe else "")
    return f"{found}\n\n{recipe}".rstrip("\n")
