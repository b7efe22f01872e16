"""What a checkpointed module contains: a forward that is run again in the backward pass.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. The
machinery is ``torch.utils.checkpoint``'s, which replays random states and autocast;
:mod:`~pocketize.passes.shared.second_run` makes the module for it as the first run found it.
"""

from __future__ import annotations

__all__ = ["CheckpointedForward"]

import threading
import warnings
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pocketize._torch import global_forward_hooks
from pocketize.errors import PocketizeWarning
from pocketize.passes.shared.forwards import Forward, hooked, is_foreign, without_backward
from pocketize.passes.shared.second_run import Run


class CheckpointedForward(Forward):
    """A module's forward of which only the inputs are kept for the backward pass.

    Without gradients, and inside function transforms, it is the forward itself; also while modules
    inside have forward hooks, which must not run twice. Under ``torch.compile`` a module without
    buffers is part of the compiled graph, and the compiler recomputes its operators; a module with
    buffers runs outside of it, because the compiler would update them twice.
    """

    #: Whether the warning about hooks was given.
    _warned = False

    lowers: ClassVar[str] = "checkpoint"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, and remember how to run it again."""
        if without_backward():
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling() and not list(self.module.buffers()):
            return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
        return self._checkpointed(*args, **kwargs)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def _checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_hooked():
            return self.original(*args, **kwargs)
        # A second run gives the module the attributes that it had: other threads wait meanwhile.
        with self._lock:
            run = Run(self.module, self.original, self._lock, args, kwargs)
            return checkpoint(run, *run.saved, use_reentrant=False, context_fn=run.contexts)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _is_hooked(self) -> bool:
        """Tell, and warn once, if forward hooks would run twice."""
        inner = {path: m for path, m in self.module.named_modules() if m is not self.module}
        path = hooked(inner)
        if not path and not (inner and any(map(is_foreign, global_forward_hooks()))):
            return False
        if not self._warned:
            self._warned = True
            kind = type(self.module).__name__
            warnings.warn(
                f"checkpoint: {path or 'every module'} of a checkpointed {kind} has forward hooks, "
                f"which would run again in the backward pass, so the {kind} keeps its activations "
                "until they are removed",
                PocketizeWarning,
                stacklevel=2,
            )
        return True
