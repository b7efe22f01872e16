"""More input channels: the same function, parameters that stay, and the way back from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pocketize import history, load, plan, rewrite, save
from pocketize.engine.surgery import apply_edits
from pocketize.errors import OptionError, RewriteError
from pocketize.graph.capture import find_tensors
from pocketize.passes.cascade.extend_inputs import ExtendInputs
from pocketize.plugin.edits import Extend
from tests.foreign import foreign_nets

NETS = {
    net.name: net
    for net in foreign_nets()
    if net.name
    in {
        "monai_unet_2d",
        "monai_unet_3d_residual",
        "monai_dynunet_residual_deep_supervision",
        "monai_segresnet",
        "monai_swin_unetr",
        "nnunet_residual_encoder_deep_supervision",
    }
}


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))


def beside(x: Tensor, extra: int) -> Tensor:
    return torch.cat([x, torch.randn(x.shape[0], extra, *x.shape[2:], dtype=x.dtype)], 1)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_other_peoples_networks_compute_exactly_the_same(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETS[name].build().double().eval(), NETS[name].inputs().double()
    wide = rewrite(model, ExtendInputs(3), inputs=x)
    with torch.no_grad():
        before, after = find_tensors(model(x)), find_tensors(wide(beside(x, 3)))
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert wide.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow
def test_a_network_that_adds_copies_of_its_input_to_features_is_refused() -> None:
    (net,) = (net for net in foreign_nets() if net.name == "monai_vnet")
    with pytest.raises(RewriteError, match=r"VNet cannot read 3 more channels: aten\.\w+ at vnet"):
        rewrite(net.build(), ExtendInputs(3), inputs=net.inputs())


def test_the_new_weights_learn() -> None:
    wide = rewrite(chain(), ExtendInputs(2), inputs=X)
    wide(beside(X, 2)).square().sum().backward()
    gradient = wide.get_parameter("0.weight").grad
    assert gradient is not None
    assert gradient[:, 3:].abs().amax() > 0


def test_parameters_stay_the_objects_they_are() -> None:
    model = chain().to(memory_format=torch.channels_last)
    model(X).sum().backward()
    model[0].weight.requires_grad_(False)
    weight, old, gradient = model[0].weight, model[0].weight.clone(), model[0].weight.grad
    assert gradient is not None
    gradient = gradient.clone()
    assert rewrite(model, ExtendInputs(2), inputs=X, inplace=True) is model
    assert model[0].weight is weight
    assert model[0].in_channels == 5
    assert torch.equal(weight[:, :3], old)
    assert not weight[:, 3:].any()
    assert not weight.requires_grad
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad is not None
    assert torch.equal(weight.grad[:, :3], gradient)
    assert not weight.grad[:, 3:].any()
    assert model[2].weight.shape == (2, 8, 1, 1)


def test_a_widened_model_is_loaded_from_its_recipe(tmp_path: Path) -> None:
    wide = rewrite(chain(), ExtendInputs(2), inputs=X)
    nn.init.normal_(wide.get_parameter("0.weight"))
    save(wide, tmp_path / "wide.safetensors")
    again = load(tmp_path / "wide.safetensors", chain)
    x = beside(X, 2)
    assert torch.equal(again(x), wide(x))
    assert history(again) == history(wide)
    assert [record.name for record in history(again)] == ["extend-inputs"]


def test_the_plan_tells_which_weights_grow() -> None:
    planned = plan(chain(), ExtendInputs(2), inputs=X)
    assert "3 -> 5 on axis 1 of 0.weight" in str(planned)
    assert planned.passes[0].edits == (Extend("0.weight", 1, (3, 4), 3),)


def test_a_network_that_cannot_grow_is_left_alone_with_the_reason() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), chain())
    with pytest.raises(RewriteError, match=r"Sequential cannot read 2 more channels: .*batch_norm"):
        rewrite(model, ExtendInputs(2), inputs=X, inplace=True)
    assert model[1][0].weight.shape == (8, 3, 3, 3)


@pytest.mark.parametrize("options", [{"channels": 0}, {"channels": 1, "argument": -1}])
def test_options_out_of_range_are_errors(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="extend-inputs: "):
        ExtendInputs(**options)


def test_an_input_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RewriteError, match="the model has 1 input tensors, none is 1"):
        rewrite(chain(), ExtendInputs(1, argument=1), inputs=X)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Extend("1.weight", 1, (3,), 3), "the model has no such parameter or buffer"),
        (Extend("0.weight", 1, (3,), 4), "expected size 4, got shape"),
        (Extend("0.weight", 4, (3,), 3), "expected size 3, got shape"),
        (Extend("0.weight", 1, (4,), 3), "must be ascending, at least one, and below 4"),
        (Extend("0.weight", 1, (), 3), "must be ascending"),
        (Extend("0.weight", 1, (4, 3), 3), "must be ascending"),
    ],
)
def test_an_edit_that_does_not_fit_changes_nothing(edit: Extend, says: str) -> None:
    model = chain()
    with pytest.raises(RewriteError, match=says):
        apply_edits(model, [edit])
    assert model[0].in_channels == 3


def test_a_tensor_is_extended_once_in_a_go() -> None:
    model = chain()
    with pytest.raises(RewriteError, match=r"0\.weight is extended twice"):
        apply_edits(model, [Extend("0.weight", 1, (3,), 3), Extend("0.weight", 0, (8,), 8)])
    assert model[0].weight.shape == (8, 3, 3, 3)


def test_new_entries_may_stand_anywhere() -> None:
    model = nn.Linear(3, 2)
    old = model.weight.detach().clone()
    apply_edits(model, [Extend("weight", 1, (0, 2, 5), 3)])
    assert model.in_features == 6
    assert torch.equal(model.weight[:, [1, 3, 4]], old)
    assert not model.weight[:, [0, 2, 5]].any()
