"""Tensors that a forward makes from numbers alone: which they are, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from pocketize.graph.capture import TracedGraph, capture
from pocketize.graph.constants import Constants


class Forward(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        return self.function(x * self.weight[0])


def recorded(function: Callable[[Tensor], Any]) -> tuple[TracedGraph, fx.Node, Constants]:
    """A recording on a 2x4x6 input, its first output and its constants."""
    traced = capture(Forward(function), "2x4x6")
    return traced, traced.outputs()[0], Constants(traced.graph)


def by_parts(x: Tensor) -> Tensor:
    table = x.new_zeros(8)
    table[0::2] = torch.arange(4.0)
    table[1::2].add_(table[0::2]).mul_(2)
    return table.view(2, 4)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda x: torch.arange(x.shape[1]),
    "linspace": lambda x: torch.linspace(0, 1, x.shape[1], dtype=torch.float64),
    "logspace": lambda x: torch.logspace(0, 1, x.shape[1]),
    "eye": lambda x: torch.eye(x.shape[1])[1:],
    "triangle": lambda x: torch.ones(4, 4).tril().bool(),
    "cumulated": lambda x: torch.ones_like(x).cumsum(1),
    "counted": lambda x: torch.full((3,), x.shape[1]).cumsum(0),
    "like": lambda x: torch.full_like(x, 2.5) * x.new_ones(6),
    "new full": lambda x: x.new_full((2,), 3) - torch.zeros_like(x)[0, 0, :2],
    "list": lambda x: torch.tensor([0.5, x.shape[1]]).to(x).exp(),
    "numpy": lambda x: torch.from_numpy(np.arange(x.shape[1]))[:, None].expand(4, 2),
    "by parts": by_parts,
    "split": lambda x: torch.arange(6).chunk(2)[1].flip(0),
    "expanded": lambda x: torch.arange(6).expand_as(x),
    "sorted": lambda x: torch.arange(6).remainder(4).sort().indices,
    "grid": lambda x: torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")[1],
    "typed": lambda x: torch.arange(6).type_as(x).to(x).reshape(2, 3),
}


@pytest.mark.parametrize("name", MADE)
def test_a_constant_holds_what_the_forward_makes(name: str) -> None:
    _, node, constants = recorded(MADE[name])
    assert node in constants
    value = constants.value(node)
    assert value is not None
    expected = MADE[name](torch.zeros(2, 4, 6))
    assert value.dtype == expected.dtype
    assert torch.equal(value, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        lambda x: x + torch.arange(6),
        lambda x: torch.zeros(2, 4, 6).copy_(x),
        lambda x: torch.arange(6)[x.long().flatten()],
    ],
    ids=["input", "met", "written", "picked"],
)
def test_what_an_input_goes_into_is_no_constant(function: Callable[[Tensor], Tensor]) -> None:
    _, node, constants = recorded(function)
    assert node not in constants


def test_a_constant_that_something_else_is_written_into_is_none_any_more() -> None:
    def function(x: Tensor) -> Tensor:
        table = torch.arange(12.0)
        before = table * 1
        table[:4] = x[0, :, 0]
        return torch.stack([before, table * 1])

    traced, _, constants = recorded(function)
    before, after = (
        n for n in traced.operators() if "aten.mul" in str(n.target) and n.args[1] == 1
    )
    assert before in constants
    assert after not in constants


def test_what_is_written_into_a_constant_counts_for_those_that_read_it_later() -> None:
    def function(x: Tensor) -> Tensor:
        table = torch.zeros(6)
        x = x + table
        table[:] = torch.arange(6)
        return x - table

    traced, _, constants = recorded(function)
    add, sub = (
        next(n for n in traced.operators() if name in str(n.target))
        for name in ("aten.add", "aten.sub")
    )
    (table,) = (n for n in traced.operators() if "aten.zeros" in str(n.target))
    early, late = constants.value(table, add), constants.value(table)
    assert early is not None
    assert late is not None
    assert early.tolist() == [0] * 6
    assert late.tolist() == list(range(6))
    assert sub.args[1] in constants


RANDOM: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "noise": (lambda x: torch.randn_like(x) * 2, True),
    "dropped": (lambda x: nn.functional.dropout(torch.arange(6.0), 0.5, training=True), False),
    "drop path": (lambda x: x.new_empty(4).bernoulli_(0.9) / 0.9, True),
    "scaled": (lambda x: torch.rand(6) * torch.arange(6), False),
    "chances": (lambda x: torch.bernoulli(torch.linspace(0, 1, 6)), False),
    "generator": (lambda x: torch.rand(6, generator=torch.Generator()), False),
    "seeded": (lambda x: (torch.manual_seed(0), torch.rand(6))[1], False),
    "permutation": (lambda x: torch.randperm(6), False),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_equal_where_nothing_tells_them_apart(name: str) -> None:
    function, alike = RANDOM[name]
    _, node, constants = recorded(function)
    assert node in constants
    value = constants.value(node)
    assert alike == (value is not None and bool((value == value.flatten()[0]).all()))


def test_constants_made_alike_are_the_same_and_others_are_not() -> None:
    def function(size: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.arange(size).view(1, -1)[:, :4] * 2

    (_, one, ours), (_, same, theirs), (_, other, others) = (
        recorded(function(size)) for size in (8, 8, 9)
    )
    assert ours.same(one, theirs, same)
    assert not ours.same(one, others, other)


def test_a_huge_constant_is_not_made() -> None:
    _, node, constants = recorded(lambda x: torch.arange(2**40))
    assert constants.value(node) is None
    _, node, constants = recorded(lambda x: torch.zeros(2**40))
    value = constants.value(node)
    assert value is not None
    assert value.untyped_storage().nbytes() < 64


@pytest.mark.parametrize(
    "size",
    [
        lambda x: torch.tensor(x.shape[1:]).tolist(),
        lambda x: (torch.tensor(x.shape)[1:] // 2 * 2).tolist(),
        lambda x: [int(n) for n in torch.arange(3, 7, 3) + 1],
        lambda x: [torch.ones(4).sum().int().item(), int(torch.tensor(6.5))],
    ],
    ids=["list", "computed", "iterated", "items"],
)
def test_sizes_that_are_computed_as_tensors_are_no_branch_on_values(size: Any) -> None:
    def function(x: Tensor) -> Tensor:
        rows, columns = size(x)
        return x[:, :rows, :columns]

    traced, node, _ = recorded(function)
    assert not traced.real
    assert len(node.meta["val"].shape) == 3


def test_a_branch_on_random_numbers_is_one_on_values() -> None:
    traced, _, _ = recorded(lambda x: x if torch.rand(()).item() < 0.5 else -x)
    assert traced.real
