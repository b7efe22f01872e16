"""The command ``export``."""

from __future__ import annotations

__all__ = ["run_export"]

import argparse

from pocketize.artifact.exports import SUFFIXES, export_plain
from pocketize.cli.common import DONE, check_output, inputs_of, progress, resolve_model, show
from pocketize.plugin.history import history


def run_export(args: argparse.Namespace) -> int:
    """Write a network for other programs."""
    check_output(args.output, force=args.force, suffixes=SUFFIXES)
    resolved = resolve_model(args)
    inputs = inputs_of(args, resolved)
    progress(f"writing {args.output}")
    difference = export_plain(
        resolved.model, inputs, args.output, overwrite=args.force, check=not args.no_check
    )
    names = ", ".join(record.name for record in history(resolved.model)) or "no pass"
    told = "not compared" if args.no_check else f"outputs differ by {difference:.1g} at most"
    show(f"{args.output}: {type(resolved.model).__name__} ({names}), plain; {told}")
    return DONE
