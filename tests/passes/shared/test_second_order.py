"""Gradients that cannot be differentiated again say so, whichever way somebody tries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from pocketize.errors import ExecutionError
from pocketize.passes.shared.second_order import refuse_second


class Square(Function):
    """x * x, whose backward is computed without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            made = grad * 2 * x
        return refuse_second("square", (made,), (grad, x))[0]


def test_a_first_derivative_is_as_it_was_also_with_create_graph() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    (slope,) = torch.autograd.grad(Square.apply(x).sum(), x, create_graph=True)
    assert slope.tolist() == [6.0]
    Square.apply(x).sum().backward()
    assert x.grad.tolist() == [6.0]
    assert not x.grad.requires_grad


@pytest.mark.parametrize(
    "again",
    [
        lambda slope, x, y: torch.autograd.grad(slope.sum(), x),
        lambda slope, x, y: torch.autograd.grad(slope.sum(), y, allow_unused=True),
        lambda slope, x, y: slope.sum().backward(),
    ],
)
def test_a_second_derivative_is_an_error_that_names_the_pass(again: Any) -> None:
    x, y = (torch.tensor([3.0], requires_grad=True) for _ in range(2))
    (slope,) = torch.autograd.grad(Square.apply(x * y).sum(), x, create_graph=True)
    with pytest.raises(ExecutionError, match=r"^square: .* cannot be differentiated again"):
        again(slope, x, y)


def test_what_depends_on_nothing_else_stays_without_a_history() -> None:
    with torch.enable_grad():
        (made, none) = refuse_second("square", (torch.ones(1), None), (torch.ones(1),))
    assert made is not None
    assert not made.requires_grad
    assert none is None
