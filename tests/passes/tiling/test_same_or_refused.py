"""What networks do beside convolutions: each is the whole volume's answer, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.errors import ExecutionError
from pocketize.graph.capture import find_tensors
from pocketize.graph.clone import clone
from pocketize.passes.tiling.exact import ExactForward
from pocketize.passes.tiling.forward import Tiling
from tests.passes.tiling.nets import double

Between = Callable[[Tensor], Any]


class Sandwich(nn.Module):
    """A convolution, something, a convolution of as many channels as that leaves."""

    def __init__(self, between: Between, channels: int = 4, rank: int = 2, *layers: nn.Module):
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.first, self.last = conv(4, 4, 3, padding=1), conv(channels, 3, 3, padding=1)
        self.between, self.layers = between, nn.ModuleList(layers)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        y = self.between(y, *self.layers) if self.layers else self.between(y)
        return self.last(y) if isinstance(y, Tensor) and y.ndim == x.ndim else y


def by_tiles(model: nn.Module, tile: tuple[int, ...], **options: Any) -> nn.Module:
    made = clone(model)
    ExactForward(made, Tiling(size=tile, progress=False, **options)).install()
    return made


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    found = [t for t in find_tensors(model(x)) if t.requires_grad]
    total = torch.zeros((), dtype=torch.float64)
    for tensor in found:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        total = total + (real * torch.arange(real.numel()).cos().reshape(real.shape)).sum()
    wanted = [x, *model.parameters()]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    pairs = zip(wanted, gradients, strict=True)
    return [torch.zeros_like(w) if g is None else g for w, g in pairs]


def _agree(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        size = max(1.0, float(b.abs().max())) if b.is_floating_point() else 1.0
        assert torch.allclose(a, b, rtol=0, atol=tolerance * size, equal_nan=True)


def check(model: nn.Module, x: Tensor, *, gradients: bool = True) -> None:
    """Outputs of tiles along one axis, and gradients of weights and input of tiles along all."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        found = find_tensors(by_tiles(model, (4,))(x.clone()))
        _agree(found, find_tensors(model(x.clone())), 1e-10)
    if gradients:
        tile = tuple(size // 2 for size in x.shape[2:])
        trained = _gradients(by_tiles(model, tile, train=True), x)
        _agree(trained, _gradients(model, x), 1e-9)


def _attention(x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(rows, rows, rows).transpose(1, 2).reshape(x.shape)


def _unpool(x: Tensor) -> Tensor:
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y, indices, 2, output_size=x.shape[2:])


def _warp(x: Tensor) -> Tensor:
    return F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=True)


def _dynamic(x: Tensor, layer: nn.Linear) -> Tensor:
    weight = layer(x.mean((0, 2, 3))).view(4, 4, 3, 3)
    return F.conv2d(x, weight.softmax(1).tanh(), padding=1)


def _of_features(x: Tensor) -> Tensor:
    """A kernel that is a map itself."""
    return F.conv2d(x, x[:, :, :5, :5].tanh().repeat(2, 1, 1, 1)[:4], padding=2)


