"""What ``measure`` accepts, what it leaves alone, and what it says when it cannot measure."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from pocketize.errors import CaptureError, InputError, MeasureError, PocketizeWarning
from pocketize.graph.inputs import Inputs
from pocketize.memory import MemoryProfile, measure


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Conv2d(4, 2, 1),
    )


class TestNothingOfTheCallersChanges:
    @pytest.mark.parametrize("estimate", [False, True])
    @pytest.mark.parametrize("mode", ["train", "infer"])
    def test_weights_buffers_gradients_and_modes(self, mode: Any, estimate: bool) -> None:
        net = small()
        net[1].eval()
        net[4].weight.requires_grad_(False)
        net(torch.ones(1, 1, 8, 8)).sum().backward()
        state = copy.deepcopy(net.state_dict())
        grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        storages = [p.data_ptr() for p in net.parameters()]
        modes = [m.training for m in net.modules()]

        measure(net, "2x1x8x8", mode, estimate=estimate, time_steps=1)

        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert [p.data_ptr() for p in net.parameters()] == storages
        assert [m.training for m in net.modules()] == modes
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            assert (parameter.grad is None) == (grad is None)
            if grad is not None and parameter.grad is not None:
                assert torch.equal(parameter.grad, grad)

    def test_random_states(self) -> None:
        net = small()
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        measure(net, "2x1x8x8")
        assert torch.equal(torch.get_rng_state(), before[0])
        assert str(np.random.get_state()) == str(before[1])
        assert random.getstate() == before[2]

    def test_inputs_that_the_model_overwrites(self) -> None:
        class Overwrites(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.mul_(0)

        image = torch.ones(4)
        measure(Overwrites(), image, "infer")
        assert image.eq(1).all()

    def test_hooks_on_the_model_and_on_all_modules(self) -> None:
        net, seen = small(), []

        def remember(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(output)

        net[0].register_forward_hook(remember)
        measure(net, "2x1x8x8")
        assert seen == []
        assert len(net[0]._forward_hooks) == 1
        assert not module_globals._global_forward_hooks
        assert not module_globals._global_forward_pre_hooks

    def test_hooks_are_removed_after_an_error(self) -> None:
        with pytest.raises(InputError, match="It runs on 2x1x8x8 float32"):
            measure(small(), "2x2x8x8")
        assert not module_globals._global_forward_hooks

    @pytest.mark.slow
    def test_grad_mode_of_the_caller_is_no_matter(self) -> None:
        expected = measure(small(), "2x1x8x8").peak
        with torch.no_grad():
            assert measure(small(), "2x1x8x8").peak == expected
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            assert measure(small(), torch.ones(2, 1, 8, 8)).peak == expected
            assert measure(small(), torch.ones(2, 1, 8, 8), estimate=True).peak == expected

    @pytest.mark.parametrize("estimate", [False, True])
    def test_anomaly_detection_of_the_caller_is_no_matter(self, estimate: bool) -> None:
        expected = measure(small(), "2x1x8x8", estimate=estimate).peak
        with torch.autograd.set_detect_anomaly(True):
            assert measure(small(), "2x1x8x8", estimate=estimate).peak == expected
            assert torch.is_anomaly_enabled()


class TestModes:
    def test_frozen_norms_of_a_training_model_stay_frozen(self) -> None:
        class Tells(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    raise RuntimeError("this norm was frozen")
                return super().forward(x)

        frozen = nn.Sequential(nn.Conv2d(1, 2, 1), Tells(2).eval())
        measure(frozen, "2x1x4x4")

    @pytest.mark.slow
    def test_a_model_in_evaluation_mode_is_trained_as_a_whole(self) -> None:
        assert measure(small().eval(), "2x1x8x8").peak == measure(small(), "2x1x8x8").peak

    def test_inference_runs_in_evaluation_mode_without_gradients(self) -> None:
        class Tells(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if self.training or not torch.is_inference_mode_enabled():
                    raise RuntimeError("not inference")
                return x * 2

        profile = measure(Tells().train(), "8", "infer")
        assert profile.optimizer is None


class Nested(nn.Module):
    """Several inputs, one of them of integers, and outputs in a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens: Tensor, scale: dict[str, Tensor], *, shift: float = 0.0) -> Any:
        y = self.linear(self.embed(tokens)) * scale["by"] + shift
        return {"final": y, "deep": [y * 2, (y * 3, tokens)], "name": "nested"}


