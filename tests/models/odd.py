"""Sizes that are easily taken for widths, and modules that are no ordinary modules."""

from __future__ import annotations

import functools
import types

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.models.convs import Layers, around
from tests.models.registry import image, net

_HEAD = {"head": "output"}


class Frame(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.tail = nn.Conv2d(width, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.stem(x).relu()).relu())


@net("odd", movable=["stem"], frozen={"weights@0": "", **_HEAD})
class BranchWeights(nn.Module):
    """Eight branches weighted by a learnt vector: eight is a number of branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(8))
        self.weights = nn.Parameter(torch.randn(8))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = self.weights.softmax(0)
        parts = [weights[i] * branch(x) for i, branch in enumerate(self.branches)]
        return self.head(torch.stack(parts).sum(0).relu())


@net(
    "odd attention channel-statistics",
    inputs=image(2, 9, 5),
    width=8,
    movable=["embed", "latents@0"],
    frozen=_HEAD,
)
class Latents(nn.Module):
    """A Perceiver's latent array: sixteen queries, which are rows of a weight like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.latents = nn.Parameter(torch.randn(16, 12))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        queries = self.latents.expand(x.shape[0], -1, -1)
        weights = (queries @ x.transpose(1, 2) / 3).softmax(-1)
        return self.head((queries + weights @ x).mean(1))


@net("odd", movable=["stem"], frozen={"along": "", **_HEAD})
class LinearOverWidth(nn.Module):
    """A linear layer over the image's width: its outputs are pixels, over which a conv slides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.along = nn.Linear(16, 24)
        self.tail = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.along(self.stem(x)).relu()).relu())


@net("odd norm", movable=["stem", "hidden"], frozen={"out": "output"})
class NormAfterFlatten(nn.Module):
    """A batch norm over channels times pixels: four features for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8 * 2 * 2)
        self.hidden = nn.Linear(8 * 2 * 2, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.stem(x), 2)
        return self.out(self.hidden(self.norm(x.flatten(1))).relu())


@net("odd parameter", movable=["stem", "tail"], frozen=_HEAD)
class Temperature(Frame):
    """A zero-dimensional parameter and a zero-dimensional buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.factor: Tensor
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature.exp() / self.factor


@net("odd opaque single-precision", movable=["tail"], frozen=_HEAD)
def fourier_neural_operator() -> nn.Module:
    return around(SpectralConv(16, 16))


class SpectralConv(nn.Module):
    """Complex weights, multiplied to the lowest frequencies by einsum."""

    def __init__(self, into: int, out: int, modes: int = 4) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(into, out, modes, modes, dtype=torch.cfloat) / into)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros(b, self.weight.shape[1], h, w // 2 + 1, dtype=spectrum.dtype)
        m = self.modes
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weight)
        return torch.fft.irfft2(out, s=(h, w))


@net("odd frozen single-precision", movable=["tail"], frozen=_HEAD)
class UnregisteredLayer(Frame):
    """A layer in a plain list, unknown to state_dict and to .to(): nothing next to it can move."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Conv2d(8, 8, 1)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden[0](self.stem(x)).relu()
        return self.head(self.tail(x).relu())


def doubled(self: Frame, x: Tensor) -> Tensor:
    return Frame.forward(self, x) * 2


@net("odd copy", movable=["stem", "tail"], frozen=_HEAD)
def patched_forward() -> nn.Module:
    """forward replaced on the instance: a bound method, which a copy must bind to itself."""
    model = Frame()
    model.forward = types.MethodType(doubled, model)  # type: ignore[method-assign]
    return model


@net("odd copy", movable=["stem", "tail"], frozen=_HEAD)
def partial_attribute() -> nn.Module:
    """A functools.partial as an activation."""
    model = Frame()
    return Layers(
        model.stem,
        Call(functools.partial(F.leaky_relu, negative_slope=0.3)),
        model.tail,
        model.head,
    )


class Call(nn.Module):
    def __init__(self, function: functools.partial[Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@net("odd wrapper", movable=["module.stem", "module.tail"], frozen={"module.head": "output"})
def data_parallel() -> nn.Module:
    return nn.DataParallel(Frame())


@net("odd wrapper", movable=["stem", "tail"], frozen=_HEAD)
def graph_module() -> nn.Module:
    """Generated code instead of a class of somebody's."""
    return fx.symbolic_trace(Frame())


@net("odd outputs", movable=["stem", "tail"], frozen=_HEAD)
class ReturnsItsInput(Frame):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x, super().forward(x)


@net("odd frozen")
def no_parameters() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.ReLU(), nn.Upsample(scale_factor=2))


@net("odd frozen", frozen={"": "output"})
def single_layer() -> nn.Module:
    """The model itself is the layer: its path is empty."""
    return nn.Conv2d(3, 8, 3, padding=1)


@net("odd frozen", frozen={"0": "output"})
def every_width_seen() -> nn.Module:
    """Nothing between input and output but one layer and its norm."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


@net(
    "odd dtype low-precision",
    inputs=image(dtype=torch.float16),
    movable=["stem", "tail"],
    frozen=_HEAD,
)
def half_precision() -> nn.Module:
    return Frame().half()


@net("odd frozen", width=20, frozen={"stem": "", "tail": "", **_HEAD})
class NarrowerThanTheClamp(Frame):
    """Nothing is as wide as the clamp: nothing changes."""


@net("lazy", movable=["stem", "tail"], frozen=_HEAD)
class ScaledByFirstCall(nn.Module):
    """Sets its scales to what the first input asks for, and a flag that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)
        self.scale = nn.Parameter(torch.ones(16))
        self.initialised = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if not self.initialised:
            self.scale.data = 1 / (x.detach().std((0, 2, 3)) + 1e-3)
            self.initialised = True
        return self.head(self.tail(x * self.scale[:, None, None]).relu())
