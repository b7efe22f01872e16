"""Modules called twice, parameters shared, weights computed from other parameters."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.models.convs import Layers, around
from tests.models.registry import image, net

_HEAD = {"head": "output"}
_MOVES = {"movable": ["stem", "middle", "tail"], "frozen": _HEAD}


@net("reuse", movable=["stem", "shared", "tail"], frozen=_HEAD)
class SharedConv(nn.Module):
    """One convolution called three times: its input and its output are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.shared(x).relu()
        return self.head(self.tail(x).relu())


@net("reuse", movable=["left", "right", "block.0", "block.3"], frozen=_HEAD)
class SharedBlock(nn.Module):
    """A siamese block after two different stems: what it reads is tied across its callers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(2, 8, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1)
        )
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = self.block(self.left(x[:, :1]))
        right = self.block(self.right(x[:, 1:]))
        return self.head(torch.cat([left, right], 1).relu())


@net("reuse frozen", movable=["tail"], frozen={"shared": "input", "head": "output"})
class SharedWithInput(nn.Module):
    """The shared convolution also reads the image, so that its channels stay three."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.tail = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.shared(self.shared(x).relu())).relu())


@net("ties", movable=["stem", "a", "b"], frozen=_HEAD)
class TiedWeights(nn.Module):
    """Two convolutions with one Parameter, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.b.weight = self.a.weight
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(torch.cat([self.a(x), self.b(x)], 1).relu())


@net("ties", movable=["stem", "conv", "again.0"], frozen=_HEAD)
class TiedModule(nn.Module):
    """One module under two names; both keys stand in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.Sequential(self.conv, nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.conv(self.stem(x).relu())))


@net(
    "ties transposed-tie",
    inputs=image(2, 4, 6),
    movable=["encode", "decode"],
    frozen={"out": "output"},
)
class TransposedTie(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.Linear(6, 16)
        self.encode = nn.Linear(16, 8)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.decode(x)
        code = self.encode(x).relu()
        return self.out(nn.functional.linear(code, self.encode.weight.t()))


@net(
    "ties embedding channel-statistics",
    inputs=lambda: torch.randint(0, 11, (2, 7)),
    movable=["embed", "hidden"],
    frozen={"out": "output"},
)
class TiedEmbedding(nn.Module):
    """A language model's tie: the embedding is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.hidden = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.out(self.norm(x + self.hidden(x).relu()))


def legacy_weight_norm(conv: nn.Module, dim: int = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv, dim=dim)  # type: ignore[no-any-return]


@net("computed-weight", **{**_MOVES, "movable": ["stem", "middle.weight_v@0", "tail"]})
def weight_norm_legacy() -> nn.Module:
    return around(legacy_weight_norm(nn.Conv2d(16, 16, 3, padding=1)))


@net("computed-weight", **_MOVES)
def weight_norm_parametrized() -> nn.Module:
    return around(parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)))


@net("computed-weight transposed", **_MOVES)
def weight_norm_transposed() -> nn.Module:
    """For a transposed convolution the default axis 0 is the input's."""
    return around(parametrizations.weight_norm(nn.ConvTranspose2d(16, 16, 2, stride=2)))


@net("computed-weight channel-statistics", **{**_MOVES, "movable": ["stem", "tail"]})
def spectral_norm_legacy() -> nn.Module:
    return around(nn.utils.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)))


@net("computed-weight channel-statistics", **_MOVES)
def spectral_norm_parametrized() -> nn.Module:
    return around(parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)))


class Standardise(nn.Module):
    """Weight standardisation as a parametrization: zero mean and unit variance per filter."""

    def forward(self, weight: Tensor) -> Tensor:
        axes = tuple(range(1, weight.dim()))
        weight = weight - weight.mean(axes, keepdim=True)
        return weight / (weight.var(axes, keepdim=True) + 1e-5).sqrt()


@net("computed-weight channel-statistics", **_MOVES)
def weight_standardised() -> nn.Module:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", Standardise())
    return around(conv)


@net("computed-weight channel-statistics", movable=["stem", "middle", "tail"], frozen=_HEAD)
def weight_standardised_in_forward() -> nn.Module:
    return around(StandardisedConv(16, 16, 3, padding=1))


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = Standardise()(self.weight)
        return self._conv_forward(x, weight, self.bias)


@net("computed-weight", movable=["stem", "middle", "tail"], frozen=_HEAD)
def low_rank_update() -> nn.Module:
    """LoRA in the forward: weight + up @ down, the rank being a group of its own."""
    return around(LastLinear(16, 16))


class LastLinear(nn.Linear):
    def __init__(self, into: int, out: int, rank: int = 2) -> None:
        super().__init__(into, out)
        self.down = nn.Parameter(0.1 * torch.randn(rank, into))
        self.up = nn.Parameter(0.1 * torch.randn(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.linear(x, self.weight + self.up @ self.down, self.bias)
        return x.permute(0, 3, 1, 2)


@net("reuse", movable=["stem", "blocks.0", "blocks.1", "blocks.2"], frozen=_HEAD)
class ModuleListLoop(nn.Module):
    """A loop over a ModuleList and a ModuleDict, each layer reading the last one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8 + 2 * i, 10 + 2 * i, 1) for i in range(3)])
        self.norms = nn.ModuleDict({str(i): nn.BatchNorm2d(10 + 2 * i) for i in range(3)})
        self.head = nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = self.norms[str(i)](block(x)).relu()
        return self.head(x)


@net("reuse", movable=["0", "2", "3"], frozen={"4": "output"})
def sequential_with_repeats() -> nn.Module:
    """The same activation object at several places of a Sequential."""
    act = nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        act,
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 2, 1),
    )


@net("parameter", movable=["stem", "weights.0@0", "tail"], frozen=_HEAD)
class ParameterListConv(nn.Module):
    """Weights in a ParameterList, used by a functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.weights = nn.ParameterList(
            [nn.Parameter(0.2 * torch.randn(16, 8, 3, 3)), nn.Parameter(torch.zeros(16))]
        )
        self.tail = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(self.stem(x), self.weights[0], self.weights[1], padding=1)
        return self.head(self.tail(x.relu()).relu())


@net("conv", movable=["stem", "middle.stem", "middle.head", "tail"], frozen=_HEAD)
def nested_frames() -> nn.Module:
    """Modules three deep, so that paths have dots in them."""
    inner = Layers(nn.Conv2d(8, 8, 1), nn.Identity(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    return Layers(nn.Conv2d(3, 8, 3, padding=1), inner, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
