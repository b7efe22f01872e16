from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from pocketize.artifact.classes import resolve_classes
from pocketize.artifact.models import resolve
from pocketize.errors import ModelError


def factory(
    norm: Optional[type[nn.Module]] = None,  # noqa: UP045  (as many networks write it)
    make: Callable[[int], nn.Module] = nn.Identity,
    either: str | type[nn.Module] = "instance",
    layers: list[type[nn.Module]] | None = None,
    options: dict[str, Any] | None = None,
) -> None: ...


def test_annotations_and_a_mark_make_names_classes() -> None:
    name = "torch.nn.Conv3d"
    assert resolve_classes(factory, {"norm": name, "make": name}) == dict.fromkeys(
        ("norm", "make"), nn.Conv3d
    )
    assert resolve_classes(factory, {"either": name, "other": name}) == {
        "either": name,
        "other": name,
    }
    assert resolve_classes(factory, {"either": f"!{name}", "layers": [name]}) == {
        "either": nn.Conv3d,
        "layers": [nn.Conv3d],
    }
    given = {"options": {"act": "!torch.nn.modules.activation.ReLU", "text": "!!x"}, "norm": None}
    assert resolve_classes(factory, given) == {
        "options": {"act": nn.ReLU, "text": "!x"},
        "norm": None,
    }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("os.system", "'os.system' is not in torch.nn, and"),
        ("torch.nnx.Conv3d", "is not in torch.nn"),
        ("system", "'system' is not in torch.nn"),
        ("torch.nn.Conv3", "torch.nn has no module class 'Conv3'. Did you mean 'Conv3d'?"),
        ("torch.nn.functional.torch", "torch.nn.functional has no module class 'torch'"),
        ("torch.nn.functional.torch.os.system", "cannot be imported"),
        ("torch.nn.init.normal_", "torch.nn.init has no module class"),
    ],
)
def test_only_modules_of_torch_may_be_named(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says.replace("?", r"\?")):
        resolve_classes(factory, {"norm": name})


def test_other_packages_may_be_named_where_they_are_allowed() -> None:
    name = "dynamic_network_architectures.building_blocks.simple_conv_blocks.StackedConvBlocks"
    with pytest.raises(ModelError, match="--classes-from PACKAGE"):
        resolve_classes(factory, {"norm": name})
    found = resolve_classes(factory, {"norm": name}, ["dynamic_network_architectures"])
    assert found["norm"].__name__ == "StackedConvBlocks"


def test_networks_of_nnunet_can_be_named() -> None:
    kwargs = {
        "input_channels": 1,
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": "torch.nn.Conv2d",
        "kernel_sizes": 3,
        "strides": [1, 2],
        "n_conv_per_stage": 1,
        "num_classes": 2,
        "n_conv_per_stage_decoder": 1,
        "norm_op": "torch.nn.InstanceNorm2d",
        "nonlin": "torch.nn.LeakyReLU",
    }
    name = "dynamic_network_architectures.architectures.unet:PlainConvUNet"
    assert isinstance(resolve(name, kwargs=kwargs).model, PlainConvUNet)
