"""How many channels or kernels are inside a block, by a rule for each layer or for all at once."""

from __future__ import annotations

__all__ = ["RankTable", "allot", "read_ratio"]

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Prices of a parameter between which is looked, and how often their interval is halved.
_PRICES = 1e-15, 1e3
_HALVINGS = 60
#: A smaller share of a weight's squared norm is as good as nothing.
_NOTHING = 1e-12


@dataclass(frozen=True)
class RankTable:
    """What the ranks of a block keep of a convolution's weight, and what they cost.

    Attributes:
        kept: share of the weight's squared norm; at index [a - 1, b - 1] that of ranks (a, b).
        cost: parameters, of the same shape.
    """

    kept: Tensor
    cost: Tensor

    def cheapest(self, share: float, rounding: float) -> tuple[int, ...]:
        """Return the ranks with the fewest parameters among those that keep enough.

        Args:
            share: how much is to be kept.
            rounding: how much less than that is still enough.
        """
        enough = (self.kept >= share - rounding).contiguous()
        enough.view(-1)[-1] = True  # all ranks keep everything, up to rounding
        return self._least(torch.where(enough, self.cost.to(torch.float64), torch.inf))

    def at_price(self, price: float, before: float) -> tuple[int, ...] | None:
        """Return the ranks with the least loss, ``-log(kept)``, and parameters, which have a price.

        None if the convolution itself, of ``before`` parameters, has less.
        """
        loss = price * self.cost - self.kept.clamp(min=_NOTHING).log()
        return self._least(loss) if float(loss.min()) < price * before else None

    def parameters(self, ranks: Sequence[int]) -> int:
        """Return what these ranks cost."""
        return int(self.cost[tuple(rank - 1 for rank in ranks)])

    def _least(self, loss: Tensor) -> tuple[int, ...]:
        place = torch.unravel_index(loss.argmin(), loss.shape)
        return tuple(int(index) + 1 for index in place)


def allot(
    tables: Sequence[RankTable], before: Sequence[float], most: int
) -> list[tuple[int, ...] | None]:
    """Spread parameters over convolutions, so that the product of what weights keep is largest.

    The product, and not the sum: no weight loses everything, which no other makes up for. By a
    Lagrange multiplier, the price of a parameter: Shoham, Gersho, "Efficient bit allocation for an
    arbitrary set of quantizers", IEEE Trans. ASSP 36, 1988. So it is the largest among all choices
    with as many parameters or fewer, which may be a few below ``most``.

    Args:
        tables: of the convolutions' blocks.
        before: parameters of the convolutions, infinity for one that must not stay.
        most: parameters in all.

    Returns:
        The ranks, None for a convolution that stays; of the fewest parameters if ``most`` is less.
    """

    def taken(price: float) -> list[tuple[int, ...] | None]:
        return [table.at_price(price, n) for table, n in zip(tables, before, strict=True)]

    low, high = _PRICES
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        ranks = taken(middle)
        costs = (
            n if each is None else table.parameters(each)
            for each, table, n in zip(ranks, tables, before, strict=True)
        )
        low, high = (low, middle) if sum(costs) <= most else (middle, high)
    return taken(high)


def read_ratio(ratio: int | str | None) -> tuple[str, float] | None:
    """Read ``"energy:0.95"`` or ``"params:0.25"``; None of a number or of none.

    Raises:
        ValueError: it is something else.
    """
    if ratio is None or (isinstance(ratio, int) and ratio >= 1):
        return None
    if isinstance(ratio, str):
        word, _, number = ratio.partition(":")
        share = float(number)
        if word in ("energy", "params") and 0.0 < share <= 1.0:
            return word, share
    raise ValueError(ratio)
