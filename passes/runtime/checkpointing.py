"""What a checkpointed module contains: a forward that is run again in the backward pass.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. The
machinery is ``torch.utils.checkpoint``'s, which replays random states and autocast; the buffers
that a forward updates (running statistics, vectors of spectral norms) are looked after here.
"""

from __future__ import annotations

__all__ = ["CheckpointedForward"]

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketize._torch import version_of
from pocketize.passes.runtime.forwards import Forward, without_backward

#: Buffers up to this many elements are kept whether or not they are known to have been written to:
#: batch norm writes to its running statistics behind the back of torch's version counters.
_SMALL = 2**16


class CheckpointedForward(Forward):
    """A module's forward of which only the inputs are kept for the backward pass.

    Without gradients it is the forward itself. Under ``torch.compile`` a module without buffers is
    part of the compiled graph, and the compiler recomputes its operators; a module with buffers
    runs outside of it, because nobody else would keep them from being updated twice.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, and remember how to run it again."""
        if without_backward():
            return self.original(*args, **kwargs)
        if next(self.module.buffers(), None) is not None:
            return self._with_buffers(*args, **kwargs)
        return checkpoint(self.original, *args, use_reentrant=False, **kwargs)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def _with_buffers(self, *args: Any, **kwargs: Any) -> Any:
        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            buffers = _Buffers(self.module)
            return buffers.watched(), buffers

        return checkpoint(self.original, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class _Buffers:
    """The buffers of a module as one forward found them, so that it can be run again as it was.

    The second run gets stand-ins with the old values. What it writes goes into them and is dropped;
    the buffers themselves, which later forwards may have updated further, are not touched. As a
    context it surrounds the second run, and any further one.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (owner, name, buffer)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._values: dict[int, Tensor] = {}
        self._now: list[list[Tensor | None]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Surround the first run: keep the values of what it writes to."""
        before = {id(b): (b.detach().clone(), version_of(b)) for _, _, b in self._places}
        yield
        self._places = [
            (owner, name, buffer)
            for owner, name, buffer in self._places
            if owner._buffers.get(name) is not buffer
            or version_of(buffer) != before[id(buffer)][1]
            or buffer.numel() <= _SMALL
        ]
        self._values = {id(buffer): before[id(buffer)][0] for _, _, buffer in self._places}

    def __enter__(self) -> None:
        """Put the stand-ins into their places."""
        stand_ins = {key: value.clone() for key, value in self._values.items()}
        self._now.append([owner._buffers.get(name) for owner, name, _ in self._places])
        for owner, name, buffer in self._places:
            owner._buffers[name] = stand_ins[id(buffer)]

    def __exit__(self, *error: object) -> None:
        """Put the buffers back."""
        for (owner, name, _), current in zip(self._places, self._now.pop(), strict=True):
            owner._buffers[name] = current
