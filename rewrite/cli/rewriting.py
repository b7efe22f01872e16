"""The commands that rewrite: ``plan`` and ``apply``."""

from __future__ import annotations

__all__ = ["run_apply", "run_plan"]

import argparse
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn

from pocketize.artifact import save
from pocketize.artifact.files import atomic_write, open_for_torch
from pocketize.artifact.models import ResolvedModel
from pocketize.artifact.pt2 import write_exported
from pocketize.cli.common import (
    DONE,
    CheckFailed,
    check_output,
    inputs_of,
    note,
    passes_of,
    progress,
    resolve_model,
    show,
)
from pocketize.engine.pipeline import Plan, plan
from pocketize.errors import ArtifactError
from pocketize.graph.inputs import Inputs
from pocketize.units import count_text, ratio_text

_SUFFIXES = (".safetensors", ".pt2", ".pt", ".pth")


def run_plan(args: argparse.Namespace) -> int:
    """Print what passes would do."""
    passes = passes_of(args)
    resolved = resolve_model(args)
    progress("planning")
    planned = plan(resolved.model, *passes, inputs=inputs_of(args, resolved), seed=args.seed)
    show(planned.to_markdown() if args.format == "markdown" else str(planned))
    return DONE


def run_apply(args: argparse.Namespace) -> int:
    """Rewrite a model and save it."""
    passes = passes_of(args)
    suffix = Path(args.output).suffix.lower()
    check_output(args.output, force=args.force, suffixes=_SUFFIXES)
    resolved = resolve_model(args)
    progress("planning")
    inputs = inputs_of(args, resolved)
    planned = plan(resolved.model, *passes, inputs=inputs, seed=args.seed)
    _check_effect(planned, resolved, strict=args.strict)
    progress("rewriting")
    before = _parameters(resolved.model)
    model = planned.apply()
    progress(f"writing {args.output}")
    _write(model, inputs, Path(args.output), suffix, force=args.force)
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


def _write(model: nn.Module, inputs: Inputs, path: Path, suffix: str, *, force: bool) -> None:
    if suffix == ".safetensors":
        save(model, path, overwrite=force)
        return
    with atomic_write(path, overwrite=force) as temporary:
        if suffix == ".pt2":
            write_exported(model, inputs, temporary)
        else:
            state = _state(model)
            with open_for_torch(temporary) as file:
                torch.save(state, cast("IO[bytes]", file))


def _state(model: nn.Module) -> Any:
    try:
        return model.state_dict()
    except Exception as error:  # a class's own code may raise anything
        raise ArtifactError(
            f"state_dict() of {type(model).__name__} raises {type(error).__name__}: {error}. Mend "
            "it, or write a .safetensors file, which holds the weights whatever state_dict does"
        ) from error


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
