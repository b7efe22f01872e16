"""What users do with a network, as functions that several passes are tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["function_transforms"]


def function_transforms(model: Any, x: Tensor) -> Any:
    """Gradients of each sample (vmap of grad), a jvp, and a backward through a dual number."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(given: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (x[None],)).square().mean()

    model.eval()
    each = torch.func.vmap(torch.func.grad(one), (None, 0))(weights, x)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.autograd.forward_ad.unpack_dual(out).tangent.square().sum().backward()
    return each, tangent
