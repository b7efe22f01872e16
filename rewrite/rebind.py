"""Let an optimizer that was made before a rewrite update the rewritten copy.

``rewrite`` returns a copy, and an optimizer updates the parameters that it was made with: those of
the original. Where each parameter of the copy is the original's, by name, shape and value, the
optimizer can go on with the copy, with its state.
"""

from __future__ import annotations

__all__ = ["rebind"]

from typing import NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from pocketize.errors import ExecutionError
from pocketize.optim import StepInBackward


def rebind(optimizer: Optimizer, before: nn.Module, after: nn.Module) -> None:
    """Let an optimizer update the parameters of ``after`` in place of those of ``before``.

    ::

        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        lean = rewrite(model, "recompute", inputs=x)
        rebind(optimizer, model, lean)

    The optimizer stays the object it is, with its groups, options and hooks, so schedulers and a
    ``GradScaler`` go on. Each parameter takes its state and a waiting gradient along, and the next
    steps are those that ``before`` would have had. Parameters that are not of ``before`` stay.

    Args:
        optimizer: one of ``torch.optim``; unchanged if an error is raised.
        before: the model whose parameters it updates.
        after: the model that a rewrite made of it, before either is trained further.

    Raises:
        ExecutionError: a parameter has no counterpart with its name, shape, dtype, device and
            values, such as one that a pass has resized or drawn anew; parameters are tied in one
            model only; ``after`` has parameters of its own; or the optimizer is not of
            ``torch.optim``, steps in the backward pass, or updates none of ``before``.
    """
    kind = type(optimizer)
    if isinstance(optimizer, StepInBackward):
        _refuse(
            "it steps in the backward pass. Call its close() before, and step_in_backward after"
        )
    if not kind.__module__.startswith("torch.optim."):
        _refuse(
            f"{kind.__module__}.{kind.__name__} may refer to parameters elsewhere. Only the "
            "optimizers of torch.optim are known to have them in their groups and their state"
        )
    counterparts = _counterparts(before, after)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(parameter in counterparts for parameter in held):
        _refuse(f"it updates no parameter of this {type(before).__name__}")
    for group in optimizer.param_groups:
        # in the same list, which LBFGS refers to
        group["params"][:] = [counterparts.get(each, each) for each in group["params"]]
    for old in held:
        new = counterparts.get(old, old)
        if new is not old:
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
            if new.grad is None:
                new.grad = old.grad


def _counterparts(before: nn.Module, after: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Return the parameter of ``after`` for each of ``before``, once all have been compared."""
    olds = dict(before.named_parameters(remove_duplicate=False))
    news = dict(after.named_parameters(remove_duplicate=False))
    if added := [name for name in news if name not in olds]:
        _refuse(f"the rewritten model has a new parameter, {added[0]}, which it would not update")
    found: dict[nn.Parameter, nn.Parameter] = {}
    taken: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in olds.items():
        new = news.get(name)
        if new is None:
            _refuse(f"the rewritten model has no {name}")
        if old.shape != new.shape:
            _refuse(
                f"{name} has the shape {list(old.shape)} before and {list(new.shape)} after, and "
                "the state of the optimizer is of the first"
            )
        if (old.dtype, old.device) != (new.dtype, new.device):
            _refuse(
                f"{name} is {old.dtype} on {old.device} before, {new.dtype} on {new.device} after"
            )
        if found.setdefault(old, new) is not new or taken.setdefault(new, old) is not old:
            _refuse(f"{name} is tied to another parameter in one of the models only")
        if old is not new and not torch.equal(old, new):
            _refuse(
                f"{name} has other values after the rewrite: they were drawn anew, or one of the "
                "models was trained since"
            )
    return found


def _refuse(why: str) -> NoReturn:
    raise ExecutionError(
        f"rebind: {why}. Make the optimizer after rewriting, of the rewritten model's parameters, "
        "or rewrite with inplace=True"
    )
