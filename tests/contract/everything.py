"""All checks: importing this fills the table."""

from __future__ import annotations

from tests.contract import checks, exact, hooks  # noqa: F401  (importing registers)
from tests.contract.checking import CHECKS, Check, failures

__all__ = ["CHECKS", "Check", "failures"]
