"""The table the look-alikes register in."""

from __future__ import annotations

from tests.models.registry import Table

_TABLE = Table()
net, register, lookalike_nets = _TABLE.net, _TABLE.register, _TABLE.nets
