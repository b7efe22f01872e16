"""Everything that pocketize raises, as one tree.

::

    PocketizeError                 catch this to catch all of them
    ├── InputError                 example inputs: unreadable, wrong, or none could be guessed
    ├── CaptureError               the model could not be copied, or did not run when recorded
    ├── OptionError                an option of a pass: unknown, of the wrong type, out of range
    ├── PatternError               a path pattern that matches nothing in the model
    ├── RewriteError               a rewrite that failed; the caller's model is as it was
    │   ├── OrderError             passes in an order that one of them excludes
    │   └── VerifyError            the rewritten model did not do what the plan predicted
    ├── ExecutionError             a rewritten network in a situation that one of its passes does
    │                              not support; also a RuntimeError
    ├── RegistryError              passes and commands by name: unknown, registered twice, broken
    ├── RecipeError                a recipe file: not TOML, unknown keys, wrong values
    ├── ArtifactError              saved models: truncated, not ours, made by another version,
    │                              or not fitting the factory
    ├── ModelError                 no model: a class, weights; or one named on the command line that
    │                              is not found or does not build
    ├── MeasureError               a measurement that could not be made
    ├── PlanningError              widths that cannot be planned: points, complexities, a cache
    │   └── BudgetError            a budget that no widths meet; it names the smallest possible
    └── ReportError                a comparison's JSON, or a threshold on it, that cannot be read

    PocketizeWarning (UserWarning)
    ├── UnreadWarning              what no recorded forward reads may read what is resized
    ├── NoEffectWarning            a pass changed nothing at all
    └── CropWarning                what was looked for reaches the border of a crop
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BudgetError",
    "CaptureError",
    "CropWarning",
    "ExecutionError",
    "FitError",
    "InputError",
    "MeasureError",
    "ModelError",
    "NoEffectWarning",
    "OptionError",
    "OrderError",
    "PatternError",
    "PlanningError",
    "PocketizeError",
    "PocketizeWarning",
    "RecipeError",
    "RegistryError",
    "ReportError",
    "RewriteError",
    "UnreadWarning",
    "VerifyError",
    "brief",
    "nearest",
]

import difflib
from collections.abc import Iterable

from pocketize.untrusted import printable


class _Printable(Exception):
    """Its text may contain names of files and modules, and is printed to terminals."""

    def __str__(self) -> str:
        return printable(super().__str__())


class PocketizeError(_Printable):
    """Base class of every error that pocketize raises on purpose."""


class InputError(PocketizeError):
    """Example inputs that cannot be read, do not fit the model, or could not be guessed."""


class CaptureError(PocketizeError):
    """The model could not be copied or did not run while its graph was recorded."""


class OptionError(PocketizeError, ValueError):
    """An option of a pass is unknown, has the wrong type or is out of range."""


class PatternError(PocketizeError, ValueError):
    """A path or a path pattern that names nothing in the model."""


class RewriteError(PocketizeError):
    """A rewrite failed. The caller's model is as it was before the call."""


class OrderError(RewriteError):
    """Passes were given in an order or combination that one of them excludes."""


class VerifyError(RewriteError):
    """The rewritten model does not do what the plan predicted."""


class ExecutionError(PocketizeError, RuntimeError):
    """A rewritten network runs in a situation that one of its passes does not support.

    The text names the pass, the situation and what to do. It is a ``RuntimeError``, as torch's own
    errors in such situations are: weights written between forward and backward, for one.
    """


class RegistryError(PocketizeError):
    """A pass or a command is unknown, registered twice under one name, or broken."""


class RecipeError(PocketizeError):
    """A recipe that is not TOML, has unknown keys or values of the wrong type."""


class ArtifactError(PocketizeError):
    """A saved model that cannot be read or does not fit the factory it is loaded into."""


class ModelError(PocketizeError):
    """Something else was given for a model, or one named in text cannot be found or built."""


class MeasureError(PocketizeError):
    """A memory or time measurement that could not be made."""


class PlanningError(PocketizeError, ValueError):
    """Widths cannot be planned from what was given: trained points, complexities, a cache."""


class BudgetError(PlanningError):
    """No widths meet a budget. The text names the smallest budget that some widths meet."""


class FitError(PocketizeError):
    """No way to run a network fits a memory budget, or the budget is none.

    The text names the least peak found for each guarantee.
    """


class ReportError(PocketizeError):
    """A comparison's JSON, or a threshold on a comparison, that cannot be read."""


class PocketizeWarning(_Printable, UserWarning):
    """Base class of the warnings that pocketize gives."""


class UnreadWarning(PocketizeWarning):
    """Parameters that no recorded forward reads may read channels that are resized."""


class NoEffectWarning(PocketizeWarning):
    """A pass was applied and changed nothing."""


class CropWarning(PocketizeWarning):
    """A prediction's foreground reaches the border of the crop that it was made on."""


def brief(error: Exception, length: int = 300) -> str:
    """Return the class and the text of an error in one line, of at most ``length`` characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= length else f"{text[: length - 3]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant: ``" Did you mean 'pocket'?"``, or ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
