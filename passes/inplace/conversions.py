"""The conversions that ``in-place-norm`` proposes: of norms, of activations, of calls of them."""

from __future__ import annotations

__all__ = ["ACTIVATION", "CALL", "NORM"]

from collections.abc import Mapping
from typing import Any

from torch import nn

from pocketize.errors import RewriteError
from pocketize.passes.inplace.activations import KINDS, Activation
from pocketize.passes.inplace.invertibility import Guard
from pocketize.passes.inplace.modules import (
    ActivationInPlace,
    NormInPlace,
    SkippingForward,
    activation_of,
    converted_class,
    norm_kind,
)
from pocketize.passes.shared.forwards import obstacle, wrapping
from pocketize.plugin.conversions import conversion

NORM = "in-place-norm"
ACTIVATION = "in-place-norm-activation"
CALL = "in-place-norm-call"


@conversion(NORM)
def convert_norm(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Let a norm keep its activated output only.

    Args:
        module: a norm layer that runs one of torch's forwards.
        options: ``kind`` and ``slope`` of the activation after it, ``slopes_of``, the path of a
            PReLU, and the ``backend``.
        root: the model.
    """
    if isinstance(module, NormInPlace) or norm_kind(module) is None:
        raise RewriteError(
            f"in-place-norm: expected one of torch's norm layers, got {type(module).__name__}"
        )
    activation = _activation(options)
    slopes_of = None
    if activation.kind == "prelu":
        slopes_of = root.get_submodule(str(options.get("slopes_of")))
        if not isinstance(slopes_of, nn.PReLU):
            raise RewriteError(f"in-place-norm: expected a PReLU, got {type(slopes_of).__name__}")
    module.__class__ = converted_class(NormInPlace, type(module))
    vars(module).update(  # past nn.Module, for which the PReLU would be a child of the norm
        absorbed=activation,
        backend=str(options.get("backend", "native")),
        guard=Guard(),
        slopes_of=slopes_of,
    )
    return module


@conversion(ACTIVATION)
def convert_activation(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Let an activation layer pass on what a norm has activated.

    Args:
        module: a LeakyReLU or an ELU, or a ReLU that is to become leaky.
        options: ``kind`` and ``slope``; ``exchange`` is true for a ReLU.
        root: the model.
    """
    activation = _activation(options)
    exchange = bool(options.get("exchange", False))
    fits = type(module).forward is nn.ReLU.forward if exchange else activation_of(module)
    if isinstance(module, ActivationInPlace) or not fits:
        raise RewriteError(
            f"in-place-norm: expected an activation layer, got {type(module).__name__}"
        )
    if not exchange and activation_of(module) != activation:
        raise RewriteError(
            f"in-place-norm: expected {activation}, found {activation_of(module)}; the model was "
            "built with other settings than the one that was rewritten"
        )
    module.__class__ = converted_class(ActivationInPlace, type(module))
    vars(module)["replaced"] = activation if exchange else None
    return module


@conversion(CALL)
def convert_call(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Let the activation functions that a module's forward calls pass on what a norm has activated.

    Args:
        module: any Python module.
        options: none.
        root: the model.
    """
    why = obstacle(module)
    if why:
        raise RewriteError(f"in-place-norm: {why}")
    if wrapping(module, SkippingForward) is None:
        SkippingForward(module).install()
    return module


def _activation(options: Mapping[str, Any]) -> Activation:
    kind, slope = options.get("kind"), options.get("slope", 1.0)
    if kind not in KINDS or not isinstance(slope, int | float) or not slope > 0:
        raise RewriteError(
            f"in-place-norm: expected a kind out of {', '.join(KINDS)} and a slope above 0, "
            f"got {dict(options)}"
        )
    return Activation(kind, float(slope))
