"""The object that replaces the ``forward`` of a module instance, for the passes that wrap one.

``module.forward`` of one instance is set to an object that runs the forward it replaces inside
something: an autocast region, a checkpoint, hooks on saved tensors. The module stays the object it
was, with its class, its hooks (which run outside, once), its keys and its modes. A pair of forward
hooks would do less: torch runs no hook when a forward is interrupted from the keyboard, so that
autocast would stay switched on in the rest of a notebook, and hooks registered before ours would
see other values than they used to.

The objects hold the module, as bound methods do, so that ``copy.deepcopy`` and pickle, which come
here by way of the module, bind the copy's forward to the copy.
"""

from __future__ import annotations

__all__ = [
    "Forward",
    "hooked",
    "is_foreign",
    "lowering",
    "note_broken",
    "note_compiled",
    "obstacle",
    "refuse_exchanged",
    "unwrapping",
    "without_backward",
    "wrapping",
]

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx, nn

from pocketize._torch import saving_hooks_allowed, storage_key, transforms_active
from pocketize.errors import ExecutionError, PocketizeWarning

F = TypeVar("F", bound="Forward")

#: From torch 2.7 on.
_is_exporting = getattr(torch.compiler, "is_exporting", bool)


def without_backward() -> bool:
    """Tell whether what runs now will not be differentiated by way of its module.

    An exported or traced program is differentiated, if at all, by its own operators; function
    transforms (``torch.func``) differentiate what runs inside them as they like. The same holds
    where ``disable_saved_tensors_hooks`` forbids the hooks that passes work with.
    """
    tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
    if not torch.is_grad_enabled() or _is_exporting() or bool(tracing()):
        return True
    if torch.compiler.is_compiling():
        return False
    return transforms_active() or not saving_hooks_allowed()


_compiled: set[str] = set()


def note_compiled(name: str) -> None:
    """Warn once that a pass does nothing for a training step that ``torch.compile`` traces.

    May be called while it traces: there is no graph break.

    Args:
        name: of the pass.
    """
    if torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling():  # and not exporting
        _warn_compiled(name)


# Runs while torch.compile traces, and is no part of what it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_compiled(name: str) -> None:
    if name in _compiled or _is_exporting():
        return
    _compiled.add(name)
    warnings.warn(
        f"{name}: torch.compile traces this model, so the pass saves no memory: the compiler "
        "decides what is kept for the backward pass. Use the pass recompute with torch 2.13 or "
        "newer, which tells the compiler what to keep, or train without torch.compile",
        PocketizeWarning,
        stacklevel=2,
    )


def note_broken(name: str) -> None:
    """Warn once that ``torch.compile`` left a model to a pass that needs one graph."""
    if f"broken {name}" in _compiled:
        return
    _compiled.add(f"broken {name}")
    warnings.warn(
        f"{name}: torch.compile cannot trace this model as one graph, so it trains without the "
        "compiler: graph breaks, or attributes that the forward sets; TORCH_LOGS=graph_breaks "
        "lists them",
        PocketizeWarning,
        stacklevel=2,
    )


