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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.artifact import load, save
from pocketize.errors import ArtifactError
from tests.contract.case import Case
from tests.contract.checking import check, require
from tests.contract.checks import scripted_prefixes
from tests.contract.runs import (
    STEPS,
    Computed,
    Trained,
    differentiate,
    forward,
    inputs_may_ask_for_gradients,
    modes_of,
    optimizer_of,
    prepared,
    state_of,
    tolerance_of,
    train,
    trained,
)
from tests.contract.snapshot import Snapshot

GRADIENTS = 1e-9
TRAINED = 1e-8


@check
def exact_outputs(case: Case) -> None:
    """Outputs and buffers after a forward without gradients, in both modes."""
    if case.reference is None:
        return
    for mode in (False, True):
        expected = _expected(case, ("outputs", mode), lambda m, mode=mode: forward(case, m, mode))
        _equal(expected, forward(case, case.fresh(), mode), mode, tolerance_of(case, GRADIENTS))


@check
def exact_gradients(case: Case) -> None:
    """Loss, outputs and the gradients of parameters and inputs, in train and in eval mode."""
    if case.reference is None:
        return
    wanted = inputs_may_ask_for_gradients(case)
    for mode in modes_of(case):

        def work(model: nn.Module, mode: bool | None = mode) -> Computed:
            return differentiate(case, model, mode, wanted)

        expected = _expected(case, ("gradients", mode), work)
        found = work(case.fresh())
        tolerance = tolerance_of(case, GRADIENTS)
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
            return state_of(case, trained(case, model, kind))

        expected = _expected(case, ("trained", kind), work)
        found = work(case.fresh())
        when = f"after {STEPS} steps of {kind}"
        tolerance = tolerance_of(case, TRAINED)
        require(_differences(expected, found, when, tolerance))
        for index, (a, b) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
            _close(a, b, f"{when}: output {index} in eval mode", tolerance)


@check
def checkpoints_fit_both_ways(case: Case) -> None:
    """A state_dict of either net, loaded into the other, gives the same function."""
    if case.reference is None:
        return
    donor = trained(case, case.fresh(), "sgd", steps=1)
    old, new = prepared(case, case.reference()), prepared(case, case.fresh())
    new.load_state_dict(old.state_dict(), strict=True)
    tolerance = tolerance_of(case, GRADIENTS)
    _equal(forward(case, old, False), forward(case, new, False), False, tolerance)
    old.load_state_dict(donor.state_dict(), strict=True)
    new.load_state_dict(donor.state_dict(), strict=True)
    _equal(forward(case, old, False), forward(case, new, False), False, tolerance)


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
    model = prepared(case, case.fresh())
    twin = copy.deepcopy(model)
    wanted = inputs_may_ask_for_gradients(case)
    before = Snapshot(model), Snapshot(case.rewritten)
    learnt = differentiate(case, twin, None, wanted)
    for then, now in zip(before, (model, case.rewritten), strict=True):
        require(f"the copy's step was felt: {what}" for what in then.differences(Snapshot(now)))
    expected = differentiate(case, model, None, wanted)
    _equal(expected, learnt, None, TRAINED)
    _same_gradients(expected.gradients, learnt.gradients, None, TRAINED)


def _expected(case: Case, key: tuple[Any, ...], work: Any) -> Any:
    """What the reference gives, computed once for all cases that share it."""
    assert case.reference is not None
    if key not in case.known:
        case.known[key] = work(case.reference())
    return case.known[key]


def _resumed_elsewhere(case: Case, model: nn.Module) -> set[str]:
    """Train, save, load, train on; say what differs from a run without the stop."""
    model = prepared(case, model)
    optimizer = optimizer_of(model, "sgd")
    train(case, model, optimizer, range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "middle.safetensors")
        try:
            save(model, path)
            resumed = load(path, case.build)
        except ArtifactError as error:
            return {f"it cannot be saved and loaded: {str(error).replace(folder, '')}"}
    again = optimizer_of(resumed, "sgd")
    if optimizer is not None and again is not None:
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it keeps the tensors
    for either, its in ((model, optimizer), (resumed, again)):
        train(case, either, its, range(2, 4))
    expected, found = state_of(case, model), state_of(case, resumed)
    return set(_differences(expected, found, "after a resumed run", TRAINED))


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
