"""Activations that can be inverted, and the tag on a tensor that a norm has activated.

A norm that works in place returns the *activated* tensor. The network's own activation must then
be the identity, but only then: in evaluation, under ``torch.compile`` or inside a checkpoint the
norm computes the norm alone. So the tensor carries a tag that names the activation. The
activation, wherever in the network it is called, removes the tag and returns the tensor; a tensor
without a tag is activated as before. A norm that is replaced later therefore loses no activation.
The norm's backward checks that the tag was removed, so that a forward that differs from the
recorded one is noticed before a weight has changed.
"""

from __future__ import annotations

__all__ = ["KINDS", "Activation", "ActivationTag", "IdentityOnTagged", "is_tagged", "remove_tag"]

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pocketize._torch import activations_of_torch
from pocketize.errors import ExecutionError
from pocketize.passes.shared.norm_gradients import Elementwise, finite_inverse

_ATEN = torch.ops.aten
_TAG = "_pocketize_activation"
KINDS = ("identity", "leaky_relu", "elu", "prelu")


@dataclass(frozen=True)
class Activation(Elementwise):
    """An activation with an inverse.

    Attributes:
        kind: one of :data:`KINDS`.
        slope: the negative slope of a leaky ReLU, or ELU's alpha; above 0. A PReLU's slopes are
            parameters, which the methods are given.
    """

    kind: str
    slope: float = 1.0

    def __str__(self) -> str:
        """``"leaky_relu(0.01)"``."""
        constant = self.kind in ("identity", "prelu")
        return self.kind if constant else f"{self.kind}({self.slope:g})"

    def apply(self, z: Tensor, slopes: Tensor | None = None) -> Tensor:
        """Activate a tensor, in place where torch can, and return the result.

        Args:
            z: (N, C, ...), which the caller must own.
            slopes: of a PReLU, (1,) or (C,).
        """
        if slopes is not None:
            return torch.prelu(z, slopes.to(z.dtype))
        if self.kind == "leaky_relu":
            return F.leaky_relu(z, self.slope, inplace=True)
        if self.kind == "elu":
            return F.elu(z, self.slope, inplace=True)
        return z

    def inverse(self, y: Tensor, slopes: Tensor | None = None) -> Tensor:
        """Return what was activated; a new tensor, or ``y`` itself for the identity.

        Slopes that have no inverse count as 0: their channels are kept.

        ELU's inverse is ``log1p(y / alpha)`` below 0. Where ``y`` has been rounded to ``-alpha``
        that would be minus infinity, so it stops at the logarithm of the precision.
        """
        if slopes is not None:
            return torch.where(y > 0, y, y * finite_inverse(slopes))
        if self.kind == "leaky_relu":
            return F.leaky_relu(y, 1.0 / self.slope)
        if self.kind == "elu":
            least = torch.finfo(y.dtype).eps - 1.0
            return torch.where(y > 0, y, (y / self.slope).clamp_(least, 0.0).log1p_())
        return y

    def backward(
        self, grad: Tensor, z: Tensor, y: Tensor | None, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradient before the activation, and that of a PReLU's slopes.

        Args: those of :meth:`FusedCall.backward`.
        """
        value, grad = z if y is None else y, grad.to(z.dtype)
        if slopes is not None:
            dslopes = (grad * z.clamp(max=0)).sum((0, 3))
            return torch.where(value > 0, grad, grad * slopes), dslopes
        if self.kind == "leaky_relu":  # a positive slope keeps the sign
            return _ATEN.leaky_relu_backward(grad, value, self.slope, False), None
        if self.kind == "elu":
            return _ATEN.elu_backward(grad, self.slope, 1.0, 1.0, y is not None, value), None
        return grad.clone(), None


class ActivationTag:
    """Says which activation a tensor has had; ``layer`` is what an error calls the norm."""

    def __init__(self, activation: Activation, layer: str) -> None:
        self.activation, self.layer = activation, layer
        #: The network's own activation has seen the tensor, or there is none.
        self.removed = activation.kind == "identity"
        #: The tensor. Classes of tensors may copy their attributes to what is computed of them.
        self.tensor: weakref.ref[Tensor] | None = None

    def __copy__(self) -> ActivationTag:
        return self

    def __deepcopy__(self, memo: Any) -> ActivationTag:
        return self

    def attach(self, tensor: Tensor) -> Tensor:
        """Put the tag on a tensor, and return that."""
        if not self.removed:
            self.tensor = weakref.ref(tensor)
            setattr(tensor, _TAG, self)
        return tensor

    def check(self) -> None:
        """Raise an ExecutionError if the network's activation was not called on the tensor."""
        if not self.removed:
            raise ExecutionError(
                f"in-place-norm: {self.layer} returned an activated tensor, but {self.activation} "
                "was not called on it, as it was when the pass was applied: the forward went "
                "another way, or what stands between the two was changed. Leave the layer out with "
                "keep=(...), or apply the pass to the model as it is now"
            )


def is_tagged(tensor: Any) -> bool:
    """Whether a tensor has been activated, and its tag was not removed yet."""
    return _tag_of(tensor) is not None


def _tag_of(tensor: Any) -> ActivationTag | None:
    tag: ActivationTag | None = getattr(tensor, _TAG, None)
    mine = tag is not None and tag.tensor is not None and tag.tensor() is tensor
    return tag if mine else None


def remove_tag(tensor: Any, activation: Activation) -> bool:
    """Whether an activation has been applied to its input already; removes the tag.

    Raises:
        ExecutionError: another activation has been applied, because an attribute was changed since.
    """
    found = _tag_of(tensor)
    if found is None:
        return False
    if found.activation != activation:
        raise ExecutionError(
            f"in-place-norm: the norm before this activation applied {found.activation} in its "
            f"stead, but it is {activation} now; set the activation first, then apply the pass"
        )
    found.removed = True
    if not torch.compiler.is_compiling():
        delattr(tensor, _TAG)
    return True


class IdentityOnTagged(TorchFunctionMode):
    """While active, calls of activation functions on tagged tensors return the tensor.

    This is for activations that a forward calls as functions, ``F.leaky_relu(self.norm(x))``. All
    other calls go through, and so do these on tensors that no norm has activated.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("input")
        if func in _FUNCTIONS and is_tagged(tensor):
            kind, name, default = _FUNCTIONS[func]
            slope = args[1] if len(args) > 1 else kwargs.get(name, default)
            remove_tag(tensor, Activation(kind, float(slope)))
            return tensor
        return func(*args, **kwargs)


#: Function -> kind of activation, name of its second parameter and that one's default.
_FUNCTIONS: dict[Any, tuple[str, str, float]] = {
    **dict.fromkeys(
        (
            F.leaky_relu,
            F.leaky_relu_,
            *activations_of_torch("leaky_relu"),
            torch.ops.aten.leaky_relu.default,
            torch.ops.aten.leaky_relu_.default,
        ),
        ("leaky_relu", "negative_slope", 0.01),
    ),
    **dict.fromkeys((F.elu, F.elu_, *activations_of_torch("elu")), ("elu", "alpha", 1.0)),
}
