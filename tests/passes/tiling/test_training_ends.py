"""What goes into a forward that trains by tiles, and what comes out, is what the whole has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize import plan, rewrite
from pocketize.errors import ExecutionError
from pocketize.graph.capture import find_tensors
from pocketize.passes import Patchwise
from tests.passes.tiling.nets import double


def _tiled(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    return rewrite(model, Patchwise(size=5, train=True, progress=False, **options), inputs=inputs)


class Conditioned(nn.Module):
    """Two images, a vector that scales the channels, a number, and a map of one voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4)
        self.scale, self.last = nn.Linear(3, 4), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, images: list[Tensor], *, given: dict[str, Tensor]) -> Tensor:
        x = self.norm(self.first(torch.cat(images, 1)))
        x = x * self.scale(given["vector"])[:, :, None, None] + given["voxel"]
        made: Tensor = self.last(F.silu(x) * given["number"])
        return made


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["device", "disk"])
def test_all_inputs_have_their_gradients_also_those_that_are_no_maps(keep: Any) -> None:
    torch.manual_seed(0)
    model, encoder = Conditioned().double(), nn.Linear(2, 3).double()
    a, b, code = double(2, 1, 12, 13), double(2, 1, 12, 13, seed=1), double(2, 2, seed=2)
    more = {"voxel": double(2, 4, 1, 1, seed=3), "number": double(1, seed=4)[0]}
    sample = {"images": [a, b], "given": {"vector": double(2, 3), **more}}
    found = []
    for net in (model, _tiled(model, sample, keep=keep)):
        leaves = [t.clone().requires_grad_() for t in (a, b, *more.values())]
        given = {"vector": encoder(code), "voxel": leaves[2], "number": leaves[3]}
        loss = net(leaves[:2], given=given).square().sum()
        wanted = [*leaves, *encoder.parameters(), *net.parameters()]
        found.append(torch.autograd.grad(loss, wanted))
    for x, y in zip(*found, strict=True):
        assert x.shape == y.shape
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-10)


class Returns(nn.Module):
    def __init__(self, told: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.told = nn.Conv2d(1, 4, 3, padding=1), told

    def forward(self, x: Tensor) -> Any:
        return self.told(self.first(x), x)


RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a list": lambda y, x: [y * 2, y],
    "twice the same": lambda y, x: [y, y],
    "a part": lambda y, x: (y, y[:, :2]),
    "part of a part": lambda y, x: {"all": y, "few": y.permute(0, 2, 3, 1)[..., 1:]},
    "detached": lambda y, x: (y, y.detach(), y.detach() * 2),
    "the input": lambda y, x: (y, x, x.flatten(2)),
    "labels": lambda y, x: (y, y.argmax(1), y > 0),
    "pooled": lambda y, x: (y * 3, y.mean((2, 3)), y.sum()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RETURNS)
def test_outputs_are_written_in_place_as_those_of_the_whole_volume(name: str) -> None:
    torch.manual_seed(0)
    model, x = Returns(RETURNS[name]).double(), double(2, 1, 12, 13)
    tiled = _tiled(model, x)
    for train in (True, False):
        found = []
        for net in (model.train(train), tiled.train(train)):
            given = x.clone()
            with torch.set_grad_enabled(train):
                outputs = find_tensors(net(given))
                flags = [(t.requires_grad, t.is_leaf) for t in outputs]
                outputs[0].sigmoid_()
                loss = torch.stack([t.double().square().sum() for t in outputs]).sum()
            gradients = torch.autograd.grad(loss, list(net.parameters())) if train else ()
            found.append((flags, [*outputs, given, loss, *gradients]))
        assert found[0][0] == found[1][0]
        for a, b in zip(found[0][1], found[1][1], strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_parts_of_one_tensor_that_overlap_are_not_made_two() -> None:
    model = Returns(lambda y, x: (y[:, :3], y[:, 1:]))
    made = plan(model, Patchwise(size=5), inputs="1x1x12x12")
    assert "two parts of one tensor that overlap" in made.passes[-1].refused[0].why
    disjoint = Returns(lambda y, x: y.chunk(2, 1))
    assert not plan(disjoint, Patchwise(size=5), inputs="1x1x12x12").passes[-1].refused


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_a_batch_of_none_runs_as_it_does_without_tiles(train: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, stride=2))
    tiled = _tiled(model.train(train), torch.randn(1, 1, 12, 12))
    empty = torch.randn(0, 1, 12, 12, requires_grad=True)
    assert tiled(empty).shape == model(empty).shape
    tiled(empty).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in tiled.parameters())
    with torch.inference_mode():
        assert tiled.eval()(empty).shape == model(empty).shape


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(3, 4), (5, 5), (1, 11), (17, 2)])
def test_volumes_smaller_than_a_tile_and_odd_ones(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(4, 2, 3, padding=1),
    ).double()
    tiled = _tiled(model, double(1, 1, 12, 13))
    x = double(2, 1, *sizes)
    found = [torch.autograd.grad(n(x).square().sum(), list(n.parameters())) for n in (model, tiled)]
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_channels_that_lie_last_and_other_dtypes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1))
    model = model.to(torch.float64, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = double(2, 3, 12, 13).contiguous(memory_format=torch.channels_last).requires_grad_()
    tiled = _tiled(model, x)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = []
        for net in (model.to(dtype), tiled.to(dtype)):
            y = net(x.to(dtype))
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
        assert all(y[0].is_contiguous(memory_format=torch.channels_last) for y in found)
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            rough = 0.05 if dtype is torch.bfloat16 else 1e-4
            assert (a - b).abs().max() <= rough * max(1.0, float(a.detach().abs().max()))


class Holder:
    """Tensors in an object that torch's tools do not look into."""

    def __init__(self, image: Tensor) -> None:
        self.image = image


@pytest.mark.slow
def test_tensors_hidden_in_an_object_are_refused() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Tensor, more: Holder | None = None) -> Tensor:
            made: Tensor = self.first(x if more is None else x + more.image)
            return made

    x = double(1, 1, 12, 13)
    tiled = _tiled(Takes().double(), x)
    with pytest.raises(ExecutionError, match="argument of type Holder holds tensors"):
        tiled(x, Holder(x))