def _chunks(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    a.relu_()
    return torch.cat([b, a], 1)


SAME: dict[str, tuple[Between, int]] = {
    "pixel shuffle": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 4),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), 4),
    "flip": (lambda x: x.flip(-1) + x.flip(1), 4),
    "roll": (lambda x: x.roll(3, -1), 4),
    "cumsum along space": (lambda x: x.cumsum(2) / 9, 4),
    "softmax along space": (lambda x: x.softmax(-1), 4),
    "softmax of channels": (lambda x: x.softmax(1), 4),
    "sort": (lambda x: x.sort(1).values, 4),
    "median": (lambda x: x - x.median(), 4),
    "mean of all": (lambda x: x - x.mean(), 4),
    "mean along one axis": (lambda x: x - x.mean(2, keepdim=True), 4),
    "largest of all": (lambda x: x / (1 + x.amax((2, 3), keepdim=True).abs()), 4),
    "pooled to other windows": (lambda x: F.adaptive_avg_pool2d(x, (5, 3)), 4),
    "largest, pooled": (lambda x: x * F.adaptive_max_pool2d(x, 1), 4),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[1:]), 4),
    "layer norm of channels": (
        lambda x: F.layer_norm(x.movedim(1, -1), (4,)).movedim(-1, 1),
        4,
    ),
    "local response norm": (lambda x: F.local_response_norm(x, 3), 4),
    "normalised": (lambda x: F.normalize(x, dim=1), 4),
    "batch norm without memory": (lambda x: F.batch_norm(x, None, None, training=True), 4),
    "unfold and fold": (lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1), 4),
    "windows of a tensor": (lambda x: x.unfold(2, 3, 1).mean(-1), 4),
    "unpool": (_unpool, 4),
    "warp": (_warp, 4),
    "einsum": (lambda x: torch.einsum("nchw,nchv->nchv", x, x), 4),
    "attention": (_attention, 4),
    "correlation": (_of_features, 4),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"), 4),
    "smoothed": (lambda x: F.interpolate(x, size=(7, 8), mode="bilinear", antialias=True), 4),
    "area": (lambda x: F.interpolate(x, size=(7, 8), mode="area"), 4),
    "rounded scale": (
        lambda x: F.interpolate(x, scale_factor=1.55, recompute_scale_factor=True),
        4,
    ),
    "circular and cropped": (lambda x: F.pad(x, (2, -1, -2, 3), mode="circular"), 4),
    "replicated and cropped": (lambda x: F.pad(x, (2, -1, -2, 3), mode="replicate"), 4),
    "reflected and cropped": (lambda x: F.pad(x, (2, -1, -2, 3), mode="reflect"), 4),
    "narrow from behind": (lambda x: x.narrow(-1, -6, 4), 4),
    "every other": (lambda x: torch.cat([x[:, :, ::2], x[:, :, 1::2]], 1), 8),
    "one column": (lambda x: x * x[..., 3:4] + x[..., 2][..., None], 4),
    "picked": (lambda x: x[:, [2, 0, 1]][:, :, [5, 1, 7]], 3),
    "twice": (lambda x: x.repeat(1, 2, 1, 2), 8),
    "stacked": (lambda x: torch.stack([x, x.exp()], 1).flatten(1, 2), 8),
    "places": (lambda x: x + torch.linspace(0, 1, x.shape[-1], dtype=x.dtype), 4),
    "a constant of the forward": (
        lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)[:, None, None],
        4,
    ),
    "one hot": (lambda x: F.one_hot(x.argmax(1), 4).movedim(-1, 1).to(x.dtype) + x, 4),
    "embedding": (lambda x: F.embedding((x[:, 0] > 0).long(), x[0, :, :2, 0].T).movedim(-1, 1), 4),
    "gathered": (lambda x: x.gather(2, x.argsort(2)), 4),
    "filled": (lambda x: x.masked_fill(x < 0, 0.5) * (x > -1), 4),
    "fourier": (lambda x: torch.fft.ifft2(torch.fft.fft2(x) * (1 + 2j)).real, 4),
    "complex": (lambda x: torch.complex(x, x.cos()).exp().angle(), 4),
    "mean of complex": (
        lambda x: (lambda z: (z - z.mean((2, 3), keepdim=True)).abs())(torch.complex(x, x * x)),
        4,
    ),
    "several": (lambda x: {"a": [x, None, 3], "b": (x[:, :2], x.mean(), F.avg_pool2d(x, 2))}, 4),
    "complex output": (lambda x: (torch.complex(x, x.cos()), x > 0, x.argmax(1)), 4),
    "folded batch": (lambda x: F.avg_pool2d(x.flatten(0, 1)[:, None], 3, 1, 1).view(x.shape), 4),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_answer_and_the_same_gradients(name: str) -> None:
    between, channels = SAME[name]
    check(Sandwich(between, channels), double(2, 4, 10, 9))


def test_pieces_that_are_written_in_place_beside_each_other() -> None:
    check(Sandwich(_chunks), double(2, 4, 10, 9), gradients=False)  # autograd refuses it


def test_kernels_that_the_network_computes_from_the_volume() -> None:
    layer = nn.Linear(4, 4 * 4 * 9)
    check(Sandwich(_dynamic, 4, 2, layer), double(2, 4, 10, 9))


