"""A recording leaves everything as it was, and is the same wherever it is made."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import CaptureError
from pocketize.graph.capture import TracedGraph, Tracer, capture, settle_inputs
from pocketize.graph.inputs import as_inputs
from tests.contract.snapshot import Snapshot


def image() -> Tensor:
    return torch.rand(2, 3, 8, 8)


def targets(traced: TracedGraph) -> list[str]:
    return [str(node.target) for node in traced.operators()]


class Habits(nn.Module):
    """Draws random numbers, counts its calls, updates buffers, has parts in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.drop = nn.Dropout(0.5)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.drop(self.frozen(self.norm(self.conv(x))))
        self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return x + torch.rand(1) + random.random() + np.random.rand()


def habits() -> Habits:
    model = Habits()
    model(image()).sum().backward()
    model.conv.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("train", [False, True])
def test_model_gradients_buffers_modes_and_attributes_are_untouched(train: bool) -> None:
    model, x = habits(), image()
    before, given = Snapshot(model), x.clone()
    capture(model, x, train=train)
    assert list(before.differences(Snapshot(model))) == []
    assert model.calls == 1
    assert model.training
    assert not model.frozen.training
    assert torch.equal(x, given)


def test_no_random_generator_advances() -> None:
    model, x = habits(), image()
    for train in (False, True):
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        capture(model, x, train=train)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert all(
            np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True)
        )


def test_generators_are_put_back_also_after_a_failure() -> None:
    def fail(module: nn.Module, args: Any) -> None:
        torch.rand(3), random.random(), np.random.rand()
        raise ValueError

    model, x = nn.Sequential(nn.ReLU()), image()
    model.register_forward_pre_hook(fail)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(CaptureError):
        capture(model, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_hooks_run_and_their_closures_are_as_they_were() -> None:
    features: list[Tensor] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        features.append(output)
        return output * 2

    handle = model[0].register_forward_hook(hook)
    traced = capture(model, image())
    assert targets(traced) == ["aten.conv2d.default", "aten.mul.Tensor", "aten.relu.default"]
    assert traced.operators()[1].meta["module"] == "0"
    assert features == []
    handle.remove()
    assert not model[0]._forward_hooks


def test_no_hook_of_ours_stays_on_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    capture(model, image())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_warnings_of_the_forward_are_for_its_user_not_for_a_recording() -> None:
    class Warns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("mind the gap", UserWarning, stacklevel=2)
            return x

    capture(Warns(), image())  # a warning would be an error here


def test_torch_does_not_log_shapes_that_do_not_fit(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(logger, "disabled", False)  # torch's own settings may disable it
    with caplog.at_level(logging.DEBUG), pytest.raises(CaptureError):
        capture(nn.Sequential(nn.Linear(9, 9)), image())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not logger.disabled


# -- wherever the caller is ----------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "float64 by default": default_dtype,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("train", [False, True])
def test_a_recording_is_the_same_in_every_context(context: Callable[[], Any], train: bool) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()), image()
    expected = capture(model, x, train=train)
    with context():
        found = capture(model, x, train=train)
    assert targets(found) == targets(expected)
    assert found.structure == expected.structure


def test_under_autocast_a_recording_shows_the_casts_and_the_same_layers() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), image()
    with torch.autocast("cpu", torch.bfloat16):
        traced = capture(model, x)
        assert torch.is_autocast_enabled("cpu")
    kept = [name for name in targets(traced) if "conv" in name or "relu" in name]
    assert kept == targets(capture(model, x))
    assert traced.outputs()[0].meta["val"].dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_either_mode_is_recorded_in_the_mode_asked_for(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout()).train(training)
    for train in (False, True):
        traced = capture(model, image(), train=train)
        assert traced.train == train
        assert traced.operators()[-1].args[2] is train
        assert model.training == training


def test_inputs_may_require_gradients_or_come_from_inference_mode() -> None:
    model = nn.Conv2d(3, 4, 1)
    with torch.inference_mode():
        x = image()
    for given in (x, image().requires_grad_()):
        assert len(capture(model, given).operators()) == 1


def test_a_model_on_the_meta_device_can_be_recorded() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    traced = capture(model, "2x3x8x8")
    assert traced.outputs()[0].meta["val"].shape == (2, 4, 8, 8)


def test_one_fake_copy_serves_many_recordings() -> None:
    tracer = Tracer(Habits())
    inputs = as_inputs(image())
    shots = [tracer.trace(inputs, train=train) for train in (False, True, False)]
    assert targets(shots[0]) == targets(shots[2])
    assert shots[0].structure == shots[2].structure
    assert [shot.train for shot in shots] == [False, True, False]


# -- what a recording cannot do alike on fake tensors --------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.relu() if x.sum() > -1e9 else x.sigmoid()


def test_a_branch_on_values_is_recorded_on_real_tensors_and_says_so() -> None:
    model, x = Branches(), image()
    before = Snapshot(model)
    traced = capture(model, x)
    assert traced.real
    assert targets(traced)[-1] == "aten.relu.default"
    assert type(traced.operators()[0].meta["val"]) is Tensor
    assert list(before.differences(Snapshot(model))) == []


def test_a_size_that_depends_on_values_is_recorded_on_real_tensors() -> None:
    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0.5]

    x = image()
    traced = capture(Picks(), x)
    assert traced.real
    assert traced.outputs()[0].meta["val"].shape == (int((x > 0.5).sum()),)


def test_real_inputs_are_copied_not_written_to() -> None:
    class Writes(Branches):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            x.zero_()
            return y

    x = image()
    given = x.clone()
    assert capture(Writes(), x).real
    assert torch.equal(x, given)


def test_a_guess_works_for_a_model_that_branches_on_values() -> None:
    assert settle_inputs(Branches(), None).describe() == "2x3x32x32 float32"


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.extra = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training and random.random() < 0.9:
            return x
        return x + self.extra(x)


def test_stochastic_depth_is_recorded_in_full_in_evaluation_mode() -> None:
    random.seed(1)
    traced = capture(StochasticDepth(), image())
    assert targets(traced).count("aten.conv2d.default") == 2
    first, second = (targets(capture(StochasticDepth(), image(), train=True)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("enabled", [True, False])
def test_attention_is_recorded_operator_by_operator_and_its_fast_path_put_back(
    enabled: bool,
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        found = targets(capture(layer, torch.rand(2, 5, 8)))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert "aten.scaled_dot_product_attention.default" in found
    assert not any("_transformer_encoder_layer_fwd" in name for name in found)


def test_recordings_in_several_threads_leave_global_settings_as_they_were() -> None:
    logger, x = logging.getLogger("torch._subclasses.fake_tensor"), image()
    before = torch.backends.mha.get_fastpath_enabled(), logger.disabled, torch.get_rng_state()
    first_inside, second_inside = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is first:
                first_inside.set()
                second_inside.wait(0.2)  # it does not come, if recordings take turns
            else:
                second_inside.set()
                first.join(5)  # what it puts back is overwritten by this one
            return x

    first, second = (threading.Thread(target=capture, args=(Waits(), x)) for _ in range(2))
    first.start()
    assert first_inside.wait(5)
    second.start()
    first.join()
    second.join()
    after = torch.backends.mha.get_fastpath_enabled(), logger.disabled, torch.get_rng_state()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])
