"""One rewritten net with all that the checks compare it to."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pocketize.engine.pipeline import PassPlan, plan, rewrite
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs, as_inputs
from pocketize.plugin.base import Guarantee, Pass
from tests.contract.rounds import whole
from tests.contract.snapshot import Snapshot
from tests.models.registry import Net

__all__ = ["Case", "make_case", "seeded"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A net before and after one pass, or several in a row.

    Attributes:
        build: makes the original anew, with the same weights.
        inputs: example inputs.
        guarantee: what the pass claims to keep; of several, the weakest claim.
        original: the very module that was handed to the rewrite.
        before: that module as it was before the rewrite.
        rewritten: what came back.
        again: runs the same passes on another module.
        in_place: carries the same plan out on a module of that kind itself.
        plan: the plan the rewrite followed; None for rewrites that are no passes.
        passes: how many passes were given.
        reference: makes the net that the rewritten one must equal exactly: the original where all
            passes are EXACT, and otherwise the net as the passes that are not leave it. None where
            no pass is.
        known: what was found out about the reference, shared by the cases that have it in common.
        net: the test net with its expectations; None for nets that state none.
        repeatable: two runs of the net in eval mode give the same values.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs
    guarantee: Guarantee
    original: nn.Module
    before: Snapshot
    rewritten: nn.Module
    again: Callable[[nn.Module], nn.Module]
    in_place: Callable[[nn.Module], nn.Module]
    plan: PassPlan | None = None
    passes: int = 1
    reference: Callable[[], nn.Module] | None = None
    known: dict[object, Any] = field(default_factory=dict)
    net: Net | None = None
    repeatable: bool = True

    _runs: dict[tuple[bool, bool | None], Any] = field(default_factory=dict, init=False)

    def output(self, *, rewritten: bool, train: bool | None) -> Any:
        """A forward of a copy of either side, run once for all checks.

        The random numbers it draws are the same on both sides and on every call.

        Args:
            rewritten: of the rewritten model, otherwise of the original.
            train: the mode; None as the flags stand, module by module.
        """
        key = rewritten, train
        if key not in self._runs:
            self._runs[key] = self.run(self.fresh() if rewritten else self.build(), train)
        return self._runs[key]

    def run(self, model: nn.Module, train: bool | None) -> Any:
        """The same of any model, which keeps the mode."""
        if train is not None:
            model.train(train)
        with seeded(), torch.no_grad():
            return self.inputs.call(model)

    def fresh(self) -> nn.Module:
        """A copy of the rewritten model that a check may change."""
        return clone(self.rewritten)

    def can_be_copied(self) -> bool:
        """Whether copy.deepcopy works on the original; if it does, it must on the rewritten."""
        try:
            copy.deepcopy(self.build())
        except RuntimeError:  # torch's word for a non-leaf tensor
            return False
        return True


@contextlib.contextmanager
def seeded(seed: int = 7) -> Iterator[None]:
    """The same random numbers for every run, and the caller's generator kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_case(net: Net, *given: Pass, seed: int | None = None) -> Case:
    """Plan and apply passes to a test net, watching the original."""
    inputs: Inputs = as_inputs(net.inputs(), net.build())
    original = net.build()
    before = Snapshot(original)
    planned = plan(original, *given, inputs=inputs, seed=seed)
    rewritten = planned.apply()

    def again(model: nn.Module) -> nn.Module:
        return rewrite(model, *given, inputs=inputs, seed=seed)

    def in_place(model: nn.Module) -> nn.Module:
        return replace(planned, model=model).apply(inplace=True)

    inexact = tuple(p for p in given if p.guarantee is not Guarantee.EXACT)
    base: Callable[[], nn.Module] | None = None
    if not inexact:
        base = net.build
    elif len(inexact) < len(given):
        base = plan(net.build(), *inexact, inputs=inputs, seed=seed).apply
    return Case(
        build=net.build,
        inputs=inputs,
        guarantee=weakest(p.guarantee for p in given),
        original=original,
        before=before,
        rewritten=rewritten,
        again=again,
        in_place=in_place,
        plan=whole(planned),
        passes=len(given),
        reference=base,
        known=_shared((net.name, *map(str, inexact))),
        net=net,
        repeatable=net.repeatable,
    )


def weakest(claims: Iterable[Guarantee]) -> Guarantee:
    """What several passes keep together; guarantees are listed from the most to the least."""
    order = list(Guarantee)
    return max(claims, key=order.index)


@functools.lru_cache(maxsize=8)
def _shared(key: tuple[str, ...]) -> dict[object, Any]:
    """What is known of the latest references: the rows of a net follow each other."""
    return {}
