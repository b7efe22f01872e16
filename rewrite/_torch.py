"""The only file that touches private torch.

What has no public name in torch is reached through a function here. Each looks its name up when it
is called, so that a release of torch that drops one costs what needs it and not the import, and
each either has a fallback or raises an :class:`~pocketize.errors.ExecutionError` that names the
version of torch. ``tests/test_private_torch.py`` tries every function, and holds that no other file
touches a private name.
"""

from __future__ import annotations

__all__ = [
    "global_forward_hooks",
    "in_autograd_function",
    "innermost_saving",
    "keeps_graph",
    "real_tensors",
    "storage_key",
    "transforms_active",
    "version_of",
]

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as modules


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as autograd counts it; 0 for inference tensors."""
    return 0 if tensor.is_inference() else int(tensor._version)


def innermost_saving() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return the hooks on saved tensors that hold now; ``None`` if there are none to be seen."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top(False) if top else None


def storage_key(memory: Tensor | torch.UntypedStorage) -> int:
    """Return a number that tells a storage from all others that are alive."""
    storage = memory.untyped_storage() if isinstance(memory, Tensor) else memory
    return int(storage._cdata)


def transforms_active() -> bool:
    """Whether a function transform runs now (``torch.func``) or dual numbers are in use."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active and active()) or getattr(forward_ad, "_current_level", -1) >= 0


def in_autograd_function() -> bool:
    """Whether the forward of a ``torch.autograd.Function`` runs now.

    Such a forward runs without forward-mode gradients, which ``torch.no_grad()`` leaves on. Where
    torch no longer tells, the answer is no: who asks treats it as code under ``no_grad``.
    """
    enabled = getattr(torch._C, "_is_fwd_grad_enabled", None)
    return enabled is not None and not enabled() and not torch.is_inference_mode_enabled()


def keeps_graph() -> bool:
    """Whether the backward pass that runs now keeps its graph (``retain_graph=True``).

    Where torch does not tell, the answer is no.
    """
    autograd = getattr(torch._C, "_autograd", None)
    keeps = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return bool(keeps and keeps())


def real_tensors() -> contextlib.AbstractContextManager[object]:
    """Within it no dispatch mode is on, so that tensors that are made there have values."""
    module = getattr(torch.utils, "_python_dispatch", None)
    disable = getattr(module, "_disable_current_modes", None)
    return contextlib.nullcontext() if disable is None else disable()


def global_forward_hooks() -> list[Any]:
    """Return the forward hooks that were registered for all modules."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return [hook for name in names for hook in getattr(modules, name, {}).values()]
