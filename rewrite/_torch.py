"""The only file that touches private torch; ``tests/test_private_torch.py`` holds that.

A name is looked up when it is asked for, so that a release of torch that drops it costs what needs
it and nothing else. Each has a fallback, or raises an :class:`~pocketize.errors.ExecutionError`
that names the version of torch.
"""

from __future__ import annotations

# fmt: off
__all__ = [
    "BatchNorm", "ConvNd", "ConvTransposeNd", "DataDependentOutputException",
    "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode", "InstanceNorm", "NormBase",
    "OpOverload", "TorchDispatchMode", "activations_of_torch", "autograd_function_of",
    "backward_number", "backward_runs", "check_norm_input", "dispatch_modes", "fake_tensor_logger",
    "global_forward_hooks", "has_kernel", "has_tensor_hooks", "holders", "import_compiler",
    "in_autograd_function", "in_checkpoint", "innermost_saving", "is_batched", "is_compiled",
    "is_view", "keep_version", "keeps_graph", "next_sequence_number", "process_group", "pytree",
    "release", "run_parts", "running_node", "same_convolution", "saving_hooks_allowed", "schema_of",
    "slow_on_cpu", "sparse_parts", "storage_key", "swap_tensors", "takes_what_is_saved",
    "transforms_active", "unbatched_dim", "user_frames", "version_of", "watching_alias",
    "without_dispatch_modes",
]
# fmt: on

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from pocketize.errors import ExecutionError

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
    from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

