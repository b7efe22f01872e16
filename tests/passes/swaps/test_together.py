"""Swapped networks with everything else: files, the command line, other passes, no values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import history, plan, rewrite
from pocketize.artifact import load, save
from pocketize.cli import main
from pocketize.errors import ArtifactError, OrderError
from pocketize.passes import (
    Bottleneck,
    Checkpoint,
    CompactBlock,
    InPlaceNorm,
    Pocket,
    Recompute,
    Separable,
    Width,
)
from pocketize.passes.inplace.modules import NormInPlace
from pocketize.passes.swaps.blocks import ConvBlock, SeparableBlock


class Net(nn.Module):
    """Two levels with norms and leaky activations."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.LeakyReLU(0.1)
        self.deep = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.deep_norm = nn.BatchNorm2d(2 * width)
        self.deep_act = nn.LeakyReLU(0.1)
        self.head = nn.Conv2d(2 * width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        return self.head(self.deep_act(self.deep_norm(self.deep(x))))


X = torch.randn(2, 3, 8, 8)
SWAPS: list[Any] = [
    Bottleneck(activations="any", inner_norm=True),
    Separable(activations="any", weights="reset"),
    CompactBlock(activations="any", ratio="energy:0.3"),
]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("given", SWAPS, ids=str)
def test_a_swapped_model_is_saved_and_loaded(given: Any, tmp_path: Path) -> None:
    made = rewrite(net(), given, inputs=X, seed=1)
    save(made, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", Net)
    assert type(back.deep) is type(made.deep)
    assert torch.equal(back(X), made(X))
    assert history(back) == history(made)
    with pytest.raises(ArtifactError, match=r"weight of shape .32, 16, 3, 3., got .40, 20"):
        load(tmp_path / "net.safetensors", lambda: Net(20))


@pytest.mark.slow
def test_the_command_line_swaps_and_says_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    arguments = ["zoo:memory_fcn3d", "--kwargs", '{"widths": [8, 16, 16, 32]}']
    swap = "compact-block:ratio=2,where=encoder,activations=any"
    code = main(["apply", *arguments, "--input", "1x1x16x16x16", "--pass", swap, "-o", str(out)])
    assert code == 0, capsys.readouterr().err
    assert out.exists()
    code = main(["plan", *arguments, "--input", "1x1x16x16x16", "--pass", swap])
    assert code == 0
    assert "channels inside" in capsys.readouterr().out


@pytest.mark.parametrize("late", [InPlaceNorm(), Recompute(min_bytes=0), Checkpoint()], ids=str)
def test_what_saves_memory_comes_after_a_swap(late: Any) -> None:
    with pytest.raises(OrderError, match=f"{late.name} must come after bottleneck"):
        plan(net(), late, SWAPS[0], inputs=X)


@pytest.mark.slow
def test_what_sets_widths_comes_before_a_swap() -> None:
    for early in (Pocket(), Width(0.5)):
        with pytest.raises(OrderError, match=f"separable must come after {early.name}"):
            plan(net(), SWAPS[1], early, inputs=X)
        made: Any = rewrite(net(), early, SWAPS[1], inputs=X, seed=0)
        assert isinstance(made.deep, SeparableBlock)


@pytest.mark.slow
def test_norms_inside_a_block_are_computed_in_place() -> None:
    alone: Any = rewrite(net(), SWAPS[0], inputs=X)
    made: Any = rewrite(net(), SWAPS[0], InPlaceNorm(), inputs=X)
    assert isinstance(made.deep.reduce_norm, NormInPlace)
    for model in (alone, made):
        model.train()(X).square().sum().backward()
    for name, parameter in alone.named_parameters():
        other = made.get_parameter(name)
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-3, atol=1e-4), name


def test_widths_of_a_swapped_model_can_be_changed_and_the_block_follows() -> None:
    swapped = rewrite(net(), Bottleneck(activations="any"), inputs=X)
    made: Any = rewrite(swapped, Width(0.5), inputs=X)
    assert (made.deep.in_channels, made.deep.out_channels) == (8, 16)
    assert made(X).shape == (2, 2, 4, 4)


@pytest.mark.slow
def test_a_model_without_values_is_planned_by_shape_and_energy_is_refused() -> None:
    empty = copy.deepcopy(net()).to("meta")
    inputs = X.to("meta")
    (planned,) = plan(empty, Separable(activations="any"), inputs=inputs).passes
    assert "relative error" not in planned.changes[0].why
    assert "only shapes are planned" in planned.notes[-1]
    for kind in (Bottleneck, Separable, CompactBlock):
        (planned,) = plan(empty, kind(ratio="energy:0.9"), inputs=inputs).passes
        assert not planned.edits
        (why,) = {row.why for row in planned.refused if row.path == "deep"}
        assert why == (
            "ratio='energy:0.9' needs the weight's values, and it has none (it is on the meta "
            "device); give a number"
        )


@pytest.mark.slow
@pytest.mark.parametrize("given", SWAPS, ids=str)
def test_in_place_is_the_same_as_on_a_copy(given: Any) -> None:
    model = net()
    kept = {name: id(p) for name, p in model.named_parameters() if not name.startswith("deep.")}
    expected = rewrite(model, given, inputs=X, seed=3)
    made = rewrite(model, given, inputs=X, seed=3, inplace=True)
    assert made is model
    assert isinstance(model.deep, ConvBlock)
    assert kept.items() <= {name: id(p) for name, p in model.named_parameters()}.items()
    assert torch.equal(made(X), expected(X))


def test_a_swap_inside_inference_mode_can_be_trained() -> None:
    factory: Callable[[], Net] = net
    model = factory()
    with torch.inference_mode():
        made: Any = rewrite(model, Bottleneck(activations="any"), inputs=X)
    made.train()(X.clone()).sum().backward()
    assert made.deep.spatial.weight.grad is not None
