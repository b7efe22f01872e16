"""The exact forward by tiles as a pass: the whole volume's answer, in the model's own form."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocketize import history, load, measure, plan, rewrite, save
from pocketize.errors import NoEffectWarning
from pocketize.graph.capture import capture, find_tensors, structure_of
from pocketize.passes import Amp, InPlaceNorm, Patchwise, Recompute
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.tiling.exact import ExactForward
from pocketize.passes.tiling.forward import Tiling
from pocketize.plugin.base import Guarantee
from tests.examples import examples
from tests.foreign import foreign_nets
from tests.passes.tiling.nets import DeepSupervision, Outputs, TwoInputs, double, unet

FOREIGN = {net.name: net for net in foreign_nets()}


def infer(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.inference_mode():
        return model(*args, **kwargs)


def agree(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert structure_of(found) == structure_of(expected)
    for a, b in zip(find_tensors(found), find_tensors(expected), strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), (a - b).abs().max()


#: Every mode, every place, and exact tiles, which alone keep something between, in every place.
MODES_AND_PLACES = [
    ("exact", "device"),
    ("exact", "host"),
    ("exact", "disk"),
    ("slab", "host"),
    ("window", "disk"),
]


def tiles_of(model: nn.Module) -> list[Any]:
    """What the forward by tiles has prepared: empty where the model ran whole."""
    forward = wrapping(model, ExactForward)
    assert forward is not None
    return [made.program for made in forward._prepared.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "monai_unet_3d_residual",
        "monai_dynunet_residual_deep_supervision",
        "monai_segresnet",
        "nnunet_plain_conv",
        "nnunet_residual_encoder_deep_supervision",
    ],
)
def test_other_peoples_networks_answer_as_they_do_whole(name: str) -> None:
    torch.manual_seed(0)
    net = FOREIGN[name]
    model, x = net.build().double().eval(), net.inputs().double()
    made = rewrite(model, Patchwise(size=-(-x.shape[-1] // 3), progress=False), inputs=x)
    agree(infer(made, x), infer(model, x))
    assert tiles_of(made)


@pytest.mark.slow
@settings(max_examples=examples(25), deadline=None)
@given(
    st.tuples(st.integers(3, 17), st.integers(3, 17)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(1, 2),
)
def test_any_size_of_volume_and_tile_gives_the_same(
    sizes: tuple[int, int], tile: tuple[int, int], batch: int
) -> None:
    model = unet().double()
    x = double(batch, 1, *sizes)
    expected = infer(model, x)
    ExactForward(model, Tiling(size=tile)).install()
    agree(infer(model, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "tile"), [(0, (4, 16)), (-1, (12, 4))])
def test_a_single_number_cuts_one_axis(axis: int, tile: tuple[int, int]) -> None:
    x = double(1, 1, 12, 16)
    model = unet().double()
    made = rewrite(model, Patchwise(size=4, axis=axis), inputs=x)
    agree(infer(made, x), infer(model, x))
    (program,) = tiles_of(made)
    assert program.tile == tile


@pytest.mark.slow
def test_volumes_in_one_and_three_dimensions_are_cut_as_well() -> None:
    for rank, sizes in ((1, (40,)), (3, (9, 8, 10))):
        x = double(2, 1, *sizes)
        model = unet(rank).double()
        agree(infer(rewrite(model, Patchwise(size=4), inputs=x), x), infer(model, x))


@pytest.mark.slow
def test_the_plan_is_exact_and_tells_what_is_to_be_known() -> None:
    x = double(1, 1, 16, 200)
    planned = plan(unet().double(), Patchwise(size=40), inputs=x)
    (told,) = planned.passes
    assert told.guarantee is Guarantee.EXACT
    text = str(planned)
    # of voxel v the head reads v - 1, whose other half on the grid of stride 2 reads v - 4, or
    # v + 1, whose grid point reads v + 3
    assert "axis 1: 4 before and 3 behind" in text
    assert "axis 0: the whole axis" in text
    assert "statistics of 1 operators are reduced" in text
    assert "instance_norm" in text
    assert "times the voxels of the network are computed" in text
    assert "are kept on the device between tile loops" in text
    assert "both estimated" in text
    assert "gave the whole volume's outputs to" in text
    assert [change.what for change in told.changes] == [
        "runs by tiles of 16x40, with the same outputs"
    ]


@pytest.mark.slow
def test_outputs_keep_their_containers_and_resolutions() -> None:
    x = double(1, 1, 16, 12)
    model = DeepSupervision().double().eval()
    made = rewrite(model, Patchwise(size=5), inputs=x)
    found = infer(made, x)
    assert isinstance(found, Outputs)
    assert found.name == "both"
    agree([found.main, *found.coarse], [infer(model, x).main, *infer(model, x).coarse])


@pytest.mark.slow
def test_a_switch_that_is_turned_between_two_calls_is_seen() -> None:
    x = double(1, 1, 16, 12)
    model = DeepSupervision().double().eval()
    made: Any = rewrite(model, Patchwise(size=5), inputs=x)
    infer(made, x)
    made.supervised = model.supervised = False
    agree(infer(made, x), infer(model, x))


@pytest.mark.slow
def test_several_inputs_of_which_some_are_no_maps() -> None:
    given = {"image": double(2, 1, 9, 14), "mask": double(2, 1, 9, 14, seed=1)}
    given["vector"] = double(2, 3)
    model = TwoInputs().double().eval()
    made = rewrite(model, Patchwise(size=4), inputs=given)
    agree(infer(made, **given), infer(model, **given))


@pytest.mark.slow
def test_weights_that_are_loaded_later_are_the_ones_that_count() -> None:
    x = double(1, 1, 12, 12)
    model = unet().double()
    made = rewrite(model, Patchwise(size=5), inputs=x)
    infer(made, x)
    torch.manual_seed(3)
    other = type(model)().double().eval()
    made.load_state_dict(other.state_dict())
    agree(infer(made, x), infer(other, x))


@pytest.mark.slow
def test_training_and_gradients_go_through_the_volume_as_a_whole() -> None:
    x = double(1, 1, 12, 12)
    model = unet().double()
    made = rewrite(model, Patchwise(size=4), inputs=x)
    for train in (True, False):
        grads = []
        for each in (model, made):
            each.train(train).zero_grad()
            each(x).square().mean().backward()
            grads.append([p.grad.clone() for p in each.parameters() if p.grad is not None])
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)
    assert not tiles_of(made)
    infer(made, x)
    assert tiles_of(made)


@pytest.mark.slow
def test_a_part_of_the_model_in_training_mode_makes_it_run_whole() -> None:
    x = double(1, 1, 12, 12)
    made: Any = rewrite(unet().double(), Patchwise(size=4), inputs=x)
    made.norm.train()
    infer(made, x)
    assert not tiles_of(made)


@pytest.mark.slow
def test_recorders_and_exporters_see_the_network_itself() -> None:
    x = double(1, 1, 12, 12)
    model = unet().double()
    made = rewrite(model, Patchwise(size=4), inputs=x)
    before, after = capture(model, x), capture(made, x)
    assert [n.target for n in before.operators()] == [n.target for n in after.operators()]
    exported = torch.export.export(made, (x,), strict=False)
    agree(exported.module()(x).detach(), infer(model, x))
    assert not tiles_of(made)


@pytest.mark.slow
def test_copies_pickles_and_files_compute_the_same(tmp_path: Path) -> None:
    x = double(1, 1, 12, 12)
    model = unet().double()
    made = rewrite(model, Patchwise(size=5), inputs=x)
    expected = infer(made, x)
    path = tmp_path / "tiled.safetensors"
    save(made, path)
    for twin in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        load(path, lambda: unet().double()),
    ):
        assert not tiles_of(twin)
        agree(infer(twin.eval(), x), expected)
        assert tiles_of(twin)
        assert [record.name for record in history(twin)] == ["patchwise"]
    assert list(made.state_dict()) == list(model.state_dict())


@pytest.mark.slow
def test_a_second_time_has_no_effect_and_says_in_which_mode_it_runs() -> None:
    x = double(1, 1, 12, 12)
    made = rewrite(unet().double(), Patchwise(size=5), inputs=x)
    with pytest.warns(NoEffectWarning, match="already runs patch-wise, in mode 'exact'"):
        rewrite(made, Patchwise(size=3), inputs=x)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["host", "disk"])
def test_what_waits_and_what_is_returned_lies_where_it_is_told_to(
    keep: Any, tmp_path: Path
) -> None:
    x = double(1, 1, 24, 24)
    model = unet().double()
    folder = str(tmp_path) if keep == "disk" else None
    given = Patchwise(size=5, keep=keep, output=keep, folder=folder)
    made = rewrite(model, given, inputs=x)
    found = infer(made, x)
    agree(found, infer(model, x))
    assert list(tmp_path.iterdir()) == []
    assert (found.untyped_storage().filename is not None) == (keep == "disk")


@pytest.mark.slow
def test_an_input_in_a_memory_map_is_read_part_by_part(tmp_path: Path) -> None:
    x = double(1, 1, 12, 20)
    file = np.memmap(tmp_path / "volume", dtype=np.float64, mode="w+", shape=tuple(x.shape))
    file[:] = x.numpy()
    model = unet().double()
    made = rewrite(model, Patchwise(size=6), inputs=x)
    agree(infer(made, torch.from_numpy(file)), infer(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["device", "disk"])
def test_labels_take_the_place_of_logits(keep: Any) -> None:
    x = double(1, 1, 16, 16)
    model = unet().double()
    made = rewrite(model, Patchwise(size=5, reduce="argmax", output=keep), inputs=x)
    found = infer(made, x)
    assert found.dtype == torch.uint8
    assert torch.equal(found, infer(model, x).argmax(1, keepdim=True).to(torch.uint8))
    assert made(x).shape == model(x).shape  # with gradients there is nothing to reduce


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "place"), MODES_AND_PLACES)
def test_channels_last_volumes_and_networks_give_channels_last(mode: str, place: str) -> None:
    x = double(1, 3, 12, 16).contiguous(memory_format=torch.channels_last)
    model = unet(channels=3).double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    keep = {"keep": place} if mode == "exact" else {}
    made = rewrite(model, Patchwise(mode=mode, size=8, output=place, **keep), inputs=x)  # type: ignore[arg-type]
    found, expected = infer(made, x), infer(model, x)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    if mode != "window":  # the mean of windows is taken in torch's own layout
        assert found.is_contiguous(memory_format=torch.channels_last)
    if mode == "exact":
        agree(found, expected)
    else:
        plain = x.contiguous()
        agree(found, infer(made, plain))


@pytest.mark.slow
def test_under_autocast_tiles_compute_what_the_whole_does() -> None:
    x = double(1, 1, 16, 16).float()
    model = unet()
    made = rewrite(model, Patchwise(size=5), inputs=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = infer(made, x), infer(model, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=0.05)
    plain = infer(made, x)  # a recording of its own
    assert plain.dtype == torch.float32
    agree(plain, infer(model, x), 1e-4)


@pytest.mark.slow
def test_mixed_precision_comes_first_and_is_kept() -> None:
    x = double(1, 1, 16, 16).float()
    model = rewrite(unet(), Amp(), inputs=x)
    made = rewrite(unet(), Amp(), Patchwise(size=5), inputs=x)
    found, expected = infer(made, x), infer(model, x)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.allclose(found, expected, atol=0.05)
    assert not torch.equal(expected, infer(unet(), x))


@pytest.mark.slow
def test_hooks_of_the_model_itself_run_once_and_around_the_tiles() -> None:
    x = double(1, 1, 12, 12)
    made = rewrite(unet().double(), Patchwise(size=5), inputs=x)
    seen: list[tuple[int, ...]] = []
    made.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    infer(made, x)
    assert seen == [(1, 3, 12, 12)]


@pytest.mark.slow
def test_the_peak_that_is_foretold_is_the_one_that_is_measured() -> None:
    x = double(1, 1, 32, 128).float()
    model = unet()
    made = rewrite(model, Patchwise(size=16), inputs=x)
    infer(made, x)
    forward = wrapping(made, ExactForward)
    assert forward is not None
    peak = measure(made, x, "infer", estimate=True).peak
    text = str(plan(model, Patchwise(size=16), inputs=x))
    whole = measure(model, x, "infer", estimate=True).peak
    assert peak < whole
    foretold = _bytes_after(text, "live tensors on the device peak at ")
    assert foretold == pytest.approx(peak, rel=0.02)


def _bytes_after(text: str, start: str) -> float:
    from pocketize.units import quantity

    number, unit = text.partition(start)[2].split()[:2]
    found = quantity(f"{number} {unit.rstrip(',')}", "bytes")
    assert found is not None
    return found


@pytest.mark.slow
def test_labels_of_a_tiled_model_are_what_a_tensor_subclass_gives_as_well() -> None:
    class Dressed(Tensor):
        pass

    x = double(1, 1, 12, 12)
    model = unet().double()
    made = rewrite(model, Patchwise(size=5), inputs=x)
    agree(infer(made, x.as_subclass(Dressed)).as_subclass(Tensor), infer(model, x))


@pytest.mark.slow
def test_small_maps_that_are_split_and_dropouts_are_followed() -> None:
    class Modulated(nn.Module):
        """A convolution scaled and shifted by halves of a map without extent."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.film = nn.Conv2d(4, 8, 1)
            self.dropout = nn.Dropout2d(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.dropout(self.conv(x))
            scale, shift = self.film(x.mean((2, 3), keepdim=True)).chunk(2, 1)
            first, second = (x * scale + shift).split([3, 1], 1)
            return torch.cat([second, first], 1)

    x = double(2, 1, 10, 14)
    model = Modulated().double().eval()
    made = rewrite(model, Patchwise(size=4), inputs=x)
    agree(infer(made, x), infer(model, x))
    assert tiles_of(made)


@pytest.mark.slow
def test_weights_that_the_forward_computes_are_kept_while_they_serve() -> None:
    x = double(1, 1, 10, 14)
    model = unet().double()
    nn.utils.parametrizations.weight_norm(model.first)
    nn.utils.parametrizations.spectral_norm(model.head)
    model.eval()
    agree(infer(rewrite(model, Patchwise(size=4), inputs=x), x), infer(model, x))


@pytest.mark.slow
def test_in_place_norms_and_recomputation_come_first() -> None:
    net = FOREIGN["nnunet_plain_conv"]
    model, x = net.build().double().eval(), net.inputs().double()
    for other in (InPlaceNorm(), Recompute(min_bytes=0)):
        made = rewrite(model, other, Patchwise(size=5), inputs=x).eval()
        agree(infer(made, x), infer(model, x))
        assert tiles_of(made)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "place"), MODES_AND_PLACES)
def test_an_estimate_counts_what_is_measured_wherever_things_are_kept(
    mode: str, place: str
) -> None:
    x = torch.randn(1, 1, 16, 64)
    keep = {"keep": place} if mode == "exact" else {}
    made = rewrite(unet(), Patchwise(mode=mode, size=16, output=place, **keep), inputs=x)  # type: ignore[arg-type]
    measured = measure(made, x, "infer").peak
    assert measure(made, x, "infer", estimate=True).peak == measured
