from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pocketize.channels.ranking import rank_units, strongest

Weights = list[tuple[Tensor, int, np.ndarray]]


@st.composite
def weights_of_a_group(draw: st.DrawFn) -> Weights:
    """Tensors of any rank on which each unit owns some indices of one axis."""
    units = draw(st.integers(1, 5))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weights: Weights = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        axis = draw(st.integers(0, len(shape) - 1))
        count = draw(st.integers(1, 3))
        shape[axis] = units * count
        positions = np.array(draw(st.permutations(range(units * count)))).reshape(units, count)
        weights.append((torch.randn(shape, generator=seed), axis, positions))
    return weights


@given(weights_of_a_group())
def test_scores_equal_those_of_a_naive_loop(weights: Weights) -> None:
    naive = []
    for unit in range(len(weights[0][2])):
        total = 0.0
        for tensor, axis, positions in weights:
            for index in positions[unit]:
                total += float(tensor.select(axis, int(index)).double().square().sum())
        naive.append(math.sqrt(total))
    np.testing.assert_allclose(rank_units(weights), naive, rtol=1e-12)


@given(
    st.lists(st.one_of(st.floats(0, 5).map(round), st.just(math.nan)), min_size=1, max_size=12),
    st.data(),
)
def test_the_strongest_are_those_of_a_naive_sort(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    naive = sorted(
        range(len(scores)),
        key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i], i),
    )
    assert strongest(np.array(scores, dtype=float), k).tolist() == sorted(naive[:k])


def test_sums_are_taken_in_float64() -> None:
    """A large weight does not swallow the many small ones beside it."""
    weight = torch.full((2, 2**20 + 1), 1e-4)
    weight[:, 0] = 1e3
    weight[1, 1:] = 2e-4
    scores = rank_units([(weight, 0, np.array([[0], [1]]))])
    small = [float(np.float32(value)) ** 2 * 2**20 for value in (1e-4, 2e-4)]
    np.testing.assert_allclose(scores**2 - 1e6, small, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.complex64])
def test_any_dtype_is_ranked_without_overflow(dtype: torch.dtype) -> None:
    weight = torch.tensor([[300.0, 400.0], [3.0, 4.0]]).to(dtype)
    for axis, expected in ((0, [500.0, 5.0]), (-1, [300.015, 400.02])):
        scores = rank_units([(weight, axis, np.array([[0], [1]]))])
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_units_with_nan_weights_rank_last() -> None:
    weight = torch.tensor([[math.nan], [0.0], [2.0], [1.0]])
    scores = rank_units([(weight, 0, np.arange(4)[:, None])])
    assert strongest(scores, 2).tolist() == [2, 3]
    assert strongest(scores, 3).tolist() == [1, 2, 3]


def test_units_with_infinite_weights_rank_first() -> None:
    scores = rank_units([(torch.tensor([1.0, math.inf, 2.0]), 0, np.arange(3)[:, None])])
    assert strongest(scores, 1).tolist() == [1]


def test_ranking_neither_copies_gradients_nor_changes_weights() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    before = weight.detach().clone()
    rank_units([(weight, 1, np.arange(3)[:, None])])
    assert torch.equal(weight.detach(), before)
    assert weight.grad is None


def test_weights_that_disagree_in_units_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"one number of units, got \[2, 3\]"):
        rank_units(
            [
                (torch.ones(2), 0, np.arange(2)[:, None]),
                (torch.ones(3), 0, np.arange(3)[:, None]),
            ]
        )
    with pytest.raises(ValueError, match="got \\[\\]"):
        rank_units([])


def test_more_units_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="cannot choose 3 of 2 channels"):
        strongest(np.ones(2), 3)
