"""Regions whose recomputation ``torch.compile`` plans as a pass asks for.

``torch.utils.checkpoint`` with a context function becomes part of the compiled graph: each operator
of the region carries a policy, which the compiler's partitioner follows when it divides the graph
into forward and backward pass. Nothing runs twice that writes: buffers are updated in the forward.
"""

from __future__ import annotations

__all__ = [
    "CheckpointPolicy",
    "compiles_regions",
    "plan_recomputation",
    "run_region",
]

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

#: Whether torch is new enough: 2.6 updates the buffers of a region twice, others were not tried.
HAS_REGIONS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def compiles_regions() -> bool:
    """Tell whether what runs now is traced by ``torch.compile`` for a training step.

    False in versions of torch before 2.13, and while ``torch.export`` traces.
    """
    training = HAS_REGIONS and torch.is_grad_enabled()
    return training and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def run_region(
    run: Callable[..., Any],
    aside: Callable[..., Any],
    contexts: Callable[[], Contexts],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run something that the compiler traces, in a region of its own.

    Args:
        run: what is traced.
        aside: called instead, without the compiler, where it cannot trace the whole region.
        contexts: a ``functools.partial`` of a function that calls :func:`plan_recomputation`, with
            constants as arguments.
        args: of both functions.
        kwargs: likewise.
    """

    def region() -> Any:
        return (run if torch.compiler.is_compiling() else aside)(*args, **kwargs)

    return checkpoint(region, use_reentrant=False, context_fn=contexts)


def plan_recomputation(policy: Callable[..., CheckpointPolicy]) -> Contexts:
    """Return contexts that give each operator its policy, where there is a graph to plan.

    Without one (graph breaks, the backend "eager") autograd saves as without a checkpoint: a second
    run of the region would update its buffers twice.

    Args:
        policy: as of ``create_selective_checkpoint_contexts``.
    """
    if torch.compiler.is_compiling():
        made: Contexts = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
        return made
    return saved_tensors_hooks(_same, _same), nullcontext()


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