_FAKE, _MODES = "torch._subclasses.fake_tensor", "torch.utils._python_dispatch"
_NORM, _NORMS = "torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm"
_CONVS = "torch.nn.modules.conv"
#: Classes and modules that are private, or in private modules, and where torch has them.
_PLACES = {
    "OpOverload": "torch._ops.OpOverload",
    "TorchDispatchMode": f"{_MODES}.TorchDispatchMode",
    "pytree": "torch.utils._pytree",
}
_PLACES |= {name: f"{_FAKE}.{name}" for name in ("FakeTensor", "FakeTensorMode")}
_PLACES |= {name: f"{_FAKE}.{name}" for name in __all__ if name.endswith("Exception")}
#: Private bases, where torch has them, and their public subclasses for where it has not.
_BASES: dict[str, tuple[str, tuple[type[nn.Module], ...]]] = {
    "BatchNorm": (_NORM, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)),
    "ConvTransposeNd": (_CONVS, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    "InstanceNorm": (_NORMS, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
}
_BASES["NormBase"] = _NORM, _BASES["BatchNorm"][1] + _BASES["InstanceNorm"][1]
_BASES["ConvNd"] = _CONVS, (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_BASES["ConvTransposeNd"][1])
_CHECKPOINT = "torch.utils.checkpoint"
_FOLDER = os.path.dirname(torch.__file__) + os.sep
#: Files that wrap what torch calls back, to keep the compiler out of it.
_WRAPPING = "_compile.py", os.path.join("utils", "_python_dispatch.py"), "_dynamo" + os.sep
_WRAPPERS = tuple(_FOLDER + name for name in _WRAPPING)


def __getattr__(name: str) -> Any:
    if name in _BASES:
        module, classes = _BASES[name]
        return getattr(importlib.import_module(module), f"_{name}", classes)
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _find(_PLACES[name])


def _find(path: str) -> Any:
    """Return what torch has at a dotted path, or raise an ExecutionError."""
    module, _, name = path.rpartition(".")
    try:
        owner = importlib.import_module(module)
        return getattr(owner, name) if hasattr(owner, name) else importlib.import_module(path)
    except ImportError as error:
        raise _missing(path) from error


def _missing(name: str) -> ExecutionError:
    text = f"torch {torch.__version__} has no {name}, which pocketize needs here. Use a version"
    return ExecutionError(f"{text} of torch that the README lists as tested")


def _of(owner: Any, name: str, title: str) -> Any:
    """Return a private attribute of something of torch's, or raise an ExecutionError."""
    found = getattr(owner, name, None)
    if found is None:
        raise _missing(f"{title}.{name}")
    return found


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to, as autograd counts it; 0 for inference tensors."""
    return 0 if tensor.is_inference() else int(tensor._version)


def keep_version(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which writing into a tensor does not count as a write."""
    name = "torch.autograd.grad_mode._unsafe_preserve_version_counter"
    found: AbstractContextManager[Any] = _find(name)(tensor)
    return found


def storage_key(memory: Tensor | torch.UntypedStorage) -> int:
    """Return a number that tells a storage from all others that are alive."""
    storage = memory.untyped_storage() if isinstance(memory, Tensor) else memory
    return int(_of(storage, "_cdata", "UntypedStorage"))


def watching_alias(tensor: Tensor) -> Tensor:
    """Return an alias without history whose version counts writes to the tensor.

    In a ``__torch_dispatch__``, below what shares versions, ``tensor.detach()`` does not.
    """
    guard = _find("torch._C._SetExcludeDispatchKeyGuard")
    with guard(_find("torch._C.DispatchKey").ADInplaceOrView, False):
        return tensor.detach()


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor is a batch, in ``vmap`` or ``autograd.grad(is_grads_batched=True)``."""
    functorch = getattr(torch._C, "_functorch", None)
    asked = ("is_batchedtensor", "is_legacy_batchedtensor")
    return any(bool(ask(tensor)) for n in asked if (ask := getattr(functorch, n, None)) is not None)


def release(storage: torch.UntypedStorage) -> None:
    """Free the memory of a storage that tensors still use."""
    storage.resize_(0)


def swap_tensors(one: Tensor, other: Tensor) -> None:
    """Exchange what two tensor objects are, for everybody who holds them."""
    torch.utils.swap_tensors(one, other)  # type: ignore[no-untyped-call]


def is_view(tensor: Tensor) -> bool:
    """Whether autograd takes a tensor for a view of another one."""
    return bool(_of(tensor, "_is_view", "Tensor")())


def has_tensor_hooks(tensor: Tensor) -> bool:
    """Whether hooks wait for the gradient of a tensor; where torch does not tell, yes."""
    return bool(getattr(tensor, "_backward_hooks", True))


def holders(tensor: Tensor) -> tuple[int, int]:
    """Return how many references C++ has to a tensor, and how many its storage has."""
    count = _find("torch._C._storage_Use_Count")
    of_tensor = _of(tensor, "_use_count", "Tensor")()
    return int(of_tensor), int(count(storage_key(tensor)))


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values of a sparse COO tensor, which need not be coalesced."""
    return _of(tensor, "_indices", "Tensor")(), _of(tensor, "_values", "Tensor")()


def process_group(name: str) -> Any:
    """Return the process group of a name (``group.group_name``)."""
    return _find("torch.distributed.distributed_c10d._resolve_process_group")(name)


# Operators and the modes that watch them


def schema_of(function: Any) -> Any:
    """Return the schema of an operator; None for what is none."""
    return getattr(function, "_schema", None)


def has_kernel(operator: str, key: str) -> bool | None:
    """Whether ``"aten::add.Tensor"`` has a kernel for a key, ``"CPU"``; None if unknown."""
    if not _find("torch._C._dispatch_has_kernel")(operator):
        return None
    return bool(_find("torch._C._dispatch_has_kernel_for_dispatch_key")(operator, key))


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether torch says that it has no fast kernels for a 16-bit dtype on this CPU (oneDNN's)."""
    short = "bf16" if dtype is torch.bfloat16 else "fp16"
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", lambda: True)()


def run_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a composite operator as the operators that it is made of.

    By its kernel, as the dispatcher would, or where torch has no way to it by ``func.decompose``,
    which may prefer a decomposition for the compiler that makes many more tensors.
    """
    key = getattr(getattr(torch._C, "DispatchKey", None), "CompositeImplicitAutograd", None)
    kernel = getattr(func, "_op_dk", None)
    if key is None or kernel is None:
        return func.decompose(*args, **kwargs)
    return kernel(key, *args, **kwargs)


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """Return a context in which no dispatch mode watches."""
    found: AbstractContextManager[Any] = _find(f"{_MODES}._disable_current_modes")()
    return found


def dispatch_modes() -> list[Any]:
    """Return the dispatch modes that watch now, the innermost last."""
    return list(_find(f"{_MODES}._get_current_dispatch_mode_stack")())


def import_compiler() -> None:
    """Import what torch imports of its compiler when the first dispatch mode is entered."""
    importlib.import_module("torch._dynamo")


def fake_tensor_logger() -> logging.Logger:
    """Return the logger to which torch tells operators that fail on tensors without memory."""
    return logging.getLogger(_FAKE)


def activations_of_torch(name: str) -> tuple[Any, ...]:
    """Return the builtin functions behind ``F.<name>`` and ``F.<name>_``, as far as there are."""
    builtin = getattr(torch._C, "_nn", None)
    found = (getattr(builtin, each, None) for each in (name, f"{name}_"))
    return tuple(function for function in found if function is not None)


# Layers


def check_norm_input(norm: nn.Module, input: Tensor) -> None:
    """Let a batch or instance norm raise its own error for an input that does not fit it."""
    for name in ("_check_input_dim", "_check_non_zero_input_channels"):
        check = getattr(norm, name, None)
        if check is not None:  # where it has none, its function fails in its own words
            check(input)


def same_convolution(kind: type[nn.Module], stock: type[nn.Module]) -> bool:
    """Whether a convolution's class computes what one of torch's does."""
    inner = {getattr(each, "_conv_forward", None) for each in (kind, stock)}
    return kind.forward is stock.forward and len(inner) == 1


def unbatched_dim(norm: nn.Module) -> int:
    """Return how many axes an input has that an instance norm takes for a single sample."""
    return int(_of(norm, "_get_no_batch_dim", type(norm).__name__)())


def global_forward_hooks() -> list[Any]:
    """Return the forward hooks that were registered for all modules."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return [hook for name in names for hook in getattr(modules, name, {}).values()]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` was applied to a module itself."""
    return "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None


# Autograd


def saving_hooks_allowed() -> bool:
    """Whether hooks on saved tensors may be set now; yes where torch does not tell."""
    allowed = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", None)
    return allowed is None or bool(allowed())


def transforms_active() -> bool:
    """Whether a function transform runs now (``torch.func``) or dual numbers are in use."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active and active()) or getattr(forward_ad, "_current_level", -1) >= 0


def in_autograd_function() -> bool:
    """Whether the forward of a ``torch.autograd.Function`` runs now.

    It runs without forward-mode gradients, which ``torch.no_grad()`` leaves on. Where torch no
    longer tells, the answer is no.
    """
    enabled = getattr(torch._C, "_is_fwd_grad_enabled", None)
    return enabled is not None and not enabled() and not torch.is_inference_mode_enabled()


def autograd_function_of(node: Any) -> type[Any] | None:
    """Return the ``torch.autograd.Function`` whose backward a node of the graph is, if any."""
    found: type[Any] | None = getattr(node, "_forward_cls", None)
    return found


def keeps_graph() -> bool:
    """Whether the backward pass that runs now retains its graph; if torch does not tell, no."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(keeps and keeps())


def backward_number(at_end: Callable[[], None] | None = None) -> int:
    """Return the number of the backward pass that runs now, and wait for its end without error."""
    if at_end is not None:
        _find("torch.autograd.variable.Variable")._execution_engine.queue_callback(at_end)
    return int(_find("torch._C._current_graph_task_id")())


def next_sequence_number() -> int:
    """Return the number that the next node of the graph gets in this thread."""
    return int(_find("torch._C._autograd._get_sequence_nr")())


def running_node() -> int | Tensor | None:
    """Return the number of the node that a backward pass runs now; None outside of one.

    The node that adds to the gradient of a leaf has no number: the leaf is returned instead.
    """
    node: Any = _find("torch._C._current_autograd_node")()
    variable: Tensor | None = getattr(node, "variable", None)
    if node is None or variable is not None:
        return variable
    return int(_of(node, "_sequence_nr", "Node")())


def backward_runs(level: int) -> bool:
    """Whether autograd called the function ``level`` frames up, and no Python code of a user."""
    frame: FrameType | None = sys._getframe(level + 1)
    while frame is not None and frame.f_code.co_filename.startswith(_WRAPPERS):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def in_checkpoint() -> bool:
    """Whether a non-reentrant checkpoint takes what autograd saves now."""
    known, hooks = _saving_hooks(ignore_tracing=True)
    if known:
        return hooks is not None and getattr(hooks[0], "__module__", "") == _CHECKPOINT
    return _on_stack(None)


def takes_what_is_saved(pack: Any, code: CodeType) -> bool:
    """Whether autograd gives what it saves now to a function, not to a checkpoint inside of it.

    Args:
        pack: the function, of ``torch.autograd.graph.saved_tensors_hooks``.
        code: what entered the hooks; a checkpoint around it does not count.
    """
    known, hooks = _saving_hooks(ignore_tracing=False)
    if known:
        return hooks is not None and hooks[0] is pack
    return not _on_stack(code)


def innermost_saving() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return the hooks on saved tensors that hold now; ``None`` if there are none to be seen."""
    return _saving_hooks(ignore_tracing=False)[1]


def _saving_hooks(*, ignore_tracing: bool) -> tuple[bool, tuple[Any, Any] | None]:
    """Return whether torch tells which hooks take what is saved now, and these hooks."""
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return (False, None) if top is None else (True, top(ignore_tracing) or None)


def _on_stack(until: CodeType | None) -> bool:
    """Look for a checkpoint among the callers: before torch 2.8 the hooks cannot be read."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not until:
        if frame.f_globals.get("__name__") == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def user_frames(level: int = 0) -> Iterator[FrameType]:
    """Yield the frames of callers that are not torch's own, from ``level`` frames up outwards."""
    frame: FrameType | None = sys._getframe(level + 1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith((_FOLDER, "<")):
            yield frame
        frame = frame.f_back
