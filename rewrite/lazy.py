"""Import the names of a package on first use.

A part that cannot be imported then breaks nothing else, and ``pocketize --help`` does not import
torch.
"""

from __future__ import annotations

__all__ = ["attach"]

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def attach(package: str, exports: Mapping[str, str]) -> None:
    """Let a package import what it exports when it is asked for, and its submodules too.

    Args:
        package: name of the package.
        exports: names for each module, without ``package.``, that has them; separated by spaces.
    """
    modules = {name: module for module, names in exports.items() for name in names.split()}

    class Package(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in modules:
                return getattr(import_module(f"{package}.{modules[name]}"), name)
            if not name.startswith("_"):
                try:
                    return import_module(f"{package}.{name}")
                except ModuleNotFoundError as error:
                    if error.name != f"{package}.{name}":
                        raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            # The import system sets a submodule on its package, where a function may have its name.
            if isinstance(value, ModuleType) and name in modules:
                value = getattr(value, name)
            super().__setattr__(name, value)

        def __dir__(self) -> Iterable[str]:
            return sorted({*vars(self), *modules})

    sys.modules[package].__class__ = Package
