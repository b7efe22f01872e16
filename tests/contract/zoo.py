"""All test nets, as parameters of a test."""

from __future__ import annotations

from typing import Any

import pytest

from tests.foreign import foreign_nets
from tests.lookalikes import lookalike_nets
from tests.models import nets
from tests.models.registry import Net

__all__ = ["every_net", "parameters"]


def every_net() -> list[Net]:
    """The awkward, the look-alikes and the foreign."""
    return [*nets(), *lookalike_nets(), *foreign_nets()]


def parameters(*, broken: bool = False) -> list[Any]:
    """Nets for ``parametrize``; those that no rewrite can take only with ``broken``."""
    return [
        pytest.param(net, id=net.name, marks=[pytest.mark.slow] if "slow" in net.tags else [])
        for net in every_net()
        if (net.error is None) != broken
    ]
