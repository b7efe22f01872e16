"""The promise of the swaps: every convolution with a kernel is a cheaper block, or told of."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pocketize.passes.swaps.blocks import ConvBlock
from tests.contract.case import Case
from tests.contract.checking import require
from tests.contract.rebuilt import rebuilt

__all__ = ["as_blocks"]


def as_blocks(case: Case) -> None:
    """Blocks are like the convolution in all but their inside, and no convolution is forgotten."""
    assert case.plan is not None, "this case has no plan"
    made = rebuilt(case)
    refused = {row.path for row in case.plan.refused}
    for path, module in case.original.named_modules():
        if isinstance(module, _ConvNd) and max(module.kernel_size) > 1:
            assert path in made or path in refused, f"the plan does not tell of {path}"
    for path in made:
        old, new = (m.get_submodule(path) for m in (case.original, case.rewritten))
        assert isinstance(old, _ConvNd), f"{path} was no convolution"
        assert isinstance(new, ConvBlock), f"{path} is no block"
        require(f"{path}: {problem}" for problem in _differences(old, new))


def _differences(old: _ConvNd, new: ConvBlock) -> Iterator[str]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    for name in (*names, "padding_mode", "training"):
        if getattr(old, name) != getattr(new, name):
            yield f"{name} {getattr(old, name)} -> {getattr(new, name)}"
    for name, parameter in new.named_parameters():
        like = old.bias if name.endswith("bias") and old.bias is not None else old.weight
        for what in ("dtype", "device"):
            if getattr(parameter, what) != getattr(like, what):
                yield f"{name}: {what} {getattr(like, what)} -> {getattr(parameter, what)}"
    convolutions = [layer for layer in new if isinstance(layer, _ConvNd)]
    for layer in convolutions:
        if layer.weight.requires_grad is not old.weight.requires_grad:
            yield "a frozen weight became trainable, or the other way round"
    if any(layer.bias is not None for layer in convolutions[:-1]):
        yield "an inner layer has a bias"
    if _numbers(new) >= _numbers(old):
        yield f"{_numbers(old)} parameters -> {_numbers(new)}"


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
