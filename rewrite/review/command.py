"""``pocketize diff``: what two revisions of a repository need, network by network."""

from __future__ import annotations

__all__ = ["DiffCommand"]

import argparse
import sys
from pathlib import Path

from pocketize.cli.common import CHECK_FAILED, DONE, note, write_out


class DiffCommand:
    """The command."""

    summary = "compare the memory of networks between two git revisions, and check limits"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "base",
            nargs="?",
            metavar="BASE",
            help="a git revision; A... is the merge base with A (default: with the main branch)",
        )
        parser.add_argument(
            "head", nargs="?", metavar="HEAD", help="a git revision (default: the working tree)"
        )
        parser.add_argument(
            "--measure", action="store_true", help="run real steps instead of estimating"
        )
        parser.add_argument("--device", help="where to measure, such as cuda")
        parser.add_argument(
            "--python",
            metavar="FILE",
            default=sys.executable,
            help="the interpreter that runs both revisions; pocketize is installed there too",
        )
        parser.add_argument(
            "--fail-over",
            dest="thresholds",
            action="append",
            default=[],
            metavar="LIMIT",
            help="for all models: fail (exit code 1) if a figure grows more, as 'peak 2%% 16MiB'",
        )
        parser.add_argument("--format", choices=("text", "markdown", "json", "html"))
        parser.add_argument(
            "-o", "--output", metavar="FILE", help="write here (.txt, .md, .json, .html)"
        )
        parser.add_argument("--force", action="store_true", help="replace a file that is there")

    def run(self, args: argparse.Namespace) -> int:
        """Measure both revisions, write the report, and check the limits."""
        from pocketize.cli.reporting import output_format, render
        from pocketize.report import Threshold
        from pocketize.review.diff import diff
        from pocketize.review.revisions import Repository

        layout = output_format(args)
        for text in args.thresholds:
            Threshold.parse(text)
        repository = Repository(Path.cwd())
        found = diff(
            repository,
            repository.revisions(args.base, args.head),
            limits=tuple(args.thresholds),
            estimate=not args.measure,
            device=args.device,
            python=args.python,
            progress=note,
        )
        write_out(render(found, layout), args.output, force=args.force)
        for model in found.models:
            if model.failed or args.output is not None:
                note(f"{model.name}: {model.verdict}")
        return CHECK_FAILED if any(model.failed for model in found.models) else DONE
