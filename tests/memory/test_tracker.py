"""The tracker against counts by hand, against torch.profiler, and real against fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet, UNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tests.models as zoo
from pocketize.errors import MeasureError
from pocketize.memory import MemoryProfile, measure
from tests.memory.profiler import profiled_peak

FLOAT = 4
#: A Python number that meets a tensor becomes one of 8 bytes, and of 4 in the tensor's dtype, until
#: the operator returns. Nothing but the allocator itself sees it.
PYTHON_NUMBER = 12


def three_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 1))


class TestByHand:
    """Convolution, ReLU, convolution on one 8 x 8 image; every tensor counted on paper."""

    image = 1 * 8 * 8 * FLOAT
    features = 2 * 8 * 8 * FLOAT
    output = 1 * 8 * 8 * FLOAT
    scalar = FLOAT
    first = (2 * 1 * 9 + 2) * FLOAT
    last = (1 * 2 * 1 + 1) * FLOAT

    def test_training_step_with_adam(self) -> None:
        profile = measure(three_layers(), torch.ones(1, 1, 8, 8), loss=torch.sum)

        # The peak is in the backward of the ReLU. Alive then: its saved result; the gradient of
        # that, which came from the last convolution, and the one being computed; the gradient of
        # the loss, which is 1; the output and the loss, which the loop holds.
        assert profile.categories == {
            "parameters": self.first + self.last,
            "gradients": self.last,
            "optimizer_state": 2 * (self.first + self.last) + 4 * self.scalar,  # and four counters
            "activations": self.features + self.output + self.scalar,
            "temporaries": self.scalar + 2 * self.features,
            "inputs": self.image,
        }
        assert profile.peak == 92 + 12 + 200 + 772 + 1028 + 256
        assert profile.modules == {
            "": self.image + 2 * self.scalar,
            "0": 3 * self.first + 2 * self.scalar,
            "1": 2 * self.features,
            "2": 4 * self.last + 2 * self.scalar + self.output + self.features,
        }

    def test_training_step_without_optimizer(self) -> None:
        profile = measure(three_layers(), torch.ones(1, 1, 8, 8), optimizer=None, loss=torch.sum)
        assert profile.peak == 92 + 12 + 772 + 1028 + 256
        assert profile.categories["optimizer_state"] == 0
        assert profile.optimizer is None

    def test_sgd_keeps_no_state(self) -> None:
        profile = measure(three_layers(), torch.ones(1, 1, 8, 8), "train", "sgd", loss=torch.sum)
        assert profile.peak == 92 + 12 + 772 + 1028 + 256
        assert profile.optimizer == "sgd"

    def test_inference(self) -> None:
        profile = measure(three_layers(), torch.ones(1, 1, 8, 8), "infer")
        # In the ReLU: what it reads and what it writes.
        assert profile.peak == self.first + self.last + self.image + 2 * self.features
        assert profile.categories["temporaries"] == 2 * self.features
        assert profile.categories["activations"] == 0

    def test_outputs_of_inference_count_as_activations(self) -> None:
        profile = measure(nn.Linear(2, 100, bias=False), torch.ones(1, 2), "infer")
        assert profile.categories["activations"] == 100 * FLOAT
        assert profile.peak == (200 + 2 + 100) * FLOAT

    def test_loss_by_default_is_the_mean_of_squares(self) -> None:
        net = nn.Linear(1, 1000, bias=False)
        profile = measure(net, torch.ones(1, 1), optimizer=None)
        # Its backward, g * (2 * out ** 1) / 1000: four tensors of the outputs' size at once.
        assert profile.categories["temporaries"] == 4 * 1000 * FLOAT + FLOAT
        assert profile.categories["activations"] == 1000 * FLOAT + FLOAT


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        return y.view(-1)[: y.numel() // 2].unsqueeze(0).expand(8, -1)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).relu_().add_(1)


class Resizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.resize_(x.numel() * 4)
        return y.sum()


@pytest.mark.parametrize(
    ("net", "made"),
    [(Views(), 100), (InPlace(), 100), (Resizes(), 401)],
    ids=[
        "views count once",
        "in place makes nothing",
        "a resized storage counts with its new size",
    ],
)
def test_storages_not_tensors_are_counted(net: nn.Module, made: int) -> None:
    profile = measure(net, torch.ones(100), "infer")
    assert profile.peak == (100 + made) * FLOAT


def test_memory_that_was_there_before_the_step_is_counted_when_it_is_met() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [torch.ones(50)]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.hidden[0]

    assert measure(Foreign(), torch.ones(50), "infer").peak == 3 * 50 * FLOAT


def test_sparse_gradients_are_counted() -> None:
    net = nn.Embedding(1000, 10, sparse=True)
    profile = measure(net, torch.tensor([1, 2, 3]), "train", "sgd", loss=torch.sum)
    assert profile.categories["gradients"] == 3 * 10 * FLOAT + 3 * 8


@pytest.mark.slow
def test_checkpointing_trades_activations_for_temporaries() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            result = checkpoint(self.body, x, use_reentrant=False)
            assert isinstance(result, Tensor)
            return result

    def body() -> nn.Module:
        layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(5)]
        return nn.Sequential(*layers)

    image = torch.ones(1, 4, 32, 32)
    plain, saving = measure(body(), image), measure(Checkpointed(body()), image)
    assert saving.categories["activations"] < plain.categories["activations"] / 3
    assert saving.categories["temporaries"] > plain.categories["temporaries"]
    # What runs again in the backward pass belongs to the module that runs again.
    assert any(path.startswith("body.") for path in saving.modules)
    assert {label for label, _ in saving.timeline} >= {"backward body.0.1", "backward body.3.0"}


class Skip(nn.Module):
    """The gradients of two readers meet at the start of a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = self.stem(x).relu()
        low = self.down(top).relu()
        return self.head(torch.cat([top, self.up(low)], dim=1))


class ThreeReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y.sigmoid() * y.tanh() + y


def plain(rank: int) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    return nn.Sequential(
        conv(1, 8, 3, padding=1),
        norm(8),
        nn.ReLU(),
        conv(8, 8, 3, padding=1),
        nn.ReLU(),
        conv(8, 2, 1),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv-norm-relu 1d": (lambda: plain(1), "2x1x32"),
    "conv-norm-relu 2d": (lambda: plain(2), "2x1x32x32"),
    "conv-norm-relu 3d": (lambda: plain(3), "2x1x12x12x12"),
    "skip": (Skip, "1x1x32x32"),
    "three readers": (ThreeReaders, "2x1x16x16"),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4)),
        "512x16",
    ),
    "monai unet": (lambda: UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=1), "1x1x32x32"),
    "dynunet": (
        lambda: DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2] * 2, filters=[8, 16, 32]),
        "1x1x16x16x16",
    ),
}


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", NETS)
def test_peak_is_that_of_the_profiler(name: str, mode: Any) -> None:
    make, inputs = NETS[name]
    net = make()
    tracked = measure(net, inputs, mode).peak
    profiled = profiled_peak(net, inputs, mode)
    assert 0 <= profiled.tensors - tracked <= PYTHON_NUMBER


@pytest.mark.slow
def test_peak_is_that_of_the_profiler_in_all_where_operators_take_no_workspace() -> None:
    make, inputs = NETS["perceptron"]
    net = make()
    assert measure(net, inputs, "infer").peak == profiled_peak(net, inputs, "infer").all
    assert measure(net, inputs).peak == profiled_peak(net, inputs).all


def same(measured: MemoryProfile, estimated: MemoryProfile) -> None:
    assert not measured.estimated
    assert estimated.estimated
    assert estimated.peak == measured.peak
    assert estimated.categories == measured.categories
    assert sum(measured.modules.values()) == measured.peak
    assert sum(estimated.modules.values()) == measured.peak
    assert measured.macs == estimated.macs


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", NETS)
def test_estimate_equals_measurement_to_the_byte(name: str, mode: Any) -> None:
    make, inputs = NETS[name]
    net = make()
    same(
        measure(net, inputs, mode),
        measure(net, inputs, mode, estimate=True),
    )


