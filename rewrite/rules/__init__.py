"""Channel rules: one for each operator, in a table that third parties extend."""

from __future__ import annotations

__all__ = [
    "Call",
    "Rule",
    "Site",
    "apply_rule",
    "bind",
    "channel_rule",
    "has_rule",
    "operator_name",
    "sums_or_maps",
    "unlabelled",
]

from pocketize.rules import contractions, layers, movement, parts  # noqa: F401  (fill the table)
from pocketize.rules.table import (
    Call,
    Rule,
    Site,
    apply_rule,
    bind,
    channel_rule,
    has_rule,
    operator_name,
    sums_or_maps,
    unlabelled,
)
