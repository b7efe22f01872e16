"""The forward of a model that recomputes: the model's own, with a recompute graph on."""

from __future__ import annotations

__all__ = ["RecomputingForward", "recomputing_forward"]

import functools
import sys
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from pocketize._torch import import_compiler, in_checkpoint, takes_what_is_saved
from pocketize.errors import ExecutionError, RewriteError
from pocketize.passes.recompute.compiled import describe_uses, planned
from pocketize.passes.recompute.fusing import Fusing
from pocketize.passes.recompute.recompute_graph import RecomputeGraph
from pocketize.passes.shared.compiled import compiles_regions, run_region
from pocketize.passes.shared.forwards import (
    Forward,
    note_broken,
    note_compiled,
    obstacle,
    unwrapping,
    without_backward,
    wrapping,
)
from pocketize.plugin.conversions import conversion, reversal

_running = threading.local()


class RecomputingForward(Forward):
    """Runs a model's forward with a graph on, from its first to its last operator.

    Nothing is recorded where there is no backward pass to come (``no_grad``, ``inference_mode``),
    while ``torch.compile`` traces (from torch 2.13 on it is told what to store), under the
    transforms of ``torch.func`` and forward-mode differentiation, in a checkpoint, which runs again
    anyway, and inside another recording.

    Args:
        module: the model.
        rebuilt: see :class:`RecomputeGraph`.
        frees: likewise.
        min_bytes: likewise.
        uses: of :func:`~.compiled.describe_uses`.
    """

    lowers: ClassVar[str] = "recompute"

    def __init__(
        self,
        module: nn.Module,
        rebuilt: frozenset[str],
        frees: Mapping[str, tuple[int, ...]],
        min_bytes: int,
        uses: str = "[]",
    ) -> None:
        super().__init__(module)
        self.uses = uses
        self.rebuilt, self.frees, self.min_bytes = rebuilt, frees, min_bytes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward.

        Raises:
            ExecutionError: the model's parameters are sharded by FSDP.
        """
        if compiles_regions():
            contexts = functools.partial(planned, self.uses)
            return run_region(self.original, self._broken, contexts, args, kwargs)
        if torch.compiler.is_compiling():
            note_compiled("recompute")
            return self.original(*args, **kwargs)
        aside = without_backward() or in_checkpoint()
        if aside or getattr(_running, "model", False):
            return self.original(*args, **kwargs)
        return self._recorded(*args, **kwargs)

    def _broken(self, *args: Any, **kwargs: Any) -> Any:
        """Run without the compiler, which cannot take the whole forward as one graph."""
        note_broken("recompute")
        return self._recorded(*args, **kwargs)

    def graph(self) -> RecomputeGraph:
        """Make the graph of one forward pass."""
        return RecomputeGraph(self.module, self.rebuilt, self.frees, self.min_bytes)

    def _recorded(self, *args: Any, **kwargs: Any) -> Any:
        import_compiler()  # torch would do so amid the model
        _refuse_sharded(self.module)
        graph = self.graph()
        hooks = saved_tensors_hooks(graph.pack, graph.unpack)
        _running.model = True
        try:
            code = RecomputingForward._recorded.__code__
            with hooks, graph, Fusing(graph, lambda: takes_what_is_saved(hooks.pack_hook, code)):
                return self.original(*args, **kwargs)
        finally:
            _running.model = False
            graph.finish()


@conversion("recompute")
def convert(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Give a model its recording.

    Raises:
        RewriteError: it has one, or is a kind of module that has no hooks.
    """
    if recomputing_forward(module) is not None:
        raise RewriteError("the model recomputes already")
    if reason := obstacle(module):
        raise RewriteError(f"the model cannot recompute: {reason}")
    frees = {name: tuple(parts) for name, parts in options["frees"].items()}
    rebuilt = frozenset(options["rebuilt"])
    uses = describe_uses(module, options.get("uses", ()), rebuilt)
    RecomputingForward(module, rebuilt, frees, options["min_bytes"], uses).install()
    return module


def recomputing_forward(model: nn.Module) -> RecomputingForward | None:
    """Return the recording that a model has been given, ``None`` if it has none."""
    return wrapping(model, RecomputingForward)


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse weights that FSDP gathers: their memory is free when results are computed again.

    Raises:
        ExecutionError: the model's parameters are sharded by FSDP.
    """
    sharded = False
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if sharded or any(hasattr(p, "_fsdp_flattened") for p in model.parameters()):
        raise ExecutionError(
            "recompute: the model is sharded by FSDP, and its weights would be read when FSDP has "
            "freed them. Use the pass 'checkpoint' with FSDP, or recompute with "
            "DistributedDataParallel"
        )


reversal("recompute", unwrapping(RecomputingForward))
