"""The commands that measure: ``report`` and ``demo``."""

from __future__ import annotations

__all__ = ["run_demo", "run_report"]

import argparse
from pathlib import Path

import torch
from torch import nn

from pocketize.artifact import load
from pocketize.artifact.models import ResolvedModel, resolve
from pocketize.cli.commands import load_command
from pocketize.cli.common import (
    CHECK_FAILED,
    DONE,
    UsageError,
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
from pocketize.graph.capture import settle_inputs
from pocketize.report import Comparison, Threshold, compare

_FORMATS = {".txt": "text", ".md": "markdown", ".json": "json", ".html": "html"}
# small enough for two cores to measure both models in well under a minute
_DEMO, _DEMO_INPUT = "zoo:pocketnet_unet3d", "1x1x5x48x48"
_FIT, _FIT_INPUT, _FIT_MEMORY = '{"pocket": true}', "1x1x16x64x64", "30MiB"


def run_report(args: argparse.Namespace) -> int:
    """Compare two models, or a model with what passes make of it."""
    rewritten = bool(args.passes) or args.recipe is not None
    if rewritten == (args.after is not None):
        raise UsageError(
            "report compares two models, or one with what passes make of it: give AFTER, or "
            "--pass, and not both"
        )
    thresholds = [Threshold.parse(text) for text in args.thresholds]
    timed = [each.metric for each in thresholds if each.metric in ("time", "inference-time")]
    if timed and (args.estimate or args.time_steps == 0):
        raise UsageError(f"a limit on {timed[0]} needs times: leave out --estimate, --time-steps 0")
    if args.step_in_backward and args.optimizer == "none":
        raise UsageError("--step-in-backward needs an optimizer")
    if args.output is not None:
        check_output(args.output, force=args.force)
    layout = args.format or _FORMATS.get(Path(args.output or "").suffix.lower(), "text")
    passes = passes_of(args) if rewritten else []

    before = resolve_model(args)
    inputs = settle_inputs(before.model, inputs_of(args, before))
    if rewritten:
        progress("planning and rewriting")
        planned = plan(before.model, *passes, inputs=inputs, seed=args.seed)
        for each in planned.passes:
            if not each.edits:
                note(f"warning: {each.rewrite} changes nothing in {before.label}")
        after = planned.apply()
    else:
        after = _after(args, before)
    progress("measuring both models, in a training step and in inference")
    comparison = compare(
        before.model,
        after,
        inputs,
        optimizer=None if args.optimizer == "none" else args.optimizer,
        estimate=args.estimate,
        time_steps=args.time_steps,
        device=args.device,
        step_in_backward=args.step_in_backward,
    )
    write_out(_render(comparison, layout), args.output, force=args.force)
    violations = comparison.check(thresholds)
    for violation in violations:
        note(f"over the limit: {violation}")
    return CHECK_FAILED if violations else DONE


def _after(args: argparse.Namespace, before: ResolvedModel) -> nn.Module:
    kwargs = parse_kwargs(args.after_kwargs, "--after-kwargs")
    if Path(args.after).suffix.lower() != ".safetensors":
        return resolve(args.after, kwargs=kwargs, trust=args.trust_pickle).model
    if before.factory is None:
        raise UsageError(
            f"{args.after} was saved from a rewritten model and needs the factory of the original "
            f"as BEFORE; {before.label} is none"
        )
    return load(args.after, before.factory, folder=args.folder)


def _render(comparison: Comparison, layout: str) -> str:
    if layout == "text":
        return str(comparison)
    rendered: str = getattr(comparison, f"to_{layout}")()
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
