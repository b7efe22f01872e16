"""Norm layers that keep their activated output only, and the activations that come after them.

A layer is converted by giving the object another class: a subclass of the class it has, made by
:func:`converted_class`. So parameters, buffers, hooks, keys, versions and ``isinstance`` stay, and
where the memory cannot be saved the layer runs the forward it always had.
"""

from __future__ import annotations

__all__ = [
    "ActivationInPlace",
    "IdentityForward",
    "NormInPlace",
    "activation_of",
    "converted_class",
    "hooks_of",
    "norm_kind",
    "plain_reason",
]

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from pocketize._torch import (
    FakeTensor,
    check_norm_input,
    in_checkpoint,
    transforms_active,
    unbatched_dim,
)
from pocketize.passes.inplace.activations import (
    Activation,
    ActivationTag,
    IdentityOnTagged,
    remove_tag,
)
from pocketize.passes.inplace.inplace_abn import run_package
from pocketize.passes.inplace.invertibility import InPlaceCall, InvertibilityCheck
from pocketize.passes.inplace.statistics import normalise
from pocketize.passes.shared.forwards import Forward, note_compiled
from pocketize.passes.shared.norm_activation import NormActivation
from pocketize.passes.shared.norm_gradients import Norm

_KINDS: dict[Any, str] = {
    nn.BatchNorm1d.forward: "batch",
    nn.SyncBatchNorm.forward: "batch",
    nn.InstanceNorm1d.forward: "instance",
    nn.GroupNorm.forward: "group",
}


def _forward_of(module: nn.Module) -> Any:
    """Return the forward that a layer's class had before any conversion; None if it is patched."""
    if isinstance(module, _Converted):
        return module.converted_from.forward
    return None if "forward" in vars(module) else type(module).forward


def norm_kind(module: nn.Module) -> str | None:
    """Return "batch", "instance" or "group" for a layer that runs one of torch's norm forwards."""
    return _KINDS.get(_forward_of(module))


def activation_of(module: nn.Module) -> Activation | None:
    """Return what one of torch's own activation layers with an inverse does, as it is set now."""
    forward = _forward_of(module)
    if forward is nn.LeakyReLU.forward:
        return Activation("leaky_relu", float(cast(nn.LeakyReLU, module).negative_slope))
    if forward is nn.ELU.forward:
        return Activation("elu", float(cast(nn.ELU, module).alpha))
    if forward is nn.PReLU.forward:
        return Activation("prelu")
    return module.replaced if isinstance(module, ActivationInPlace) else None


def hooks_of(module: nn.Module) -> str:
    """Name a kind of hook that would see other values after a conversion; ``""`` for none."""
    if module._backward_hooks or module._backward_pre_hooks:
        return "backward hook"
    for hook in module._forward_hooks.values():
        if not (getattr(hook, "__module__", None) or "").startswith("pocketize."):
            return "forward hook"
    return ""


def plain_reason(module: nn.Module) -> str:
    """Say why a norm that runs now cannot save memory, by the state torch is in; ``""`` if it can.

    In each of these cases the layer runs the forward it always had.
    """
    tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
    if torch.compiler.is_compiling() or tracing():
        return "it is being compiled or traced"
    if not torch.is_grad_enabled():
        return "it runs without gradients, as in torch.no_grad or a reentrant checkpoint"
    if transforms_active():
        return "it runs under a function transform or forward-mode differentiation"
    if in_checkpoint():
        return "it stands in a checkpointed region, which is run again anyway"
    hook = hooks_of(module)
    return f"a {hook} reads the tensor between norm and activation" if hook else ""


class _Converted(nn.Module):
    """Base of what conversions make of a module: knows the class from before, and itself."""

    converted_from: type[nn.Module]
    converted_by: type[_Converted]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by way of the class from before, as this one was made at run time."""
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        return (_remake, (self.converted_by, self.converted_from), *reduced[2:])


def _remake(mixin: type[_Converted], original: type[nn.Module]) -> nn.Module:
    made = converted_class(mixin, original)
    return made.__new__(made)


_CLASSES: dict[Any, type[nn.Module]] = {}


def converted_class(mixin: type[_Converted], original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a module class that runs in place.

    Args:
        mixin: :class:`NormInPlace` or :class:`ActivationInPlace`.
        original: the class of the module.
    """
    if (mixin, original) not in _CLASSES:
        held: dict[str, Any] = {"converted_by": mixin, "converted_from": original}
        # In the module of the original: torch.fx takes what torch.nn defines as a unit.
        held |= {"__module__": original.__module__}
        made = type(f"InPlace{original.__name__}", (mixin, original), held)
        _CLASSES[mixin, original] = made
    return _CLASSES[mixin, original]


