"""Uniting labels costs what the labels cost, and gives what uniting every pair would give."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketize.channels import labels
from pocketize.channels.labels import FROZEN, Indices, UnionFind
from tests.examples import examples


def _settled(unions: UnionFind) -> tuple[set[frozenset[int]], set[int]]:
    """The free units, and the indices that are frozen; how those are grouped does not matter."""
    roots, reasons = unions.solve()
    stuck = {int(roots[index]) for index in reasons} | {int(roots[FROZEN])}
    frozen = {index for index, root in enumerate(roots.tolist()) if root in stuck}
    free = {
        frozenset(np.flatnonzero(roots == root).tolist()) for root in set(roots.tolist()) - stuck
    }
    return free, frozen


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[int, Indices, Indices]:
    count = draw(st.integers(3, 12))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))

    def label() -> Indices:
        shape = tuple(size if draw(st.booleans()) else 1 for size in sizes)
        indices = st.lists(st.integers(FROZEN, count), min_size=27 * 3, max_size=27 * 3)
        return np.array(draw(indices), dtype=np.int64)[: int(np.prod(shape))].reshape(shape)

    return count, label(), label()


@pytest.mark.slow
@given(_pairs())
@settings(deadline=None, max_examples=examples(300))
def test_uniting_labels_is_uniting_every_pair_of_the_broadcast(
    case: tuple[int, Indices, Indices],
) -> None:
    count, a, b = case
    whole, one_by_one = UnionFind(), UnionFind()
    for unions in (whole, one_by_one):
        unions.new(count)
        unions.end_of_tensors()
    whole.unite(a, b, "met")
    for left, right in zip(*(np.ravel(x) for x in np.broadcast_arrays(a, b)), strict=True):
        one_by_one.unite(np.array([left]), np.array([right]), "met")
    assert _settled(whole) == _settled(one_by_one)


def test_repeated_pairs_are_kept_once() -> None:
    left = np.tile(np.array([1, 2, 3]), labels._MANY)
    right = np.tile(np.array([4, 5, 4]), labels._MANY)
    pairs = np.stack(labels._distinct(left, right), axis=1).tolist()
    assert pairs == [[1, 4], [2, 5], [3, 4]]


def test_labels_on_different_axes_unite_without_their_product() -> None:
    unions = UnionFind()
    a, b = unions.new(200_000)[:, None], unions.new(200_000)[None, :]
    unions.end_of_tensors()
    started = time.process_time()
    unions.unite(a, b, "met")
    roots, _ = unions.solve()
    assert set(roots[1:].tolist()) == {1}
    assert time.process_time() - started < 20  # the product would not even fit into memory
