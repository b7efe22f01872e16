"""What is done to a network in each row of the comparison: our passes, and what else there is."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pocketize import rewrite
from pocketize.errors import NoEffectWarning
from tools.bench.memory_nets import BenchNet

__all__ = ["ROWS", "NotApplicableError", "Row"]


class NotApplicableError(Exception):
    """The row has nothing to do on this network; the text says why."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        title: what the table calls it.
        prepare: takes the network, its description and its inputs, returns what trains.
        seen: whether the tracker sees what runs; what is compiled runs outside of it.
        fakes: whether it can be estimated on tensors without values.
        note: what the reader must know.
    """

    title: str
    prepare: Callable[[nn.Module, BenchNet, Any], nn.Module]
    seen: bool = True
    fakes: bool = True
    note: str = ""


def _untouched(model: nn.Module, net: BenchNet, inputs: Any) -> nn.Module:
    return model


def _passes(*texts: str) -> Callable[[nn.Module, BenchNet, Any], nn.Module]:
    def prepare(model: nn.Module, net: BenchNet, inputs: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NoEffectWarning)
            try:
                return rewrite(model, *texts, inputs=inputs, inplace=True)
            except NoEffectWarning as nothing:
                raise NotApplicableError(str(nothing)) from None

    return prepare


def _checkpointed(model: nn.Module, net: BenchNet, inputs: Any) -> nn.Module:
    """By hand, as PyTorch's documentation has it: each block in a checkpoint of its own."""
    for path in net.block_paths(model):
        block: Any = model.get_submodule(path)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def _inplace_abn(model: nn.Module, net: BenchNet, inputs: Any) -> nn.Module:
    """BatchNorm and the activation after it in a Sequential, as its authors replace them."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise NotApplicableError("it has no BatchNorm, and the package knows no other norm")
    from inplace_abn import InPlaceABN

    replaced = 0
    for parent in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        names = list(parent._modules)
        for name, following in pairwise(names):
            norm, act = parent._modules[name], parent._modules[following]
            if isinstance(norm, _BatchNorm) and isinstance(act, nn.ReLU | nn.LeakyReLU):
                parent._modules[name] = InPlaceABN(
                    norm.num_features, activation="leaky_relu", activation_param=0.01
                )
                parent._modules[following] = nn.Identity()
                replaced += 1
    if not replaced:
        raise NotApplicableError("no BatchNorm of it is followed by an activation in a Sequential")
    return model


def _compiled(budget: float) -> Callable[[nn.Module, BenchNet, Any], nn.Module]:
    def prepare(model: nn.Module, net: BenchNet, inputs: Any) -> nn.Module:
        import torch._functorch.config as functorch

        functorch.activation_memory_budget = budget
        compiled: Any = torch.compile(model)
        return compiled

    return prepare


ROWS = {
    "untouched": Row("untouched", _untouched),
    "in-place-norm": Row("in-place-norm", _passes("in-place-norm")),
    "in-place-norm-leaky": Row(
        "in-place-norm, ReLU exchanged",
        _passes("in-place-norm:activation=leaky_relu:0.01"),
        note="leaky ReLU in place of ReLU: another function, to be trained",
    ),
    "recompute-conv": Row("recompute keep=conv", _passes("recompute:keep=conv")),
    "recompute-block": Row("recompute keep=block", _passes("recompute:keep=block")),
    "recompute-level": Row("recompute keep=level", _passes("recompute:keep=level")),
    "checkpoint": Row("checkpoint", _passes("checkpoint")),
    "amp": Row("amp bf16", _passes("amp"), note="bfloat16 inside"),
    "in-place-norm-amp": Row(
        "in-place-norm + amp", _passes("in-place-norm", "amp"), note="bfloat16 inside"
    ),
    "recompute-block-amp": Row(
        "amp + recompute keep=block",
        _passes("amp", "recompute:keep=block"),
        note="bfloat16 inside",
    ),
    "recompute-amp": Row(
        "amp + recompute keep=level",
        _passes("amp", "recompute:keep=level"),
        note="bfloat16 inside",
    ),
    "pocket": Row("pocket", _passes("pocket"), note="another, narrower network"),
    "pocket-recompute": Row(
        "pocket + recompute keep=level",
        _passes("pocket", "recompute:keep=level"),
        note="another, narrower network",
    ),
    "pocket-recompute-amp": Row(
        "pocket + amp + recompute keep=level",
        _passes("pocket", "amp", "recompute:keep=level"),
        note="another, narrower network; bfloat16 inside",
    ),
    "inplace-abn": Row(
        "inplace-abn package",
        _inplace_abn,
        fakes=False,
        note="leaky ReLU in place of ReLU: another function, to be trained",
    ),
    "torch-checkpoint": Row(
        "torch.utils.checkpoint, each block",
        _checkpointed,
        note="by hand; running statistics are updated twice",
    ),
    "compile": Row(
        "torch.compile",
        _compiled(1.0),
        seen=False,
        fakes=False,
    ),
    "compile-0.5": Row(
        "torch.compile, budget 0.5",
        _compiled(0.5),
        seen=False,
        fakes=False,
    ),
    "compile-0.2": Row(
        "torch.compile, budget 0.2",
        _compiled(0.2),
        seen=False,
        fakes=False,
    ),
}
"""By the name that the command line takes, in the order of the table."""