class NormInPlace(_Converted):
    """A norm that returns its activated output and keeps nothing else, where that saves memory.

    Attributes:
        absorbed: the activation that it computes as well.
        backend: ``"native"`` or ``"inplace_abn"``.
        slopes_of: the PReLU that it computes; no child of this layer.
    """

    #: The pass that lowers what training keeps by this class.
    lowers: ClassVar[str] = "in-place-norm"
    absorbed: Activation
    backend: str
    invertibility: InvertibilityCheck
    slopes_of: nn.Module | None
    eps: float
    num_features: int
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and activate (and tag the tensor), or just normalise, as the class before."""
        if torch.compiler.is_compiling():
            note_compiled("in-place-norm")
            return cast(Tensor, super().forward(input))
        kind = _KINDS[self.converted_from.forward]
        group = _group_to_share_with(self, input)
        slopes = None if self.slopes_of is None else cast(Tensor, self.slopes_of.weight)
        reason = plain_reason(self) or _slopes_obstacle(slopes, input, kind)
        if group is not None:
            # In all cases here, saving or not: processes whose batches differ must exchange the
            # same sums, and torch has no SyncBatchNorm for CPUs to fall back to.
            check_norm_input(self, input)
            if input.shape[1] != self.num_features:
                raise ValueError(f"expected {self.num_features} channels, got {input.shape[1]}")
        elif reason or not _saves(self, input, kind, slopes):
            return self._plain(input)
        tag = ActivationTag(Activation("identity") if reason else self.absorbed, self._title())
        norm, running = _settings(self, kind, group)
        input = _autocast(input, kind)
        if self.backend == "inplace_abn" and not reason and slopes is None:
            done = run_package(
                input, self.weight, self.bias, running, norm, tag, self.invertibility
            )
            if done is not None:
                return tag.attach(done)

        new: list[Tensor | None] = []

        def run(input: Tensor) -> Tensor:
            weight, bias = self.weight, self.bias
            with torch.no_grad():
                done = normalise(input, weight, bias, *running, norm)
            new[:] = done.running_mean, done.running_var
            call = InPlaceCall(norm, tag, self.invertibility, done.count)
            given = input, weight, bias, None if reason else slopes, done.mean, done.invstd
            return NormActivation.run(call, done.output, *given)

        # A class of tensors gives its results their class and metadata in __torch_function__.
        dressed = has_torch_function_unary(input)
        output: Tensor = handle_torch_function(run, (input,), input) if dressed else run(input)
        with torch.no_grad():
            for old, value in zip(running, new, strict=True):
                if old is not None and value is not None:
                    old.copy_(value)
        return tag.attach(output)

    def _plain(self, input: Tensor) -> Tensor:
        """Run the forward of the class from before, in this process alone."""
        if isinstance(self, nn.SyncBatchNorm):
            # its own insists on other devices than a CPU
            return nn.BatchNorm1d.forward(self, input)
        return cast(Tensor, super().forward(input))

    def _title(self) -> str:
        return f"{self.converted_from.__name__}({super().extra_repr()})"

    def extra_repr(self) -> str:
        """The class's own text, and the activation."""
        return f"{super().extra_repr()}, in_place={self.absorbed}"


class ActivationInPlace(_Converted):
    """An activation that passes on what a norm has activated, and activates everything else.

    Attributes:
        replaced: for a ReLU that was exchanged, what it is now.
    """

    replaced: Activation | None

    def forward(self, input: Tensor) -> Tensor:
        """Activate, unless a norm has done it."""
        activation = activation_of(self)
        if activation is not None and remove_tag(input, activation):
            return input
        if self.replaced is not None:
            return F.leaky_relu(input, self.replaced.slope, bool(getattr(self, "inplace", False)))
        return cast(Tensor, super().forward(input))

    def extra_repr(self) -> str:
        """The class's own text, and what a ReLU was exchanged for."""
        own = super().extra_repr()
        if self.replaced is None:
            return own
        return f"{own}, replaced_by={self.replaced}" if own else f"replaced_by={self.replaced}"


