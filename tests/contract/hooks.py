"""Hooks: the user's stay, in their order, and fire as often; a pass may add its own beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn

from pocketize.plugin.edits import Convert
from tests.contract.case import Case
from tests.contract.checking import check, require
from tests.contract.snapshot import HOOK_TABLES
from tests.contract.training import step

__all__ = ["hook_names", "hooks_survive"]

RUNTIME = "pocketize.passes"
"""Where what passes put into rewritten nets lives."""


def hook_names(module: nn.Module, table: str) -> list[str]:
    return [_hook_name(hook) for hook in vars(module).get(table, {}).values()]


def _hook_name(hook: Any) -> str:
    hook = getattr(hook, "hook", hook)  # torch wraps some
    hook = getattr(hook, "__func__", hook)  # a bound method, of the copy's own object
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def _is_ours(hook: Any) -> bool:
    """Whether a hook is part of what passes put into rewritten nets."""
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "__func__", hook)
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home == RUNTIME or home.startswith(f"{RUNTIME}.")


def _may_add_hooks(case: Case, path: str) -> bool:
    """Whether the plan converts a module, or one that it is a part of."""
    converted = [e.module for e in case.plan.edits if isinstance(e, Convert)] if case.plan else []
    return any(not root or f"{path}.".startswith(f"{root}.") for root in converted)


@check
def hooks_survive(case: Case) -> None:
    """The same hooks stand in the same tables, bound to the copy, and as many of them fire.

    A conversion may add hooks of the passes' runtime to the module it names and to parts of it.
    """
    after = dict(case.rewritten.named_modules(remove_duplicate=False))
    theirs = {id(module) for module in case.original.modules()}
    problems = []
    for path, module in case.original.named_modules():
        for table in HOOK_TABLES:
            old = list(vars(module).get(table, {}).values())
            new = list(vars(after[path]).get(table, {}).values())
            problems += [
                f"{path}.{table}: a hook is bound to the original"
                for hook in new
                if id(getattr(hook, "__self__", None)) in theirs
            ]
            if _may_add_hooks(case, path):
                new = [hook for hook in new if not _is_ours(hook)]
            if [_hook_name(hook) for hook in old] != [_hook_name(hook) for hook in new]:
                problems.append(f"{path}.{table}: {len(old)} hooks -> {len(new)}")
    require(problems)
    before, now = _fired(case, case.build()), _fired(case, case.fresh())
    assert before == now, f"hooks fired {before}, after the rewrite {now}"


def _fired(case: Case, model: nn.Module) -> dict[str, int]:
    """How often each hook of the user's runs in one training step, by module path and table."""
    counts: dict[str, int] = defaultdict(int)
    found = False

    def counted(hook: Callable[..., Any], key: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[key] += 1
            return hook(*args, **kwargs)

        return wrapper

    for path, module in model.named_modules():
        for table in HOOK_TABLES[:4]:
            hooks = vars(module).get(table) or {}
            for number, hook in hooks.items():
                if not _is_ours(hook):
                    found = True
                    hooks[number] = counted(hook, f"{path}.{table}")
    if found:
        step(model, case.inputs)
    return dict(counts)
