"""The table of checks, and how they are run: all of them, each failure told with its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tests.contract.case import Case

__all__ = ["CHECKS", "Check", "check", "failures", "require"]

Check = Callable[[Case], None]
CHECKS: dict[str, Check] = {}
"""Name -> check; filled by the modules that define them."""


def check(function: Check) -> Check:
    """Put a check on the table."""
    CHECKS[function.__name__] = function
    return function


def failures(
    case: Case, names: Iterable[str] | None = None, promise: Check | None = None
) -> list[str]:
    """Run the checks, and what one pass promises beyond them, and say which failed, all of them."""
    chosen = dict(CHECKS) if names is None else {name: CHECKS[name] for name in names}
    if promise is not None:
        chosen[promise.__name__] = promise
    reports = (_report(name, check, case) for name, check in chosen.items())
    return [report for report in reports if report]


def _report(name: str, check: Check, case: Case) -> str:
    try:
        check(case)
    except AssertionError as error:
        return f"{name}: {error}"
    except Exception as error:  # a rewritten model may fail in any way; tell which check met it
        return f"{name}: {type(error).__name__}: {error}"
    return ""


def require(problems: Iterable[str]) -> None:
    """Raise if there is any problem, listing the first few."""
    listed = list(problems)
    if listed:
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise AssertionError("; ".join(listed[:8]) + more)
