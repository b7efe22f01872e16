"""Optional packages: what is missing is an error that says how to get it."""

from __future__ import annotations

__all__ = ["needed_for"]

import contextlib
from collections.abc import Iterator

from pocketize.errors import OptionError


@contextlib.contextmanager
def needed_for(purpose: str, package: str) -> Iterator[None]:
    """Import an optional package inside, or fail with what to install.

    Args:
        purpose: what it is needed for, as the subject of a sentence in the plural.
        package: its name on PyPI.

    Raises:
        OptionError: the import inside failed.
    """
    try:
        yield
    except ImportError as error:
        raise OptionError(
            f"{purpose} need {package}, which cannot be imported ({error}): "
            "pip install 'pocketize[complexity]'"
        ) from error
