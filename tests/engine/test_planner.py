"""The planner: what the check finds is frozen and told, the rest still moves; nonsense ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketize.engine.pipeline import PassPlan, Plan, plan, pocketize, rewrite
from pocketize.errors import RewriteError, VerifyError
from pocketize.passes import Pocket
from pocketize.plugin.base import Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.edits import Edit, Resize, SetAttribute
from tests.contract.snapshot import Snapshot
from tests.models import get

INPUT = "2x3x8x8"


class Toy(Pass):
    summary: ClassVar[str] = "for tests"

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.APPROXIMATE


class Between(nn.Module):
    """stem -> a function -> tail -> head; the tail moves whatever happens to the stem."""

    def __init__(self, function: Callable[[Tensor], Any], out: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.function = function
        self.tail = nn.Conv2d(out, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.function(self.stem(x))).relu())


def planned(model: nn.Module) -> PassPlan:
    return plan(model, Pocket(width=4), inputs=INPUT).passes[0]


def small(model: nn.Module) -> Any:
    """The pocket net; it must run and train."""
    found = pocketize(model, 4, inputs=INPUT)
    found(torch.rand(2, 3, 8, 8)).sum().backward()
    return found


# -- sizes in the forward ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "out", "operator"),
    [
        (lambda y: y.reshape(len(y), 8, -1, y.shape[-1]), 8, "aten.reshape"),
        (lambda y: y.reshape(len(y), 8, -1).unflatten(2, y.shape[2:]), 8, "aten.reshape"),
        (lambda y: y.split([5, 3], 1)[0], 5, "aten.split_with_sizes"),
        (lambda y: y[:, :5], 5, "aten.slice"),
        (lambda y: y * torch.arange(8.0).view(8, 1, 1), 8, "aten.arange"),
        (lambda y: y.relu() if y.shape[1] == 8 else y, 8, "aten.relu"),
    ],
    ids=["view", "flatten", "split", "slice", "constant", "branch"],
)
def test_a_size_in_the_forward_freezes_there_with_the_reason_and_the_rest_moves(
    function: Callable[[Tensor], Tensor], out: int, operator: str
) -> None:
    model = Between(function, out)
    refusal = next(r for r in planned(model).refused if r.path == "stem")
    assert refusal.why.startswith(f"{out} channels: the check found that it cannot change: ")
    assert operator in refusal.why
    assert "test_planner.py:" in refusal.why
    result = small(model)
    assert (result.stem.out_channels, result.tail.out_channels) == (8, 4)


def test_heads_of_a_fixed_size_move_in_whole_heads() -> None:
    """First every head is taken to shrink; the check finds the literal, and heads go instead."""
    model = Between(lambda y: y.unflatten(1, (-1, 2)).flip(2).flatten(1, 2))
    result = small(model)
    assert (result.stem.out_channels, result.tail.in_channels) == (4, 4)
    resize = {e.tensor: e for e in planned(model).edits if isinstance(e, Resize) and e.axis == 0}
    kept = resize["stem.weight"].keep
    assert all((i + 1 in kept) if i % 2 == 0 else (i - 1 in kept) for i in kept)


def test_a_fixed_number_of_heads_lets_every_head_shrink() -> None:
    model = Between(lambda y: y.unflatten(1, (2, -1)).flip(1).flatten(1, 2))
    assert small(model).stem.out_channels == 4
    resize = {e.tensor: e for e in planned(model).edits if isinstance(e, Resize) and e.axis == 0}
    first = [i for i in resize["stem.weight"].keep if i < 4]
    assert [i + 4 for i in first] == [i for i in resize["stem.weight"].keep if i >= 4]


class Two(nn.Module):
    """Two places that know their size, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)
        self.c, self.head = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(y.reshape(len(y), 8, -1, y.shape[-1]))
        return self.head(self.c(y.reshape(len(y), 16, -1, y.shape[-1])))


