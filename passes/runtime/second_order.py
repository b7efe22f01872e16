"""Gradients that a pass cannot differentiate a second time."""

from __future__ import annotations

__all__ = ["refuse_second"]

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketize.errors import ExecutionError


def refuse_second(
    name: str,
    gradients: Sequence[Tensor | None],
    sources: Iterable[Tensor | None],
    advice: str = "Leave the pass out where second derivatives are needed",
) -> tuple[Tensor | None, ...]:
    """Let an error follow if the gradients that a backward returns are differentiated again.

    torch's ``once_differentiable`` cuts them off from the graph instead, so that
    ``torch.autograd.grad`` of something that was made of them finds no path and leaves them out in
    silence.

    Args:
        name: of the pass.
        gradients: what the backward is going to return, computed without a graph.
        sources: all tensors with a history that they depend on: the gradients that the backward was
            given, inputs and weights.
        advice: what the user can do, without a full stop.

    Returns:
        The gradients as they are, unless grad mode is on (``create_graph=True``): then they hang
        on their sources by a node whose backward raises an
        :class:`~pocketize.errors.ExecutionError`.
    """
    wanted = [t for t in sources if t is not None and t.requires_grad]
    given = [t for t in gradients if t is not None]
    if not torch.is_grad_enabled() or not wanted or not given:
        return tuple(gradients)
    text = (
        f"{name}: these gradients cannot be differentiated again (a second derivative after "
        f"create_graph=True, as in a gradient penalty): the pass computes them without a graph. "
        f"{advice}"
    )
    made = iter(_Refusing.apply(text, len(given), *given, *wanted))  # type: ignore[no-untyped-call]
    return tuple(None if t is None else next(made) for t in gradients)


class _Refusing(torch.autograd.Function):
    """Passes gradients on; whoever differentiates them gets an error."""

    @staticmethod
    def forward(ctx: Any, text: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.text = text
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ExecutionError(ctx.text)
