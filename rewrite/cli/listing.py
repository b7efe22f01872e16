"""The commands that look: ``passes``, ``zoo`` and ``explain``."""

from __future__ import annotations

__all__ = ["run_explain", "run_passes", "run_zoo"]

import argparse
import importlib
import textwrap

from tabulate import tabulate

from pocketize.cli.common import DONE, UsageError, inputs_of, progress, resolve_model, show
from pocketize.errors import nearest
from pocketize.plugin.registry import PassInfo, get_pass, list_passes


def run_passes(args: argparse.Namespace) -> int:
    """List the passes, or tell about one."""
    if args.name is not None:
        get_pass(args.name)  # for its errors
    shown = [info for info in list_passes() if args.name in (None, info.name)]
    if not shown:
        raise UsageError("no passes are registered; is pocketize installed?")
    show("\n\n".join(_describe(info) for info in shown))
    if args.name is None:
        show("\nEXACT keeps the function, APPROXIMATE the shapes with the weights carried over,")
        show("RETRAIN the shapes. Use them as --pass NAME or --pass NAME:option=value,...")
    return DONE


def _describe(info: PassInfo) -> str:
    if info.error is not None:
        return f"{info.name} (BROKEN)\n{_indent(info.error, 2)}"
    keeps = str(info.guarantee) if info.guarantee is not None else "depends on its options"
    lines = [f"{info.name} ({keeps})", _indent(info.summary, 2)]
    if not info.distribution.startswith("pocketize "):
        lines.append(_indent(f"from {info.distribution}", 2))
    for option in info.options:
        default = "required" if option.default is None else f"default {option.default or repr('')}"
        lines.append(_indent(f"{option.name}: {option.type}; {default}", 4))
        if option.help:
            lines.append(_indent(option.help, 8))
    return "\n".join(lines)


def _indent(text: str, columns: int) -> str:
    margin = " " * columns
    return textwrap.fill(text, 100, initial_indent=margin, subsequent_indent=margin)


def run_zoo(args: argparse.Namespace) -> int:
    """List the bundled networks, or tell about one in full."""
    zoo = importlib.import_module("pocketize.zoo")  # the engine depends on no network
    names = zoo.list_models(args.pattern)
    if not names:
        raise UsageError(
            f"no network matches {args.pattern!r}.{nearest(args.pattern, zoo.list_models())} "
            "`pocketize zoo` lists all"
        )
    infos = [zoo.describe(name) for name in names]
    if len(infos) == 1 and args.pattern == infos[0].name:
        (info,) = infos
        show(f"zoo:{info.name}  {info.summary}\n{info.paper}\n")
        options = [(name, repr(default)) for name, default in info.options.items()]
        show(tabulate(options, headers=("option", "default"), disable_numparse=True))
        return DONE
    rows = [
        (
            f"zoo:{info.name}",
            f"{info.parameters:,}" if info.parameters is not None else "",
            "x".join(map(str, info.input_shape)),
            info.summary,
        )
        for info in infos
    ]
    headers = ("model", "parameters", "input", "")
    show(tabulate(rows, headers=headers, colalign=("left", "right", "left", "left")))
    return DONE


def run_explain(args: argparse.Namespace) -> int:
    """Tell why a layer can be resized, or why not."""
    from pocketize.channels.analysis import analyse

    resolved = resolve_model(args)
    progress("tracing the model and finding its channel groups")
    show(analyse(resolved.model, inputs_of(args, resolved)).explain(args.path))
    return DONE
