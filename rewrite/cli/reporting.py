"""The commands that measure: ``measure``, ``report`` and ``demo``."""

from __future__ import annotations

__all__ = ["output_format", "render", "run_demo", "run_measure", "run_report"]

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocketize.artifact import load
from pocketize.artifact.models import ResolvedModel, resolve
from pocketize.artifact.statefile import has_recipe
from pocketize.cli.commands import load_command
from pocketize.cli.common import (
    CHECK_FAILED,
    DONE,
    UsageError,
    as_usage,
    check_output,
    inputs_of,
    note,
    parse_kwargs,
    passes_of,
    progress,
    resolve_model,
    show,
    write_out,
)
from pocketize.engine.pipeline import plan
from pocketize.errors import ReportError
from pocketize.graph.inputs import Inputs
from pocketize.plugin.base import Pass
from pocketize.report import (
    Comparison,
    Measurement,
    Threshold,
    compare,
    compare_measurements,
    take,
)

_FORMATS = {".txt": "text", ".md": "markdown", ".json": "json", ".html": "html"}
# small enough for two cores to measure both models in well under a minute
_DEMO, _DEMO_INPUT = "zoo:pocketnet_unet3d", "1x1x5x48x48"
_FIT, _FIT_INPUT, _FIT_MEMORY = '{"pocket": true}', "1x1x16x64x64", "30MiB"


def run_measure(args: argparse.Namespace) -> int:
    """Measure one model, as it is or with what passes make of it."""
    layout = _checked_output(args)
    passes = passes_of(args) if _rewrites(args) else []
    resolved = resolve_model(args)
    inputs = inputs_of(args, resolved)
    model = _rewritten(args, resolved, passes, inputs) if passes else resolved.model
    modes = ["train", "infer"] if args.mode == "both" else [args.mode]
    taken = take(model, inputs, **_options(args, modes))
    write_out(render(taken, layout), args.output, force=args.force)
    return DONE


def run_report(args: argparse.Namespace) -> int:
    """Compare two models, or a model with what passes make of it."""
    if _rewrites(args) == (args.after is not None):
        raise UsageError(
            "report compares two models, or one with what passes make of it: give AFTER, or "
            "--pass, and not both"
        )
    thresholds = [Threshold.parse(text) for text in args.thresholds]
    timed = [each.metric for each in thresholds if each.metric in ("time", "inference-time")]
    if timed and (args.estimate or args.time_steps == 0):
        raise UsageError(f"a limit on {timed[0]} needs times: leave out --estimate, --time-steps 0")
    layout = _checked_output(args)
    passes = passes_of(args) if _rewrites(args) else []
    comparison = _compared(args, passes).with_limits(thresholds)
    write_out(render(comparison, layout), args.output, force=args.force)
    if args.output is not None:
        show(comparison.verdict)
    violations = comparison.check(thresholds)
    for violation in violations:
        note(f"over the limit: {violation}")
    return CHECK_FAILED if violations else DONE


def _compared(args: argparse.Namespace, passes: list[Pass]) -> Comparison:
    old, new = _stored(args.model), _stored(args.after)
    if old is not None and new is not None:
        return compare_measurements(old, new, anyway=args.anyway)
    if old is None:
        before = resolve_model(args)
        if new is not None:
            taken = take(before.model, args.input or _input_text(new), **_options_of(args, new))
            return compare_measurements(taken, new, anyway=args.anyway)
        if args.thresholds and args.input is None:
            raise UsageError("--fail-over needs --input: the limit is on figures of this size")
        inputs = inputs_of(args, before)
        after = _rewritten(args, before, passes, inputs) if passes else _after(args, before)
        options = _options(args, ["train", "infer"], sides=2)
        return compare(before.model, after, inputs, anyway=args.anyway, **options)
    if passes:
        raise UsageError(f"{args.model} holds figures and no model that --pass could rewrite")
    after = _after(args, None)
    taken = take(after, args.input or _input_text(old), **_options_of(args, old))
    return compare_measurements(old, taken, anyway=args.anyway)


def _rewrites(args: argparse.Namespace) -> bool:
    return bool(args.passes) or args.recipe is not None


