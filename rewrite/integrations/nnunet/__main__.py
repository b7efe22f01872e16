"""``python -m pocketize.integrations.nnunet``: print the folder for ``nnUNet_extTrainer``.

``python -m pocketize.integrations.nnunet predict ...`` is ``nnUNetv2_predict ...``, whose export
never holds resampled logits; with ``--exact`` it predicts whole volumes instead of windows.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from pocketize.integrations.nnunet.folder import trainer_folder


def predict(arguments: list[str]) -> None:
    """Run nnU-Net's command with the options that are its own."""
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    from pocketize.integrations.nnunet.exact import exact_prediction
    from pocketize.integrations.nnunet.export import lean_export

    parser = argparse.ArgumentParser("predict", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--exact",
        nargs="?",
        const=(),
        type=_sizes,
        metavar="SIZE",
        help="predict whole volumes by exact tiles, of the patch's size or of 96x96x96 voxels",
    )
    parser.add_argument(
        "--keep",
        choices=("device", "host", "disk"),
        default="host",
        help="with --exact: where results wait between loops over the tiles (default: host)",
    )
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(f"{parser.format_help()}\nand the options of nnU-Net:\n\n")
    given, sys.argv[1:] = parser.parse_known_args(arguments)
    exact: Any = contextlib.nullcontext()
    if given.exact is not None:
        exact = exact_prediction(given.exact or None, keep=given.keep)
    with lean_export(), exact:
        predict_entry_point()


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected voxels, such as 96x96x96, got {text!r}")
    return tuple(map(int, parts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["predict"]:
        predict(sys.argv[2:])
    elif sys.argv[1:2] in (["-h"], ["--help"]):
        sys.stdout.write(f"{__doc__}\n")
    elif sys.argv[1:]:
        sys.exit(f"unknown: {sys.argv[1]!r}; give nothing, or predict and nnU-Net's options")
    else:
        sys.stdout.write(f"{trainer_folder()}\n")
