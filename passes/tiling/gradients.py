"""Whether the gradients of a forward are those of its operators.

A recording has the operators, and nothing of what keeps gradients from following them: parts that
run under ``torch.no_grad()``, autograd functions with a backward of their own, hooks that change a
gradient on its way. Training by tiles goes back through the operators, so these are refused.
"""

from __future__ import annotations

__all__ = ["check_gradients"]

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pocketize._torch import autograd_function_of, in_autograd_function, user_frames
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.backward import differentiable
from pocketize.passes.tiling.network import TilingError

_HOOKS = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook")
_CUT = {"detach", "detach_", "data", "grad"}  # these say themselves that no gradient follows


def check_gradients(model: nn.Module, inputs: Inputs) -> None:
    """Refuse a forward whose gradients are not those of its operators.

    Args:
        model: a copy without memory, in the modes in which it is to be trained.
        inputs: without memory, too.

    Raises:
        TilingError: the text says what keeps or changes gradients, and where.
    """
    # not leaves, as a network may write into its input
    given = inputs.map(lambda t: t.detach().requires_grad_().clone() if differentiable(t) else t)
    with torch.enable_grad(), _Watch(model) as watch:
        outputs = find_tensors(given.call(model))
    for cls in _functions(outputs):
        if not _is_own(cls.__module__):
            raise TilingError(
                f"{cls.__name__} has a backward of its own, which training by tiles does not run; "
                "train the volume whole (train=False)"
            )
    if watch.inside:  # under torch.no_grad(), or of torch.utils.checkpoint: outputs do not tell
        raise TilingError(
            f"{watch.inside} in an autograd function, whose backward training by tiles does not "
            "run; detach what it reads instead of calling it under torch.no_grad(), give "
            "torch.utils.checkpoint use_reentrant=False, or train the volume whole (train=False)"
        )


class _Watch(TorchFunctionMode):
    """Looks at every call on tensors that ask for gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        #: The first call in an autograd function: where, and of what.
        self.inside = ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse hooks of tensors, and calls that keep gradients from their results."""
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute such as .T or .data
            name = getattr(func.__self__, "__name__", "")
        if name in _HOOKS:
            raise TilingError(
                f"{self._where()} calls {name} on a tensor, of which training by tiles knows "
                "nothing; train the volume whole (train=False)"
            )
        out = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() or name in _CUT:
            return out
        asks = any(t.requires_grad for t in find_tensors((args, kwargs)))
        keeps = any(differentiable(t) and not t.requires_grad for t in find_tensors(out))
        if not asks or not keeps or _is_of_a_pass():
            return out
        if in_autograd_function():
            self.inside = self.inside or f"{self._where()} computes {name}"
        else:
            raise TilingError(
                f"{self._where()} computes {name} under torch.no_grad(), and training by tiles "
                "would give it gradients; detach what it reads instead, or train the volume whole "
                "(train=False)"
            )
        return out

    def _where(self) -> str:
        """Return the module and the line of the call."""
        line = ""
        for frame in user_frames():
            if frame.f_code.co_filename == __file__:
                continue
            line = line or f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
            path = self.paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                return f"{path or 'the model'} at {line}"
        return f"the model at {line}"


def _is_of_a_pass() -> bool:
    """Whether the call is in a pass whose gradients are known."""
    user = next(frame for frame in user_frames() if frame.f_code.co_filename != __file__)
    return _is_own(str(user.f_globals.get("__name__", "")))


def _functions(outputs: list[Tensor]) -> Iterator[Any]:
    """Yield the autograd functions written in Python that outputs depend on."""
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        cls = autograd_function_of(node)
        if cls is not None:
            yield cls
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                stack.append(before)


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "pocketize")
