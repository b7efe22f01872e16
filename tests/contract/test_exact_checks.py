"""The checks of EXACT find what they are there for: faults that a forward does not show."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import NoEffectWarning
from pocketize.graph.inputs import as_inputs
from pocketize.passes import Pocket
from pocketize.plugin.base import Guarantee
from tests.contract.case import Case, make_case, weakest
from tests.contract.everything import failures
from tests.contract.snapshot import Snapshot
from tests.models.registry import Net, image
from tests.toys import Idle

EXACT = ("exact_outputs", "exact_gradients", "exact_training", "checkpoints_fit_both_ways")


class Learner(nn.Module):
    """What training can go wrong with: statistics, dropout, a branch, state in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Conv2d(6, 2, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.drop(torch.tanh(self.norm(self.stem(x)))))


NET = Net("learner", Learner, image(2, 3, 6, 6))


def keep(model: nn.Module) -> None:
    """The rewrite without a fault."""


def fake_case(fault: Callable[[Any], None] = keep) -> Case:
    """A deep copy of the net with a fault planted in it."""
    original = NET.build()
    before = Snapshot(original)
    rewritten = copy.deepcopy(original)
    fault(rewritten)

    def again(model: nn.Module) -> nn.Module:
        warnings.warn("fake changed nothing", NoEffectWarning, stacklevel=2)
        return copy.deepcopy(model)

    def in_place(model: nn.Module) -> nn.Module:
        fault(model)
        return model

    return Case(
        build=NET.build,
        inputs=as_inputs(NET.inputs()),
        guarantee=Guarantee.EXACT,
        original=original,
        before=before,
        rewritten=rewritten,
        again=again,
        in_place=in_place,
        reference=NET.build,
        net=NET,
    )


def test_a_faultless_rewrite_passes() -> None:
    assert failures(fake_case()) == []


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that is a little off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * (1 + 1e-7)


class WrongInTraining(Learner):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return _Scaled.apply(x) if self.training else x


class WrongInEval(Learner):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.training else _Scaled.apply(x)


class StopsAtInput(Learner):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class DrawsOnce(Learner):
    """One random number more than the net draws, so that dropout drops others."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(())
        return super().forward(x)


class OnlyInTraining(Learner):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (1e-7 if self.training else 0)


class RunsTwice(Learner):
    """A checkpoint that updates running statistics in recomputation too, and counts it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.norm(self.stem(x))
        return super().forward(x)


class CountsTwice(Learner):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += int(self.training and torch.is_grad_enabled())
        return super().forward(x)


class KeepsFirstWeights(Learner):
    """A buffer for the eval mode that is filled once and never again."""

    held: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.held = self.held or [copy.deepcopy(self.head.weight.detach())]
            return super().forward(x)
        if self.held is None:
            return super().forward(x)
        x = torch.tanh(self.norm(self.stem(x)))
        return torch.nn.functional.conv2d(x, self.held[0], self.head.bias)


class SlowsDown(Learner):
    """Right in the first step, not in those that follow."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if not (self.training and torch.is_grad_enabled()):
            return x
        self.steps += 1
        return x if self.steps == 1 else x + (x - x.detach()) * 1e-3


class OtherUnits(Learner):
    """The same function of weights that are kept in half the size."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.drop(torch.tanh(self.norm(self.stem(x))))
        return torch.nn.functional.conv2d(x, 2 * self.head.weight, self.head.bias)


def halve_units(model: Any) -> None:
    model.__class__ = OtherUnits
    model.head.weight.data /= 2


