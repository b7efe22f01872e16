"""Running a net of the contract: forward, backward, steps of training, and in what precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pocketize.graph.inputs import Inputs
from tests.contract import trees
from tests.contract.case import Case, seeded
from tests.contract.snapshot import plain_attributes
from tests.contract.widths import tensors_of

STEPS = 5
LARGE = 20_000_000
"""Number of parameters from which on a net is compared in the precision that it has."""


@dataclass(frozen=True)
class Computed:
    """What one forward and backward gave.

    Attributes:
        outputs: every tensor of the outputs.
        loss: the loss; zero where no output has a gradient.
        gradients: of parameters by name, and of inputs as ``"input 0"``.
        buffers: by name, after the forward.
    """

    outputs: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """A net after some steps of training.

    Attributes:
        tensors: parameters and buffers under all their names.
        attributes: Python values by module, with the module's class.
        outputs: what it then gives in eval mode.
    """

    tensors: dict[str, Tensor]
    attributes: dict[str, tuple[type, dict[str, Any]]]
    outputs: list[Tensor]


def prepared(case: Case, model: nn.Module) -> nn.Module:
    """Without gradients, and in float64 unless the net cannot compute in it."""
    for parameter in model.parameters():
        parameter.grad = None
    return model.double() if _rounding(case)[0] else model


def inputs_of(case: Case, *, gradients: bool = False, double: bool | None = None) -> Inputs:
    double = _rounding(case)[0] if double is None else double

    def taken(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        tensor = tensor.detach().double() if double else tensor.detach()
        return tensor.clone().requires_grad_(gradients)

    return case.inputs.map(taken)


def modes_of(case: Case) -> list[bool | None]:
    """Train, eval, and as the flags stand where they are neither."""
    flags = set(case.before.modes.values())
    return [True, False] if len(flags) == 1 else [True, False, None]


def _set_mode(model: nn.Module, mode: bool | None) -> None:
    if mode is not None:
        model.train(mode)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_buffers(remove_duplicate=False)
    return {name: tensor.detach().clone() for name, tensor in named}


def forward(case: Case, model: nn.Module, mode: bool) -> Computed:
    _set_mode(prepared(case, model), mode)
    with seeded(), torch.no_grad():
        outputs = list(trees.tensors(inputs_of(case).call(model)))
    return Computed([t.clone() for t in outputs], torch.zeros(()), {}, _buffers(model))


def differentiate(case: Case, model: nn.Module, mode: bool | None, of_inputs: bool) -> Computed:
    _set_mode(prepared(case, model), mode)
    inputs = inputs_of(case, gradients=of_inputs)
    with seeded():
        outputs = list(trees.tensors(inputs.call(model)))
        kept = [t.detach().clone() for t in outputs]
        loss = loss_of(outputs)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    for index, tensor in enumerate(inputs.tensors()):
        if tensor.grad is not None:
            gradients[f"input {index}"] = tensor.grad
    return Computed(kept, loss.detach(), gradients, _buffers(model))


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A weighted mean of every output; the weights are fixed, so that errors are not magnified."""
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in outputs:
        if tensor.requires_grad:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            weights = torch.arange(1, real.numel() + 1, dtype=torch.float64).cos()
            loss = loss + (real.double() * weights.reshape(real.shape)).mean()
    return loss


def trained(case: Case, model: nn.Module, kind: str, steps: int = STEPS) -> nn.Module:
    model = prepared(case, model)
    train(case, model, optimizer_of(model, kind), range(steps))
    return model


def state_of(case: Case, model: nn.Module) -> Trained:
    tensors = {name: t.detach().clone() for name, t in tensors_of(model).items()}
    attributes = {p: (type(m), plain_attributes(m)) for p, m in model.named_modules()}
    return Trained(tensors, copy.deepcopy(attributes), forward(case, model, False).outputs)


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer | None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        return None
    if kind == "adam":
        return torch.optim.Adam(trainable, lr=1e-3)
    return torch.optim.SGD(trainable, lr=1e-2, momentum=0.9)


def train(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer | None, steps: range
) -> None:
    if not model.training:  # one that trains keeps the flags of its parts: frozen norms stay so
        model.train()
    for step in steps:
        if optimizer is not None:
            optimizer.zero_grad()
        with seeded(step):
            loss = loss_of(list(trees.tensors(inputs_of(case).call(model))))
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()


def inputs_may_ask_for_gradients(case: Case) -> bool:
    """Some nets write into their inputs, which no leaf allows."""
    key = "inputs may ask for gradients"
    if key not in case.known:
        try:
            differentiate(case, case.build(), True, True)
            case.known[key] = True
        except RuntimeError:
            case.known[key] = False
    return bool(case.known[key])


class _Precisions(TorchDispatchMode):
    """Notes the coarsest precision in which an operator returned anything."""

    def __init__(self) -> None:
        super().__init__()
        self.coarsest = torch.finfo(torch.float64).eps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in trees.tensors(result):
            if tensor.is_floating_point() or tensor.is_complex():
                self.coarsest = max(self.coarsest, torch.finfo(tensor.dtype).eps)
        return result


def _rounding(case: Case) -> tuple[bool, float]:
    """Whether a net can compute in float64, and the rounding of the coarsest step of it.

    Some cannot: they cast by hand, or hold tensors that ``double()`` does not reach. And none of
    the large is made to, as convolutions in float64 take twenty times as long on a CPU.
    """
    if "rounding" not in case.known:
        weights = sum(parameter.numel() for parameter in case.original.parameters())
        for double in (True, False) if weights < LARGE else (False,):
            model = case.build().double() if double else case.build()
            inputs = inputs_of(case, double=double)
            try:
                with seeded(), torch.no_grad(), _Precisions() as seen:
                    inputs.call(model)
            except RuntimeError:  # torch's word for mixed dtypes
                continue
            case.known["rounding"] = double, seen.coarsest
            break
    rounding: tuple[bool, float] = case.known["rounding"]
    return rounding


def tolerance_of(case: Case, asked: float) -> float:
    """What is asked; a few roundings where a net computes in less than float64 whatever one does.

    A gradient is a sum of many terms, so float32 is given some digits.
    """
    rounding = _rounding(case)[1]
    if rounding <= torch.finfo(torch.float64).eps:
        return asked
    return 1e-3 if rounding <= torch.finfo(torch.float32).eps else 8 * rounding
