"""``pocketize widths``: widths from a budget, and the recipe that ``apply`` takes."""

from __future__ import annotations

__all__ = ["Widths"]

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketize.cli.common import (
    DONE,
    CheckFailed,
    UsageError,
    add_model,
    check_output,
    inputs_of,
    progress,
    resolve_model,
    show,
    write_out,
)
from pocketize.errors import BudgetError, OptionError, PlanningError
from pocketize.passes.planning.equations import (
    DEGRADATION,
    METRICS,
    ROUNDING,
    Degradation,
    degradation_of,
)
from pocketize.untrusted import read_json

# torch takes seconds to import, and a list of commands needs none: functions import it
if TYPE_CHECKING:
    from torch import nn

    from pocketize.passes.planning.plan import WidthPlan

_ARGUMENTS = re.compile(
    r"\b(?:(max_bytes|max_parameters|max_peak|max_drop)|(round_to|minimum|keep|complexity)(?==))"
    r"(=(?:\.\.\.)?)?"
)
_ARCHITECTURES = tuple(dict.fromkeys(architecture for architecture, _ in DEGRADATION))


class Widths:
    """The command."""

    summary = "plan widths from a budget, or from the complexity of images, and write the recipe"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        from pocketize.passes.planning.budgets import COUNTS

        add_model(parser)
        budget = parser.add_argument_group("budgets, which hold together; one is needed")
        budget.add_argument("--max-bytes", metavar="SIZE", help="of all weights: 1MB, 500KiB")
        budget.add_argument("--max-parameters", metavar="N", help="such as 500k")
        budget.add_argument(
            "--max-peak", metavar="SIZE", help="of the estimated peak at --input: 2GiB"
        )
        budget.add_argument(
            "--max-drop", type=float, metavar="SHARE", help="of the accuracy: 0.05 for a twentieth"
        )
        budget.add_argument("--dtype", help="what weights are stored as (default: what they are)")
        budget.add_argument(
            "--count",
            choices=tuple(COUNTS),
            default="parameters",
            help="what --max-bytes and --max-parameters count; conv: the paper's convolution "
            "weights, stored: buffers too (default parameters)",
        )
        budget.add_argument(
            "--mode", choices=("train", "infer"), default="train", help="the step of --max-peak"
        )
        budget.add_argument("--optimizer", choices=("adam", "adamw", "sgd", "none"), default="adam")
        self._add_knowledge(parser)
        self._add_widths(parser)
        parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
        parser.add_argument("-o", "--output", metavar="FILE", help="write the recipe here (.toml)")
        parser.add_argument("--force", action="store_true", help="replace a file that is there")

    def _add_knowledge(self, parser: argparse.ArgumentParser) -> None:
        known = parser.add_argument_group("what is known of the images, for a layer-wise plan")
        known.add_argument("--images", metavar="DIR", help="measure their complexity")
        known.add_argument("--pattern", default="*", help="which of the images, such as '*.png'")
        known.add_argument("--masks", metavar="DIR", help="for --measure foreground and jb")
        known.add_argument(
            "--measure", default="jpeg", help="see `pocketize complexity --help` (default jpeg)"
        )
        known.add_argument(
            "--size",
            choices=("raw", "file"),
            default="raw",
            help="what the size of a JPEG is relative to: the pixels' or, as in the paper, the "
            "file's (default raw)",
        )
        known.add_argument(
            "--complexity",
            metavar="C,C,...",
            help="instead of --images: a number for each level, finest first, or one",
        )
        known.add_argument(
            "--architecture", choices=_ARCHITECTURES, help="whose degradation, of the paper's table"
        )
        known.add_argument("--metric", choices=METRICS, help="of which accuracy (default f1)")
        known.add_argument(
            "--fit", metavar="FILE", help="instead of --architecture: a fit of your own, as JSON"
        )
        known.add_argument("--uniform", action="store_true", help="one multiplier for all levels")

    def _add_widths(self, parser: argparse.ArgumentParser) -> None:
        widths = parser.add_argument_group("widths")
        widths.add_argument(
            "--rounding",
            choices=tuple(ROUNDING),
            help="default: nearest for uniform budgets, else up; the paper's accuracy floors are "
            "doubling (uniform) and shared (layer-wise)",
        )
        widths.add_argument("--round-to", type=int, default=1, metavar="N", help="multiples of N")
        widths.add_argument("--minimum", type=int, default=1, metavar="N", help="of every width")
        widths.add_argument(
            "--keep", action="append", default=[], metavar="PATTERN", help="modules that stay"
        )
        widths.add_argument(
            "--method",
            choices=("search", "closed-form"),
            default="search",
            help="count every candidate, or solve the paper's equations (default search)",
        )
        widths.add_argument(
            "--reset", action="store_true", help="let the recipe draw all weights anew"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Plan, print the plan and its recipe, and write the recipe if asked to."""
        from pocketize.passes.planning.planner import plan_widths

        if args.output is not None:
            check_output(args.output, force=args.force)
        degradation = _degradation(args)
        if (args.images is not None) and (args.complexity is not None):
            raise UsageError("--complexity says what --images would measure: give one of them")
        known = args.images is not None or args.complexity is not None
        if known and degradation is None:
            raise UsageError(
                "a complexity needs a degradation: add --architecture "
                f"({', '.join(_ARCHITECTURES)}), or --fit"
            )
        if degradation is not None and not known:
            raise UsageError("a degradation needs a complexity: add --images or --complexity")
        resolved = resolve_model(args)
        inputs = inputs_of(args, resolved)
        try:
            complexity, told = _complexity(args, resolved.model, inputs)
            progress("planning")
            made = plan_widths(
                resolved.model,
                inputs=inputs,
                complexity=complexity,
                degradation=degradation,
                layerwise=False if args.uniform else None,
                max_bytes=args.max_bytes,
                dtype=args.dtype,
                max_parameters=args.max_parameters,
                max_peak=args.max_peak,
                mode=args.mode,
                optimizer=None if args.optimizer == "none" else args.optimizer,
                max_drop=args.max_drop,
                count=args.count,
                method=args.method,
                rounding=args.rounding,
                round_to=args.round_to,
                minimum=args.minimum,
                keep=args.keep,
                progress=lambda tried: progress(f"tried {tried}"),
            )
        except BudgetError as error:
            raise CheckFailed(_as_options(str(error))) from error
        except (OptionError, PlanningError) as error:
            raise UsageError(_as_options(str(error))) from error
        recipe = made.recipe(**({"weights": "reset"} if args.reset else {})).rstrip("\n")
        show(_render(made, recipe, told, args))
        if args.output is not None:
            write_out(recipe, args.output, force=args.force)
        return DONE


def _as_options(text: str) -> str:
    """Write what an error says of arguments in Python as options of the command."""

    def option(match: re.Match[str]) -> str:
        name = f"--{match[1] or match[2]}".replace("_", "-")
        return f"{name} " if match[3] == "=" and text[match.end() :][:1].isdigit() else name

    return _ARGUMENTS.sub(option, text.replace(" (or min_accuracy)", ""))


def _degradation(args: argparse.Namespace) -> Degradation | None:
    if args.fit is None:
        if args.architecture is None:
            if args.metric is not None:
                raise UsageError("--metric goes with --architecture")
            return None
        return degradation_of(args.architecture, args.metric or "f1")
    if args.architecture is not None or args.metric is not None:
        raise UsageError("--fit is a degradation of your own: leave out --architecture, --metric")
    from pocketize.passes.planning.fitting import DegradationFit

    try:
        fit = DegradationFit.from_json(read_json(Path(args.fit).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # PlanningError is a ValueError too
        raise UsageError(f"--fit {args.fit}: {error}") from error
    return fit.degradation


def _complexity(
    args: argparse.Namespace, model: nn.Module, inputs: Any
) -> tuple[list[float] | float | None, str | None]:
    """Return the complexity of each level, or the whole one, and how it was measured."""
    if args.complexity is not None:
        try:
            values = [float(part) for part in args.complexity.split(",")]
        except ValueError as error:
            raise UsageError(
                f"--complexity {args.complexity!r}: expected numbers with commas between"
            ) from error
        return values[0] if len(values) == 1 else values, None
    if args.images is None:
        return None, None
    # the measures bring packages that are there only with the extra
    from pocketize.passes.complexity import measure_dataset
    from pocketize.passes.planning.network import level_scales

    scales = (0,) if args.uniform else level_scales(model, inputs)
    progress(f"measuring the images in {args.images}")
    measured = measure_dataset(
        args.images,
        args.measure,
        scales=max(scales) + 1,
        size=args.size,
        masks=args.masks,
        pattern=args.pattern,
    )
    values = [float(measured.mean[scale]) for scale in scales]
    return values[0] if args.uniform else values, measured.title()


def _render(made: WidthPlan, recipe: str, told: str | None, args: argparse.Namespace) -> str:
    if args.format == "json":
        data = {**made.to_json(), "complexity_of": told, "recipe": recipe}
        return json.dumps(data, indent=2)
    markdown = args.format == "markdown"
    parts = [made.to_markdown() if markdown else str(made)]
    if told is not None:
        parts.append(f"complexity: {told}")
    if args.output is not None:
        parts.append(f"recipe: {args.output}; apply it with `pocketize apply --recipe`")
    else:
        parts.append(f"```toml\n{recipe}\n```" if markdown else recipe)
    return "\n\n".join(parts)
