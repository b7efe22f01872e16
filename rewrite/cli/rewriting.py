"""The commands that rewrite: ``plan`` and ``apply``."""

from __future__ import annotations

__all__ = ["run_apply", "run_plan"]

import argparse
from pathlib import Path

from torch import nn

from pocketize.artifact import save
from pocketize.artifact.files import atomic_write
from pocketize.artifact.kept import lost_steps
from pocketize.artifact.models import ResolvedModel
from pocketize.artifact.pt2 import write_exported
from pocketize.artifact.statefile import write_state
from pocketize.calibration.calibrate import check_passes
from pocketize.calibration.options import Calibration
from pocketize.cli.common import (
    DONE,
    CheckFailed,
    UsageError,
    check_output,
    inputs_of,
    note,
    passes_of,
    progress,
    resolve_model,
    show,
)
from pocketize.cli.crops import crops_of
from pocketize.engine.calibrated import apply_calibrated, needs_calibration
from pocketize.engine.pipeline import Plan, plan
from pocketize.graph.inputs import Inputs
from pocketize.units import count_text, ratio_text

_SUFFIXES = (".safetensors", ".pt2", ".pt", ".pth")


def run_plan(args: argparse.Namespace) -> int:
    """Print what passes would do."""
    passes = passes_of(args)
    resolved = resolve_model(args)
    progress("planning")
    inputs = inputs_of(args, resolved)
    planned = plan(
        resolved.model, passes=passes, inputs=inputs, variants=args.variants, seed=args.seed
    )
    show(planned.to_markdown() if args.format == "markdown" else str(planned))
    return DONE


def run_apply(args: argparse.Namespace) -> int:
    """Rewrite a model and save it."""
    passes = passes_of(args)
    if args.calibrate is None and (args.crops, args.scale) != (None, None):
        raise UsageError("--crops and --scale are for --calibrate DIR; add it, or leave them out")
    suffix = Path(args.output).suffix.lower()
    check_output(args.output, force=args.force, suffixes=_SUFFIXES)
    resolved = resolve_model(args)
    progress("planning")
    inputs = inputs_of(args, resolved)
    planned = plan(
        resolved.model, passes=passes, inputs=inputs, variants=args.variants, seed=args.seed
    )
    _check_effect(planned, resolved, strict=args.strict)
    images = None
    if args.calibrate is not None:
        check_passes(passes)
        count, scale = 8 if args.crops is None else args.crops, args.scale or "standard"
        images = crops_of(args.calibrate, inputs, count, scale, args.seed or 0)
    if suffix != ".safetensors":
        _check_format(planned, inputs if suffix == ".pt2" else None, args.output)
    progress("rewriting")
    before = _parameters(resolved.model)
    calibrated = ""
    if images is not None and needs_calibration(planned):
        found = apply_calibrated(
            planned, inputs, Calibration(images, seed=args.seed or 0), progress
        )
        model, calibrated = found.model, str(found)
    else:
        if images is not None:
            note("nothing is calibrated: the passes keep what the network computes")
        model = planned.apply()
    progress(f"writing {args.output}")
    _write(model, inputs, Path(args.output), suffix, force=args.force)
    if calibrated:
        show(f"{calibrated}\n")
    after = _parameters(model)
    for each in planned.passes:
        counts = f"{len(each.changes)} changed, {len(each.refused)} left alone"
        show(f"{each.rewrite} ({each.guarantee}): {counts}")
    show(
        f"{args.output}: {count_text(before)} -> {count_text(after)} parameters "
        f"({ratio_text(before, after)})"
    )
    return DONE


def _check_effect(planned: Plan, resolved: ResolvedModel, *, strict: bool) -> None:
    for each in planned.passes:
        if each.edits:
            continue
        text = f"{each.rewrite} changes nothing in {resolved.label}"
        if reasons := sorted({refusal.why for refusal in each.refused}):
            text += f"; reasons given: {'; '.join(reasons[:3])}"
        if strict:
            raise CheckFailed(text)
        note(f"warning: {text}")


def _check_format(planned: Plan, inputs: Inputs | None, output: str) -> None:
    """Refuse a format in which a pass leaves nothing; ``inputs`` are those of an exported program.

    Raises:
        UsageError: there is such a pass.
    """
    lost = lost_steps(planned.model, [each.edits for each in planned.passes], inputs)
    if lost:
        names = " and ".join(dict.fromkeys(planned.passes[number].name for number in lost))
        kind = "a state_dict" if inputs is None else "an exported program"
        raise UsageError(
            f"{output} would be as without {names}, of which {kind} keeps nothing. Write "
            f".safetensors, which keeps every pass, or leave out {names}"
        )


def _write(model: nn.Module, inputs: Inputs, path: Path, suffix: str, *, force: bool) -> None:
    if suffix == ".safetensors":
        save(model, path, overwrite=force)
        return
    with atomic_write(path, overwrite=force) as temporary:
        if suffix == ".pt2":
            write_exported(model, inputs, temporary)
        else:
            write_state(model, temporary)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
