"""The time model: what it counts, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pocketize import measure, rewrite
from pocketize.engine.surgery import apply_edits
from pocketize.memory.hints import is_rehearsal
from pocketize.memory.meter import measure_here
from pocketize.memory.step import Request
from pocketize.memory.work import ConvolutionShape, Operations, Work
from pocketize.passes import Patchwise
from pocketize.passes.fit.time_model import TimeModel, _part
from pocketize.plugin.edits import Convert
from tests.passes.fit.conftest import INPUT, UNet3d

aten = torch.ops.aten
CPU = torch.device("cpu")
_TIME = TimeModel._time


def _work(width: int, size: int) -> Work:
    net = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(width * (size - 2) ** 2, 2))
    work = Work()
    measure_here(Request(net, f"1x1x{size}x{size}", estimate=True), work=work)
    return work


def test_a_step_is_counted_with_its_backward() -> None:
    work = _work(4, 16)
    (forward,) = (c for c in work.convolutions if not c.mask)
    (backward,) = (c for c in work.convolutions if c.mask)
    assert forward.input == backward.input == (1, 1, 16, 16)
    assert backward.mask == (False, True, True)
    products = 2 * (4 * 9 * 14 * 14)  # one multiplication and one addition each
    assert work.flops >= 2 * products
    names = {name.partition(" ")[0] for name in work.others}
    assert {"native_batch_norm", "threshold_backward"} <= names


_slow = pytest.mark.slow


def _tiled(**options: Any) -> nn.Module:
    net = UNet3d()
    tiles = Patchwise(**options, keep="disk", output="disk", progress=False)
    apply_edits(net, [Convert("", tiles.name, tiles.conversion_options())])
    return net


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        pytest.param(UNet3d, "train", id="untouched"),
        pytest.param(partial(_tiled, size=16, train=True), "train", id="tiles", marks=_slow),
        pytest.param(partial(_tiled, size=16), "infer", id="inference", marks=_slow),
    ],
)
def test_what_a_time_is_predicted_from_is_what_a_real_step_runs(
    make: Callable[[], nn.Module], mode: str
) -> None:
    net, works = make(), []
    for estimate in (True, False):
        works.append(Work())
        measure_here(Request(net, INPUT, mode, estimate=estimate), work=works[-1])
    foretold, real = works
    assert foretold.convolutions == real.convolutions
    files = real.others.pop("from_file", Operations())  # mappings, which the moves count
    assert {name: (of.calls, of.nbytes, of.flops) for name, of in foretold.others.items()} == {
        name: (of.calls, of.nbytes, of.flops) for name, of in real.others.items()
    }
    assert foretold.dispatched == real.dispatched - files.calls
    assert foretold.followed == real.followed
    assert foretold.moves == real.moves
    assert foretold.moved == real.moved
    assert foretold.moved["map", False] == files.nbytes


def test_tiles_of_larger_maps_are_apart_from_dense_maps() -> None:
    """Their runs in memory are short, and so they take several times as long."""
    work, whole, tile = Work(), torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 4)
    part = whole[..., 4:8]
    work.note(aten.add.Tensor, (tile, tile), {}, tile)
    work.note(aten.add_.Tensor, (part, tile), {}, part)
    work.note(aten.mul.Tensor, (tile, tile[:, :, :1, :1]), {}, tile)
    assert {name: of.calls for name, of in work.others.items()} == {
        "add": 1,
        "add ss": 1,
        "mul b": 1,
    }
    _, (described, _), _ = work.others["add ss"].example
    assert described.shape == part.shape
    assert described.stride[-2:] == (8 * 4, 1)  # not the 64 of the map, which may be huge


@pytest.fixture
def _real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimeModel, "_time", _TIME)


@pytest.mark.slow
@pytest.mark.usefixtures("_real_clock")
def test_more_work_takes_longer(tmp_path: Path) -> None:
    model = TimeModel(CPU, tmp_path / "times.json")
    little, much = _work(4, 32), _work(64, 128)
    assert 0 < model.seconds(little) < model.seconds(much)


@pytest.mark.usefixtures("_real_clock")
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_are_timed_without_a_crash(kind: Any, tmp_path: Path) -> None:
    """The backward of torch's LSTM on the CPU reads addresses of what its forward left."""
    work = Work()
    request = Request(kind(4, 16), "2x150x4", optimizer="adam", estimate=True)
    measure_here(request, work=work)
    assert TimeModel(CPU, tmp_path / "times.json").seconds(work) > 0


