"""Nets that can be built at any width, initialisations for them, and the comparison by layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import init

Init = Callable[[nn.Module], None]
FULL, POCKET = 24, 8


class Net(nn.Module):
    """A U-Net-like stack: doubled or constant widths, convolutions of all kinds, linear, norms."""

    def __init__(self, width: int, dims: int = 2) -> None:
        super().__init__()
        conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        norm = getattr(nn, f"BatchNorm{dims}d")
        w, wide = width, width if width == POCKET else 2 * width
        self.body = nn.Sequential(
            conv(1, w, 3),
            norm(w),
            conv(w, wide, 3),
            nn.GroupNorm(4, wide),
            nn.PReLU(),
            conv(wide, wide, 3),
            conv(wide, wide, 3, groups=4),
            conv(wide, wide, 3, groups=wide),
            up(wide, w, 2, stride=2),
            conv(2 * w, w, 3),
            conv(w, 3, 1),
        )
        self.head = nn.Sequential(nn.Linear(wide * 4, wide), nn.LayerNorm(wide), nn.Linear(wide, 5))


def apply_to(
    weight: Callable[[Tensor], object],
    bias: Callable[[Tensor], object] | None = None,
    types: tuple[str, ...] = ("Conv", "Linear"),
) -> Init:
    """An ``init_fn`` for ``model.apply``."""

    def init_fn(module: nn.Module) -> None:
        if type(module).__name__.startswith(types):
            weight(module.weight)
            if bias is not None and module.bias is not None:
                bias(module.bias)

    return init_fn


def lecun_truncated(weight: Tensor) -> None:
    fan, _ = init._calculate_fan_in_and_fan_out(weight)
    std = math.sqrt(1 / fan) / 0.87962566
    init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def scaled_kaiming(weight: Tensor) -> None:
    """Kaiming's, times a factor that nobody has written down."""
    init.kaiming_normal_(weight)
    weight.data.mul_(0.289)


def laplace(weight: Tensor) -> None:
    fan, _ = init._calculate_fan_in_and_fan_out(weight)
    scale = torch.tensor(1 / math.sqrt(fan))
    weight.data.copy_(torch.distributions.Laplace(0.0, scale).sample(weight.shape))


def by_out_channels(module: nn.Module) -> None:
    """As MobileNet and the first ResNets did."""
    if isinstance(module, nn.modules.conv._ConvNd):
        count = math.prod(module.kernel_size) * module.out_channels
        module.weight.data.normal_(0, math.sqrt(2 / count))
        init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, 0, 0.01)
        init.zeros_(module.bias)


def dcgan(module: nn.Module) -> None:
    if isinstance(module, nn.modules.conv._ConvNd):
        init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
        init.normal_(module.weight, 1, 0.02)
        init.zeros_(module.bias)


def kaiming_out(weight: Tensor) -> None:
    init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


INITS: dict[str, Init] = {
    "torch_default": lambda module: None,
    "kaiming_normal_fan_in": apply_to(init.kaiming_normal_, init.zeros_),
    "kaiming_normal_fan_out": apply_to(kaiming_out, init.zeros_),
    "kaiming_normal_leaky_convs_only": apply_to(
        lambda w: init.kaiming_normal_(w, a=1e-2), init.zeros_, ("Conv",)
    ),
    "kaiming_uniform_leaky": apply_to(lambda w: init.kaiming_uniform_(w, a=0.2)),
    "kaiming_uniform_tanh": apply_to(lambda w: init.kaiming_uniform_(w, nonlinearity="tanh")),
    "xavier_uniform": apply_to(init.xavier_uniform_),
    "xavier_normal_odd_gain": apply_to(
        lambda w: init.xavier_normal_(w, 0.3), lambda b: init.constant_(b, 0.1)
    ),
    "trunc_normal_0.02": apply_to(lambda w: init.trunc_normal_(w, std=0.02), init.zeros_),
    "trunc_normal_cut": apply_to(lambda w: init.trunc_normal_(w, std=0.06, a=-0.12, b=0.12)),
    "lecun_truncated": apply_to(lecun_truncated, init.zeros_),
    "orthogonal": apply_to(lambda w: init.orthogonal_(w, 1.3), init.zeros_),
    "normal_0.037": apply_to(
        lambda w: init.normal_(w, 0, 0.037), lambda b: init.normal_(b, 0, 0.3)
    ),
    "uniform_0.07": apply_to(lambda w: init.uniform_(w, -0.07, 0.07)),
    "scaled_kaiming": apply_to(scaled_kaiming, init.zeros_),
    "laplace": apply_to(laplace, init.zeros_),
    "by_out_channels": by_out_channels,
    "dcgan": dcgan,
}
#: Initialisations whose scale does not depend on the width: keeping it is right for them.
CONSTANT_SCALE = {"trunc_normal_0.02", "trunc_normal_cut", "normal_0.037", "uniform_0.07", "dcgan"}


def build(width: int, init_fn: Init, dims: int = 2, *, seed: int = 0) -> Net:
    """A net with its initialisation, at one width."""
    torch.manual_seed(seed)
    net = Net(width, dims)
    net.apply(init_fn)
    return net


def shrink(model: nn.Module, like: nn.Module) -> nn.Module:
    """A copy with every parameter sliced to the shape that it has in ``like``."""
    small = copy.deepcopy(model)
    shapes = {name: parameter.shape for name, parameter in like.named_parameters()}
    for name, parameter in small.named_parameters():
        corner = tuple(slice(size) for size in shapes[name])
        parameter.data = parameter.data[corner].clone()
    for module in small.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module.weight.shape[1] == 1:
            module.groups = len(module.weight) if module.groups > 4 else module.groups
    return small


def values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, flat, in float64."""
    return {name: p.detach().double().flatten() for name, p in model.named_parameters()}


def disagreements(
    ours: Iterable[Mapping[str, Tensor]], truth: Iterable[Mapping[str, Tensor]]
) -> list[str]:
    """Names whose mean or standard deviation differs by more than sampling error, draws pooled."""
    ours, truth = list(ours), list(truth)
    wrong = []
    for name in truth[0]:
        a = torch.cat([draw[name] for draw in ours])
        b = torch.cat([draw[name] for draw in truth])
        std_a, std_b = float(a.std(correction=0)), float(b.std(correction=0))
        if min(std_a, std_b) <= 1e-6 * float(b.abs().max()):  # constants
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-12):
                wrong.append(name)
            continue
        kurtosis = float(((b - b.mean()) ** 4).mean()) / std_b**4
        error = math.sqrt(max(kurtosis - 1, 0.5) / 4 * (1 / len(a) + 1 / len(b)))
        far = abs(math.log(std_a / std_b)) > 5 * error + 0.005
        apart = abs(float(a.mean() - b.mean())) > 5 * std_b * math.sqrt(1 / len(a) + 1 / len(b))
        if far or apart:
            wrong.append(name)
    return wrong