class Leaves(nn.Module):
    """Keeps a tensor of each forward in an attribute, and one in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.middle: Any = None
        self.heads: list[Any] = [torch.zeros(1)] * 2

    def forward(self, x: Tensor) -> Tensor:
        self.middle = self.first(x)
        self.heads[1] = self.middle.mean()
        made: Tensor = self.last(self.middle)
        return made


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_what_a_forward_leaves_in_attributes_is_not_that_of_an_earlier_one(train: bool) -> None:
    torch.manual_seed(0)
    model, x = Leaves().double().train(train), double(1, 1, 12, 13)
    model(x * 2)
    tiled: Any = _tiled(model, x)
    tiled(x)  # whole in evaluation mode, if there were no gradients by tiles
    for use in (lambda t: t + 1, lambda t: 1 - t, torch.sum, lambda t: t.square(), lambda t: t[0]):
        for left in (tiled.middle, tiled.heads[1]):
            with pytest.raises(ExecutionError, match=r"^patchwise: the forward leaves a tensor in"):
                use(left)
    assert torch.equal(tiled.heads[0], torch.zeros_like(tiled.heads[0]))
    copied = copy.deepcopy(tiled)
    assert torch.allclose(copied(x), model(x))
    with torch.no_grad():
        tiled.train()(x)
    assert torch.is_tensor(tiled.middle)


def test_a_forward_that_reads_what_the_last_one_left_is_refused() -> None:
    class Recurrent(Leaves):
        def __init__(self, held: str) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4, 1, 1))
            self.plain, self.held = torch.zeros(4, 1, 1), held

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            setattr(
                self, self.held, getattr(self, self.held) * 0.9 + x.mean((0, 2, 3))[:, None, None]
            )
            made: Tensor = self.last(x - getattr(self, self.held))
            return made

    for held, words in (("plain", "reads a tensor that is no input"), ("mean", "attribute mean")):
        made = plan(Recurrent(held), Patchwise(size=5), inputs="1x1x12x12")
        assert words in made.passes[-1].refused[0].why
