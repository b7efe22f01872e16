"""The hooks on a model that record every forward pass with gradients."""

from __future__ import annotations

__all__ = ["Recording", "recording_of"]

import contextlib
import importlib
import sys
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from pocketize.conversions import conversion
from pocketize.errors import RewriteError
from pocketize.passes.runtime.recompute.fusing import Fusing
from pocketize.passes.runtime.recompute.tape import Tape
from pocketize.passes.runtime.recompute.values import Meter

_running = threading.local()


class Recording:
    """Forward hooks of the model itself: a tape runs from its first to its last operator.

    Nothing is recorded where there is no backward pass to come (``no_grad``, ``inference_mode``),
    while ``torch.compile`` traces (it plans recomputation itself, see
    ``torch._functorch.config.activation_memory_budget``), and inside another recording.

    Args:
        rebuilt: see :class:`Tape`.
        frees: likewise.
        min_bytes: likewise.
        meter: likewise.
    """

    def __init__(
        self,
        rebuilt: frozenset[str],
        frees: Mapping[str, tuple[int, ...]],
        min_bytes: int,
        meter: Meter | None = None,
    ) -> None:
        self.rebuilt, self.frees, self.min_bytes, self.meter = rebuilt, frees, min_bytes, meter

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on a model: the first to run before its forward, the last after it."""
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)

    def begin(self, model: nn.Module, args: Any) -> None:
        """Start recording, as a forward pre-hook."""
        if torch.compiler.is_compiling():
            return
        importlib.import_module("torch._dynamo")  # torch would do so amid the model

        stack = contextlib.ExitStack()
        opened = _stacks()
        if torch.is_grad_enabled() and not any(active for _, active, _ in opened):
            _refuse_sharded(model)
            tape = Tape(model, self.rebuilt, self.frees, self.min_bytes, self.meter)
            stack.callback(tape.finish)
            hooks = saved_tensors_hooks(tape.pack, tape.unpack)
            stack.enter_context(hooks)
            stack.enter_context(tape)
            stack.enter_context(Fusing(tape, lambda: _innermost() is hooks.pack_hook))
            opened.append((self, True, stack))
        else:
            opened.append((self, False, stack))

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Stop recording, as a forward hook that is always called."""
        if torch.compiler.is_compiling():
            return
        opened = _stacks()
        if opened and opened[-1][0] is self:
            opened.pop()[2].close()


@conversion("recompute")
def convert(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Give a model its recording.

    Raises:
        RewriteError: it has one, or is a kind of module that has no hooks.
    """
    if recording_of(module) is not None:
        raise RewriteError("the model recomputes already")
    if isinstance(module, torch.jit.ScriptModule):
        raise RewriteError("TorchScript modules take no hooks, so they cannot recompute")
    frees = {name: tuple(parts) for name, parts in options["frees"].items()}
    Recording(frozenset(options["rebuilt"]), frees, options["min_bytes"]).attach(module)
    return module


def recording_of(model: nn.Module) -> Recording | None:
    """Return the recording that a model has been given, ``None`` if it has none."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Recording):
            return owner
    return None


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse weights whose memory comes and goes: they are gone when results are built again.

    Raises:
        RuntimeError: the model's parameters are sharded by FSDP.
    """
    sharded = False
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if sharded or any(hasattr(p, "_fsdp_flattened") for p in model.parameters()):
        raise RuntimeError(
            "Recompute does not work on a model sharded by FSDP: it reads weights when FSDP has "
            "freed them. Use the pass 'checkpoint' with FSDP, or Recompute with "
            "DistributedDataParallel"
        )


def _stacks() -> list[tuple[Recording, bool, contextlib.ExitStack]]:
    if not hasattr(_running, "stacks"):
        _running.stacks = []
    stacks: list[tuple[Recording, bool, contextlib.ExitStack]] = _running.stacks
    return stacks


def _innermost() -> Any:
    """Return the pack hook that autograd would call now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]