def test_several_places_are_found_one_after_the_other() -> None:
    result = small(Two())
    assert [m.out_channels for m in (result.a, result.b, result.c)] == [8, 16, 4]


def test_what_was_frozen_is_logged_for_those_who_look(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pocketize"):
        planned(Two())
    assert sum(message.startswith("pocket: aten.reshape") for message in caplog.messages) == 2


# -- sizes in attributes -------------------------------------------------------------------------


class Sizes(NamedTuple):
    width: int
    other: int


class Remembers(Between):
    """A size that the constructor has put into an attribute, as most code does."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(torch.relu)
        self.__dict__.update(attributes)
        self.inner = nn.Module()
        self.inner.__dict__.update(attributes)

    def width(self) -> int:
        return self.size

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y.reshape(len(y), self.width(), -1, y.shape[-1])
        return self.head(self.tail(y).relu())


class InTuple(Remembers):
    def width(self) -> int:
        return self.sizes[1]


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (lambda: Remembers(size=8), "size", 4),
        (lambda: InTuple(sizes=(3, 8)), "sizes", (3, 4)),
        (lambda: InTuple(sizes=[3, 8]), "sizes", [3, 4]),
        (lambda: InTuple(sizes=Sizes(3, 8)), "sizes", Sizes(3, 4)),
    ],
    ids=["int", "tuple", "list", "named tuple"],
)
def test_an_attribute_that_holds_the_size_follows_and_the_plan_says_so(
    make: Callable[[], Any], name: str, expected: Any
) -> None:
    found = planned(make())
    (row,) = (change for change in found.changes if change.why == "its forward reads it")
    assert (row.path, row.what.partition(" ")[2]) == ("", "8 -> 4")
    assert row.what.startswith(name)
    result = small(make())
    assert getattr(result, name) == expected
    assert type(getattr(result, name)) is type(expected)
    assert result.stem.out_channels == 4
    assert getattr(result.inner, name) == make().__dict__[name]  # nothing reads that one


def test_of_two_attributes_of_that_value_the_one_that_is_read_follows() -> None:
    class Many(Remembers):
        def __init__(self) -> None:
            super().__init__(epochs=8, size=8, tail_width=8)

    result = small(Many())
    assert (result.epochs, result.size, result.tail_width) == (8, 4, 8)


def test_an_attribute_of_an_owner_further_up_follows() -> None:
    class Block(nn.Module):
        def __init__(self, owner: Any) -> None:
            super().__init__()
            self.get = owner.width
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor, width: int) -> Tensor:
            y = self.conv(x)
            return y.reshape(len(y), width, -1, y.shape[-1])

    class Owner(nn.Module):
        width = 0

        def __init__(self) -> None:
            super().__init__()
            self.features = 8
            self.block, self.head = Block(self), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x, self.features))

    result = small(Owner())
    assert result.features == 4
    assert result.block.conv.out_channels == 4


def test_a_boolean_is_no_size() -> None:
    class Flag(Between):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.flag = True

    assert small(Flag()).flag is True


# -- backward ------------------------------------------------------------------------------------


class Sized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.full((8, 1, 1), 2.0)


def test_a_backward_written_for_one_size_freezes_there_and_the_rest_moves() -> None:
    model = Between(lambda y: Sized.apply(y))  # type: ignore[no-untyped-call]
    found = planned(model)
    (refusal,) = (r for r in found.refused if r.path == "stem")
    assert "the check found that it cannot change: its backward: " in refusal.why
    result = small(model)
    assert (result.stem.out_channels, result.tail.out_channels) == (8, 4)


# -- passes that are wrong -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Nonsense(Toy):
    """Proposes the same wrong edits, whatever it is told."""

    name: ClassVar[str] = "nonsense"
    looks: bool = True

    def propose(self, target: Target) -> Proposal:
        if self.looks:
            target.channels()
        return Proposal(self.edits())

    def edits(self) -> tuple[Edit, ...]:
        return (Resize("head.weight", 0, (0,), 2), Resize("head.bias", 0, (0,), 2))


@dataclass(frozen=True, kw_only=True)
class Torn(Nonsense):
    name: ClassVar[str] = "torn"

    def edits(self) -> tuple[Edit, ...]:
        return (Resize("stem.weight", 0, (0, 1), 8), Resize("stem.bias", 0, (0, 2), 8))


@dataclass(frozen=True, kw_only=True)
class Unfit(Nonsense):
    name: ClassVar[str] = "unfit"

    def edits(self) -> tuple[Edit, ...]:
        return (Resize("stem.wait", 0, (0, 1), 8),)


@dataclass(frozen=True, kw_only=True)
class WrongAttribute(Nonsense):
    name: ClassVar[str] = "wrong-attribute"

    def edits(self) -> tuple[Edit, ...]:
        return (SetAttribute("stem", "groups", 1, 2),)


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        (Nonsense, VerifyError, "nonsense: the rewritten model does not run as predicted, whatever "
         "is left out; last at .*the outputs have other shapes"),
        (Torn, VerifyError, "torn: index 1 of stem.bias axis 0 is dropped, but index 1 of "
         "stem.weight axis 0, which is the same channel, stays"),
        (Unfit, RewriteError, "no such parameter or buffer.*Did you mean 'stem.weight'"),
        (WrongAttribute, VerifyError, "wrong-attribute: .*aten.conv2d"),
    ],
)  # fmt: skip
def test_a_pass_that_proposes_nonsense_ends_in_an_error_and_the_model_is_untouched(
    kind: type[Nonsense], error: type[Exception], says: str, looks: bool
) -> None:
    model = Between(torch.relu)
    before = Snapshot(model)
    with pytest.raises(error, match=says):
        rewrite(model, kind(looks=looks), inputs=INPUT, inplace=True)
    assert list(before.differences(Snapshot(model))) == []


def test_a_pass_that_raises_is_not_swallowed() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Raises(Toy):
        name: ClassVar[str] = "raises"

        def propose(self, target: Target) -> Proposal:
            raise LookupError("its own")

    with pytest.raises(LookupError, match="its own"):
        plan(Between(torch.relu), Raises(), inputs=INPUT)


# -- what a pass is asked ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Looks(Toy):
    """Halves the stem; tells what it saw."""

    name: ClassVar[str] = "looks"

    def propose(self, target: Target) -> Proposal:
        channels = target.channels()
        assert target.channels() is channels
        assert target.traced(train=True) is target.traced(train=True)
        assert target.traced(train=True).train
        (group,) = channels.matching("stem")
        if group.frozen:
            return Proposal(refused=(Refusal("stem", group.frozen),))
        return Proposal(channels.resize({group: np.arange(group.units // 2)}))


def test_a_pass_is_asked_again_with_what_the_check_has_frozen() -> None:
    model = Between(lambda y: y.reshape(len(y), 8, -1, y.shape[-1]))
    (found,) = plan(model, Looks(), inputs=INPUT).passes
    assert found.edits == ()
    assert "the check found that it cannot change" in found.refused[0].why


def test_a_pass_that_proposes_nothing_costs_no_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Idle(Toy):
        name: ClassVar[str] = "idle"

        def propose(self, target: Target) -> Proposal:
            return Proposal(notes=(target.inputs.describe(),))

    def refuse(*args: Any) -> None:
        raise AssertionError("the channels were analysed")

    monkeypatch.setattr("pocketize.engine.planner.Analysis", refuse)
    found: Plan = plan(Between(torch.relu), Idle(), inputs=INPUT)
    assert found.passes[0].notes == ("2x3x8x8 float32",)


@pytest.mark.parametrize(("weights", "width"), [("slice", 16), ("reset", 4)])
def test_numbers_that_channels_meet_matter_where_channels_keep_their_weights(
    weights: Any, width: int
) -> None:
    net = get("numbers_arange")
    made = pocketize(net.build(), 4, inputs=net.inputs(), weights=weights)
    assert made.get_parameter("stem.weight").shape[0] == width
