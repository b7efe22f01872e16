"""The version of the installed distribution."""

from __future__ import annotations

__all__ = ["VERSION"]

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("pocketize")
except PackageNotFoundError:  # imported from a source tree that was never installed
    VERSION = "0+unknown"
