"""Published nets: which of their norms are converted, that they train alike, what it saves."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

from pocketize.artifact import load, save
from pocketize.engine.pipeline import plan
from pocketize.graph.inputs import as_inputs
from pocketize.memory import measure
from pocketize.passes import InPlaceNorm

Build = Callable[[], nn.Module]


def _monai(name: str, *args: Any, **kwargs: Any) -> Build:
    def build() -> nn.Module:
        nets = importlib.import_module("monai.networks.nets")
        return cast(nn.Module, getattr(nets, name)(*args, **kwargs))

    return build


def _dynunet(residual: bool) -> Build:
    kernels = [[3, 3, 3]] * 3
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    return _monai(
        "DynUNet", 3, 1, 2, kernels, strides, strides[1:], filters=[8, 12, 16], res_block=residual
    )


def _plain_conv_unet() -> nn.Module:
    nets = importlib.import_module("dynamic_network_architectures.architectures.unet")
    return cast(
        nn.Module,
        nets.PlainConvUNet(
            1,
            3,
            [8, 12, 16],
            nn.Conv3d,
            [3, 3, 3],
            [1, 2, 2],
            [2, 2, 2],
            2,
            [2, 2],
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        ),
    )


class Expected(NamedTuple):
    """How many norms are converted, and why others are not, with how often."""

    converted: int
    refused: dict[str, int]


NETS: dict[str, tuple[Build, str, Expected]] = {
    "dynunet": (_dynunet(False), "1x1x16x16x16", Expected(10, {})),
    "dynunet-residual": (
        _dynunet(True),
        "1x1x16x16x16",
        Expected(7, {"add_ reads it, not an activation": 6}),
    ),
    "nnunet": (_plain_conv_unet, "1x1x16x16x16", Expected(10, {})),
    "unet-prelu": (
        _monai("UNet", 3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2),
        "1x1x16x16x16",
        Expected(9, {}),
    ),
    "unet-leaky": (
        _monai("UNet", 2, 1, 2, (4, 8, 16), (2, 2), act="leakyrelu", norm="batch", dropout=0.0),
        "2x1x16x16",
        Expected(4, {}),
    ),
    "segresnet": (
        _monai("SegResNet", 3, 8, 1, 2, act=("leakyrelu", {"inplace": True})),
        "1x1x16x16x16",
        Expected(25, {}),
    ),
    "segresnet-relu": (
        _monai("SegResNet", 3, 8, 1, 2),
        "1x1x16x16x16",
        Expected(
            0,
            {
                "activation relu is not invertible; use recompute instead, or "
                "activation='leaky_relu:0.01', which replaces it": 25
            },
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_the_norms_of_published_nets(name: str) -> None:
    build, inputs, expected = NETS[name]
    torch.manual_seed(0)
    model = build()
    planned = plan(model, InPlaceNorm(), inputs=inputs)
    (found,) = planned.passes
    norms = [edit for edit in found.edits if getattr(edit, "conversion", "") == "in-place-norm"]
    assert len(norms) == expected.converted
    assert Counter(row.why for row in found.refused) == expected.refused
    if norms:
        _train_alike(model.double(), planned.apply().double(), inputs)


def _train_alike(model: nn.Module, made: nn.Module, inputs: str) -> None:
    """Three steps of SGD in float64, then evaluation."""
    torch.manual_seed(1)
    given = as_inputs(inputs, model).map(lambda t: t.double())
    with torch.no_grad():
        for a, b in zip(model.parameters(), made.parameters(), strict=True):
            b.copy_(a.add_(0.1 * torch.randn_like(a)))
    for module in (model, made):
        module.train()
        optimiser = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(3):
            optimiser.zero_grad()
            cast(Tensor, given.call(module)).square().mean().backward()
            optimiser.step()
        module.eval()
    for (name, a), b in zip(model.state_dict().items(), made.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10), name
    assert torch.allclose(given.call(model), given.call(made), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynunet", "nnunet"])
def test_a_training_step_needs_a_quarter_less(name: str) -> None:
    model = NETS[name][0]()
    made = plan(model, InPlaceNorm(), inputs="1x1x32x32x32").passes[0]
    assert made.edits
    rewritten = plan(model, InPlaceNorm(), inputs="1x1x32x32x32").apply()
    peaks = [
        measure(net, "1x1x32x32x32", optimizer="sgd", estimate=True).peak
        for net in (model, rewritten)
    ]
    assert peaks[1] < 0.75 * peaks[0]


@pytest.mark.slow
def test_the_peak_is_the_same_estimated_and_measured() -> None:
    made = plan(_dynunet(False)(), InPlaceNorm(), inputs="1x1x16x16x16").apply()
    estimated, measured = (
        measure(made, "1x1x16x16x16", optimizer="sgd", estimate=estimate).peak
        for estimate in (True, False)
    )
    assert abs(estimated - measured) < 0.01 * measured


def test_a_saved_net_is_in_place_again_when_it_is_loaded(tmp_path: Any) -> None:
    build, inputs, _ = NETS["unet-leaky"]
    made = plan(build(), InPlaceNorm(), inputs=inputs).apply()
    save(made, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", build)
    assert [type(m).__name__ for m in loaded.modules()] == [
        type(m).__name__ for m in made.modules()
    ]
    given = as_inputs(inputs, made)
    for module in (made, loaded):
        module.eval()
    assert torch.equal(given.call(made), given.call(loaded))
    copied = copy.deepcopy(loaded)
    assert torch.equal(given.call(copied), given.call(loaded))