#: Nets that caught a tracker, and a sample of the others.
AWKWARD = {
    net.name: net
    for net in [
        *(
            zoo.get(name)
            for name in (
                "unet_add",  # composite operators that have a second, Python-made decomposition
                "pools",
                "squeeze_excite",  # gradients that are added in place
                "shortcut_by_padding",
                "learnt_permutation",  # gradients that are scattered in place
                "in_place",  # scalars that become tensors
                "threshold_mask",
                "fourier_over_space",
                "batch_norm_cumulative",  # asks a buffer for its value
                "frozen_parameters",
                "tied_weights",
                "weight_norm_parametrized",
            )
        ),
        *zoo.nets()[::6],
    ]
}
#: What torch's fake kernels get wrong: the workspace of oneDNN's recurrent layers, and the dtype of
#: the statistics that a batch norm keeps of bfloat16 data.
WRONG_FAKES = {"recurrent_middle", "lstm_over_image", "autocast_inside"}
#: Nets that ask for values, which there are none of in an estimate.
NO_FAKES = {"branch_on_values", "stochastic_depth", "crop_by_tensor"}
#: Tensors from before the step that the profiler cannot know: those that a hook replaces, whose
#: release it does not see, and those of a layer that the model hides in a list. And a table of
#: numbers, whose bytes it counts and takes for no tensor's.
UNSEEN = {"weight_norm_legacy", "spectral_norm_legacy", "unregistered_layer"}
UNSEEN |= {"numbers_mixing_table"}
#: Nothing to train: no floating-point output, no parameter.
NO_LOSS = {"class_map_output", "no_parameters", "sum_over_channels_output"}


@pytest.mark.slow
@pytest.mark.each_value
@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_nets_agree_with_the_estimate_and_the_profiler(name: str, mode: Any) -> None:
    net = AWKWARD[name]
    if mode == "train" and name in NO_LOSS:
        with pytest.raises(MeasureError):
            measure(net.build(), net.inputs())
        return
    measured = measure(net.build(), net.inputs(), mode)
    if name not in WRONG_FAKES | NO_FAKES:
        same(measured, measure(net.build(), net.inputs(), mode, estimate=True))
    if name not in UNSEEN:
        profiled = profiled_peak(net.build(), net.inputs(), mode)
        assert abs(profiled.tensors - measured.peak) <= PYTHON_NUMBER


@pytest.mark.slow
@pytest.mark.whole
def test_dynunet_and_basic_unet_at_full_width_agree_with_the_profiler() -> None:
    nets = [
        (DynUNet(3, 1, 3, [3] * 5, [1, 2, 2, 2, 2], [2] * 4), "1x1x32x32x32"),
        (BasicUNet(3, 1, 2, (16, 16, 32, 64, 128, 16)), "1x1x32x32x32"),
    ]
    for net, inputs in nets:
        measured = measure(net, inputs)
        assert measured.peak == profiled_peak(net, inputs).tensors
        assert measured.peak == measure(net, inputs, estimate=True).peak


class Mapped(nn.Module):
    """Keeps a result of its forward in a file that is mapped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        held = torch.from_file(str(self.path), shared=True, size=x.numel(), dtype=x.dtype)
        return x + held.view_as(x).copy_(x).mean()


def test_a_mapped_file_is_elsewhere_and_no_memory(tmp_path: Path) -> None:
    x = torch.ones(1, 1, 32, 32)
    (tmp_path / "held").write_bytes(bytes(x.nbytes))
    profile = measure(Mapped(tmp_path / "held"), x, "infer", isolate=False)
    assert profile.elsewhere == x.nbytes
    assert profile.peak == 2 * x.nbytes + FLOAT


def test_timeline_tells_phase_and_module_and_holds_the_peak() -> None:
    profile = measure(three_layers(), torch.ones(1, 1, 8, 8), loss=torch.sum)
    labels = [label for label, _ in profile.timeline]
    assert labels[:4] == ["forward", "forward 0", "forward 1", "forward"]
    assert {"backward 2", "backward 1", "backward 0", "optimizer"} <= set(labels)
    assert max(live for _, live in profile.timeline) == profile.peak
    assert labels[-1] == "end"


def test_gradients_appear_in_the_backward_pass_and_stay() -> None:
    net = nn.Linear(100, 100, bias=False)
    profile = measure(net, torch.ones(1, 100), "train", "sgd", loss=torch.sum)
    live = dict(profile.timeline)  # the last of each label
    forward, after = live["forward"], live["end"]
    assert (
        after - forward == 100 * 100 * FLOAT - 101 * FLOAT
    )  # the gradient came, outputs and loss went


def test_a_module_called_twice_keeps_both_results() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x))

    image = torch.ones(1000, requires_grad=True)
    profile = measure(Twice(), image, loss=torch.sum)
    assert profile.categories["activations"] == 2 * 1000 * FLOAT + FLOAT
    assert profile.modules["act"] >= 2 * 1000 * FLOAT
