"""The mapillary package inplace_abn as a backend: batch norms in float32, written into the input.

The package computes ``act(xhat * (|weight| + eps) + bias)``. For a weight above ``eps`` that is the
user's function once it is given ``weight - eps``; for others it is not, and those steps run on
plain PyTorch instead. Its kernels know no fake tensors.

Source: Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018; https://github.com/mapillary/inplace_abn
"""

from __future__ import annotations

__all__ = ["INSTALL", "package_installed", "package_obstacle", "run_package"]

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import BatchNorm, FakeTensor, is_view
from pocketize.errors import ExecutionError
from pocketize.passes.inplace.activations import Activation, ActivationTag
from pocketize.passes.inplace.invertibility import InvertibilityCheck, unsafe_channels
from pocketize.passes.shared.norm_gradients import Norm

INSTALL = "pip install --no-build-isolation inplace-abn==1.1.0"


def package_installed() -> bool:
    """Whether inplace_abn can be imported."""
    return importlib.util.find_spec("inplace_abn") is not None


def package_obstacle(module: nn.Module, dtype: torch.dtype, activation: Activation) -> str:
    """Say why the package cannot run a layer; ``""`` if it can.

    Args:
        module: the norm.
        dtype: type of its input.
        activation: what follows it.
    """
    if not isinstance(module, BatchNorm):
        return "the package inplace_abn knows batch norms only; use backend='native'"
    if activation.kind == "prelu":
        return "the package inplace_abn knows no PReLU; use backend='native'"
    if dtype != torch.float32:
        return f"the package inplace_abn works in float32, not {dtype}; use backend='native'"
    weight = module.weight
    if weight is None or weight.is_meta or isinstance(weight, FakeTensor):
        return ""
    small = int((weight.detach() <= 2 * module.eps).sum())
    if small:
        return (
            f"{small} of {weight.numel()} gammas are negative or not above twice eps; the package "
            "inplace_abn computes |gamma| + eps, another function; use backend='native'"
        )
    return ""


def run_package(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    norm: Norm,
    tag: ActivationTag,
    invertibility: InvertibilityCheck,
) -> Tensor | None:
    """Run norm and activation in the memory of ``x``.

    Returns:
        ``x``, overwritten; or None, with nothing touched, where the package would compute something
        else than the layer does.
    """
    plain = isinstance(x, FakeTensor) or x.is_meta or not package_installed()
    if plain or x.dtype != torch.float32 or norm.kind != "batch" or norm.process_group is not None:
        return None
    if (x.is_leaf and x.requires_grad) or is_view(x):
        return None  # memory that others read
    if weight is not None:
        gamma, beta = weight.detach(), None if bias is None else bias.detach()
        unsafe, nearly = (
            unsafe_channels(gamma, beta, tag.activation, None, x.dtype, margin=margin)
            | (gamma <= least)
            for margin, least in ((False, 2 * norm.eps), (True, 0.1))
        )
        kept = invertibility.select(unsafe, nearly, (weight, bias), tag.layer)
        invertibility.stepped()  # the package's backward does not tell
        if kept.everything or kept.index is not None:
            return None
    functions: Any = importlib.import_module("inplace_abn.functions")
    activated: Tensor = functions.inplace_abn(
        x,
        None if weight is None else weight - norm.eps,
        bias,
        *running,
        training=norm.from_input,
        momentum=norm.momentum,
        eps=norm.eps,
        activation=tag.activation.kind,
        activation_param=tag.activation.slope,
    )
    if activated.requires_grad:
        activated.register_hook(_refuse_second)  # type: ignore[no-untyped-call]
    return activated


def _refuse_second(gradient: Tensor) -> None:
    """Refuse to be differentiated twice: the package's backward leaves no graph."""
    if torch.is_grad_enabled():
        raise ExecutionError(
            "in-place-norm: the package inplace_abn has no second derivative (create_graph=True); "
            "use backend='native'"
        )
