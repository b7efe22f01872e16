"""The decompositions of a weight: exact at full rank, best where there is a best, told truly."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocketize.passes.swaps.decompositions import (
    BlockTerms,
    Tucker,
    block_terms,
    block_terms_kept,
    channelwise,
    channelwise_kept,
    folded,
    principal,
    relative_error,
    tucker,
    tucker_kept,
)
from tests.examples import examples

SHAPES = [(6, 4, 9), (4, 6, 27), (3, 8, 3), (1, 5, 5), (5, 1, 5), (12, 12, 27)]
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 9))


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_ranks_lose_nothing(shape: tuple[int, int, int]) -> None:
    o, i, k = shape
    weight = random(*shape)
    for found in (
        tucker(weight, o, i).composed(),
        channelwise(weight, min(o, k)).composed(),
        block_terms(weight, i, min(o, k)).composed(),
    ):
        assert relative_error(weight, found) < 1e-13


@given(shapes, st.integers(0, 100))
@settings(max_examples=examples(20), deadline=None)
def test_more_ranks_are_never_worse(shape: tuple[int, int, int], seed: int) -> None:
    o, i, k = shape
    weight = random(*shape, seed=seed)
    ranks = min(o, i)
    errors = [
        [relative_error(weight, tucker(weight, r, r).composed()) for r in range(1, ranks + 1)],
        [relative_error(weight, channelwise(weight, m).composed()) for m in range(1, min(o, k))],
    ]
    for series in errors:
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(series))
        assert all(error <= 1 for error in series)


@given(shapes, st.integers(0, 100))
@settings(max_examples=examples(20), deadline=None)
def test_the_energy_that_ranks_keep_is_told_before_they_are_used(
    shape: tuple[int, int, int], seed: int
) -> None:
    o, _i, k = shape
    weight = random(*shape, seed=seed)
    kept = {
        "tucker": (tucker_kept(weight), lambda a, b: tucker(weight, a, b).composed()),
        "terms": (block_terms_kept(weight), lambda a, b: block_terms(weight, a, b).composed()),
    }
    for table, compose in kept.values():
        for a, b in {(1, 1), tuple(table.shape)}:
            reached = 1 - relative_error(weight, compose(a, b)) ** 2
            assert reached >= float(table[a - 1, b - 1]) - 1e-9  # sweeps improve on it
    shares = channelwise_kept(weight)
    assert shares.shape == (min(o, k),)
    for m in range(1, len(shares) + 1):
        reached = 1 - relative_error(weight, channelwise(weight, m).composed()) ** 2
        assert reached == pytest.approx(float(shares[m - 1]), abs=1e-9)


def test_sweeps_beat_the_truncated_decomposition() -> None:
    weight = random(12, 10, 9)
    for r in (2, 4):
        first = 1 - float(tucker_kept(weight)[r - 1, r - 1])
        assert relative_error(weight, tucker(weight, r, r).composed()) ** 2 < first - 1e-3
        first = 1 - float(block_terms_kept(weight)[r - 1, 0])
        assert relative_error(weight, block_terms(weight, r, 1).composed()) ** 2 < first - 1e-3


def test_one_kernel_a_channel_is_the_best_there_is() -> None:
    weight = random(7, 3, 9)
    found = channelwise(weight, 1).composed()
    for channel in range(3):
        values = torch.linalg.svdvals(weight[:, channel])
        left = torch.linalg.vector_norm(weight[:, channel] - found[:, channel])
        assert float(left) == pytest.approx(float(values[1:].norm()), rel=1e-9)


def test_low_rank_is_found_again() -> None:
    weight = Tucker(random(12, 3), random(3, 4, 9, seed=1), random(10, 4, seed=2)).composed()
    assert relative_error(weight, tucker(weight, 3, 4).composed()) < 1e-12
    assert relative_error(weight, tucker(weight, 2, 4).composed()) > 0.05
    for m in (1, 2):
        terms = BlockTerms(random(10, 4), random(4, m, 9, seed=1), random(12, 4, m, seed=2))
        weight = terms.composed()
        assert relative_error(weight, block_terms(weight, 4, m, sweeps=400).composed()) < 0.02


def test_a_weight_of_zeros_gives_layers_that_can_still_learn() -> None:
    zeros = torch.zeros(6, 4, 9, dtype=torch.float64)
    outer, core, inner = tucker(zeros, 2, 2)
    assert outer.any()
    assert inner.any()
    assert not core.any()
    kernels, columns = channelwise(zeros, 1)
    assert kernels.any()
    assert not columns.any()
    mix, kernels, columns = block_terms(zeros, 2, 1)
    assert mix.any()
    assert kernels.any()
    assert not columns.any()
    assert relative_error(zeros, zeros) == 0
    for table in (tucker_kept(zeros), block_terms_kept(zeros), channelwise_kept(zeros)):
        assert bool((table == 1).all())


def test_the_factors_of_a_term_are_of_one_size() -> None:
    """A gradient step then moves all three alike."""
    weight = 100 * random(8, 8, 9)
    kernels, columns = channelwise(weight, 1)
    assert torch.allclose(kernels.norm(dim=2)[:, 0], columns.norm(dim=1)[:, 0])
    mix, kernels, columns = block_terms(weight, 3, 1)
    sizes = torch.stack([mix.norm(dim=0), kernels.norm(dim=2)[:, 0], columns.norm(dim=0)[:, 0]])
    assert float((sizes.amax(0) / sizes.amin(0)).max()) == pytest.approx(1, abs=1e-6)


def test_principal_vectors_are_orthonormal_by_falling_size_and_of_fixed_sign() -> None:
    matrix = random(5, 20)
    vectors = principal(matrix)
    assert torch.allclose(vectors.T @ vectors, torch.eye(5, dtype=torch.float64))
    sizes = (vectors.T @ matrix).norm(dim=1)
    assert torch.allclose(sizes, torch.linalg.svdvals(matrix))
    assert torch.allclose(vectors, principal(-matrix))


def test_a_weight_is_folded_in_double_precision() -> None:
    weight = torch.rand(4, 3, 2, 5, 1, dtype=torch.bfloat16)
    assert folded(weight).shape == (4, 3, 10)
    assert folded(weight).dtype is torch.float64
