"""Blocks that stand where a convolution stood: the same function at full rank, the same manners."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pocketize.passes  # noqa: F401  (registers the conversions)
from pocketize.engine.surgery import apply_edits
from pocketize.errors import RewriteError
from pocketize.graph.clone import fake_clone
from pocketize.passes.swaps.blocks import ConvBlock
from pocketize.plugin.edits import Convert
from tests.examples import examples

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KINDS = ("bottleneck", "separable", "compact-block")


def full_ranks(kind: str, weight: Tensor) -> list[int]:
    o, i = weight.shape[:2]
    kernels = min(o, weight[0, 0].numel())
    return {"bottleneck": [o, i], "separable": [kernels], "compact-block": [i, kernels]}[kind]


def swapped(conv: nn.Module, kind: str, **options: Any) -> ConvBlock:
    model = nn.Sequential(copy.deepcopy(conv))
    weight: Any = conv.weight
    told = {"ranks": full_ranks(kind, weight), "shape": list(weight.shape)}
    apply_edits(model, [Convert("0", kind, told | {"weights": "decompose"} | options)])
    block = model[0]
    assert isinstance(block, ConvBlock)
    return block


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    rank = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    stride = [draw(st.integers(1, 2)) for _ in range(rank)]
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = [draw(st.integers(0, 2)) for _ in range(rank)]
    if draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
        stride = [1] * rank
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = CONVS[rank](
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    return conv, torch.randn(2, conv.in_channels, *[7] * rank, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the original's too
@pytest.mark.parametrize("kind", KINDS)
@given(convolutions())
@settings(max_examples=examples(25), deadline=None)
def test_full_rank_is_the_convolution(kind: str, given_conv: tuple[nn.Module, Tensor]) -> None:
    conv, x = given_conv
    block = swapped(conv, kind)
    assert torch.allclose(block(x), conv(x), rtol=1e-10, atol=1e-10)
    assert torch.allclose(block(x[0]), conv(x[0]), rtol=1e-10, atol=1e-10)  # without a batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", CONVS)
def test_full_rank_is_the_convolution_in_single_precision_too(rank: int, kind: str) -> None:
    torch.manual_seed(0)
    conv = CONVS[rank](12, 16, 3, stride=2, padding=1)
    x = torch.randn(1, 12, *[9] * rank)
    with torch.no_grad():
        assert float((swapped(conv, kind)(x) - conv(x)).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_answers_for_the_convolution(kind: str) -> None:
    conv = nn.Conv2d(4, 6, (3, 5), stride=2, padding="valid", dilation=(1, 2), bias=False)
    block = swapped(conv, kind)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(block, name) == getattr(conv, name), name
    assert (block.groups, block.padding_mode) == (1, "zeros")
    assert not any("bias" in name for name, _ in block.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_convolution_had_the_block_has(kind: str) -> None:
    conv = nn.Conv3d(4, 6, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    conv.weight.requires_grad_(False)
    conv.note = "mine"
    conv.eval()
    model = nn.Sequential(conv)
    seen: list[tuple[int, ...]] = []
    handle = conv.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    bias = conv.bias
    told = {"ranks": full_ranks(kind, conv.weight), "shape": list(conv.weight.shape)}
    apply_edits(model, [Convert("0", kind, told | {"weights": "decompose"})])
    block = model[0]
    assert block.note == "mine"
    assert not any(module.training for module in block.modules())
    *inner, last = block
    assert last.bias is bias
    for layer in (*inner, last):
        assert layer.weight.dtype is torch.bfloat16
        assert not layer.weight.requires_grad
        assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert bias.requires_grad
    x = torch.randn(1, 4, 5, 5, 5, dtype=torch.bfloat16)
    model(x)
    assert seen == [(1, 6, 3, 3, 3)]
    handle.remove()
    model(x)
    assert len(seen) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_can_be_copied_pickled_and_scripted(kind: str) -> None:
    conv = nn.Conv2d(4, 6, 3)
    block = swapped(conv, kind, norm={"kind": "BatchNorm"}, activation={"kind": "ReLU"}).eval()
    x = torch.randn(2, 4, 6, 6)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is type(block)
        assert torch.equal(twin(x), block(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        scripted = torch.jit.script(block)
    assert torch.equal(scripted(x), block(x))


@pytest.mark.parametrize("kind", KINDS)
def test_models_without_memory_get_blocks_without_memory(kind: str) -> None:
    options = {"norm": {"kind": "InstanceNorm", "affine": True, "track_running_stats": True}}
    options |= {"activation": {"kind": "PReLU", "shared": False}}
    shapes = {
        n: p.shape for n, p in swapped(nn.Conv2d(4, 6, 3), kind, **options).named_parameters()
    }
    empty = swapped(nn.Conv2d(4, 6, 3, device="meta"), kind, **options)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert {n: p.shape for n, p in empty.named_parameters()} == shapes
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_clone(nn.Sequential(nn.Conv2d(4, 6, 3)), mode)
    told = {"ranks": full_ranks(kind, model[0].weight), "shape": [6, 4, 3, 3]} | options
    apply_edits(model, [Convert("0", kind, told | {"weights": "decompose"})])
    with mode:
        assert model.train()(torch.empty(2, 4, 8, 8)).shape == (2, 6, 6, 6)
    assert {n[2:]: p.shape for n, p in model.named_parameters()} == shapes


def test_no_random_number_is_drawn() -> None:
    conv = nn.Conv2d(4, 6, 3)
    state = torch.get_rng_state()
    for kind in KINDS:
        swapped(conv, kind, norm={"kind": "GroupNorm", "num_groups": 4, "affine": True})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("module", "told", "says"),
    [
        (nn.Conv2d(4, 8, 3), {"shape": [8, 4, 5, 5]}, "weight of shape .8, 4, 5, 5., got"),
        (nn.ReLU(), {}, "expected a convolution without groups, got ReLU"),
        (nn.Conv2d(4, 8, 3, groups=2), {}, "without groups"),
        (nn.ConvTranspose2d(4, 8, 3), {}, "without groups, got ConvTranspose2d"),
        (nn.Conv2d(4, 8, 3), {"ranks": [2]}, "expected 2 ranks of at least 1, got .2,"),
        (nn.Conv2d(4, 8, 3), {"ranks": [0, 2]}, "ranks of at least 1"),
        (nn.Conv2d(4, 8, 3), {"norm": {"kind": "os.system"}}, "a norm out of BatchNorm"),
        (nn.Conv2d(4, 8, 3), {"activation": {"kind": "x"}}, "an activation out of CELU"),
    ],
)
def test_a_conversion_that_does_not_fit_says_why(
    module: nn.Module, told: dict[str, Any], says: str
) -> None:
    options = {"ranks": [2, 2], "shape": [8, 4, 3, 3], "weights": "decompose"} | told
    with pytest.raises(RewriteError, match=says):
        apply_edits(nn.Sequential(module), [Convert("0", "bottleneck", options)])