@pytest.mark.usefixtures("_real_clock")
def test_times_are_kept_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TimeModel(CPU, tmp_path / "times.json")
    work = _work(4, 32)
    seconds = first.seconds(work)
    first.save()
    again = TimeModel(CPU, tmp_path / "times.json")
    monkeypatch.setattr(again, "_call", None)  # nothing is timed again
    monkeypatch.setattr(again, "_convolution_call", None)
    assert again.seconds(work) == seconds


def test_tiles_of_about_one_size_are_timed_once() -> None:
    parts = {_part(ConvolutionShape((1, 4, n, 10), (4, 4, 3, 3), "float32", ())) for n in (96, 98)}
    assert [part.input for part in parts] == [(1, 4, 96, 10)]


def test_a_part_of_a_convolution_runs_in_the_same_kernel() -> None:
    """torch takes another kernel where the sizes of the first four axes multiply to less."""
    whole = ConvolutionShape((2, 8, 48, 48, 480), (8, 8, 3, 3, 3), "float32", ())
    part = _part(whole)
    assert part.input[:4] == whole.input[:4]
    assert 8 <= part.input[4] < 240


def test_what_recompute_follows_and_what_moves_takes_time() -> None:
    work = Work()
    lean = rewrite(UNet3d(), "recompute:keep=conv,min_bytes=0", inputs=INPUT)
    measure_here(Request(lean, INPUT, estimate=True), work=work)
    forward = sum(not c.mask for c in work.convolutions.elements())
    assert work.followed > 3 * forward  # every operator, and what is saved
    model = TimeModel(CPU)
    before = model.seconds(work)
    work.followed += 1000
    after = model.seconds(work)
    work.note_move(1 << 20, "disk", away=True)
    assert before < after < model.seconds(work)


@pytest.mark.slow
@pytest.mark.usefixtures("_real_clock")
@pytest.mark.parametrize("away", [False, True])
def test_moves_of_more_bytes_take_longer(tmp_path: Path, away: bool) -> None:
    model, little, much = TimeModel(CPU, tmp_path / "times.json"), Work(), Work()
    little.note_move(1 << 20, "disk", away=away)
    much.note_move(1 << 28, "disk", away=away)
    assert 0 < model.seconds(little) < model.seconds(much)


@pytest.mark.usefixtures("_real_clock")
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"call": "soon"}', '{"call": null}'])
def test_a_broken_file_is_ignored(tmp_path: Path, text: str) -> None:
    file = tmp_path / "times.json"
    file.write_text(text)
    model = TimeModel(CPU, file)
    assert model.seconds(_work(4, 16)) > 0


def test_recomputation_is_in_the_flops_of_a_profile() -> None:
    net = UNet3d()
    lean = rewrite(net, "recompute:keep=level,min_bytes=0", inputs=INPUT)
    before, after = (measure(n, INPUT, estimate=True).flops for n in (net, lean))
    assert 1.1 * before < after < 2 * before


def test_bytes_in_files_are_counted_apart() -> None:
    lean = _tiled(size=16, axis=2, train=True)
    profile = measure(lean, INPUT, estimate=True)
    assert profile.elsewhere > 0
    assert measure(lean, INPUT).elsewhere == profile.elsewhere


class _Leaving(nn.Module):
    """A rehearsal leaves a layer out, as one tile of a map may not read some weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return y if is_rehearsal() else self.last(y)


@pytest.mark.parametrize("tiled", [False, True])
def test_an_estimate_whose_first_step_leaves_out_much_equals_the_measurement(tiled: bool) -> None:
    net, shape = (_tiled(size=8, train=True), INPUT) if tiled else (_Leaving(), "1x1x9x9")
    (estimated, foretold), (measured, real) = (
        (measure_here(Request(net, shape, estimate=estimate), work=work), work)
        for estimate, work in ((True, Work()), (False, Work()))
    )
    assert estimated.categories == measured.categories
    assert estimated.elsewhere == measured.elsewhere
    assert foretold.convolutions == real.convolutions
