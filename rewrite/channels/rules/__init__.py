"""Channel rules: one for each operator, in a table that third parties extend."""

from __future__ import annotations

__all__ = [
    "Call",
    "LayerChannels",
    "Rule",
    "apply_rule",
    "channel_rule",
    "has_rule",
    "sums_or_maps",
    "unlabelled",
]

from pocketize.channels.rules import contractions, layers, movement, parts  # noqa: F401  (fill the table)
from pocketize.channels.rules.table import (
    Call,
    LayerChannels,
    Rule,
    apply_rule,
    channel_rule,
    has_rule,
    sums_or_maps,
    unlabelled,
)
