"""What ``torch.compile`` stores of a model that recomputes: the same results of convolutions."""

from __future__ import annotations

__all__ = ["describe_uses", "planned"]

import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pocketize.ops import Kind, operator_of
from pocketize.passes.recompute.values import describe
from pocketize.passes.shared.compiled import CheckpointPolicy, Contexts, plan_recomputation


def describe_uses(model: nn.Module, order: Iterable[str], rebuilt: frozenset[str]) -> str:
    """Return the uses of weights in their order, as text, which the compiler takes for a constant.

    A compiled graph does not know the names of its weights; their sizes and order tell which is
    which. A mistake costs memory or time, and changes no number.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    uses = [(sizes.get(name.partition("#")[0], 0), int(name in rebuilt)) for name in order]
    return json.dumps(uses) if rebuilt else "[]"


def planned(uses: str) -> Contexts:
    """Return the contexts of one trace of the model.

    Args:
        uses: of :func:`describe_uses`.
    """
    return plan_recomputation(_Policy(json.loads(uses)))


class _Policy:
    """Stores the results of convolutions and the like, but for those that are rebuilt.

    Concatenations too: a graph that builds one again holds it and its parts at the peak.
    """

    def __init__(self, uses: list[tuple[int, int]]) -> None:
        self.uses = uses
        self.next = 0

    def __call__(self, ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        operator = describe(func)
        stored = operator.random or operator_of(func).kind is Kind.CONCATENATION
        if stored or (operator.heavy and not self._is_rebuilt(operator.weight, args)):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def _is_rebuilt(self, position: int | None, args: tuple[Any, ...]) -> bool:
        """Tell whether the next use of a weight of this size is rebuilt.

        Uses may be missing: the traced mode may leave out heads that were there at the rewrite.
        """
        weight = args[position] if position is not None and position < len(args) else None
        size = weight.numel() if isinstance(weight, Tensor) else 0
        for index in range(self.next, len(self.uses)):
            if size and self.uses[index][0] == size:
                self.next = index + 1
                return bool(self.uses[index][1])
        return False