class Forward:
    """Runs in place of a module's forward; by itself it does just what that does.

    Args:
        module: the module; :meth:`install` puts the object into its place.
    """

    #: The pass that lowers what training keeps by this; "" where it is none of those.
    lowers: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the object be called as a method of its module, too."""
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            cls.__call__ = _also_bound(cls.__call__)  # type: ignore[method-assign]

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        #: A forward that was set on the instance before, by the user or another pass.
        self.inner: Any = vars(module).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments of the module's forward and return what it returns."""
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that this one replaces."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        # Looked up on every call: fully_shard, for one, gives a module another class.
        return type(self.module).forward(self.module, *args, **kwargs)

    def install(self) -> None:
        """Become the module's forward."""
        vars(self.module)["forward"] = self

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the forward that this one replaces."""
        if self.inner is not None:
            return inspect.signature(self.inner)
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        """The code of the replaced forward, in which ``torch.export`` looks up its source."""
        code: CodeType = (self.inner or type(self.module).forward).__code__
        return code


def _also_bound(call: Any) -> Any:
    """Return a ``__call__`` that accepts the module as its first argument.

    accelerate's ``unwrap_model(keep_fp32_wrapper=False)`` makes a bound method of what it finds as
    a module's forward. The first call puts the object itself back.
    """

    @functools.wraps(call)
    def run(self: Forward, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):
            held = vars(args[0]).get("forward")
            if getattr(held, "__func__", None) is self:
                _unbound(args[0], held).install()
                args = args[1:]
        return call(self, *args, **kwargs)

    return run


def _unbound(module: nn.Module, forward: Any) -> Any:
    """Return a module's forward; of one that was bound to the module, the object itself.

    Raises:
        ExecutionError: a copy of the module has the original's, as copies of bound methods have.
    """
    found = getattr(forward, "__func__", None)
    if not isinstance(found, Forward):
        return forward
    if found.module is not module:
        raise ExecutionError(
            "the model was copied with a forward that accelerate had bound to the original: call "
            "the model once after unwrap_model, then copy it"
        )
    return found


def wrapping(module: nn.Module, kind: type[F]) -> F | None:
    """Return the object of a kind that replaces a module's forward, if there is one.

    Args:
        module: the module.
        kind: a subclass of :class:`Forward`; it may stand below others.
    """
    for forward in _layers(module):
        if isinstance(forward, kind):
            return forward
    return None


def unwrapping(kind: type[Forward]) -> Callable[[nn.Module], None]:
    """Return what takes the objects of a kind away from where they replace a module's forward."""

    def unwrap(module: nn.Module) -> None:
        held = vars(module)
        above: Any = None
        for forward in list(_layers(module)):
            if not isinstance(forward, kind):
                above = forward
            elif above is not None:
                above.inner = forward.inner
            elif forward.inner is not None:
                held["forward"] = forward.inner
            else:
                del held["forward"]

    return unwrap


def lowering(model: nn.Module) -> list[str]:
    """Return the names of the passes that lower what training a model keeps.

    Their forwards, or the classes of modules that they replaced, say so as ``lowers``.
    """
    layers = [forward for module in model.modules() for forward in _layers(module)]
    names = [forward.lowers for forward in layers]
    names += [getattr(type(module), "lowers", "") for module in model.modules()]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def _layers(module: nn.Module) -> Iterator[Any]:
    forward = _unbound(module, vars(module).get("forward"))
    while isinstance(forward, Forward):
        yield forward
        forward = forward.inner


def obstacle(module: nn.Module) -> str:
    """Say why a module's forward cannot be replaced on the instance; ``""`` if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "it is TorchScript, whose forward is compiled code; rewrite the Python module and "
            "script or trace the result"
        )
    if isinstance(module, fx.GraphModule):
        return (
            "it is a torch.fx GraphModule, and copies of one lose what is attached to it; rewrite "
            "the module that it was traced from, or make it a submodule of a module of your own"
        )
    return ""


def refuse_exchanged(name: str, parameter: torch.Tensor, before: torch.Tensor) -> None:
    """Refuse a backward pass if a weight has other data than in the forward (``p.data = ...``).

    Args:
        name: of the pass.
        parameter: the weight as it is now.
        before: an alias of what it was.

    Raises:
        ExecutionError: it holds other memory, with other values.
    """
    if storage_key(parameter) == storage_key(before) or type(before) is not torch.Tensor:
        return  # fake tensors and other subclasses may have no values to compare
    if parameter.device != before.device or not torch.equal(parameter, before):
        raise ExecutionError(
            f"{name}: a weight of shape {list(before.shape)} was given other data between the "
            "forward and the backward pass (p.data = ...), and both must see the same; run the "
            "forward again after weights change"
        )


def hooked(modules: Mapping[str, nn.Module]) -> str:
    """Return the path of the first module with forward hooks that must not run twice, or ``""``.

    Hooks of torch, and those that pocketize measures with, are made for it.
    """
    for path, module in modules.items():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(map(is_foreign, hooks)):
            return path
    return ""


def is_foreign(hook: Any) -> bool:
    """Tell whether a forward hook is neither torch's nor ours."""
    hook = getattr(hook, "func", hook)  # of a functools.partial
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.partition(".")[0] not in ("torch", "pocketize")
