"""The command ``pocketize complexity``: the measures of this package, for a folder of images."""

from __future__ import annotations

__all__ = ["ComplexityCommand"]

import argparse
import json
from typing import TYPE_CHECKING, Any

from pocketize.cli.common import DONE, UsageError, check_output, note, write_out

# `pocketize --help` imports this file, and numpy takes as long as the rest: functions import it
if TYPE_CHECKING:
    from pocketize.passes.complexity.dataset import Complexity

_OVER_SIZE = ("jpeg", "jb")
_ALL = "all"


class ComplexityCommand:
    """Measure the images of a folder and print a table; see :mod:`pocketize.cli.commands`."""

    summary = "measure how complex the images of a folder are"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        from pocketize.passes.complexity.registry import MEASURES

        parser.add_argument("images", metavar="DIR", help="a folder of images, or one image")
        parser.add_argument(
            "--measure",
            dest="measures",
            action="append",
            choices=(*MEASURES, _ALL),
            metavar="NAME",
            help=f"{', '.join(MEASURES)} or all (default jpeg); repeat for several; foreground and "
            "jb need --masks",
        )
        parser.add_argument(
            "--scales",
            type=int,
            default=5,
            metavar="N",
            help="how many of the scales 1, 1/2, 1/4, ... (default 5; 1: the plain measure)",
        )
        parser.add_argument(
            "--size",
            choices=("raw", "file"),
            default="raw",
            help="over what the size of a JPEG is taken: the image's raw bytes (default), or its "
            "file, which compares within one storage format only",
        )
        parser.add_argument("--quality", type=int, metavar="Q", help="of the JPEG (default 25)")
        parser.add_argument("--masks", metavar="DIR", help="a folder of masks, for foreground, jb")
        parser.add_argument(
            "--foreground", type=float, metavar="V", help="value of masks (default: all but 0)"
        )
        parser.add_argument(
            "-w", metavar="W", help="weight of jb: a number, unet (default), cumedvision, ucunet"
        )
        parser.add_argument(
            "--pattern", default="*", metavar="GLOB", help="which images, such as '*.png', '**/*'"
        )
        parser.add_argument("--mask-pattern", default="*", metavar="GLOB", help="which masks")
        parser.add_argument(
            "--axis", type=int, metavar="N", help="along which volumes are cut (default: the last)"
        )
        parser.add_argument(
            "--range",
            dest="value_range",
            metavar="LOW,HIGH",
            help="values that become black and white, such as --range=-160,240 (default: by the "
            "type of the image)",
        )
        parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
        parser.add_argument("-o", "--output", metavar="FILE", help="write here, not to stdout")
        parser.add_argument("--force", action="store_true", help="replace a file that is there")

    def run(self, args: argparse.Namespace) -> int:
        """Measure, and print."""
        from pocketize.passes.complexity.dataset import measure_dataset
        from pocketize.passes.complexity.registry import MEASURES

        names = _names(args)
        value_range = _range(args.value_range)
        if args.output is not None:
            check_output(args.output, force=args.force)
        results = [
            measure_dataset(
                args.images,
                name,
                scales=args.scales,
                size=args.size if name in _OVER_SIZE else "raw",
                masks=args.masks,
                pattern=args.pattern,
                mask_pattern=args.mask_pattern,
                axis=args.axis,
                value_range=value_range,
                **{
                    option: value
                    for option, value in _given(args).items()
                    if option in MEASURES[name].options
                },
            )
            for name in names
        ]
        if any(result.settings.get("masks paired by") == "order" for result in results):
            note("masks and images have other names, and were paired in the order of their names")
        write_out(_render(results, args.format), args.output, force=args.force)
        return DONE


def _names(args: argparse.Namespace) -> list[str]:
    from pocketize.passes.complexity.registry import MEASURES

    asked = list(dict.fromkeys(args.measures or ["jpeg"]))
    if _ALL in asked:
        asked = [
            name
            for name, each in MEASURES.items()
            if args.masks is not None or not each.needs_masks
        ]
    without = [name for name in asked if MEASURES[name].needs_masks and args.masks is None]
    if without:
        raise UsageError(f"{without[0]} needs masks: add --masks DIR")
    for option in _given(args):
        if not any(option in MEASURES[name].options for name in asked):
            raise UsageError(
                f"{'-' if option == 'w' else '--'}{option} is no option of {', '.join(asked)}"
            )
    if args.size == "file" and not any(name in _OVER_SIZE for name in asked):
        raise UsageError(f"--size is an option of jpeg and jb, not of {', '.join(asked)}")
    if args.masks is not None and not any(MEASURES[name].needs_masks for name in asked):
        raise UsageError(f"--masks is for foreground and jb, not for {', '.join(asked)}")
    return asked


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The measures' own options that were given."""
    own = {"foreground": args.foreground, "quality": args.quality, "w": _number_or_name(args.w)}
    return {name: value for name, value in own.items() if value is not None}


def _number_or_name(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--range: expected LOW,HIGH, such as 0,4095, got {text!r}") from error
    return low, high


def _render(results: list[Complexity], layout: str) -> str:
    if layout == "json":
        return json.dumps([result.to_dict() for result in results], indent=2)
    if len(results) > 1:
        from pocketize.passes.complexity.dataset import compare_measures

        return compare_measures(results, markdown=layout == "markdown")
    return results[0].to_markdown() if layout == "markdown" else repr(results[0])
