"""EXACT, checked: the same outputs, gradients and training as the net it must equal.

All in float64, where two correct orders of summation agree to far more digits than a wrong formula
does: in float32 they differ by 1e-3 in gradients, as signs of activations flip.

What a rewritten net must equal is the untouched net, or, where a pass that is not exact took part,
the net as that pass alone leaves it: see :class:`~tests.contract.case.Case`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pocketize.artifact import load, save
from pocketize.errors import ArtifactError
from pocketize.inputs import Inputs
from tests.contract import trees
from tests.contract.case import Case, seeded
from tests.contract.checking import check, require
from tests.contract.checks import scripted_prefixes
from tests.contract.snapshot import Snapshot, plain_attributes
from tests.contract.widths import tensors_of

GRADIENTS = 1e-9
TRAINED = 1e-8
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


@check
def exact_outputs(case: Case) -> None:
    """Outputs and buffers after a forward without gradients, in both modes."""
    if case.reference is None:
        return
    for mode in (False, True):
        expected = _expected(case, ("outputs", mode), lambda m, mode=mode: _forward(case, m, mode))
        _equal(expected, _forward(case, case.fresh(), mode), mode, _tolerance(case, GRADIENTS))


@check
def exact_gradients(case: Case) -> None:
    """Loss, outputs and the gradients of parameters and inputs, in train and in eval mode."""
    if case.reference is None:
        return
    wanted = _inputs_may_ask_for_gradients(case)
    for mode in _modes(case):

        def work(model: nn.Module, mode: bool | None = mode) -> Computed:
            return _differentiate(case, model, mode, wanted)

        expected = _expected(case, ("gradients", mode), work)
        found = work(case.fresh())
        tolerance = _tolerance(case, GRADIENTS)
        _equal(expected, found, mode, tolerance)
        _close(expected.loss, found.loss, f"train={mode}: loss", tolerance)
        _same_gradients(expected.gradients, found.gradients, mode, tolerance)


@check
def exact_training(case: Case) -> None:
    """Five steps of SGD with momentum and of Adam: parameters, buffers, Python state, and eval."""
    if case.reference is None:
        return
    for kind in ("sgd", "adam"):

        def work(model: nn.Module, kind: str = kind) -> Trained:
            return _state(case, _trained(case, model, kind))

        expected = _expected(case, ("trained", kind), work)
        found = work(case.fresh())
        when = f"after {STEPS} steps of {kind}"
        tolerance = _tolerance(case, TRAINED)
        require(_differences(expected, found, when, tolerance))
        for index, (a, b) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
            _close(a, b, f"{when}: output {index} in eval mode", tolerance)


@check
def checkpoints_fit_both_ways(case: Case) -> None:
    """A state_dict of either net, loaded into the other, gives the same function."""
    if case.reference is None:
        return
    donor = _trained(case, case.fresh(), "sgd", steps=1)
    old, new = _prepared(case, case.reference()), _prepared(case, case.fresh())
    new.load_state_dict(old.state_dict(), strict=True)
    tolerance = _tolerance(case, GRADIENTS)
    _equal(_forward(case, old, False), _forward(case, new, False), False, tolerance)
    old.load_state_dict(donor.state_dict(), strict=True)
    new.load_state_dict(donor.state_dict(), strict=True)
    _equal(_forward(case, old, False), _forward(case, new, False), False, tolerance)


@check
def resumes(case: Case) -> None:
    """Saved in the middle of a training run, loaded and trained on: as if it had never stopped.

    Where the untouched net does not manage that either (its state is not all in the state_dict),
    nothing is asked of the rewritten one.
    """
    problems = _resumed_elsewhere(case, case.fresh())
    if problems:
        excused = {problem.split()[0] for problem in _resumed_elsewhere(case, case.build())}
        require(sorted(problem for problem in problems if problem.split()[0] not in excused))


@check
def copies_train(case: Case) -> None:
    """A copy of the rewritten net learns what the net learns, and teaches it nothing."""
    if not case.can_be_copied() or scripted_prefixes(case.original):
        return  # torch's copies of TorchScript share their tensors
    model = _prepared(case, case.fresh())
    twin = copy.deepcopy(model)
    wanted = _inputs_may_ask_for_gradients(case)
    before = Snapshot(model), Snapshot(case.rewritten)
    learnt = _differentiate(case, twin, None, wanted)
    for then, now in zip(before, (model, case.rewritten), strict=True):
        require(f"the copy's step was felt: {what}" for what in then.differences(Snapshot(now)))
    expected = _differentiate(case, model, None, wanted)
    _equal(expected, learnt, None, TRAINED)
    _same_gradients(expected.gradients, learnt.gradients, None, TRAINED)


def _expected(case: Case, key: tuple[Any, ...], work: Any) -> Any:
    """What the reference gives, computed once for all cases that share it."""
    assert case.reference is not None
    if key not in case.known:
        case.known[key] = work(case.reference())
    return case.known[key]


def _prepared(case: Case, model: nn.Module) -> nn.Module:
    """Without gradients, and in float64 unless the net cannot compute in it."""
    for parameter in model.parameters():
        parameter.grad = None
    return model.double() if _rounding(case)[0] else model


def _inputs(case: Case, *, gradients: bool = False, double: bool | None = None) -> Inputs:
    double = _rounding(case)[0] if double is None else double

    def taken(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        tensor = tensor.detach().double() if double else tensor.detach()
        return tensor.clone().requires_grad_(gradients)

    return case.inputs.map(taken)


def _modes(case: Case) -> list[bool | None]:
    """Train, eval, and as the flags stand where they are neither."""
    flags = set(case.before.modes.values())
    return [True, False] if len(flags) == 1 else [True, False, None]


def _set_mode(model: nn.Module, mode: bool | None) -> None:
    if mode is not None:
        model.train(mode)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_buffers(remove_duplicate=False)
    return {name: tensor.detach().clone() for name, tensor in named}


def _forward(case: Case, model: nn.Module, mode: bool) -> Computed:
    _set_mode(_prepared(case, model), mode)
    with seeded(), torch.no_grad():
        outputs = list(trees.tensors(_inputs(case).call(model)))
    return Computed([t.clone() for t in outputs], torch.zeros(()), {}, _buffers(model))


def _differentiate(case: Case, model: nn.Module, mode: bool | None, of_inputs: bool) -> Computed:
    _set_mode(_prepared(case, model), mode)
    inputs = _inputs(case, gradients=of_inputs)
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


def _trained(case: Case, model: nn.Module, kind: str, steps: int = STEPS) -> nn.Module:
    model = _prepared(case, model)
    _train(case, model, _optimizer(model, kind), range(steps))
    return model


def _state(case: Case, model: nn.Module) -> Trained:
    tensors = {name: t.detach().clone() for name, t in tensors_of(model).items()}
    attributes = {p: (type(m), plain_attributes(m)) for p, m in model.named_modules()}
    return Trained(tensors, copy.deepcopy(attributes), _forward(case, model, False).outputs)


def _optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer | None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        return None
    if kind == "adam":
        return torch.optim.Adam(trainable, lr=1e-3)
    return torch.optim.SGD(trainable, lr=1e-2, momentum=0.9)


def _train(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer | None, steps: range
) -> None:
    if not model.training:  # one that trains keeps the flags of its parts: frozen norms stay so
        model.train()
    for step in steps:
        if optimizer is not None:
            optimizer.zero_grad()
        with seeded(step):
            loss = loss_of(list(trees.tensors(_inputs(case).call(model))))
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()


def _resumed_elsewhere(case: Case, model: nn.Module) -> set[str]:
    """Train, save, load, train on; say what differs from a run without the stop."""
    model = _prepared(case, model)
    optimizer = _optimizer(model, "sgd")
    _train(case, model, optimizer, range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "middle.safetensors")
        try:
            save(model, path)
            resumed = load(path, case.build)
        except ArtifactError as error:
            return {f"it cannot be saved and loaded: {str(error).replace(folder, '')}"}
    again = _optimizer(resumed, "sgd")
    if optimizer is not None and again is not None:
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it keeps the tensors
    for either, its in ((model, optimizer), (resumed, again)):
        _train(case, either, its, range(2, 4))
    expected, found = _state(case, model), _state(case, resumed)
    return set(_differences(expected, found, "after a resumed run", TRAINED))


def _inputs_may_ask_for_gradients(case: Case) -> bool:
    """Some nets write into their inputs, which no leaf allows."""
    key = "inputs may ask for gradients"
    if key not in case.known:
        try:
            _differentiate(case, case.build(), True, True)
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
            inputs = _inputs(case, double=double)
            try:
                with seeded(), torch.no_grad(), _Precisions() as seen:
                    inputs.call(model)
            except RuntimeError:  # torch's word for mixed dtypes
                continue
            case.known["rounding"] = double, seen.coarsest
            break
    rounding: tuple[bool, float] = case.known["rounding"]
    return rounding


def _tolerance(case: Case, asked: float) -> float:
    """What is asked; a few roundings where a net computes in less than float64 whatever one does.

    A gradient is a sum of many terms, so float32 is given some digits.
    """
    rounding = _rounding(case)[1]
    if rounding <= torch.finfo(torch.float64).eps:
        return asked
    return 1e-3 if rounding <= torch.finfo(torch.float32).eps else 8 * rounding


def _equal(expected: Computed, found: Computed, mode: bool | None, tolerance: float) -> None:
    pairs = zip(expected.outputs, found.outputs, strict=True)
    for index, (a, b) in enumerate(pairs):
        _close(a, b, f"train={mode}: output {index}", tolerance)
    assert expected.buffers.keys() == found.buffers.keys(), "the buffers have other names"
    for name, a in expected.buffers.items():
        _close(a, found.buffers[name], f"train={mode}: buffer {name}", tolerance)


def _same_gradients(
    expected: dict[str, Tensor], found: dict[str, Tensor], mode: bool | None, tolerance: float
) -> None:
    """Relative to the largest gradient of all: many are zero but for rounding."""
    odd = sorted(expected.keys() ^ found.keys())
    assert not odd, f"train={mode}: only one of the two has a gradient for {odd[:6]}"
    sizes = [float(g.abs().max()) for g in expected.values() if g.numel()]
    largest = max((size for size in sizes if size < float("inf")), default=1.0) or 1.0
    require(
        f"train={mode}: gradient of {name} differs by {error:.1e} of the largest gradient"
        for name, a in expected.items()
        if (error := _error(a, found[name], largest)) > tolerance
    )


def _differences(expected: Trained, found: Trained, when: str, tolerance: float) -> Iterator[str]:
    """Say which tensors and Python values of two nets differ."""
    for name, a in expected.tensors.items():
        b = found.tensors[name]
        if a.shape != b.shape or _error(a, b, max(1.0, _size(a))) > tolerance:
            yield f"{name} differs {when}"
    for path, (kind, values) in expected.attributes.items():
        kind_now, now = found.attributes.get(path, (object, {}))
        if issubclass(kind_now, kind):
            for name, value in values.items():
                if now.get(name) != value:
                    yield f"{path}.{name} is {now.get(name)!r}, not {value!r}, {when}"


def _close(a: Tensor, b: Tensor, what: str, tolerance: float) -> None:
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
    assert a.dtype is b.dtype, f"{what}: {a.dtype} against {b.dtype}"
    error = _error(a, b, _size(a) or 1.0)
    assert error <= tolerance, f"{what} differs by {error:.1e} of its largest value"


def _size(tensor: Tensor) -> float:
    """The largest finite magnitude."""
    if not tensor.numel() or tensor.dtype is torch.bool:
        return 0.0
    values = tensor.detach().abs().double()
    return float(values[values.isfinite()].max()) if bool(values.isfinite().any()) else 0.0


def _error(a: Tensor, b: Tensor, scale: float) -> float:
    """The largest deviation over a scale; infinite where one is undefined and the other not."""
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    if not a.numel() or torch.equal(a, b):
        return 0.0
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    finite = a.isfinite()
    return float((a - b)[finite].abs().max()) / scale if bool(finite.any()) else 0.0
