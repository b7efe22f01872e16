"""What a forward does besides its operators: run hooks, change gradients.

Running the operators by tiles does nothing of it, so it is refused. For attributes that a forward
changes see attributes.py.
"""

from __future__ import annotations

__all__ = ["check_gradients", "check_hooks"]

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pocketize._torch import (
    autograd_function_of,
    global_forward_hooks,
    in_autograd_function,
    user_frames,
)
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.backward import differentiable
from pocketize.passes.tiling.tiled_graph import TilingError

_MODULE_HOOKS = {
    "forward": ("_forward_pre_hooks", "_forward_hooks"),
    "backward": ("_backward_hooks", "_backward_pre_hooks"),
}
_TENSOR_HOOKS = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook")
_DETACHING = {"detach", "detach_", "data", "grad"}  # explicit: no gradient follows

# -- hooks ---------------------------------------------------------------------------------------


def check_hooks(model: nn.Module, *, training: bool = False) -> None:
    """Refuse hooks of the user's on inner modules, which tiles do not run.

    The model's own hooks run around its forward. Hooks of the backward pass count in ``training``.

    Raises:
        TilingError: there is one.
    """
    kinds = ("forward", "backward") if training else ("forward",)
    found = [("every module", "forward", hook) for hook in global_forward_hooks()]
    for path, module in model.named_modules():
        for kind in kinds if path else ():
            tables = [vars(module).get(name, {}) for name in _MODULE_HOOKS[kind]]
            found += [(path, kind, hook) for table in tables for hook in table.values()]
    for path, kind, hook in found:
        if not _is_own(getattr(hook, "__module__", None) or type(hook).__module__):
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            raise TilingError(
                f"{path} has a {kind} hook ({name}), which tiles would not run; remove it, "
                "and register it again afterwards"
            )


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "pocketize")


# -- gradients -----------------------------------------------------------------------------------


def check_gradients(model: nn.Module, inputs: Inputs) -> None:
    """Refuse a forward whose gradients are not those of its operators.

    A trace has the operators, and not what keeps gradients from following them: parts that run
    under ``torch.no_grad()``, autograd functions with a backward of their own, hooks that change a
    gradient. Model and inputs are without memory.

    Raises:
        TilingError: the text says what keeps or changes gradients, and where.
    """
    # not leaves, as a network may write into its input
    given = inputs.map(lambda t: t.detach().requires_grad_().clone() if differentiable(t) else t)
    with torch.enable_grad(), _GradientWatch(model) as watch:
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


class _GradientWatch(TorchFunctionMode):
    """Checks every call on tensors that require gradients."""

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
        if name in _TENSOR_HOOKS:
            raise TilingError(
                f"{self._where()} calls {name} on a tensor, which training by tiles would not run; "
                "train the volume whole (train=False)"
            )
        out = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() or name in _DETACHING:
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
    stack: list[Any] = [t.grad_fn for t in outputs]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        cls = autograd_function_of(node)
        if cls is not None:
            yield cls
        stack += [before for before, _ in node.next_functions]