def _checked_output(args: argparse.Namespace) -> str:
    """Check options before the work, and return the format."""
    if args.step_in_backward and args.optimizer == "none":
        raise UsageError("--step-in-backward needs an optimizer")
    return output_format(args)


def output_format(args: argparse.Namespace) -> str:
    """Check before the work that ``-o`` can be written, and return the format."""
    if args.output is not None:
        known = tuple(_FORMATS) if args.format is None else ()
        check_output(args.output, force=args.force, suffixes=known)
    return args.format or _FORMATS.get(Path(args.output or "").suffix.lower(), "text")


def _options(args: argparse.Namespace, modes: list[str], sides: int = 1) -> dict[str, Any]:
    numbers, total = itertools.count(1), sides * len(modes)
    return {
        "modes": modes,
        "progress": lambda text: progress(f"figure {next(numbers)} of {total}: {text}"),
        "optimizer": None if args.optimizer == "none" else args.optimizer or "adam",
        "estimate": args.estimate,
        "time_steps": args.time_steps,
        "device": args.device,
        "step_in_backward": args.step_in_backward,
    }


def _options_of(args: argparse.Namespace, like: Measurement) -> dict[str, Any]:
    """How to measure: as asked for, and otherwise as ``like`` was measured."""
    options = _options(args, [profile.mode for profile in like.profiles])
    options["estimate"] |= like.profiles[0].estimated
    if like.train is not None:
        options["step_in_backward"] |= like.train.step_in_backward
        if args.optimizer is None:
            options["optimizer"] = like.train.optimizer
    return options


def _input_text(like: Measurement) -> str:
    return like.profiles[0].input.replace(" ", ":").replace(",:", ",")


def _stored(path: str | None) -> Measurement | None:
    if path is None or Path(path).suffix.lower() != ".json":
        return None
    try:
        return Measurement.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error


def _rewritten(
    args: argparse.Namespace, before: ResolvedModel, passes: list[Pass], inputs: Inputs
) -> nn.Module:
    progress("planning and rewriting")
    planned = plan(
        before.model, passes=passes, inputs=inputs, variants=args.variants, seed=args.seed
    )
    for each in planned.passes:
        if not each.edits:
            note(f"warning: {each.rewrite} changes nothing in {before.label}")
    return planned.apply()


def _after(args: argparse.Namespace, before: ResolvedModel | None) -> nn.Module:
    kwargs = parse_kwargs(args.after_kwargs, "--after-kwargs")
    if Path(args.after).suffix.lower() != ".safetensors" and not has_recipe(args.after):
        with as_usage():
            return resolve(
                args.after,
                kwargs=kwargs,
                trust=args.trust_pickle,
                classes_from=args.classes_from,
            ).model
    if before is None or before.factory is None:
        raise UsageError(
            f"{args.after} was saved from a rewritten model and needs the factory of the original "
            f"as BEFORE; {args.model} is none"
        )
    with as_usage():
        return load(args.after, before.factory, folder=args.folder)


def render(drawn: object, layout: str) -> str:
    """Draw a report in one of the formats, without a line end."""
    if layout == "text":
        return str(drawn)
    rendered: str = getattr(drawn, f"to_{layout}")()
    return rendered.rstrip("\n")


def run_demo(args: argparse.Namespace) -> int:
    """Make a bundled network fit a budget, and clamp its widths."""
    torch.manual_seed(args.seed)
    resolved = resolve(_DEMO)
    show(f"$ pocketize fit {_DEMO} --kwargs '{_FIT}' --input {_FIT_INPUT} --memory {_FIT_MEMORY}\n")
    command, parser = load_command("fit"), argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = [_DEMO, "--kwargs", _FIT, "--input", _FIT_INPUT, "--memory", _FIT_MEMORY]
    command.run(parser.parse_args(arguments))
    show(f"\n$ pocketize report {_DEMO} --pass pocket --input {_DEMO_INPUT}\n")
    progress("measuring both models, in a training step and in inference")
    small = plan(resolved.model, "pocket", inputs=_DEMO_INPUT, seed=args.seed).apply()
    show(str(compare(resolved.model, small, _DEMO_INPUT, time_steps=3)))
    show(f"\nNext: pocketize apply {_DEMO} --pass pocket -o small.safetensors")
    return DONE
