"""The pocket pass on random small U-Nets: widths, and that every kept index is the right one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocketize import history
from pocketize.graph.clone import clone
from pocketize.passes import Pocket
from tests.contract.case import make_case
from tests.contract.indices import SEEN, TOLERANCE, Sliced, difference, silence
from tests.contract.widths import width_of
from tests.examples import examples
from tests.models.registry import Net

# The same examples every time: what turns red is then the change at hand.
fixed = settings(deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Recipe:
    """A U-Net in words."""

    dims: int
    widths: tuple[int, ...]
    norm: str
    skip: str
    up: str
    down: str
    residual: bool
    width: int


class Unet(nn.Module):
    """A U-Net as a recipe says."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, widths = recipe, recipe.widths
        self.encoders = nn.ModuleList()
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        self.decoders = nn.ModuleList()
        before = 1
        for level, width in enumerate(widths):
            self.encoders.append(Block(recipe, before, width))
            before = width
            if level + 1 < len(widths):
                self.downs.append(down(recipe, width))
        for width in reversed(widths[:-1]):
            self.ups.append(up(recipe, before, width))
            joined = 2 * width if recipe.skip == "concat" else width
            self.decoders.append(Block(recipe, joined, width))
            before = width
        self.head = conv(recipe.dims)(before, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(x)
            if level < len(self.downs):
                skips.append(x)
                x = self.downs[level](x)
        for raise_, decoder in zip(self.ups, self.decoders, strict=True):
            x, skip = raise_(x), skips.pop()
            x = decoder(torch.cat([x, skip], 1) if self.recipe.skip == "concat" else x + skip)
        return self.head(x)


class Block(nn.Module):
    """Twice convolution, norm, activation; the second may be added to the first."""

    def __init__(self, recipe: Recipe, before: int, width: int) -> None:
        super().__init__()
        self.first = conv(recipe.dims)(before, width, 3, padding=1)
        self.second = conv(recipe.dims)(width, width, 3, padding=1)
        self.norms = nn.ModuleList(norm(recipe, width) for _ in range(2))
        self.act = nn.LeakyReLU(0.1)
        self.residual = recipe.residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norms[0](self.first(x)))
        y = self.act(self.norms[1](self.second(x)))
        return x + y if self.residual else y


def conv(dims: int) -> Any:
    return nn.Conv2d if dims == 2 else nn.Conv3d


def norm(recipe: Recipe, width: int) -> nn.Module:
    kinds: dict[str, Any] = {
        "none": nn.Identity,
        "batch": nn.BatchNorm2d if recipe.dims == 2 else nn.BatchNorm3d,
        "instance": nn.InstanceNorm2d if recipe.dims == 2 else nn.InstanceNorm3d,
    }
    return nn.GroupNorm(2, width) if recipe.norm == "group" else kinds[recipe.norm](width)


def down(recipe: Recipe, width: int) -> nn.Module:
    if recipe.down == "pool":
        return nn.MaxPool2d(2) if recipe.dims == 2 else nn.MaxPool3d(2)
    return conv(recipe.dims)(width, width, 2, stride=2)


def up(recipe: Recipe, before: int, width: int) -> nn.Module:
    if recipe.up == "transposed":
        kind = nn.ConvTranspose2d if recipe.dims == 2 else nn.ConvTranspose3d
        return kind(before, width, 2, stride=2)
    if recipe.up == "shuffle" and recipe.dims == 2:
        return nn.Sequential(nn.Conv2d(before, 4 * width, 1), nn.PixelShuffle(2))
    mode = "bilinear" if recipe.dims == 2 else "trilinear"
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode=mode), conv(recipe.dims)(before, width, 1)
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    dims = draw(st.sampled_from([2, 2, 3]))
    even = st.sampled_from([2, 4, 6, 8, 10])
    return Recipe(
        dims=dims,
        widths=tuple(draw(st.lists(even, min_size=1, max_size=3))),
        norm=draw(st.sampled_from(["none", "batch", "instance", "group"])),
        skip=draw(st.sampled_from(["concat", "add"])),
        up=draw(st.sampled_from(["transposed", "shuffle", "interpolate"])),
        down=draw(st.sampled_from(["pool", "strided"])),
        residual=draw(st.booleans()),
        width=draw(st.integers(2, 9)),
    )


def as_net(recipe: Recipe) -> Net:
    size = 2 ** len(recipe.widths)
    return Net(
        name=str(recipe),
        factory=lambda: Unet(recipe),
        example=lambda: torch.randn(2, 1, *[size] * recipe.dims),
        width=recipe.width,
    )


def layers(model: nn.Module) -> dict[str, int]:
    kinds = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
    return {p: width_of(model, p) for p, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.slow
@settings(fixed, max_examples=examples(8))
@given(recipes())
def test_a_random_unet_runs_is_as_narrow_as_asked_and_keeps_the_right_indices(
    recipe: Recipe,
) -> None:
    made = make_case(as_net(recipe), Pocket(width=recipe.width))
    case = Sliced(made)
    small = case.model

    before, after = layers(case.original), layers(small)
    step = 2 if recipe.norm == "group" else 1
    for path, width in after.items():
        shuffled = (
            4 if recipe.up == "shuffle" and path.startswith("ups.") and recipe.dims == 2 else 1
        )
        allowed = before[path] if path == "head" else recipe.width * shuffled
        assert width <= allowed, path
        full = min(before[path] // shuffled, recipe.width) // step * step * shuffled
        assert path == "head" or width >= full, f"{path} is narrower than it need be"

    found = case.output()
    if recipe.norm == "group":  # its statistics are over channels, and change with them
        reference = case.reference
    else:
        original = clone(case.original)
        silence(original, case.edits)
        reference = case.output(original)
    assert difference(found, reference) < TOLERANCE
    if before != after:
        assert difference(found, case.output(clone(case.original))) > SEEN
        assert history(made.rewritten)

    small.train()
    case.inputs.call(small).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
