"""Building by name, and what the zoo says to a name or an option that it does not know."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pocketize import zoo
from pocketize.zoo import pocketnet, registry
from pocketize.zoo.memory_fcn import MemoryFCN3d


@pytest.fixture
def _guest() -> Iterator[None]:
    """A network of someone else's, for the time of a test."""

    @zoo.register(
        "guest1d",
        summary="one convolution",
        paper="none",
        input_shape=(1, 2, 100),
        small_shape=(1, 2, 10),
        fixed={"kernel": 3},
    )
    def guest(in_channels: int = 2, kernel: int = 1, act: str = "relu") -> nn.Module:
        return nn.Sequential(nn.Conv1d(in_channels, 1, kernel), getattr(nn, act.upper(), nn.ReLU)())

    yield
    del registry._MODELS["guest1d"]


def test_patterns_select_names_in_order() -> None:
    names = zoo.list_models()
    assert names == sorted(names)
    assert zoo.list_models("pocketnet_*2d") == [
        "pocketnet_densenet2d",
        "pocketnet_encoder2d",
        "pocketnet_resnet2d",
        "pocketnet_unet2d",
    ]
    assert set(zoo.list_models("*3d*")) | set(zoo.list_models("*2d")) == set(names)
    assert zoo.list_models("nothing*") == []


def test_every_entry_says_what_it_is() -> None:
    for name in zoo.list_models():
        info = zoo.describe(name)
        assert info.name == name
        assert info.summary
        assert "\n" not in info.summary
        assert info.paper
        assert len(info.input_shape) == len(info.small_shape)


def test_options_reach_the_network_also_as_json_has_them() -> None:
    model = zoo.build("complexity_unet2d", in_channels=3, widths=[2, 3, 4, 5, 6])
    assert model.encoder[0][0].weight.shape == (2, 3, 3, 3)


def test_building_draws_from_the_global_generator() -> None:
    torch.manual_seed(3)
    first = zoo.build("pocketnet_encoder2d", pocket=True).state_dict()
    torch.manual_seed(3)
    second = zoo.build("pocketnet_encoder2d", pocket=True).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_example_input_follows_the_options_and_leaves_the_random_state() -> None:
    state = torch.random.get_rng_state()
    x = zoo.example_input("pocketnet_unet3d", small=True, in_channels=4, pocket=True)
    assert x.shape == (1, 4, 5, 64, 64)
    assert torch.equal(x, zoo.example_input("pocketnet_unet3d", small=True, in_channels=4))
    assert zoo.example_input("pocketnet_unet2d").shape == (1, 1, 256, 256)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.usefixtures("_guest")
def test_a_registered_function_is_built_with_its_fixed_arguments() -> None:
    assert zoo.list_models("guest*") == ["guest1d"]
    assert dict(zoo.describe("guest1d").options) == {"in_channels": 2, "act": "relu"}
    assert zoo.build("guest1d", in_channels=5)[0].weight.shape == (1, 5, 3)


@pytest.mark.usefixtures("_guest")
def test_a_taken_name_is_refused() -> None:
    register = zoo.register(
        "guest1d", summary="another", paper="none", input_shape=(1, 1, 2), small_shape=(1, 1, 2)
    )
    with pytest.raises(zoo.ZooError, match=r"'guest1d' is registered already: one convolution"):
        register(nn.Identity)


def test_an_option_without_default_is_refused() -> None:
    register = zoo.register(
        "unfinished", summary="x", paper="none", input_shape=(1, 1, 2), small_shape=(1, 1, 2)
    )
    with pytest.raises(zoo.ZooError, match=r"option 'in_features' of 'unfinished' needs a default"):
        register(nn.Linear)
    assert "unfinished" not in zoo.list_models()


@pytest.mark.parametrize("call", [zoo.build, zoo.describe, zoo.example_input])
def test_an_unknown_name_is_met_with_the_nearest(call: object) -> None:
    assert callable(call)
    with pytest.raises(zoo.UnknownModelError) as error:
        call("pocketnet_unet_3d")
    assert str(error.value).startswith(
        "zoo: no network is called 'pocketnet_unet_3d'. "
        "Did you mean 'pocketnet_unet3d'? There are: "
    )
    assert all(name in str(error.value) for name in zoo.list_models())


@pytest.mark.parametrize("call", [zoo.build, zoo.example_input])
def test_an_unknown_option_is_met_with_those_there_are(call: object) -> None:
    assert callable(call)
    with pytest.raises(zoo.ModelOptionError) as error:
        call("pocketnet_encoder2d", poket=True)
    assert str(error.value) == (
        "zoo: 'pocketnet_encoder2d' has no option 'poket'. Did you mean 'pocket'? "
        "Its options are: in_channels=1, classes=2, pocket=False, width=16, depth=4."
    )


def test_a_fixed_argument_is_no_option() -> None:
    with pytest.raises(zoo.ModelOptionError, match="no option 'block'"):
        zoo.build("pocketnet_unet3d", block="dense")


@pytest.mark.parametrize(
    ("name", "option", "value", "kind"),
    [
        ("pocketnet_unet3d", "pocket", "false", "true or false, such as False; got 'false'"),
        ("pocketnet_unet3d", "pocket", 1, "true or false"),
        ("pocketnet_unet3d", "width", 0, "a whole number, at least 1, such as 16; got 0"),
        ("pocketnet_unet3d", "width", 16.0, "a whole number"),
        ("pocketnet_unet3d", "in_channels", True, "a whole number"),
        ("complexity_unet2d", "widths", [1, 2, 3], "5 whole numbers, each at least 1"),
        ("complexity_unet2d", "widths", [1, 2, 3, 4, -5], "5 whole numbers, each at least 1"),
        ("complexity_unet2d", "widths", 64, "5 whole numbers"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_what_fits(
    name: str, option: str, value: object, kind: str
) -> None:
    with pytest.raises(zoo.ModelOptionError) as error:
        zoo.build(name, **{option: value})
    assert f"option {option!r} of {name!r} takes {kind}" in str(error.value)


@pytest.mark.usefixtures("_guest")
def test_a_string_option_takes_strings() -> None:
    zoo.build("guest1d", act="elu")
    with pytest.raises(zoo.ModelOptionError, match="takes a str, such as 'relu'; got 3"):
        zoo.build("guest1d", act=3)


def test_values_that_only_the_network_can_judge_are_refused_there() -> None:
    with pytest.raises(zoo.ModelOptionError, match="per_level is 1 or 2; got 3"):
        zoo.build("memory_fcn3d_separable", per_level=3)


@pytest.mark.parametrize("module", ["PocketNet2d", "PocketNet3d"])
def test_an_unknown_pocketnet_block_is_refused(module: str) -> None:
    with pytest.raises(
        zoo.ModelOptionError, match="block is 'unet', 'resnet' or 'dense'; got 'vgg'"
    ):
        getattr(pocketnet, module)(block="vgg")


def test_an_unknown_fcn_block_is_refused() -> None:
    with pytest.raises(zoo.ModelOptionError, match="'separable' or 'compact'; got 'vgg'"):
        MemoryFCN3d(block="vgg")
