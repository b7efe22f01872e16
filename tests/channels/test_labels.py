"""The label algebra against a naive one, and labels against moving real indices with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketize.channels.labels import FROZEN, UnionFind, Value, axes_of, squeeze_constant
from tests.board import Board
from tests.chains import Chain, chains
from tests.examples import examples

# The same examples every time: what turns red is then the change at hand.
fixed = settings(deadline=None, derandomize=True, database=None)


def vector(*indices: int) -> Any:
    return np.array(indices, dtype=np.int64)


# -- units ---------------------------------------------------------------------------------------


class Naive:
    """Sets of indices, and one reason each, as simply as can be."""

    def __init__(self, count: int) -> None:
        self.sets = [{index} for index in range(count)]
        self.frozen: list[tuple[set[int], str]] = []

    def of(self, index: int) -> set[int]:
        return next(s for s in self.sets if index in s)

    def unite(self, a: int, b: int, reason: str) -> None:
        if FROZEN in (a, b):
            self.freeze(max(a, b), reason)
        elif self.of(a) is not self.of(b):
            merged = self.of(a) | self.of(b)
            self.sets = [s for s in self.sets if not s & merged] + [merged]

    def freeze(self, index: int, reason: str) -> None:
        if index != FROZEN:
            self.frozen.append(({index}, reason))

    def reason(self, index: int) -> str | None:
        return next((why for indices, why in self.frozen if indices & self.of(index)), None)


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, list[tuple[str, list[int], list[int]]]]:
    """A number of indices, and unions and freezings of vectors of them."""
    count = draw(st.integers(2, 14))
    index = st.integers(0, count - 1)
    made = []
    for _ in range(draw(st.integers(0, 12))):
        size = draw(st.integers(1, 4))
        left = draw(st.lists(index, min_size=size, max_size=size))
        right = draw(st.lists(index, min_size=size, max_size=size))
        made.append((draw(st.sampled_from(["unite", "unite", "unite", "freeze"])), left, right))
    return count, made


@fixed
@given(steps())
def test_units_and_reasons_are_those_of_a_naive_union_find(
    given_steps: tuple[int, list[tuple[str, list[int], list[int]]]],
) -> None:
    count, made = given_steps
    unions, naive = UnionFind(), Naive(count)
    unions.new(count - 1)
    for number, (kind, left, right) in enumerate(made):
        why = f"step {number}"
        if kind == "unite":
            unions.unite(vector(*left), vector(*right), why)
            for a, b in zip(left, right, strict=True):
                naive.unite(a, b, why)
        else:
            unions.freeze(vector(*left), why)
            for a in left:
                naive.freeze(a, why)
    roots, reasons = unions.solve()
    for index in range(1, count):
        assert roots[index] == min(naive.of(index))
        assert reasons.get(int(roots[index])) == naive.reason(index)


@fixed
@given(st.integers(2, 400), st.integers(0, 2**32 - 1))
def test_long_chains_of_unions_are_one_unit_in_any_order(length: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(np.arange(1, length))
    unions = UnionFind()
    unions.new(length)
    for index in order:
        unions.unite(vector(index), vector(index + 1), "")
    roots, _ = unions.solve()
    assert (roots[1:] == 1).all()


def test_a_union_broadcasts() -> None:
    unions = UnionFind()
    a = unions.new(6).reshape(2, 3)
    unions.unite(a, a[:1], "")
    roots, _ = unions.solve()
    assert roots[1:].tolist() == [1, 2, 3, 1, 2, 3]


def test_what_meets_a_frozen_channel_is_frozen_and_nothing_else() -> None:
    unions = UnionFind()
    a = unions.new(3)
    unions.unite(a, vector(FROZEN, FROZEN, a[2]), "met the input")
    roots, reasons = unions.solve()
    assert reasons == {1: "met the input", 2: "met the input"}
    assert roots.tolist() == [0, 1, 2, 3]


def test_the_first_reason_is_told_unless_a_later_one_goes_first() -> None:
    unions = UnionFind()
    a = unions.new(2)
    unions.freeze(a, "early")
    unions.freeze(a, "late")
    unions.freeze(a[:1], "output", first=True)
    _, reasons = unions.solve()
    assert reasons == {1: "output", 2: "early"}


def test_atoms_after_the_seal_belong_to_no_tensor() -> None:
    unions = UnionFind()
    ours = unions.new(2)
    unions.end_of_tensors()
    (label,) = unions.fresh((1, 3), range(2))
    assert label.shape == (1, 3)
    assert unions.is_fresh(label)
    assert not unions.is_fresh(np.concatenate([ours, label.reshape(-1)]))


# -- values --------------------------------------------------------------------------------------


def test_a_value_knows_its_axes() -> None:
    label = vector(1, 2, 3).reshape(1, 3, 1)
    value = Value((5, 3, 1), (label,))
    assert value.axis(-1) == 2
    assert value.label_on(1) is label
    assert value.label_on(0) is None
    assert [value.fixed(axis) for axis in range(3)] == [True, False, False]
    assert value.off(0) == (label,)
    assert value.off(1) == ()


def test_keeping_an_axis_whole_ties_what_lies_along_it() -> None:
    unions = UnionFind()
    label = unions.new(6).reshape(2, 3)
    kept = unions.tie_axes(label, [0], "needs it")
    assert kept.tolist() == [[1, 2, 3]]
    roots, reasons = unions.solve()
    assert roots[1:].tolist() == [1, 2, 3, 1, 2, 3]
    assert reasons == {}


def test_keeping_every_axis_of_a_label_whole_freezes_it() -> None:
    unions = UnionFind()
    label = unions.new(6).reshape(2, 3)
    assert (unions.tie_axes(label, [0, 1], "needs it") == FROZEN).all()
    _, reasons = unions.solve()
    assert set(reasons) == {1, 2, 3, 4, 5, 6}
    assert set(reasons.values()) == {"needs it"}


def test_keeping_an_axis_whole_on_which_nothing_lives_changes_nothing() -> None:
    unions = UnionFind()
    label = unions.new(3).reshape(1, 3)
    assert unions.tie_axes(label, [0], "") is label
    assert unions.solve()[1] == {}


def test_a_sum_over_all_axes_of_a_label_lets_it_vanish_free() -> None:
    unions = UnionFind()
    label = unions.new(3).reshape(1, 3)
    assert (unions.reduce(label, [1], "") == FROZEN).all()
    assert unions.solve()[1] == {}


def test_a_sum_over_part_of_a_split_axis_keeps_the_rest_whole() -> None:
    unions = UnionFind()
    label = unions.new(6).reshape(2, 3)
    unions.defer("view", label)
    assert (unions.reduce(label, [1], "") == FROZEN).all()
    roots, reasons = unions.solve()
    assert roots[1:].tolist() == [1, 2, 3, 1, 2, 3]
    assert reasons == {}


def test_a_sum_over_part_of_a_split_axis_lets_the_rest_go_on_where_a_check_asked_for_it() -> None:
    unions = UnionFind(trailing=frozenset({"view"}))
    label = unions.new(6).reshape(2, 3)
    unions.defer("view", label)
    assert unions.reduce(label, [1], "").tolist() == [[1], [4]]
    roots, _ = unions.solve()
    assert roots[1:].tolist() == [1, 1, 1, 4, 4, 4]


@pytest.mark.parametrize(
    ("trailing", "expected"),
    [(frozenset(), [1, 2, 3, 1, 2, 3]), (frozenset({"view"}), [1, 1, 1, 4, 4, 4])],
    ids=["leading axis whole", "trailing axis whole"],
)
def test_a_split_that_nothing_joins_again_keeps_one_axis_whole(
    trailing: frozenset[str], expected: list[int]
) -> None:
    unions = UnionFind(trailing)
    unions.defer("view", unions.new(6).reshape(2, 3))
    assert unions.deferred_keys() == ("view",)
    roots, reasons = unions.solve()
    assert roots[1:].tolist() == expected
    assert reasons == {}


def test_settling_twice_says_the_same() -> None:
    unions = UnionFind()
    unions.defer("view", unions.new(6).reshape(2, 3))
    first, second = unions.solve(), unions.solve()
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]


def test_squeezing_gives_size_one_to_axes_without_change() -> None:
    assert squeeze_constant(np.array([[1, 1], [2, 2]])).tolist() == [[1], [2]]
    assert squeeze_constant(np.array([[1, 2], [2, 2]])).shape == (2, 2)


# -- alignment -----------------------------------------------------------------------------------


@st.composite
def operands(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[bool]]]:
    """Shapes that broadcast, and for each axis of each whether it has a label."""
    full = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    shapes, labelled = [], []
    for _ in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(1, len(full)))
        shape = [n if draw(st.booleans()) else 1 for n in full[len(full) - rank :]]
        shapes.append(tuple(shape))
        labelled.append([n > 1 and draw(st.booleans()) for n in shape])
    return shapes, labelled


def spread(shape: Sequence[int], axis: int, indices: Any) -> Any:
    return indices.reshape([-1 if a == axis else 1 for a in range(len(shape))])


@fixed
@given(operands())
def test_aligned_operands_share_their_channels_or_freeze_on_fixed_axes(
    given_operands: tuple[list[tuple[int, ...]], list[list[bool]]],
) -> None:
    shapes, labelled = given_operands
    shape = np.broadcast_shapes(*shapes)
    unions = UnionFind()
    values, by_axis, fixed_axes = [], {}, set()  # axes counted from the last
    for own, has in zip(shapes, labelled, strict=True):
        labels = []
        for axis, size in enumerate(own):
            place = axis - len(own)
            if has[axis]:
                indices = unions.new(size)
                labels.append(spread(own, axis, indices))
                by_axis.setdefault(place, []).append(indices)
            elif size > 1:
                fixed_axes.add(place)
        values.append(Value(own, tuple(labels)))
    out = unions.align(values, shape, "met")
    roots, reasons = unions.solve()
    assert out.shape == shape
    for place, vectors in by_axis.items():
        along = out.label_on(place + len(shape))
        if place in fixed_axes:
            assert along is None
            assert all(int(roots[index]) in reasons for indices in vectors for index in indices)
        else:
            assert along is not None
            assert not any(int(roots[index]) in reasons for index in along.reshape(-1))
            for indices in vectors:
                assert roots[indices].tolist() == roots[along.reshape(-1)].tolist()
            assert len(set(roots[along.reshape(-1)].tolist())) == along.size
    assert sum(len(axes_of(label)) for label in out.labels) == len(set(by_axis) - fixed_axes)


# -- movement ------------------------------------------------------------------------------------


@settings(fixed, max_examples=examples(80))
@given(chains())
def test_labels_move_as_integer_tensors_do(chain: Chain) -> None:
    board = Board(chain, a=chain.shape)
    for value in board.outputs():
        lived_on = [axis for label in value.labels for axis in axes_of(label)]
        assert len(lived_on) == len(set(lived_on))
        for label in value.labels:
            assert np.broadcast_shapes(label.shape, value.shape) == value.shape
            assert label.ndim == len(value.shape)
    for axis, size in enumerate(chain.shape):
        assert size == 1 or board.follows(f"a{axis}")


_LOSSLESS = ("permute", "flip", "unflatten", "unsqueeze", "squeeze", "cat")


@settings(fixed, max_examples=examples(40))
@given(chains((*_LOSSLESS, "channel_shuffle", "repeat_interleave")))
def test_movement_that_merges_no_channels_freezes_none(chain: Chain) -> None:
    assert not Board(chain, a=chain.shape).reasons


@settings(fixed, max_examples=examples(30))
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.data())
def test_a_split_that_is_joined_again_moves_in_steps_of_its_parts(
    before: int, groups: int, run: int, data: st.DataObject
) -> None:
    """Attention heads: split, moved about, moved back, joined; every head drops the same."""
    size = groups * run
    shape = (before, size, 2)
    order = data.draw(st.permutations(range(4)))
    back = [order.index(axis) for axis in range(4)]

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (groups, run)).permute(order).permute(back).flatten(1, 2)

    board = Board(heads, a=shape)
    assert board.follows("a1")
    assert not board.frozen("a1")
    units = board.unit("a1")
    assert len(set(units)) == (run if run > 1 else groups)
    assert run == 1 or units == units[:run] * groups


def test_the_oracle_sees_a_wrong_label() -> None:
    """The tests above fail where a rule moves labels wrongly."""
    board = Board(lambda a: a.flip(0), a=(4, 3))
    assert board.follows("a0")
    (out,) = board.traced.outputs()
    right = board.values[0][out]
    for wrong in (right.labels[0][::-1], right.labels[0] * 0 + 1):
        board.values[0][out] = Value(right.shape, (wrong, *right.labels[1:]))
        assert not board.follows("a0")
    board.values[0][out] = Value(right.shape, right.labels[1:])
    assert not board.follows("a0")