class TestInputsAndOutputs:
    @pytest.mark.slow
    def test_nested_inputs_and_outputs(self) -> None:
        tokens, by = torch.zeros(2, 5, dtype=torch.int64), torch.ones(4)
        profiles = [
            measure(Nested(), (tokens, {"by": by})),
            measure(Nested(), {"tokens": tokens, "scale": {"by": by}}),
            measure(Nested(), Inputs((tokens,), {"scale": {"by": by}, "shift": 1.0})),
        ]
        assert len({profile.peak for profile in profiles}) == 1
        assert profiles[0].input == "2x5 int64, 4 float32"
        assert profiles[0].categories["inputs"] == 2 * 5 * 8 + 4 * 4

    @pytest.mark.slow
    def test_inputs_are_guessed(self) -> None:
        assert measure(small()).input == "2x1x32x32 float32"
        assert measure(small(), estimate=True).input == "2x1x32x32 float32"

    @pytest.mark.slow
    def test_channels_last_inputs_stay_so(self) -> None:
        class Tells(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if not x.is_contiguous(memory_format=torch.channels_last):
                    raise RuntimeError("contiguous")
                return x * 2

        image = torch.ones(2, 3, 8, 8).to(memory_format=torch.channels_last)
        measured = measure(Tells(), image, "infer")
        assert measure(Tells(), image, "infer", estimate=True).peak == measured.peak

    @pytest.mark.slow
    def test_channels_last_model(self) -> None:
        net = small().to(memory_format=torch.channels_last)
        image = torch.ones(2, 1, 8, 8).to(memory_format=torch.channels_last)
        assert measure(net, image).peak == measure(net, image, estimate=True).peak

    @pytest.mark.slow
    def test_a_view_of_something_large_counts_as_what_it_shows(self) -> None:
        image = torch.ones(100, 8)[3:4]
        for estimate in (False, True):
            profile = measure(nn.Linear(8, 1), image, "infer", estimate=estimate)
            assert profile.categories["inputs"] == 8 * 4

    def test_floating_inputs_take_the_dtype_of_the_model(self) -> None:
        profile = measure(nn.Linear(8, 8).double(), "4x8", "infer")
        assert (profile.dtype, profile.input) == ("float64", "4x8 float64")

    @pytest.mark.slow
    def test_the_same_tensor_twice_is_one_tensor(self) -> None:
        image = torch.ones(100)
        for estimate in (False, True):
            profile = measure(_Add(), (image, image), "infer", estimate=estimate)
            assert profile.categories["inputs"] == 400


class _Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class TestUnusualModels:
    def test_without_parameters(self) -> None:
        profile = measure(nn.MaxPool2d(2), "1x1x8x8", "infer")
        assert (profile.parameters, profile.weight_bytes, profile.dtype) == (0, 0, "float32")

    def test_without_parameters_but_inputs_that_want_gradients(self) -> None:
        image = torch.ones(1, 1, 8, 8, requires_grad=True)
        profile = measure(nn.MaxPool2d(2), image)
        assert profile.optimizer is None
        assert image.grad is None

    @pytest.mark.slow
    def test_partly_frozen(self) -> None:
        net = small()
        for parameter in net[0].parameters():
            parameter.requires_grad_(False)
        whole, part = measure(small(), "2x1x8x8"), measure(net, "2x1x8x8")
        assert part.categories["optimizer_state"] < whole.categories["optimizer_state"]
        assert part.parameters == whole.parameters

    @pytest.mark.slow
    def test_a_model_that_accumulates_statistics_over_batches(self) -> None:
        net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=None))
        assert measure(net, "2x1x4x4").peak == measure(net, "2x1x4x4", estimate=True).peak

    def test_tied_weights_count_once(self) -> None:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        net[1].weight = net[0].weight
        profile = measure(net, "1x8")
        assert profile.parameters == 64 + 8 + 8
        assert profile.categories["parameters"] == profile.weight_bytes == 4 * 80

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_scripted_inference(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        scripted = torch.jit.script(net)
        assert measure(scripted, "2x4", "infer").peak == measure(net, "2x4", "infer").peak

    @pytest.mark.slow
    def test_reference_cycles_do_not_make_the_peak_depend_on_the_collector(self) -> None:
        class Cycle(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                for _ in range(3):
                    x = x * 2
                    knot: list[Any] = [x]
                    knot.append(knot)
                return x

        assert {measure(Cycle(), "1000", "infer").peak for _ in range(3)} == {4 * 4 * 1000}


class TestEstimates:
    def test_any_size_fits(self) -> None:
        net = nn.Sequential(nn.Conv3d(4, 32, 3, padding=1), nn.ReLU(), nn.Conv3d(32, 4, 1))
        profile = measure(net, "1x4x512x512x512", estimate=True)
        assert profile.peak > 40 * 2**30
        assert profile.estimated

    @pytest.mark.slow
    def test_models_without_memory(self) -> None:
        with torch.device("meta"):
            net = nn.Linear(100_000, 100_000)
        profile = measure(net, "1x100000", estimate=True)
        assert profile.weight_bytes == 4 * (10**10 + 10**5)
        assert profile.device == "cpu"
        with pytest.raises(MeasureError, match=r"weight of Linear has a shape but no values"):
            measure(net, "1x100000")

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
    def test_a_gpu_that_is_not_there_is_stood_for_by_the_cpu(self) -> None:
        profile = measure(small(), "2x1x8x8", estimate=True, device="cuda")
        assert profile.device == "cuda (on CPU fakes)"
        assert profile.reserved is None
        with pytest.raises(MeasureError, match="no such device; pass estimate=True"):
            measure(small(), "2x1x8x8", device="cuda")

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
    def test_the_update_on_a_gpu_handles_all_parameters_at_once(self) -> None:
        net = nn.Sequential(*[nn.Linear(100, 100) for _ in range(10)])
        one_by_one = measure(net, "1x100", estimate=True)
        together = measure(net, "1x100", estimate=True, device="cuda")
        assert together.categories["temporaries"] > 5 * one_by_one.categories["temporaries"]

    def test_time_is_not_estimated(self) -> None:
        assert measure(small(), "2x1x8x8", estimate=True, time_steps=3).step_seconds is None

    @pytest.mark.slow
    def test_a_model_that_wants_values_is_told_to_be_measured(self) -> None:
        class Looks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x) if x.sum() > 0 else x

        with pytest.raises(MeasureError, match=r"has only shapes; use estimate=False"):
            measure(Looks(), torch.ones(1, 4), estimate=True)
        assert measure(Looks(), torch.ones(1, 4)).macs == 16

    def test_a_model_that_leaves_torch_is_told_the_same(self) -> None:
        class Leaves(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.from_numpy(x.detach().numpy().copy())

        with pytest.raises(MeasureError, match="on real ones, use estimate=False"):
            measure(Leaves(), "4", "infer", estimate=True)


class TestTime:
    def test_median_and_spread(self) -> None:
        times = measure(small(), "2x1x8x8", time_steps=5).step_seconds
        assert times is not None
        assert 0 < times[0] < 60
        assert times[1] >= 0

    def test_one_step_has_no_spread(self) -> None:
        times = measure(small(), "2x1x8x8", "infer", time_steps=1).step_seconds
        assert times is not None
        assert times[1] == 0

    def test_none_by_default(self) -> None:
        assert measure(small(), "2x1x8x8").step_seconds is None


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"mode": "training"}, "mode must be 'train' or 'infer', not 'training'. Did you mean"),
            (
                {"optimizer": "adamx"},
                "optimizer must be 'adam', 'adamw', 'sgd' or None, not 'adamx'.",
            ),
            ({"time_steps": -1}, "time_steps must be 0 or more"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], text: str) -> None:
        with pytest.raises(MeasureError) as caught:
            measure(small(), "2x1x8x8", **arguments)
        assert text in str(caught.value)

    @pytest.mark.slow
    @pytest.mark.parametrize("estimate", [False, True])
    def test_norms_with_one_value_per_channel(self, estimate: bool) -> None:
        with pytest.raises(InputError, match=r"give a batch of 2, .* It runs on 1x1x2x2 float32"):
            measure(small(), "1x1x1x1", estimate=estimate)
        measure(small(), "1x1x1x1", "infer", estimate=estimate)

    def test_nothing_to_train(self) -> None:
        net = small().requires_grad_(False)
        with pytest.raises(MeasureError, match="no output of Sequential depends on a trainable"):
            measure(net, "2x1x8x8")

    def test_no_floating_output(self) -> None:
        class Classes(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).argmax(1)

        with pytest.raises(MeasureError, match=r"no floating-point tensor to make a loss of; pass"):
            measure(Classes(nn.Linear(2, 2)), "1x2")

    def test_a_loss_that_is_no_scalar(self) -> None:
        with pytest.raises(MeasureError, match=r"one element, got \(2, 2, 8, 8\)"):
            measure(small(), "2x1x8x8", loss=lambda outputs: outputs)

    def test_a_loss_of_ones_own(self) -> None:
        assert measure(small(), "2x1x8x8", loss=lambda out: out.abs().sum()).peak > 0

    def test_the_model_fails(self) -> None:
        with pytest.raises(MeasureError) as caught:
            measure(small(), "2x3x8x8x8")
        assert "Sequential did not get through" in str(caught.value)
        assert "2x3x8x8x8 float32" in str(caught.value)
        assert isinstance(caught.value.__cause__, RuntimeError)

    def test_too_large_for_this_machine(self) -> None:
        class Greedy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.new_empty(2**60)

        with pytest.raises(MeasureError, match="not enough memory to measure; estimate=True"):
            measure(Greedy(), "1", "infer")

    @pytest.mark.slow
    def test_unreadable_inputs_and_models_that_cannot_be_copied(self) -> None:
        with pytest.raises(InputError):
            measure(small(), "2 by 8")
        net = small()
        net.lock = threading.Lock()  # type: ignore[assignment]
        with pytest.raises(CaptureError, match="cannot be copied"):
            measure(net, "2x1x8x8")


def test_profiles_survive_json() -> None:
    profile = measure(small(), "2x1x8x8", time_steps=1)
    assert MemoryProfile.from_json(profile.to_json()) == profile


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_is_told_to_be_counted_without_the_compiler(whole: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    plain = measure(model, "1x1x8x8").peak
    if whole:
        compiled: Any = torch.compile(model, backend="eager")
    else:
        compiled = model
        model[0].compile(backend="eager")
    with pytest.warns(PocketizeWarning, match=r"torch\.compile was applied to this \w+, and its"):
        assert measure(compiled, "1x1x8x8").peak == plain
