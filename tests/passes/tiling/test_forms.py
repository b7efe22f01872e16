"""Local forms: every region of every operator's result equals that part of the whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from pocketize.passes.tiling.forms import Form
from pocketize.passes.tiling.intervals import Box, is_contested
from pocketize.passes.tiling.operators import NotLocal, local_form
from tests.examples import examples
from tests.foreign import foreign_nets
from tests.passes.tiling.whole import Whole, crop, is_map, run_whole


def _regions(sizes: tuple[int, ...], count: int, seed: int) -> Iterator[Box]:
    """The whole, each end of each axis, and some in between."""
    yield tuple((0, size) for size in sizes)
    draw = random.Random(seed)
    for _ in range(count):
        region = []
        for size in sizes:
            low = draw.choice([0, draw.randrange(size), size - 1])
            region.append((low, draw.choice([size, draw.randrange(low + 1, size + 1)])))
        yield tuple(region)


def _check(form: Form, whole: Whole, count: int = 12, seed: int = 0) -> None:
    expected = whole.values[form.node]
    for region in _regions(tuple(expected.shape[2:]), count, seed):
        for source, needed in form.input_boxes(region).items():
            sizes = tuple(whole.values[source].shape[2:])
            for (low, high), size in zip(needed, sizes, strict=True):
                assert 0 <= low <= high <= size, (form.node, region, needed, sizes)
        with torch.no_grad():
            found = form.run(region, whole)
        part = crop(expected, region)
        assert found.shape == part.shape, (form.node.target, region)
        assert found.dtype == part.dtype
        assert torch.allclose(found, part, rtol=1e-10, atol=1e-12), (form.node.target, region)


def _forms(whole: Whole, rank: int) -> Iterator[Form]:
    for node in whole.traced.operators():
        if is_map(node, rank):
            try:
                yield local_form(node, rank)
            except NotLocal:
                continue


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _single(model: nn.Module, *inputs: Tensor) -> tuple[Form, Whole]:
    """The form of the last operator of a model."""
    whole = run_whole(model.double().eval(), *(x.double() for x in inputs))
    node = whole.traced.operators()[-1]
    return local_form(node, inputs[0].ndim - 2), whole


_C2 = torch.randn(2, 4, 13, 10)
_C3 = torch.randn(1, 4, 7, 9, 6)
_C1 = torch.randn(2, 4, 23)

LAYERS: list[tuple[nn.Module, Tensor]] = [
    (nn.Conv2d(4, 3, 3, padding=1), _C2),
    (nn.Conv2d(4, 3, (3, 5), padding=(2, 1), stride=(2, 3), dilation=(2, 1)), _C2),
    (nn.Conv2d(4, 4, 4, padding="same", groups=2, bias=False), _C2),
    (nn.Conv3d(4, 3, 3, padding=1, stride=2), _C3),
    (nn.Conv1d(4, 3, 5, padding=4, stride=3), _C1),
    (nn.Conv2d(4, 3, 1, stride=2), _C2),
    (nn.Conv2d(4, 3, 3), _C2),
    (nn.ConvTranspose2d(4, 3, 2, stride=2), _C2),
    (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), _C2),
    (nn.ConvTranspose2d(4, 4, 3, stride=3, dilation=2, padding=2, groups=2), _C2),
    (nn.ConvTranspose3d(4, 3, 1, stride=2, output_padding=1), _C3),
    (nn.ConvTranspose1d(4, 3, 5, stride=4, padding=3, bias=False), _C1),
    (nn.MaxPool2d(2), _C2),
    (nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), _C2),
    (nn.MaxPool3d((1, 2, 2)), _C3),
    (nn.MaxPool1d(3, stride=1, dilation=2, padding=1), _C1),
    (nn.AvgPool2d(2), _C2),
    (nn.AvgPool2d(3, stride=2, padding=1), _C2),
    (nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), _C2),
    (nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), _C2),
    (nn.AvgPool3d(2, stride=1, divisor_override=3), _C3),
    (nn.AdaptiveAvgPool2d((13, 5)), _C2),
    (nn.Upsample(scale_factor=2), _C2),
    (nn.Upsample(size=(17, 29)), _C2),
    (nn.Upsample(scale_factor=1.7, mode="nearest-exact"), _C2),
    (nn.Upsample(scale_factor=2, mode="bilinear"), _C2),
    (nn.Upsample(scale_factor=1.3, mode="bilinear"), _C2),
    (nn.Upsample(scale_factor=0.6, mode="bilinear", align_corners=True), _C2),
    (nn.Upsample(size=(5, 31), mode="bilinear", align_corners=True), _C2),
    (nn.Upsample(scale_factor=2, mode="trilinear"), _C3),
    (nn.Upsample(scale_factor=1.5, mode="linear"), _C1),
    (nn.Upsample(size=(1, 1), mode="bilinear", align_corners=True), _C2),
    (nn.ReflectionPad2d((1, 2, 3, 4)), _C2),
    (nn.ReplicationPad3d(2), _C3),
    (nn.CircularPad2d((2, 1, 3, 0)), _C2),
    (nn.ConstantPad2d((1, -2, 3, 1), 2.5), _C2),
    (nn.ZeroPad2d(-1), _C2),
    (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), _C2),
    (nn.BatchNorm2d(4), _C2),
    (nn.PReLU(4), _C2),
    (nn.Dropout2d(0.3), _C2),
    (nn.Softmax(1), _C2),
    (nn.LogSoftmax(-3), _C2),
    (nn.GLU(1), _C2),
    (nn.PixelShuffle(2), _C2),
    (nn.PixelUnshuffle(2), _C2[:, :, :12]),
    (nn.ChannelShuffle(2), _C2),
    (Call(torch.absolute), _C2),
    (Call(lambda x: torch.concat([x, x], 1)), _C2),
    (Call(torch.special.expit), _C2),
    (nn.GELU(), _C2),
    (nn.Hardswish(inplace=True), _C2),
    (nn.LeakyReLU(0.1, inplace=True), _C2),
    (Call(lambda x: x[:, 1:3]), _C2),
    (Call(lambda x: x[..., 2:-1]), _C2),
    (Call(lambda x: x[:, :, ::3]), _C2),
    (Call(lambda x: x.narrow(2, 3, 5)), _C2),
    (Call(lambda x: torch.cat([x, x * 2], 1)), _C2),
    (Call(lambda x: x.amax(1, keepdim=True)), _C2),
    (Call(lambda x: x[:, :1].expand(-1, 6, -1, -1)), _C2),
    (Call(lambda x: torch.where(x > 0, x, x.exp())), _C2),
    (Call(lambda x: x.clamp(min=0).to(torch.float32)), _C2),
    (Call(lambda x: x * torch.ones(4, 1, 1, dtype=x.dtype)), _C2),
]


@pytest.mark.parametrize(("layer", "x"), LAYERS, ids=[str(row[0])[:70] for row in LAYERS])
def test_a_part_equals_that_part_of_the_whole(layer: nn.Module, x: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.uniform_(tensor.data, 0.2, 1.0)
    form, whole = _single(layer, x)
    _check(form, whole, count=25)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(1, 14),
    st.booleans(),
    st.integers(0, 99),
)
def test_convolutions_of_any_kind(
    kernel: int, stride: int, padding: int, dilation: int, size: int, transposed: bool, seed: int
) -> None:
    span = (kernel - 1) * dilation + 1
    if transposed:
        padding = min(padding, ((size - 1) * stride + span - 1) // 2)
        extra = seed % max(stride, dilation)
        layer: nn.Module = nn.ConvTranspose1d(
            2, 3, kernel, stride, padding, extra, dilation=dilation
        )
    elif size + 2 * padding < span:
        return
    else:
        layer = nn.Conv1d(2, 3, kernel, stride, padding, dilation)
    form, whole = _single(layer, torch.randn(1, 2, size))
    _check(form, whole, count=15, seed=seed)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.sampled_from([nn.MaxPool1d, nn.AvgPool1d]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(3, 14),
    st.booleans(),
    st.integers(0, 99),
)
def test_poolings_of_any_kind(
    kind: Any, kernel: int, stride: int, padding: int, size: int, ceil: bool, seed: int
) -> None:
    padding = min(padding, kernel // 2)
    if size + 2 * padding < kernel:
        return
    form, whole = _single(kind(kernel, stride, padding, ceil_mode=ceil), torch.randn(1, 2, size))
    _check(form, whole, count=15, seed=seed)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.sampled_from(["nearest", "nearest-exact", "linear"]),
    st.integers(1, 30),
    st.integers(1, 30),
    st.booleans(),
    st.integers(0, 99),
)
def test_interpolations_to_any_size(
    mode: str, size: int, length: int, corners: bool, seed: int
) -> None:
    aligned = {"align_corners": corners} if mode == "linear" else {}
    layer = Call(lambda x: F.interpolate(x, length, mode=mode, **aligned))
    if mode != "linear" and is_contested(size, length, None, exact="exact" in mode, wide=True):
        with pytest.raises(NotLocal, match="from one kernel to the next"):
            _single(layer, torch.randn(1, 2, size))
        return
    form, whole = _single(layer, torch.randn(1, 2, size))
    _check(form, whole, count=15, seed=seed)


NOT_LOCAL: list[tuple[nn.Module, str]] = [
    (nn.InstanceNorm2d(4), "it takes the statistics of the whole map"),
    (nn.BatchNorm2d(4, track_running_stats=False), "it takes the statistics of the batch"),
    (nn.GroupNorm(2, 4), "aten.group_norm is not known to be local"),
    (nn.AdaptiveAvgPool2d(1), "it pools the whole map"),
    (nn.AdaptiveAvgPool2d((5, 3)), r"its windows differ: \(13, 10\) to \(5, 3\)"),
    (nn.Softmax(2), "it runs along the spatial axis 2"),
    (Call(lambda x: x.mean((2, 3), keepdim=True)), "it reduces over space"),
    (Call(lambda x: torch.cat([x, x], 2)), "it concatenates maps along a spatial axis"),
    (Call(lambda x: x.flip(2)), "aten.flip is not known to be local"),
    (Call(lambda x: x.transpose(2, 3)), "aten.transpose is not known to be local"),
    (Call(lambda x: x + torch.ones(13, 10, dtype=x.dtype)), "a tensor of shape"),
    (Call(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))), "it pads channels"),
    (
        Call(lambda x: F.pad(x, (5, -6, 0, 0), mode="circular")),
        "around the 4 remaining entries",
    ),
    (nn.Upsample(scale_factor=(1.05, 1.0)), "torch picks other entries of 13 for 13"),
    (nn.Upsample(scale_factor=(1.0, 2.05)), "torch picks other entries of 10 for 20"),
    (nn.Upsample(scale_factor=(1.05, 1.0), mode="bilinear"), "scale of 1.05 keeps the size of 13"),
]


@pytest.mark.parametrize(("layer", "why"), NOT_LOCAL, ids=[str(row[0])[:50] for row in NOT_LOCAL])
def test_what_needs_the_whole_map_is_not_local(layer: nn.Module, why: str) -> None:
    with pytest.raises(NotLocal, match=why):
        _single(layer, _C2)


SEEN = {
    net.name: net
    for net in foreign_nets()
    if not {"slow"} & set(net.tags) and "swin" not in net.name
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_every_local_operator_of_other_peoples_networks(name: str) -> None:
    net = SEEN[name]
    torch.manual_seed(0)
    model, x = net.build().double().eval(), net.inputs()
    whole = run_whole(model, x.double())
    kinds: set[str] = set()
    for form in _forms(whole, x.ndim - 2):
        _check(form, whole, count=2)
        kinds.add(type(form).__name__)
    assert "Pointwise" in kinds


def test_nodes_that_do_not_make_a_map_of_a_map_are_refused() -> None:
    whole = run_whole(Call(lambda x: torch.zeros_like(x)), _C2)
    node: fx.Node = whole.traced.operators()[-1]
    form = local_form(node, 2)
    _check(form, whole)
