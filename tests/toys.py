"""Small passes and a small net for tests of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.edits import Redraw

__all__ = ["INPUT", "Fresh", "Halve", "Idle", "Net", "tensors_equal", "toy"]

INPUT = "2x3x8x8"


class Net(nn.Module):
    """Conv, norm, conv with a skip, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.join = nn.Conv2d(20, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        y = torch.cat([y, self.norm(self.deep(y)).relu()], 1)
        return self.head(self.join(y).relu())

    def widths(self) -> list[int]:
        return [m.out_channels for m in (self.stem, self.deep, self.join, self.head)]


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    """Halve every group that matches a pattern."""

    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "Halve widths"
    only: str = "*"

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.APPROXIMATE

    def propose(self, target: Target) -> Proposal:
        channels = target.channels()
        free = [g for g in channels.matching(self.only) if not g.frozen and g.units > 1]
        return Proposal(
            channels.resize({g: np.arange(g.units // 2) for g in free}),
            tuple(Change(g.name, f"{g.units} -> {g.units // 2}") for g in free),
            tuple(Refusal(g.name, g.frozen) for g in channels.groups if g.frozen and g.layers),
        )


@dataclass(frozen=True, kw_only=True)
class Fresh(Pass):
    """Draw all weights anew; says a number that it has drawn itself."""

    name: ClassVar[str] = "fresh"
    summary: ClassVar[str] = "Draw weights"

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.RETRAIN

    def propose(self, target: Target) -> Proposal:
        drawn = torch.rand(1, generator=target.generator).item()
        return Proposal((Redraw(),), (Change("", "drawn anew"),), notes=(f"drew {drawn:.6f}",))


@dataclass(frozen=True, kw_only=True)
class Idle(Pass):
    """Find nothing to do."""

    name: ClassVar[str] = "idle"
    summary: ClassVar[str] = "Nothing"
    reasons: tuple[str, ...] = ()

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.EXACT

    def propose(self, target: Target) -> Proposal:
        return Proposal(refused=tuple(Refusal("stem", why) for why in self.reasons))


def toy(name: str, after: tuple[str, ...] = (), conflicts: tuple[str, ...] = ()) -> Pass:
    """A pass that does nothing, with a place in the order."""
    body: dict[str, Any] = {"name": name, "after": after, "conflicts": conflicts}
    return dataclass(frozen=True, kw_only=True)(type(name.title(), (Idle,), body))()


def tensors_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same state."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].shape == right[k].shape and torch.equal(left[k], right[k]) for k in left
    )
