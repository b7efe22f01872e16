"""Which module runs: in the forward pass by hooks, in the backward pass by sequence numbers.

Every autograd node has the sequence number that it got in the forward pass. Numbers only grow, so
it is enough to note which module ran from which number on. In the backward pass, the number of the
running node gives the module whose forward made it.
"""

from __future__ import annotations

__all__ = ["ModulePaths", "held_tensors"]

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from pocketize._torch import next_sequence_number, running_node


class ModulePaths:
    """Follows the calls of a model's modules.

    Args:
        model: paths are those of its ``named_modules()``; of several names of a module, the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._owners: dict[int, str] = {}
        for path, module in model.named_modules():
            for tensor in held_tensors(module):
                self._owners.setdefault(id(tensor), path)
        self._stack: list[str] = []
        self._starts = [0]
        self._ran = [""]

    def owner(self, tensor: Tensor) -> str:
        """Return the path of the module that holds a parameter, buffer or plain tensor."""
        return self._owners.get(id(tensor), "")

    def current(self) -> str:
        """Return the path of the module that runs, ``""`` for the root and outside any module."""
        if self._stack:  # also in backward, where a checkpointed module runs again
            return self._stack[-1]
        running = running_node()
        if running is None:
            return ""
        if isinstance(running, Tensor):
            return self.owner(running)
        return self._ran[bisect.bisect_right(self._starts, running) - 1]

    @contextmanager
    def following(self) -> Iterator[ModulePaths]:
        """Follow calls while the context lasts.

        The hooks are global ones: those of a module itself would switch off the fast paths of
        torch's transformer layers, and with them change what is measured.
        """
        enter = register_module_forward_pre_hook(self._enter)
        leave = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield self
        finally:
            enter.remove()
            leave.remove()
            self._stack.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            self._stack.append(path)
            self._note(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._paths.get(id(module))
        if path is not None and path in self._stack:
            while self._stack.pop() != path:  # left open by an exception on its way out
                pass
            self._note(self._stack[-1] if self._stack else "")

    def _note(self, path: str) -> None:
        number = next_sequence_number()
        if self._starts[-1] == number:
            self._ran[-1] = path
        else:
            self._starts.append(number)
            self._ran.append(path)


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers and plain tensor attributes of a module, without its children."""
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    yield from (value for value in vars(module).values() if isinstance(value, Tensor))
