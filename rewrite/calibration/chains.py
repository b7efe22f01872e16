"""Chains of convolutions that stand where one convolution stood: solved as a whole.

A chain without norms and activations inside is one linear map ``M`` of the inputs under a kernel.
With the normal matrix ``N`` of those inputs, and the least-squares solution ``B``, its squared
error is ``tr((M - B)^T N (M - B))`` and a constant: the decomposition of ``B`` in the norm of the
input covariance. L-BFGS minimises it over all factors of ``M``, from those that are there; then the
last layer is solved exactly.
"""

from __future__ import annotations

__all__ = ["ConvChain", "find_chain", "fit_chain"]

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.calibration.windows import CONVS

_STEPS = 60
#: Multiplications of all steps, at most.
_WORK = 4e12


@dataclass(frozen=True)
class ConvChain:
    """Convolutions that run one after the other.

    Attributes:
        layers: their names within the module, and the convolutions.
        window: a convolution over the same positions, with the inputs and outputs of the chain.
    """

    layers: tuple[tuple[str, nn.Conv2d], ...]
    window: nn.Conv2d

    @property
    def last(self) -> str:
        """Name of the last convolution."""
        return self.layers[-1][0]

    @property
    def inputs(self) -> int:
        """Return how many inputs are under the kernel."""
        return self.window.in_channels * math.prod(self.window.kernel_size)

    def weights(self) -> list[Tensor]:
        """Return copies of the weights in float64: ``(outputs, inputs of a group, kernel)``."""
        return [layer.weight.detach().double().flatten(2) for _, layer in self.layers]

    def composed(self, weights: list[Tensor]) -> Tensor:
        """Return the map that weights stand for: ``(inputs * kernel, outputs)``."""
        groups = [layer.groups for _, layer in self.layers]
        first, *others = (_dense(w, g) for w, g in zip(weights, groups, strict=True))
        for other in others:  # one of both has a kernel of one element
            both = torch.einsum("ock,cil->oikl", other, first)
            first = both.flatten(2)
        return first.flatten(1).T


def _dense(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of a grouped convolution as one without groups."""
    if groups == 1:
        return weight
    outputs, inputs, kernel = weight.shape
    own = torch.eye(groups, dtype=weight.dtype, device=weight.device)
    parts = weight.reshape(groups, -1, 1, inputs, kernel) * own[:, None, :, None, None]
    return parts.reshape(outputs, groups * inputs, kernel)


def find_chain(module: nn.Module) -> ConvChain | None:
    """Return the chain that a module is; None if it is none."""
    if not isinstance(module, nn.Sequential) or not len(module):
        return None
    layers: list[tuple[str, Any]] = list(module._modules.items())
    *inner, (_, last) = layers
    if any(type(layer) is not type(last) or type(layer) not in CONVS for _, layer in layers):
        return None
    if any(layer.bias is not None for _, layer in inner):
        return None
    wide = [layer for _, layer in layers if not _pointwise(layer)] or [last]
    users = [layer.weight for _, layer in layers]
    if len(wide) > 1 or len({id(weight) for weight in users}) < len(users):
        return None
    like = wide[0]
    window = type(last)(
        layers[0][1].in_channels,
        last.out_channels,
        like.kernel_size,
        like.stride,
        like.padding,
        like.dilation,
        bias=last.bias is not None,
        padding_mode=like.padding_mode,
        device=last.weight.device,
        dtype=last.weight.dtype,
    )
    return ConvChain(tuple(layers), window)


def _pointwise(layer: Any) -> bool:
    ones = (1,) * len(layer.kernel_size)
    still = layer.padding in ("same", "valid") or not any(layer.padding)
    return bool(layer.kernel_size == ones and layer.stride == ones and still)


def fit_chain(chain: ConvChain, normal: Tensor, right: Tensor, ridge: float) -> list[Tensor]:
    """Return the weights that bring the chain nearest to a least-squares solution.

    Args:
        chain: where it starts.
        normal: ``(D, D)`` in float64, of the inputs under the kernel.
        right: ``(D, outputs)``.
        ridge: pull of the whole map towards the present one, as a share of the mean diagonal.
    """
    pull = float(ridge * normal.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    weights = chain.weights()
    normal = normal.clone()
    normal.diagonal().add_(pull)
    right = right + pull * chain.composed(weights)
    weights = _last_solved(chain, weights, normal, right)
    outputs = right.shape[1]
    steps = min(_STEPS, int(_WORK / (4.0 * outputs * len(normal) ** 2)))
    if steps:
        size = abs(float((chain.composed(weights) * right).sum())) or 1.0  # a scale
        factors = [weight.clone().requires_grad_() for weight in weights]
        optimizer = torch.optim.LBFGS(
            factors, max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            whole = chain.composed(factors)
            error = ((whole * (normal @ whole)).sum() - 2 * (whole * right).sum()) / size
            error.backward()  # type: ignore[no-untyped-call]
            return error

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        weights = [factor.detach() for factor in factors]
    return _last_solved(chain, weights, normal, right)


def _last_solved(
    chain: ConvChain, weights: list[Tensor], normal: Tensor, right: Tensor
) -> list[Tensor]:
    """Solve the last layer, where it is pointwise and has no groups."""
    last = chain.layers[-1][1]
    if len(chain.layers) < 2 or last.groups > 1 or not _pointwise(last):
        return weights
    inside = ConvChain(chain.layers[:-1], chain.window).composed(weights[:-1])
    small = inside.T @ normal @ inside
    small.diagonal().add_(1e-9 * small.diagonal().mean() + 1e-300)
    solved = torch.cholesky_solve(inside.T @ right, torch.linalg.cholesky(small))
    return [*weights[:-1], solved.T[:, :, None].contiguous()]
