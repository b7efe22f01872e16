"""Which width a pocket takes: that of the finest level's features, whatever the net begins with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize import plan, pocketize
from pocketize.channels.analysis import analyse
from pocketize.passes.widths.features import finest_width

DIM, CLASSES = 12, 3
_ANY = "the layer that embeds patches, or the one that brings them back: they are as wide"


class Made(nn.Module):
    """A net whose forward is a function of its layers."""

    def __init__(self, forward: Callable[[Made, Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


def conv(before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel // 2 if kernel != stride else 0
    return nn.Conv2d(before, after, kernel, stride, padding, groups=groups)


def behind(*stem: nn.Module, features: int = DIM) -> nn.Module:
    """A stem, then a level that is twice as wide, and a head."""
    body = (nn.ReLU(), conv(features, 2 * features, 3, 2), nn.ReLU(), conv(2 * features, CLASSES))
    return nn.Sequential(*stem, *body)


def tokens(embed: Callable[[Tensor], Tensor], net: Made, x: Tensor) -> Tensor:
    """Patches of 4x4 as a transformer has them, and a head at full resolution."""
    t = embed(x)
    t = t + net.mlp(t)
    side = x.shape[-1] // 4
    y = net.up(t).transpose(1, 2).unflatten(2, (side, side))
    return net.head(F.pixel_shuffle(y, 4))


def transformer(embed: nn.Module, how: Callable[[Made, Tensor], Tensor]) -> nn.Module:
    return Made(
        lambda net, x: tokens(lambda y: how(net, y), net, x),
        embed=embed,
        mlp=nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)),
        up=nn.Linear(DIM, 16 * DIM),
        head=conv(DIM, CLASSES, 1),
    )


def patches(x: Tensor) -> Tensor:
    """4x4 patches as (batch, position, 16 C), by reshaping."""
    y = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3, 5)
    return y.flatten(3).flatten(1, 2)


def upsampled(coarse: nn.Module, fine: nn.Module, *head: nn.Module) -> nn.Module:
    """A net whose full resolution is in the decoder alone."""
    return nn.Sequential(coarse, nn.ReLU(), conv(DIM, 2 * DIM, 3, 2), nn.ReLU(), fine, *head)


def two_stages(net: Made, x: Tensor) -> tuple[Tensor, Tensor]:
    fine = net.stem(x)
    return net.head(fine), net.side(net.deep(F.max_pool2d(fine, 2)))


STEMS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "plain": (lambda: behind(conv(1, DIM)), "1x1x16x16", "0"),
    "1x1": (lambda: behind(conv(1, DIM, 1)), "1x1x16x16", "0"),
    "strided": (lambda: behind(conv(3, DIM, 7, 2)), "1x3x32x32", "0"),
    "strided and pooled": (
        lambda: behind(conv(3, DIM, 7, 2), nn.MaxPool2d(2)),
        "1x3x32x32",
        "0",
    ),
    "of non-overlapping windows": (lambda: behind(conv(3, DIM, 4, 4)), "1x3x32x32", "0"),
    "grouped": (lambda: behind(conv(4, DIM, groups=2)), "1x4x16x16", "0"),
    "norm first": (lambda: behind(nn.InstanceNorm2d(1), conv(1, DIM)), "1x1x16x16", "1"),
    "batch norm of the input first": (
        lambda: behind(nn.BatchNorm2d(3), conv(3, DIM)),
        "2x3x16x16",
        "1",
    ),
    "separable, one channel": (
        lambda: behind(conv(1, 1), nn.BatchNorm2d(1), conv(1, DIM, 1)),
        "2x1x16x16",
        "2",
    ),
    "separable, three channels": (
        lambda: behind(conv(3, 3, groups=3), nn.ReLU(), conv(3, DIM, 1)),
        "1x3x16x16",
        "2",
    ),
    "separable, depth multiplier": (
        lambda: behind(conv(3, 6, groups=3), nn.ReLU(), conv(6, DIM, 1)),
        "1x3x16x16",
        "2",
    ),
    "separable, depth multiplier, one channel": (
        lambda: behind(conv(1, 2), nn.BatchNorm2d(2), conv(2, DIM, 1)),
        "2x1x16x16",
        "2",
    ),
    "two depthwise layers": (
        lambda: behind(conv(3, 3, groups=3), conv(3, 3, groups=3), conv(3, DIM, 1)),
        "1x3x16x16",
        "2",
    ),
    "learnt colours": (
        lambda: behind(conv(3, 3, 1), nn.ReLU(), conv(3, DIM)),
        "1x3x16x16",
        "2",
    ),
    "pixel unshuffle": (
        lambda: behind(nn.PixelUnshuffle(4), conv(16, DIM, 1)),
        "1x1x32x32",
        "1",
    ),
    "patches by a convolution": (
        lambda: transformer(
            conv(1, DIM, 4, 4), lambda net, x: net.embed(x).flatten(2).transpose(1, 2)
        ),
        "1x1x16x16",
        _ANY,
    ),
    "patches by unfold": (
        lambda: transformer(
            nn.Linear(16, DIM), lambda net, x: net.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        ),
        "1x1x16x16",
        _ANY,
    ),
    "patches by reshaping": (
        lambda: transformer(nn.Linear(16, DIM), lambda net, x: net.embed(patches(x))),
        "1x1x16x16",
        _ANY,
    ),
    "full resolution in the decoder": (
        lambda: upsampled(
            conv(1, DIM, 3, 2), nn.ConvTranspose2d(2 * DIM, 5, 4, 4), conv(5, CLASSES, 1)
        ),
        "1x1x32x32",
        "4",
    ),
    "full resolution in the head alone": (
        lambda: upsampled(
            conv(1, DIM, 3, 2), nn.Upsample(scale_factor=4), conv(2 * DIM, CLASSES, 1)
        ),
        "1x1x32x32",
        "0",
    ),
    "the head makes full resolution": (
        lambda: upsampled(conv(1, DIM, 3, 2), nn.ConvTranspose2d(2 * DIM, CLASSES, 4, 4)),
        "1x1x32x32",
        "0",
    ),
    "a head of several layers as wide as the output": (
        lambda: upsampled(
            conv(1, DIM, 3, 2),
            nn.ConvTranspose2d(2 * DIM, CLASSES, 4, 4),
            nn.BatchNorm2d(CLASSES),
            nn.ReLU(),
            conv(CLASSES, CLASSES),
        ),
        "2x1x32x32",
        "0",
    ),
    "a head with hidden features": (
        lambda: upsampled(
            conv(1, DIM, 3, 2),
            nn.Upsample(scale_factor=4),
            conv(2 * DIM, 8),
            nn.ReLU(),
            conv(8, CLASSES, 1),
        ),
        "1x1x32x32",
        "5",
    ),
    "a head as wide as the features": (
        lambda: nn.Sequential(conv(1, DIM), nn.ReLU(), conv(DIM, 24), nn.ReLU(), conv(24, DIM)),
        "1x1x16x16",
        "0",
    ),
    "pixel shuffle to full resolution": (
        lambda: upsampled(
            conv(1, DIM, 3, 2), conv(2 * DIM, 16 * 7), nn.PixelShuffle(4), conv(7, CLASSES, 1)
        ),
        "1x1x32x32",
        "5",
    ),
    "super-resolution": (
        lambda: nn.Sequential(
            conv(1, DIM), nn.ReLU(), conv(DIM, 4 * 5), nn.PixelShuffle(2), conv(5, 1)
        ),
        "1x1x8x8",
        "3",
    ),
    "an input that is concatenated": (
        lambda: Made(
            lambda net, x: net.head(torch.cat([x, net.up(net.deep(x))], 1)),
            deep=conv(2, DIM, 3, 2),
            up=nn.ConvTranspose2d(DIM, 6, 2, 2),
            head=conv(8, CLASSES),
        ),
        "1x2x16x16",
        "up",
    ),
    "two encoders": (
        lambda: Made(
            lambda net, x, y: net.head(net.deep(torch.cat([net.one(x), net.two(y)], 1))),
            one=conv(1, DIM),
            two=conv(3, 5),
            deep=conv(DIM + 5, 24, 3, 2),
            head=conv(24, CLASSES),
        ),
        "1x1x16x16,1x3x16x16",
        "one",
    ),
    "several outputs": (
        lambda: Made(
            two_stages,
            stem=conv(1, DIM),
            head=conv(DIM, CLASSES),
            deep=conv(DIM, 24),
            side=conv(24, CLASSES),
        ),
        "1x1x16x16",
        "stem",
    ),
    "features that are returned": (
        lambda: Made(
            lambda net, x: (f := net.stem(x), net.head(net.deep(f.relu()))),
            stem=conv(1, DIM),
            deep=conv(DIM, 24),
            head=conv(24, CLASSES),
        ),
        "1x1x16x16",
        "stem",
    ),
    "a gate first at full resolution": (
        lambda: Made(
            lambda net, x: net.head(net.fine(F.interpolate(net.deep(x), None, 2.0) * net.gate(x))),
            gate=conv(2, 1),
            deep=conv(2, DIM, 3, 2),
            fine=conv(DIM, 7),
            head=conv(7, CLASSES),
        ),
        "1x2x16x16",
        "fine",
    ),
    "tokens mixed before channels": (
        lambda: Made(
            lambda net, x: net.head(net.mix(net.embed(x).flatten(2)).transpose(1, 2).mean(1)),
            embed=conv(1, DIM, 4, 4),
            mix=nn.Sequential(nn.Linear(16, 5), nn.GELU(), nn.Linear(5, 16)),
            head=nn.Linear(DIM, CLASSES),
        ),
        "1x1x16x16",
        "embed",
    ),
    "linear layers": (
        lambda: nn.Sequential(nn.Linear(30, DIM), nn.ReLU(), nn.Linear(DIM, 24), nn.Linear(24, 2)),
        "2x30",
        "0",
    ),
    "one layer": (lambda: nn.Sequential(conv(1, 4)), "1x1x8x8", "0"),
}
WIDTHS = {
    "full resolution in the decoder": 5,
    "a head with hidden features": 8,
    "pixel shuffle to full resolution": 7,
    "super-resolution": 5,
    "an input that is concatenated": 6,
    "a gate first at full resolution": 7,
    "one layer": 4,
}


@pytest.mark.parametrize("name", STEMS)
def test_the_width_is_that_of_the_features_at_the_finest_resolution(name: str) -> None:
    build, shape, path = STEMS[name]
    inputs = shape if "," not in shape else tuple(_zeros(part) for part in shape.split(","))
    width, why = finest_width(analyse(build(), inputs))
    assert width == WIDTHS.get(name, DIM), why
    assert path == _ANY or f"{path} (" in f"{why} (" or f"{path}, as" in why


def _zeros(shape: str) -> Tensor:
    return torch.zeros([int(n) for n in shape.split("x")])


def test_the_plan_says_what_it_passed_over_and_why() -> None:
    build, shape, _ = STEMS["separable, three channels"]
    (step,) = plan(build(), "pocket", inputs=shape).passes
    assert step.notes[0] == (
        "width 12: the first features at the finest resolution, of 2 "
        "(not of 0, which passes the input's channels on)"
    )
    build, shape, _ = STEMS["full resolution in the head alone"]
    (step,) = plan(build(), "pocket", inputs=shape).passes
    assert step.notes[0] == (
        "width 12: the first features at the finest resolution, of 0 "
        "(not of 5, which makes the output)"
    )


def test_a_second_look_at_the_result_keeps_the_width() -> None:
    """What was clamped to as many channels as the output has must not become a head by that."""
    net = nn.Sequential(
        conv(1, 4), nn.ReLU(), conv(4, 32), nn.GroupNorm(8, 32), nn.ReLU(), conv(32, 4)
    )
    first, second = plan(net, "pocket", inputs="1x1x8x8").passes
    assert first.notes[0].startswith("width 4: the first features")
    assert second.notes[0] == "width 4: as given"
    small = pocketize(net, inputs="1x1x8x8")
    assert [m.out_channels for m in small if isinstance(m, nn.Conv2d)] == [4, 4, 4]
