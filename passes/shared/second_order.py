"""Second derivatives: of what a pass runs again, or an error where there are none."""

from __future__ import annotations

__all__ = ["HistoryOf", "aliases_of_hooked", "differentiate", "refuse_second"]

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import has_tensor_hooks
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
        f"create_graph=True, as in a gradient penalty): pocketize computes them without a graph. "
        f"{advice}"
    )
    made = iter(_Refusing.apply(text, len(given), *given, *wanted))  # type: ignore[no-untyped-call]
    return tuple(None if t is None else next(made) for t in gradients)


def differentiate(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradient: Tensor,
) -> tuple[Tensor | None, ...]:
    """Run a function and let autograd differentiate it; with a graph where grad mode is on.

    Args:
        function: of the tensors.
        tensors: what it is given, each with the history that it has outside.
        needed: which of them need a gradient.
        gradient: of the result.

    Returns:
        The gradients, ``None`` where none is needed.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, since one tensor may be made of another: a weight that is used twice, for one.
        given = [
            None if t is None else t.view_as(t) if again else t.detach().requires_grad_(n)
            for t, n in zip(tensors, needed, strict=True)
        ]
        made = function(*given)
    wanted = [n and t is not None for t, n in zip(given, needed, strict=True)]
    asked = [t for t, n in zip(given, wanted, strict=True) if n and t is not None]
    found = iter(torch.autograd.grad(made, asked, gradient, allow_unused=True, create_graph=again))
    return tuple(next(found) if n else None for n in wanted)


def aliases_of_hooked(tensors: Iterable[Any]) -> list[Any]:
    """Return what an autograd function may save without losing hooks on weights.

    torch 2.6 forgets the hooks of a weight that an autograd function saves, itself, where hooks on
    saved tensors hold. It does not forget those of a weight of which a view is saved.
    """
    return [
        t.view_as(t) if isinstance(t, nn.Parameter) and has_tensor_hooks(t) else t for t in tensors
    ]


class HistoryOf(torch.autograd.Function):
    """Give a tensor the history of another one of its shape."""

    @staticmethod
    def of(tensor: Tensor) -> Tensor:
        """Return what has a tensor's history and shape, without content: one element, spread."""
        return HistoryOf.give(tensor, tensor.new_empty(()).expand(tensor.shape))

    @staticmethod
    def give(history: Tensor, content: Tensor) -> Tensor:
        """Return a tensor's content with another one's history."""
        made: Tensor = HistoryOf.apply(history, content)  # type: ignore[no-untyped-call]
        return made

    @staticmethod
    def forward(ctx: Any, history: Tensor, content: Tensor) -> Tensor:
        """Return the content."""
        return content.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient on to the history."""
        return gradient, None


class _Refusing(torch.autograd.Function):
    """Passes gradients on; differentiating them is an error."""

    @staticmethod
    def forward(ctx: Any, text: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.text = text
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ExecutionError(ctx.text)