def become(kind: type[Learner]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        model.__class__ = kind

    fault.__name__ = kind.__name__
    return fault


def set_momentum(model: Any) -> None:
    """An attribute that no file holds and no record tells of."""
    model.norm.momentum = 0.5


class HookOfAnother:
    """Holds a module that is not its own, and that no copy takes along."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __deepcopy__(self, memo: Any) -> HookOfAnother:
        return self

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0 * self.module.weight.sum()


def hook_of_the_first_copy(model: Any) -> None:
    model.head.register_forward_hook(HookOfAnother(model.stem))


class WritesElsewhere(HookOfAnother):
    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if module.training:
            self.module.running_mean += 1
        return output


def statistics_of_the_first_copy(model: Any) -> None:
    model.head.register_forward_hook(WritesElsewhere(model.norm))


EXACT_FAULTS: list[tuple[str, Callable[[Any], None]]] = [
    ("exact_outputs", become(OnlyInTraining)),
    ("exact_outputs", become(DrawsOnce)),
    ("exact_gradients", become(WrongInTraining)),
    ("exact_gradients", become(WrongInEval)),
    ("exact_gradients", become(StopsAtInput)),
    ("exact_gradients", become(DrawsOnce)),
    ("exact_gradients", become(RunsTwice)),
    ("exact_training", become(RunsTwice)),
    ("exact_training", become(CountsTwice)),
    ("exact_training", become(KeepsFirstWeights)),
    ("exact_training", become(SlowsDown)),
    ("exact_training", halve_units),
    ("checkpoints_fit_both_ways", halve_units),
    ("resumes", set_momentum),
    ("copies_train", statistics_of_the_first_copy),
    ("copies_train", hook_of_the_first_copy),
]
"""Name of a check and a fault that it must find."""


@pytest.mark.parametrize(("name", "fault"), EXACT_FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_the_check_finds_its_fault(name: str, fault: Callable[[Any], None]) -> None:
    found = failures(fake_case(fault), [name])
    assert len(found) == 1
    assert found[0].startswith(f"{name}: ")


def test_nothing_is_asked_of_a_rewrite_that_claims_nothing_exact() -> None:
    case = replace(fake_case(halve_units), reference=None)
    assert failures(case, EXACT) == []


def test_gradients_that_are_rounding_only_are_measured_by_the_largest() -> None:
    """The bias before a norm has none in theory, and another sum of them in every order."""

    def shuffle(model: Any) -> None:
        model.stem.bias.register_hook(lambda grad: grad.flip(0) if model.training else grad)

    case = fake_case()
    object.__setattr__(case, "fresh", lambda: _with(shuffle))
    assert failures(case, ["exact_gradients"]) == []


def _with(fault: Callable[[Any], None]) -> nn.Module:
    model = NET.build()
    fault(model)
    return model


def test_what_the_untouched_net_cannot_resume_is_not_asked_for() -> None:
    class Forgets(Learner):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            self.scale += 0.5 if self.training else 0
            return super().forward(x) * self.scale

    net = Net("forgets", Forgets, image(2, 3, 6, 6))
    case = replace(fake_case(), build=net.build, rewritten=net.build())
    assert failures(case, ["resumes"]) == []


def test_a_combination_promises_the_weakest_and_is_measured_by_what_is_not_exact() -> None:
    assert weakest([Guarantee.EXACT, Guarantee.RETRAIN, Guarantee.APPROXIMATE]).name == "RETRAIN"
    net = Net("learner", Learner, image(2, 3, 6, 6), width=4)
    alone = make_case(net, Pocket(width=4))
    assert alone.guarantee is Guarantee.APPROXIMATE
    assert alone.reference is None
    both = make_case(net, Pocket(width=4), Idle())
    assert both.guarantee is Guarantee.APPROXIMATE
    assert both.passes == 2
    assert both.reference is not None
    reference: Any = both.reference()
    assert reference.stem.out_channels == 4
    assert failures(both) == []
    both.rewritten.head.bias.data += 1e-6  # type: ignore[union-attr,operator]
    assert [found.partition(":")[0] for found in failures(both, EXACT)] == [
        "exact_outputs",
        "exact_gradients",
        "exact_training",
    ]


def test_the_same_passes_share_what_is_known_of_their_reference() -> None:
    net = Net("learner", Learner, image(2, 3, 6, 6), width=4)
    assert make_case(net, Idle()).known is make_case(net, Idle(reasons=("x",))).known
    assert make_case(net, Idle()).known is not make_case(net, Pocket(width=4), Idle()).known
