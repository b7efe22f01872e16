"""Activations that can be undone, and how the net's own activation learns that it has been done.

A norm that works in place returns the *activated* tensor. The net's own activation then has
nothing left to do, but only then: in evaluation, under ``torch.compile`` or inside a checkpoint the
norm computes the norm alone. So the tensor carries a mark that tells which activation it has had,
and the activation, wherever in the net it is called, takes the mark off and passes the tensor on. A
tensor without a mark is activated as it always was. Nothing depends on who calls whom how often,
and a norm that somebody replaces later loses no activation. The norm's backward looks whether the
mark was taken off, so a forward that goes another way than the one that was planned is noticed
before a weight has moved.
"""

from __future__ import annotations

__all__ = ["KINDS", "Activation", "Mark", "Skipping", "finite_inverse", "marked", "take_mark"]

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pocketize._torch import activations_of_torch
from pocketize.errors import ExecutionError

_ATEN = torch.ops.aten
_MARK = "_pocketize_activation"
KINDS = ("identity", "leaky_relu", "elu", "prelu")


@dataclass(frozen=True)
class Activation:
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

    def apply_(self, z: Tensor, slopes: Tensor | None = None) -> Tensor:
        """Activate a tensor, in place where torch can, and return the result.

        Args:
            z: (N, C, ...), which the caller must own.
            slopes: of a PReLU, (1,) or (C,), of the type of ``z``.
        """
        if slopes is not None:
            return torch.prelu(z, slopes)
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
        self, grad: Tensor, value: Tensor, *, activated: bool, slopes: Tensor | None = None
    ) -> Tensor:
        """Return the gradient before the activation, a tensor of its own.

        Args:
            grad: the gradient after it.
            value: the tensor after the activation or before it.
            activated: it is the one after it. A positive slope keeps the sign, and need not know.
            slopes: those of a PReLU, so that they broadcast.
        """
        if slopes is not None:
            return torch.where(value > 0, grad, grad * slopes)
        if self.kind == "leaky_relu":
            before: Tensor = _ATEN.leaky_relu_backward(grad, value, self.slope, False)
        elif self.kind == "elu":
            before = _ATEN.elu_backward(grad, self.slope, 1.0, 1.0, activated, value)
        else:
            before = grad.clone()
        return before


def finite_inverse(values: Tensor) -> Tensor:
    """Return ``1 / values``, and 0 where that is infinite."""
    inverse = values.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0.0)


class Mark:
    """Tells on a tensor what it has been activated with.

    Args:
        activation: what with.
        layer: what an error calls the norm that did it.
    """

    def __init__(self, activation: Activation, layer: str) -> None:
        self.activation, self.layer = activation, layer
        #: The net's own activation has seen the tensor, or there is none.
        self.taken = activation.kind == "identity"

    def put_on(self, tensor: Tensor) -> Tensor:
        """Put the mark on a tensor, and return that."""
        if not self.taken:
            setattr(tensor, _MARK, self)
        return tensor

    def check(self) -> None:
        """See to it that the activation has been skipped.

        Raises:
            ExecutionError: it has not.
        """
        if not self.taken:
            raise ExecutionError(
                f"in-place-norm: {self.layer} returned an activated tensor, but {self.activation} "
                "was not called on it, as it was when the pass was applied: the forward went "
                "another way, or what stands between the two was changed. Leave the layer out with "
                "keep=(...), or apply the pass to the model as it is now"
            )


def marked(tensor: Any) -> bool:
    """Whether a tensor has been activated and nobody has taken the mark off yet."""
    return getattr(tensor, _MARK, None) is not None


def take_mark(tensor: Any, activation: Activation) -> bool:
    """Whether this activation has been applied to a tensor already; takes the mark off.

    Args:
        tensor: the input of an activation.
        activation: that activation.

    Raises:
        ExecutionError: another activation has been applied, because an attribute was changed since.
    """
    found: Mark | None = getattr(tensor, _MARK, None)
    if found is None:
        return False
    if found.activation != activation:
        raise ExecutionError(
            f"in-place-norm: the norm before this activation applied {found.activation} in its "
            f"stead, but it is {activation} now; set the activation first, then apply the pass"
        )
    found.taken = True
    if not torch.compiler.is_compiling():
        delattr(tensor, _MARK)
    return True


class Skipping(TorchFunctionMode):
    """While active, calls of activation functions on marked tensors return the tensor.

    This is for activations that a forward calls as functions, ``F.leaky_relu(self.norm(x))``. All
    other calls go through, and so do these on tensors that no norm has activated.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, or return its input if it is an activation that has been applied."""
        kwargs = kwargs or {}
        entry = _FUNCTIONS.get(func)
        if entry is not None:
            tensor = args[0] if args else kwargs.get("input")
            if marked(tensor):
                kind, name, default = entry
                slope = args[1] if len(args) > 1 else kwargs.get(name, default)
                if take_mark(tensor, Activation(kind, float(slope))):
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
    **dict.fromkeys(
        (F.elu, F.elu_, *activations_of_torch("elu")),
        ("elu", "alpha", 1.0),
    ),
}
