"""Slabs: cut along one axis, each alone, put together; and a backward pass for each."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocketize import load, plan, rewrite, save
from pocketize.errors import InputError, RewriteError
from pocketize.graph.capture import capture
from pocketize.passes import Patchwise
from pocketize.passes.tiling.forward import Tiling
from pocketize.passes.tiling.slabs import SlabForward, slab_backward
from pocketize.plugin.base import Guarantee
from tests.examples import examples
from tests.passes.tiling.nets import DeepSupervision, TwoInputs, double, unet


def by_hand(model: nn.Module, x: Tensor, axis: int, size: int) -> Tensor:
    """The thesis, in six lines."""
    length = x.shape[axis]
    made = []
    for start in range(0, length, size):
        slab = x.narrow(axis, start, min(size, length - start))
        pads = [0, 0] * x.ndim
        pads[2 * (x.ndim - 1 - axis % x.ndim) + 1] = size - slab.shape[axis]
        made.append(model(F.pad(slab, pads)))
    return torch.cat(made, axis).narrow(axis, 0, length)


def equal(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), (a - b).abs().max()


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(4, 20), st.integers(2, 24), st.integers(0, 1), st.integers(1, 3))
def test_slabs_are_what_they_are_by_hand(length: int, size: int, axis: int, batch: int) -> None:
    x = double(2, 1, *((length, 8) if axis == 0 else (8, length)))
    model = unet().double()
    size = min(size, length)
    expected = by_hand(model, x, axis + 2, size)
    SlabForward(model, Tiling(mode="slab", size=(size,), axis=axis, batch=batch)).install()
    equal(model(x), expected)


@pytest.mark.slow
def test_155_voxels_make_ten_slabs_of_16_with_5_of_padding() -> None:
    model = unet(3).double()
    planned = plan(model, Patchwise(mode="slab", size=16), inputs="1x1x8x8x155")
    assert "10 slabs, 5 of them zeros behind the volume" in str(planned)
    assert "live tensors of the forward of a slab peak at" in str(planned)
    assert planned.passes[0].guarantee is Guarantee.APPROXIMATE
    x = double(1, 1, 8, 8, 155)
    equal(planned.apply()(x), by_hand(model, x, 4, 16))


def test_a_slab_larger_than_the_volume_is_the_volume() -> None:
    x = double(1, 1, 8, 12)
    model = unet().double()
    equal(rewrite(model, Patchwise(mode="slab", size=100), inputs=x)(x), model(x))


def test_outputs_at_other_resolutions_are_put_together_in_their_containers() -> None:
    x = double(1, 1, 8, 22)
    model = DeepSupervision().double().eval()
    made: Any = rewrite(model, Patchwise(mode="slab", size=8), inputs=x)
    found = made(x)
    equal(found.main, by_hand(lambda y: model(y).main, x, 3, 8))  # type: ignore[arg-type]
    assert found.coarse[0].shape == (1, 2, 4, 11)
    made.supervised = False
    assert list(made(x)) == ["main"]


def test_what_is_no_map_goes_with_every_slab() -> None:
    given = {"image": double(2, 1, 8, 12), "mask": double(2, 1, 8, 12, seed=1)}
    given["vector"] = double(2, 3)
    model = TwoInputs().double().eval()
    one, two = (
        rewrite(model, Patchwise(mode="slab", size=4, batch=batch), inputs=given)(**given)
        for batch in (1, 2)
    )
    equal(one, two)
    first = {**given, "image": given["image"][..., :4], "mask": given["mask"][..., :4]}
    equal(one[..., :4], model(**first))


@pytest.mark.slow
def test_the_plain_forward_trains_with_one_graph() -> None:
    x = double(2, 1, 8, 10)
    model = unet().double().train()
    made = rewrite(model, Patchwise(mode="slab", size=4), inputs=x)
    made(x).square().mean().backward()
    by_hand(model, x, 3, 4).square().mean().backward()
    for a, b in zip(made.parameters(), model.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            assert a.grad is not None
            equal(a.grad, b.grad)


@pytest.mark.parametrize("length", [12, 10])
def test_a_backward_for_each_slab_adds_up_to_that_of_one_graph(length: int) -> None:
    x, y = double(2, 1, 8, length), double(2, 3, 8, length, seed=1)
    model = rewrite(unet().double().train(), Patchwise(mode="slab", size=4), inputs=x)
    whole = copy.deepcopy(model)
    expected = F.mse_loss(whole(x), y)
    expected.backward()
    found = slab_backward(model, x, y, F.mse_loss)
    equal(found, expected.detach())
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            assert a.grad is not None
            equal(a.grad, b.grad)


def test_a_backward_for_each_slab_scales_the_loss_and_takes_nests() -> None:
    x, y = double(1, 1, 8, 8), double(1, 2, 8, 8, seed=1)
    model = rewrite(DeepSupervision().double(), Patchwise(mode="slab", size=4), inputs=x)
    model.train()

    def loss(output: Any, target: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(output.main, target["labels"]) + output.coarse[0].square().mean()

    slab_backward(model, x, {"labels": y}, loss)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    slab_backward(model, x, {"labels": y}, loss, scale=lambda value: 8 * value)
    for p, grad in zip(model.parameters(), once, strict=True):
        assert p.grad is not None
        equal(p.grad, 8 * grad)


def test_a_backward_for_each_slab_wants_slabs_and_a_scalar() -> None:
    x = double(1, 1, 8, 8)
    model = unet().double()
    with pytest.raises(RewriteError, match="rewrite it with Patchwise"):
        slab_backward(model, x, x, F.mse_loss)
    made = rewrite(model, Patchwise(mode="slab", size=4), inputs=x)
    with pytest.raises(InputError, match="must be a scalar"):
        slab_backward(made, x, x, lambda output, target: output)


def test_labels_and_places_of_outputs(tmp_path: Path) -> None:
    x = double(1, 1, 8, 10)
    model = unet().double()
    options: dict[str, Any] = {"mode": "slab", "size": 4, "output": "disk", "folder": str(tmp_path)}
    made = rewrite(model, Patchwise(**options, reduce="argmax"), inputs=x)
    with torch.inference_mode():
        labels = made(x)
        expected = by_hand(model, x, 3, 4).argmax(1, keepdim=True)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), expected)
    assert labels.untyped_storage().filename is not None
    assert list(tmp_path.iterdir()) == []
    assert made(x).dtype == torch.float64  # with gradients


def test_copies_pickles_and_files_compute_the_same(tmp_path: Path) -> None:
    x = double(1, 1, 8, 10)
    model = unet().double()
    made = rewrite(model, Patchwise(mode="slab", size=4), inputs=x)
    save(made, tmp_path / "slabs.safetensors")
    loaded = load(tmp_path / "slabs.safetensors", lambda: unet().double())
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
        equal(twin(x), by_hand(model, x, 3, 4))


def test_recorders_see_the_network_and_not_its_slabs() -> None:
    x = double(1, 1, 8, 10)
    made = rewrite(unet().double(), Patchwise(mode="slab", size=4), inputs=x)
    assert len(capture(made, x).operators()) == len(capture(unet().double(), x).operators())


def test_a_network_that_gives_no_map_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (told,) = plan(model, Patchwise(mode="slab", size=4), inputs="2x1x8x8").passes
    assert "only outputs (N, ..., *spatial)" in told.refused[0].why


def test_a_size_that_does_not_run_is_told_with_the_nearest_that_does() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.conv(x), scale_factor=2) + x

    (told,) = plan(Halves(), Patchwise(mode="slab", size=7), inputs="1x1x8x16").passes
    assert "a slab of 8x7 does not run through the model" in told.refused[0].why
    assert "The nearest size that does is 8x8" in told.refused[0].why


def test_inputs_of_several_sizes_are_refused() -> None:
    given = {"image": double(1, 1, 8, 8), "mask": double(1, 1, 4, 4), "vector": double(1, 3)}
    made = SlabForward(TwoInputs().double(), Tiling(mode="slab", size=(4,)))
    with pytest.raises(InputError, match="several sizes"):
        made(**given)
