"""All test nets, as parameters of a test."""

from __future__ import annotations

from collections.abc import Container, Iterable
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


def parameters(
    nets: Iterable[Net] | None = None,
    *,
    broken: bool = False,
    fast: Container[str] | None = None,
) -> list[Any]:
    """Nets for ``parametrize``.

    Args:
        nets: which; all unless told.
        broken: only those that no rewrite can take, and otherwise only the others.
        fast: names of those that are not marked slow; all unless told, but for nets that are.
    """

    def is_slow(net: Net) -> bool:
        return "slow" in net.tags or (fast is not None and net.name not in fast)

    return [
        pytest.param(net, id=net.name, marks=[pytest.mark.slow] if is_slow(net) else [])
        for net in (every_net() if nets is None else nets)
        if (net.error is None) != broken
    ]
