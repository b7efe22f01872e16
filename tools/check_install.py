"""Check that an installed pocketize stands on its own, away from the checkout.

Run it with the environment's Python, from another folder::

    python tools/check_install.py /path/to/the/checkout
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
from pathlib import Path


def main(checkout: Path) -> None:
    # This script's own folder leads sys.path; nothing of the checkout may help the import.
    sys.path = [
        entry for entry in sys.path if not Path(entry or ".").resolve().is_relative_to(checkout)
    ]
    package = importlib.import_module("pocketize")
    home = Path(package.__file__ or "").resolve().parent
    if home.is_relative_to(checkout):
        sys.exit(f"pocketize was imported from the checkout ({home}), not from the installation")
    if not (home / "py.typed").is_file():
        sys.exit("py.typed was not installed: type checkers will not see the annotations")

    names = [found.name for found in pkgutil.walk_packages(package.__path__, "pocketize.")]
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # noqa: PERF203
            # an integration needs the tool that it is for
            ours = (error.name or "").startswith("pocketize")
            if ours or not name.startswith("pocketize.integrations."):
                raise
    passes = importlib.metadata.entry_points(group="pocketize.passes")
    commands = importlib.metadata.entry_points(group="pocketize.commands")
    for entry in (*passes, *commands):
        entry.load()

    import torch

    if torch.cuda.is_initialized():
        sys.exit("importing pocketize initialised CUDA")
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    if missing:
        sys.exit(f"pocketize.__all__ names what is not there: {', '.join(missing)}")
    counts = f"{len(names)} modules, {len(passes)} passes and {len(commands)} commands"
    sys.stdout.write(f"{counts} import from {home.name}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
