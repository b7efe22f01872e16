"""Whole networks: each layer that is drawn at another width has the scale that its author gives it.

The constructor at the new width is the truth. Layers of a few elements tell no scale; of the others
the standard deviation must be within 10 %, and norms, zeros and constants the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import init

from pocketize import zoo
from pocketize.initial import infer_schemes

FULL, SMALL = 24, 8


def nnunet(width: int, residual: bool) -> nn.Module:
    """As nnU-Net builds it: He's initialisation, and zeros where a residual branch ends."""
    pytest.importorskip("dynamic_network_architectures")
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    from dynamic_network_architectures.initialization.weight_init import (
        InitWeights_He,
        init_last_bn_before_add_to_0,
    )

    kind = ResidualEncoderUNet if residual else PlainConvUNet
    blocks = {"n_blocks_per_stage" if residual else "n_conv_per_stage": 2}
    net = kind(
        1, 4, [width, 2 * width, 4 * width, 5 * width], nn.Conv3d, 3, [1, 2, 2, 2],
        num_classes=3, n_conv_per_stage_decoder=2, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, **blocks,
    )  # fmt: skip
    net.apply(InitWeights_He(1e-2))
    if residual:
        net.apply(init_last_bn_before_add_to_0)
    return net


def monai(name: str, width: int) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    widths = [width, 2 * width, 4 * width, 8 * width]
    if name == "UNet":
        return nets.UNet(3, 1, 2, widths, (2, 2, 2), num_res_units=2)
    if name == "BasicUNet":
        return nets.BasicUNet(3, 1, 2, features=(*widths, 8 * width, width))
    if name == "DynUNet":
        return nets.DynUNet(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=widths)
    return nets.SegResNet(
        2, init_filters=width, in_channels=1, out_channels=2, upsample_mode="pixelshuffle"
    )


class ResNet(nn.Module):
    """As torchvision initialises its ResNets, with zeros in the last norm of each branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, bias=False), nn.BatchNorm2d(width)]
        for level in range(3):
            i, o = width * 2 ** max(0, level - 1), width * 2**level
            layers += [nn.Conv2d(i, o, 3, bias=False), nn.BatchNorm2d(o)]
            layers += [nn.Conv2d(o, o, 3, bias=False), nn.BatchNorm2d(o), nn.Conv2d(i, o, 1)]
        self.layers = nn.Sequential(*layers, nn.Linear(4 * width, 100))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        for index in (5, 10, 15):
            init.zeros_(layers[index].weight)


class Sparse(nn.Module):
    """Weights of which 30 % are zero, and constant biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(i * width, i * width + 64) for i in range(2, 6)))
        for layer in self.layers:
            init.sparse_(layer.weight, 0.3, 0.05)
            init.constant_(layer.bias, 0.3)


NETS: dict[str, Callable[[int], nn.Module]] = {
    "nnU-Net": lambda width: nnunet(width, residual=False),
    "nnU-Net, residual encoder": lambda width: nnunet(width, residual=True),
    "ResNet": ResNet,
    "sparse": Sparse,
    "zoo, U-Net": lambda w: zoo.build(
        "complexity_unet2d", widths=(w, 2 * w, 4 * w, 8 * w, 8 * w)
    ),
    "zoo, PocketNet": lambda width: zoo.build("pocketnet_unet3d", width=width, depth=3),
    "zoo, FCN": lambda w: zoo.build("memory_fcn3d", widths=(w, 2 * w, 4 * w, 4 * w)),
}  # fmt: skip
NETS |= {
    f"MONAI, {name}": lambda width, name=name: monai(name, width)
    for name in ("UNet", "BasicUNet", "DynUNet", "SegResNet")
}


@pytest.mark.parametrize("name", NETS)
def test_scales_are_those_of_the_constructor_at_the_new_width(name: str) -> None:
    torch.manual_seed(0)
    schemes = infer_schemes(NETS[name](FULL))
    assert not schemes.trained
    truth = NETS[name](SMALL)
    drawn = copy.deepcopy(truth)
    schemes.redraw(drawn, torch.Generator().manual_seed(1))
    wrong = []
    for (key, ours), theirs in zip(drawn.named_parameters(), truth.parameters(), strict=True):
        a, b = ours.detach().double(), theirs.detach().double()
        if b.numel() == 1:
            continue
        if float(b.std(correction=0)) < 1e-9 * max(1.0, float(b.abs().max())):
            if not torch.allclose(a, b):
                wrong.append((key, schemes.by_name[key]))
        elif b.numel() >= 128:
            sampling = 3 / math.sqrt(b.numel())
            if abs(math.log(float(a.std() / b.std()))) > 0.1 + sampling:
                wrong.append((key, schemes.by_name[key]))
    assert wrong == []
