"""What every network of the zoo does: shapes, training, equal keys, the papers' details."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pocketize import zoo
from pocketize.zoo.complexity import CUMedVision2d, Head, UCUNet2d
from pocketize.zoo.memory_fcn import MemoryFCN3d
from pocketize.zoo.patchwise import UNet3d, pad_to
from pocketize.zoo.pocketnet import (
    DenseBlock2d,
    DenseBlock3d,
    PocketNet2d,
    PocketNet3d,
    ResNetBlock2d,
    ResNetBlock3d,
)

# slim, so that running them takes milliseconds
SLIM: dict[str, dict[str, Any]] = {
    "pocketnet_*": {"width": 4},
    "patchwise_*": {"widths": (2, 4, 6, 8, 10)},
    "memory_fcn3d*": {"widths": (4, 8, 12, 16)},
    "complexity_*unet2d": {"widths": (2, 3, 5, 4, 6)},
    "complexity_cumedvision2d": {"widths": (2, 3, 5, 4)},
}
SLIM_NETS = [
    (name, options) for pattern, options in SLIM.items() for name in zoo.list_models(pattern)
]


@functools.cache
def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return zoo.build(name, **dict(SLIM_NETS)[name])


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = model(x)
    return (y,) if isinstance(y, Tensor) else y


def expected_shape(name: str, x: Tensor) -> tuple[int, ...]:
    out = zoo.describe(name).options.get("out_channels")
    return (len(x), 2) if out is None else (len(x), out, *x.shape[2:])


def test_no_network_is_left_out_here() -> None:
    assert sorted(name for name, _ in SLIM_NETS) == zoo.list_models()


@pytest.mark.each_value
@pytest.mark.parametrize("name", zoo.list_models())
@pytest.mark.parametrize("small", [True, False])
def test_example_shapes_fit_the_network_as_it_is(name: str, small: bool) -> None:
    with FakeTensorMode():  # the paper's sizes would take gigabytes
        model = zoo.build(name).eval()
        info = zoo.describe(name)
        x = torch.empty(info.small_shape if small else info.input_shape)
        assert model(x).shape == expected_shape(name, x)


@pytest.mark.parametrize("name", zoo.list_models())
@pytest.mark.parametrize("odd", [(17, 23, 19), (16, 31, 33)])
def test_sizes_that_the_poolings_do_not_divide_come_back(name: str, odd: tuple[int, ...]) -> None:
    size = odd if name.startswith(("patchwise", "memory")) or "3d" in name else odd[1:]
    x = torch.randn(2, zoo.describe(name).input_shape[1], *size)
    with torch.no_grad():
        (y,) = outputs(build(name).eval(), x)
    assert y.shape == expected_shape(name, x)


@pytest.mark.parametrize("name", zoo.list_models())
def test_heads_give_logits_not_probabilities(name: str) -> None:
    model = zoo.build(name, **dict(SLIM_NETS)[name]).eval()
    last = [head.up for head in model.heads] if hasattr(model, "heads") else []
    last += [model.head] if hasattr(model, "head") else []
    for layer in last:
        nn.init.constant_(layer.bias, -100.0)
    with torch.no_grad():
        (y,) = outputs(model, zoo.example_input(name, small=True))
    assert y.max() < -50


@pytest.mark.parametrize("name", zoo.list_models())
def test_a_training_step_reaches_every_parameter(name: str) -> None:
    model = build(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    x = zoo.example_input(name, small=True)
    loss = torch.stack([y.square().mean() for y in outputs(model, x)]).sum()
    optimizer.zero_grad()
    loss.backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None]
    optimizer.step()
    assert not unreached
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- PocketNet ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*zoo.list_models("pocketnet_*3d"), *zoo.list_models("pocketnet_encoder*")]
)
def test_full_and_pocket_form_have_the_same_keys(name: str) -> None:
    full, pocket = zoo.build(name, width=4), zoo.build(name, width=4, pocket=True)
    assert list(full.state_dict()) == list(pocket.state_dict())
    assert [n for n, _ in full.named_modules()] == [n for n, _ in pocket.named_modules()]


@pytest.mark.parametrize("name", zoo.list_models("pocketnet_*"))
def test_no_pocket_layer_is_wider_than_the_finest_level(name: str) -> None:
    model = zoo.build(name, pocket=True)
    widths = {m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)}
    assert max(widths) == 16


def test_pooling_in_3d_leaves_the_first_spatial_axis_alone() -> None:
    y = PocketNet3d(width=2)(torch.randn(1, 1, 1, 16, 16))
    assert y.shape == (1, 2, 1, 16, 16)


def test_2d_resnet_block_adds_around_each_convolution() -> None:
    block = ResNetBlock2d(3)
    for p in block.parameters():
        nn.init.zeros_(p)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(block(x), x)


def test_3d_resnet_block_adds_around_the_second_convolution_only() -> None:
    block = ResNetBlock3d(2, 3)
    for p in block.conv2.parameters():
        nn.init.zeros_(p)
    x = torch.randn(1, 2, 3, 5, 5)
    assert torch.equal(block(x), block.conv1(x))


def test_2d_dense_block_is_a_chain_and_the_3d_one_is_dense() -> None:
    chain, dense = DenseBlock2d(4), DenseBlock3d(3, 4)
    assert [c[0].in_channels for c in (chain.conv1, chain.conv2, chain.merge)] == [4, 4, 12]
    assert [c[0].in_channels for c in (dense.conv1, dense.conv2, dense.merge)] == [3, 7, 11]


def test_2d_net_brings_nothing_but_the_stem_past_its_levels() -> None:
    model = PocketNet2d(width=2).eval()
    for p in model.levels.up.parameters():  # cuts the coarser levels off
        nn.init.zeros_(p)
    x = torch.randn(1, 1, 16, 16)
    nowhere = model.levels.decode(torch.zeros(1, 2, 16, 16))
    expected = model.head(torch.cat([model.stem(x), nowhere], 1))
    assert torch.equal(model(x), expected)


# --- the thesis -----------------------------------------------------------------------------------


def test_padding_goes_to_the_far_side_of_each_axis() -> None:
    x = torch.ones(1, 1, 2, 4, 2)
    padded = pad_to(x, torch.Size((3, 4, 3)))
    assert padded.shape == (1, 1, 3, 4, 3)
    assert torch.equal(padded[..., :2, :, :2], x)
    assert padded.sum() == x.sum()
    assert pad_to(x, x.shape[2:]) is x


def test_slabs_of_sixteen_voxels_go_through_alone() -> None:
    model = UNet3d(widths=(2, 2, 2, 2, 2)).eval()
    assert model(torch.randn(1, 4, 24, 30, 16)).shape == (1, 4, 24, 30, 16)


# --- Mishra ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [CUMedVision2d, UCUNet2d])
def test_auxiliary_outputs_come_in_train_mode_only(net: type[nn.Module]) -> None:
    model = net(out_channels=3, norm=False)
    x = torch.randn(2, 1, 21, 37)
    with torch.no_grad():
        logits, *auxiliary = model.train()(x)
        alone = model.eval()(x)
    assert [y.shape for y in (logits, *auxiliary)] == [(2, 3, 21, 37)] * 4
    assert torch.equal(logits, alone)


def test_cumedvision_sums_heads_at_three_scales() -> None:
    model = CUMedVision2d(widths=(2, 3, 5, 4), norm=False)
    logits, *auxiliary = model(torch.randn(1, 1, 16, 16))
    assert torch.allclose(logits, auxiliary[0] + auxiliary[1] + auxiliary[2])
    assert [head.up.stride[0] for head in model.heads] == [2, 4, 8]
    convs = [sum(isinstance(m, nn.Conv2d) for m in level) for level in model.encoder]
    assert convs == [2, 2, 3, 3]


def test_ucunet_adds_three_heads_to_the_unets_own() -> None:
    model = UCUNet2d(widths=(2, 3, 5, 4, 6), norm=False)
    own: list[Tensor] = []
    model.head.register_forward_hook(lambda module, args, output: own.append(output))
    logits, *auxiliary = model(torch.randn(1, 1, 16, 16))
    assert torch.allclose(logits, own[0] + auxiliary[0] + auxiliary[1] + auxiliary[2], atol=1e-6)
    assert [head.up.stride[0] for head in model.heads] == [8, 4, 2]


@pytest.mark.parametrize("size", range(16, 24))
def test_a_head_reaches_every_size_that_pools_to_its_own(size: int) -> None:
    y = Head(3, 2, stride=8)(torch.randn(1, 3, 2, 2), torch.Size((size, 23)))
    assert y.shape == (1, 2, size, 23)


# --- memory-efficient FCN -------------------------------------------------------------------------


def test_variants_differ_in_the_encoder_only() -> None:
    def rest(block: str) -> dict[str, torch.Size]:
        state = MemoryFCN3d(block=block, widths=(4, 8, 12, 16)).state_dict()
        return {key: v.shape for key, v in state.items() if not key.startswith("encoder.")}

    baseline = rest("conv")
    assert all(rest(block) == baseline for block in ("bottleneck", "separable", "compact"))


def test_compact_block_is_pointwise_depthwise_pointwise() -> None:
    model = MemoryFCN3d(block="compact", widths=(4, 8, 12, 16), per_level=1)
    convs = [m for m in model.encoder[1].modules() if isinstance(m, nn.Conv3d)]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.groups) for c in convs]
    assert shapes == [(4, 2, 1, 1), (2, 2, 3, 2), (2, 8, 1, 1)]
