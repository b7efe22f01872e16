"""The ranks that a rule gives: by one convolution's energy, or by the parameters of all."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocketize import plan, rewrite
from pocketize.errors import OptionError
from pocketize.passes import Bottleneck, CompactBlock, Separable
from pocketize.passes.swaps.blocks import ConvBlock
from pocketize.passes.swaps.decompositions import Tucker
from pocketize.passes.swaps.ranks import RankTable, allot
from pocketize.plugin.edits import Convert
from tests.examples import examples

KINDS = (Bottleneck, Separable, CompactBlock)
IMAGE = "1x8x12x12"


def test_the_cheapest_ranks_that_keep_enough_are_taken() -> None:
    table = RankTable(torch.tensor([[0.5, 0.8], [0.85, 1.0]]), torch.tensor([[1, 5], [3, 9]]))
    assert table.cheapest(0.5, 0.0) == (1, 1)
    assert table.cheapest(0.6, 0.0) == (2, 1)
    assert table.cheapest(0.8, 0.0) == (2, 1)
    assert table.cheapest(0.9, 0.0) == (2, 2)
    assert table.cheapest(0.86, 0.02) == (2, 1)
    line = RankTable(torch.tensor([0.2, 0.999999]), torch.tensor([1, 2]))
    assert line.cheapest(1.0, 0.0) == (2,)


@given(st.integers(0, 1000), st.floats(0.1, 1.0))
@settings(max_examples=examples(30), deadline=None)
def test_no_other_ranks_of_as_few_parameters_keep_more(seed: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    tables, before = [], []
    for _ in range(3):
        energy = torch.rand(2, 3, generator=draw, dtype=torch.float64)
        kept = (energy / energy.sum()).cumsum(0).cumsum(1)
        cost = torch.randint(1, 9, (2, 3), generator=draw).cumsum(0).cumsum(1)
        tables.append(RankTable(kept, cost))
        before.append(int(cost.max()) + int(torch.randint(0, 9, (), generator=draw)))
    least = sum(int(table.cost.min()) for table in tables)
    most = max(least, int(share * sum(before)))

    def of(table: RankTable, ranks: tuple[int, ...] | None, whole: int) -> tuple[int, float]:
        if ranks is None:
            return whole, 0.0
        return table.parameters(ranks), -math.log(table.kept[ranks[0] - 1, ranks[1] - 1])

    found = allot(tables, before, most)
    pairs = [of(*one) for one in zip(tables, found, before, strict=True)]
    taken, error = (sum(each) for each in zip(*pairs, strict=True))
    assert taken <= most
    every: list[Any] = [None, *itertools.product((1, 2), (1, 2, 3))]
    for others in itertools.product(every, repeat=3):
        pairs = [of(*one) for one in zip(tables, others, before, strict=True)]
        if sum(pair[0] for pair in pairs) <= taken:
            assert sum(pair[1] for pair in pairs) >= error - 1e-9
    assert None not in allot(tables, [math.inf] * 3, most)


def test_no_weight_loses_everything() -> None:
    """A large layer with little in each rank beside a small one with much in the first."""
    large = RankTable(torch.linspace(0.02, 1, 50), torch.arange(1, 51) * 100)
    small = RankTable(torch.tensor([0.9, 1.0]), torch.tensor([10, 20]))
    (first, second) = allot([large, small], [5001, 21], 2000)
    assert first is not None
    assert first[0] >= 15
    assert second is None or second[0] == 2


class Three(nn.Module):
    """A convolution of rank one, and two that have no structure."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.simple, self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        parts = torch.randn(8, 1), torch.randn(1, 1, 9), torch.randn(8, 1)
        with torch.no_grad():
            self.simple.weight.copy_(Tucker(*parts).composed().reshape(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.simple(x).relu()).relu())


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_go_where_they_are_needed(kind: Any) -> None:
    model, before = Three(), 3 * 8 * 8 * 9
    least = 0.6 if kind is Separable else 0.4
    for share in (least, 0.8):
        swap = kind(ratio=f"params:{share}", activations="any")
        (planned,) = plan(model, swap, inputs=IMAGE).passes
        ranks = {e.path: e.options["ranks"] for e in planned.edits if isinstance(e, Convert)}
        assert set(ranks["simple"]) == {1}
        made = rewrite(model, swap, inputs=IMAGE)
        convs = [made.simple, made.one, made.two]
        left = sum(p.numel() for m in convs for p in m.parameters() if p.dim() > 1)
        assert 0.7 * share * before < left <= share * before
        x = torch.randn(1, 8, 12, 12)
        assert torch.allclose(made.simple(x), model.simple(x), atol=1e-4)
    assert not isinstance(made.one, ConvBlock) or not isinstance(made.two, ConvBlock)
    why = {row.why for row in planned.refused}
    assert "its block would err too much for the parameters that it saves" in why


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_that_no_blocks_have_is_refused_by_name(kind: Any) -> None:
    with pytest.raises(OptionError, match="give a larger share"):
        plan(Three(), kind(ratio="params:0.001", activations="any"), inputs=IMAGE)


def test_convolutions_that_stay_for_other_reasons_do_not_count() -> None:
    model = Three()
    kept = Bottleneck(ratio="params:0.3", activations="any", keep=("simple",))
    made = rewrite(model, kept, inputs=IMAGE)
    left = sum(p.numel() for m in (made.one, made.two) for p in m.parameters() if p.dim() > 1)
    assert left <= 0.3 * 2 * 8 * 8 * 9
    # the activations of a large image weigh more than what is saved
    (planned,) = plan(model, Bottleneck(ratio="params:0.3"), inputs="1x8x256x256").passes
    assert not planned.edits
    assert all("activations='any' swaps it" in row.why for row in planned.refused)
    forced = Bottleneck(ratio="params:0.9", force=("one", "two"), activations="any")
    (planned,) = plan(model, forced, inputs=IMAGE).passes
    assert {e.path for e in planned.edits if isinstance(e, Convert)} == {"simple", "one", "two"}
