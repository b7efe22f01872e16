"""``python -m pocketize`` is the command ``pocketize``."""

from __future__ import annotations

__all__: list[str] = []

import os
import sys

if __name__ == "__main__":
    # `python -m` puts the current folder first, where any file could stand for an installed package
    if not getattr(sys.flags, "safe_path", False) and sys.path[:1] in ([""], [os.getcwd()]):
        del sys.path[0]
    from pocketize.cli import main

    sys.exit(main())
