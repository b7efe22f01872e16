"""``python -m pocketize`` is the command ``pocketize``."""

from __future__ import annotations

__all__: list[str] = []

import sys

from pocketize.cli import main

if __name__ == "__main__":
    sys.exit(main())