class IdentityForward(Forward):
    """Runs a forward whose calls of activation functions are the identity on tagged tensors."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        if torch.compiler.is_compiling():  # no norm works in place then
            return self.original(*args, **kwargs)
        with IdentityOnTagged():  # type: ignore[no-untyped-call, unused-ignore]
            return self.original(*args, **kwargs)


def _group_to_share_with(module: nn.Module, input: Tensor) -> Any:
    """Return the processes whose statistics a SyncBatchNorm shares now; None if it is alone."""
    if not (isinstance(module, nn.SyncBatchNorm) and module.training):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if isinstance(input, FakeTensor) or input.is_meta:
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _slopes_obstacle(slopes: Tensor | None, input: Tensor, kind: str) -> str:
    """Say why a PReLU cannot be computed with the norm, for this input; ``""`` if it can."""
    if slopes is None:
        return ""
    if slopes.device != input.device or slopes.numel() not in (1, input.shape[1]):
        return "its PReLU does not fit the input"
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.is_floating_point():
        dtypes = input.dtype, torch.get_autocast_dtype(device)
        if _autocast_dtype("prelu", device, *dtypes) != _autocast_dtype(kind, device, *dtypes):
            return "autocast runs its PReLU in another type"
    elif slopes.dtype != input.dtype:
        return "its PReLU does not fit the input"
    return ""


def _saves(module: Any, input: Tensor, kind: str, slopes: Tensor | None) -> bool:
    """Whether there will be a backward pass, and the input is an ordinary one.

    Unusual inputs (no batch axis, one value per mean, a wrong number of channels) are left to
    torch's own forward, which raises the right error.
    """
    tensors = (input, module.weight, module.bias, slopes)
    if not any(t is not None and t.requires_grad for t in tensors):
        return False
    if not input.is_floating_point() or input.ndim < 2 or not input.numel():
        return False
    channels = module.num_channels if kind == "group" else module.num_features
    size = math.prod(input.shape[2:])
    if kind == "group":
        return bool(input.shape[1] == channels and size * channels > module.num_groups)
    check_norm_input(module, input)
    if kind == "instance":
        batched = input.ndim != unbatched_dim(module)
        return bool(batched and input.shape[1] == channels and size > 1)
    return bool(input.shape[1] == channels and input.shape[0] * size > 1)


def _settings(
    layer: Any, kind: str, group: Any
) -> tuple[Norm, tuple[Tensor | None, Tensor | None]]:
    """Return what the layer does in its present mode, and its running statistics.

    This is what torch's forwards work out before they call the functional.
    """
    if kind == "group":
        return Norm("group", layer.eps, groups=layer.num_groups), (None, None)
    mean, var = layer.running_mean, layer.running_var
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if kind == "instance":
        if not layer.training and layer.track_running_stats:
            return Norm("batch", layer.eps, from_input=False), (mean, var)
        return Norm("instance", layer.eps, momentum=momentum), (mean, var)
    if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:  # a cumulative average
            momentum = 1.0 / float(layer.num_batches_tracked)
    from_input = layer.training or (mean is None and var is None)
    if layer.training and not layer.track_running_stats:
        mean = var = None
    norm = Norm("batch", layer.eps, from_input=from_input, momentum=momentum, process_group=group)
    return norm, (mean, var)


def _autocast(input: Tensor, kind: str) -> Tensor:
    """Bring the input to the type that autocast would run torch's own norm in."""
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return input
    return input.to(_autocast_dtype(kind, device, input.dtype, torch.get_autocast_dtype(device)))


@functools.cache
def _autocast_dtype(
    kind: str, device: str, dtype: torch.dtype, autocast: torch.dtype
) -> torch.dtype:
    """Ask torch, whose lists differ between devices and versions."""
    tiny = torch.zeros(1, 1, 2, dtype=dtype, device=device)
    functions: dict[str, Callable[[], Tensor]] = {
        "batch": lambda: F.batch_norm(tiny, None, None, training=True),
        "instance": lambda: F.instance_norm(tiny),
        "group": lambda: F.group_norm(tiny, 1),
        "prelu": lambda: F.prelu(tiny, torch.zeros(1, device=device)),
    }
    with torch.no_grad():
        return functions[kind]().dtype