def test_a_recurrence_along_one_axis() -> None:
    def rows(x: Tensor, layer: nn.GRU) -> Tensor:
        return layer(x.mean(2).transpose(1, 2))[0].transpose(1, 2)[:, :, None] + x

    check(Sandwich(rows, 4, 2, nn.GRU(4, 4, batch_first=True)), double(2, 4, 10, 9))


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_weights_that_hooks_compute(kind: str) -> None:
    norm: Any = nn.utils.weight_norm if kind == "weight" else nn.utils.spectral_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # torch's word on the old forms
        layer = norm(nn.Conv2d(4, 4, 3, padding=1).double())
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), layer, nn.ReLU())
    check(model, double(1, 4, 9, 10), gradients=False)


def test_one_layer_three_times() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    check(nn.Sequential(layer, nn.ReLU(), layer, nn.GroupNorm(2, 4), layer), double(2, 4, 9, 10))


@pytest.mark.parametrize("scale", [1.05, 2.05, 0.97, (1.9, 0.6)])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scale_factors_that_lengths_contradict(
    mode: str, scale: float | tuple[float, float], layout: torch.memory_format
) -> None:
    """Of 10 times 1.05 are 10; torch then copies here, and scales there."""
    x = double(2, 4, 10, 9).contiguous(memory_format=layout)
    model = Sandwich(lambda y: F.interpolate(y, scale_factor=scale, mode=mode))
    check(model, x, gradients=mode == "bilinear")  # of nearest, torch's own are others'


def test_where_the_layout_decides_what_torch_picks_only_the_plain_layout_is_taken() -> None:
    x = double(1, 4, 5, 2, 5)
    model = nn.Sequential(nn.Sigmoid(), nn.Upsample(scale_factor=(1.05, 1.0, 1.0)), nn.Sigmoid())
    check(model, x, gradients=False)
    with pytest.raises(ExecutionError, match=r"nearest3d.* in 1: torch picks other entries of"):
        check(model, x.contiguous(memory_format=torch.channels_last_3d))


def test_volumes_without_a_batch_are_not_taken_for_one_with_fewer_axes() -> None:
    x = double(4, 16, 12)
    for model in (
        nn.Sequential(nn.Sigmoid(), nn.AvgPool2d(2), nn.Sigmoid()),
        nn.Sequential(nn.Sigmoid(), nn.AdaptiveAvgPool2d((8, 6)), nn.Sigmoid()),
        nn.Sequential(nn.Sigmoid(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1)),
    ):
        check(model, x)


class Writes(nn.Module):
    """Writes in place, reads what shares the memory."""

    def __init__(self, view: Between) -> None:
        super().__init__()
        self.view, self.first = view, nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.view(y).relu_()
        return y + 1


class IsRead(Writes):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        view = self.view(y)
        y.relu_()
        return view * 2


VIEWS: dict[str, Between] = {
    "detach": Tensor.detach,
    "view as": lambda y: y.view_as(y),
    "move": lambda y: y.movedim(1, 2),
    "unflatten": lambda y: y.unflatten(1, (2, 2)),
    "stride": lambda y: y.as_strided(y.shape, y.stride()),
    "part": lambda y: y[:, :2],
    "every other": lambda y: y[..., ::2],
    "dropout": lambda y: F.dropout(y, training=False).view(y.shape),
}


@pytest.mark.parametrize("kind", [Writes, IsRead])
@pytest.mark.parametrize("name", VIEWS)
def test_writing_into_what_is_read_by_another_name_is_refused(
    name: str, kind: type[Writes]
) -> None:
    with pytest.raises(ExecutionError, match=r"aten\.relu_.* writes into .* that is read again"):
        check(kind(VIEWS[name]), double(2, 4, 8, 9))


class Remembers(Sandwich):
    def forward(self, x: Tensor) -> Any:
        return self.between(self.first(x), self)


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (lambda x, m: F.batch_norm(x, m.mean, m.variance, training=True), "batch_norm"),
        (lambda x, m: F.instance_norm(x, m.mean, m.variance, use_input_stats=True), "instance_n"),
        (lambda x, m: x + m.mean[1:].add_(1).sum(), "add_"),
    ],
    ids=["batch norm", "instance norm", "part of a buffer"],
)
def test_what_outlives_the_forward_and_is_written_without_saying_so_is_refused(
    between: Any, words: str
) -> None:
    with pytest.raises(ExecutionError, match=rf"writes into mean \(aten\.{words}"):
        check(Remembers(between), double(2, 4, 8, 9))
