"""Windows: the results are those of MONAI's sliding window inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from pocketize import measure, plan, rewrite
from pocketize.errors import InputError
from pocketize.graph.capture import find_tensors
from pocketize.passes import Patchwise
from pocketize.passes.tiling.forward import Tiling
from pocketize.passes.tiling.windows import WindowForward, importance, window_starts
from tests.examples import examples
from tests.foreign import foreign_nets
from tests.passes.tiling.nets import DeepSupervision, double, unet


def windowed(model: nn.Module, **options: Any) -> nn.Module:
    size, overlap = options.pop("size"), options.pop("overlap", (0.25,))
    WindowForward(model, Tiling(mode="window", size=size, overlap=overlap, **options)).install()
    return model


def agree(found: Any, expected: Any) -> None:
    for a, b in zip(find_tensors(found), find_tensors(expected), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), (a - b).abs().max()


@settings(max_examples=examples(25), deadline=None)
@given(
    st.tuples(st.integers(3, 20), st.integers(3, 20)),
    st.tuples(st.integers(2, 12), st.integers(2, 12)),
    st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    st.sampled_from(["constant", "gaussian"]),
    st.integers(1, 3),
)
def test_the_result_is_that_of_monais_inferer(
    sizes: tuple[int, int], window: tuple[int, int], overlap: float, weights: str, batch: int
) -> None:
    x = double(2, 1, *sizes)
    model = unet().double()
    with torch.no_grad():
        expected = SlidingWindowInferer(window, 2, overlap, weights)(x, model)
        made = windowed(model, size=window, overlap=(overlap,), weights=weights, batch=batch)
        agree(made(x), expected)


@pytest.mark.slow
def test_outputs_at_several_resolutions_are_monais_too() -> None:
    net = next(n for n in foreign_nets() if n.name == "nnunet_plain_conv_deep_supervision")
    model, x = net.build().double().eval(), double(1, 1, 16, 24, 16)
    with torch.no_grad():
        expected = SlidingWindowInferer((16, 16, 16), 1, 0.5, "gaussian")(x, model)
        made = rewrite(
            model,
            Patchwise(mode="window", size=16, overlap=0.5, weights="gaussian"),
            inputs=x,
        )
        agree(made(x), expected)


@pytest.mark.parametrize("weights", ["constant", "gaussian"])
def test_the_weights_are_monais(weights: str) -> None:
    for window in ((7,), (4, 9), (8, 5, 6)):
        expected = compute_importance_map(window, mode=weights).expand(window)
        assert torch.allclose(importance(window, weights), expected, rtol=1e-6)


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12))
def test_the_windows_lie_where_monais_do(size: int, window: int, step: int) -> None:
    window = min(size, window)
    image, windows, steps = (size, 9), (window, 4), (min(step, window), 3)
    expected = [
        tuple(int(s.start) for s in one) for one in dense_patch_slices(image, windows, steps)
    ]
    assert window_starts(image, windows, steps) == expected


@pytest.mark.slow
def test_the_overlap_may_differ_from_axis_to_axis() -> None:
    x = double(1, 1, 17, 20)
    model = unet().double()
    with torch.no_grad():
        expected = SlidingWindowInferer((8, 8), 1, (0.5, 0.25))(x, model)
        given = Patchwise(mode="window", size=8, overlap=(0.5, 0.25))
        agree(rewrite(model, given, inputs=x)(x), expected)


@pytest.mark.slow
def test_the_plan_tells_windows_and_what_they_cost() -> None:
    text = str(plan(unet(), Patchwise(mode="window", size=8, overlap=0.5), inputs="1x1x16x16"))
    assert "9 windows, 2.25 times the voxels of the volume are computed" in text
    assert "live tensors of the forward of a window peak at" in text


@pytest.mark.slow
def test_gradients_flow_through_the_average() -> None:
    x = double(1, 1, 12, 9)
    model = unet().double().train()
    made = rewrite(model, Patchwise(mode="window", size=6, overlap=0.5), inputs=x)
    y = x.clone().requires_grad_()
    made(y).square().mean().backward()
    expected = x.clone().requires_grad_()
    SlidingWindowInferer((6, 6), 1, 0.5)(expected, model).square().mean().backward()
    agree(y.grad, expected.grad)
    for a, b in zip(made.parameters(), model.parameters(), strict=True):
        if b.grad is not None:
            agree(a.grad, b.grad)


@pytest.mark.slow
def test_labels_need_no_more_than_a_row_of_logits(tmp_path: Path) -> None:
    x = double(1, 1, 96, 16).float()
    many = unet(classes=40)
    plain = rewrite(many, Patchwise(mode="window", size=16, overlap=0.5), inputs=x)
    made = rewrite(many, Patchwise(mode="window", size=16, overlap=0.5, reduce="argmax"), inputs=x)
    with torch.inference_mode():
        assert torch.equal(made(x), plain(x).argmax(1, keepdim=True).to(torch.uint8))
    logits = 40 * 96 * 16 * 4
    peaks = [measure(each, x, "infer", estimate=True).peak for each in (plain, made)]
    assert peaks[0] - peaks[1] > 0.9 * logits


@pytest.mark.slow
def test_outputs_may_lie_in_a_file(tmp_path: Path) -> None:
    x = double(1, 1, 16, 12)
    model = unet().double()
    given = Patchwise(mode="window", size=8, output="disk", folder=str(tmp_path))
    made = rewrite(model, given, inputs=x)
    with torch.inference_mode():
        found = made(x)
        agree(found, SlidingWindowInferer((8, 8))(x, model))
    assert found.untyped_storage().filename is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_containers_are_kept() -> None:
    x = double(1, 1, 16, 12)
    model = DeepSupervision().double().eval()
    made: Any = rewrite(model, Patchwise(mode="window", size=8), inputs=x)
    found = made(x)
    assert found.name == "both"
    assert found.coarse[0].shape == (1, 2, 8, 6)


def test_labels_of_a_network_cannot_be_averaged() -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).argmax(1, keepdim=True)

    (told,) = plan(Labels(), Patchwise(mode="window", size=4), inputs="1x1x8x8").passes
    assert "windows that overlap are averaged" in told.refused[0].why
    assert "reduce='argmax'" in told.refused[0].why


def test_numbers_for_another_rank_are_refused() -> None:
    made = WindowForward(unet(), Tiling(mode="window", size=(4, 4), overlap=(0.1, 0.1, 0.1)))
    with pytest.raises(InputError, match="overlap has 3 numbers and the input 2 spatial axes"):
        made(torch.zeros(1, 1, 8, 8))
