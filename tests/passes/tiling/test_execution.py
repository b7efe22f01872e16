"""Whole networks, part by part: the same outputs, whatever is tiled, kept and freed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn

from pocketize.errors import InputError
from pocketize.graph.capture import capture, find_tensors
from pocketize.graph.inputs import as_inputs
from pocketize.memory.tracker import LiveTracker
from pocketize.passes.tiling import storage
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.program import Program, TileLoop, build_program
from pocketize.passes.tiling.storage import Storage
from pocketize.passes.tiling.tiled_graph import TiledGraph, TilingError, simplify
from tests.examples import examples
from tests.foreign import foreign_nets


def tiled(
    model: nn.Module, x: Tensor, tile: Sequence[int], *, keeper: Storage | None = None, **more: Any
) -> tuple[list[Tensor], Program]:
    traced = capture(model, x)
    simplify(traced.graph)
    program = build_program(TiledGraph(traced), tile)
    (node,) = [n for n in traced.graph.nodes if n.op == "placeholder"]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    storage = keeper or Storage("device", x.device)
    execution = Execution(
        program=program, tensors=tensors, inputs={node: x}, storage=storage, **more
    )
    with torch.no_grad():
        made = execution.run()
    return [made[n] for n in traced.outputs()], program


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return find_tensors(as_inputs(x, model).call(model.eval()))


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), (a - b).abs().max()


NETS = {net.name: net for net in foreign_nets() if "slow" not in net.tags}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_other_peoples_networks_give_the_whole_volumes_answer(name: str) -> None:
    net = NETS[name]
    torch.manual_seed(0)
    model, x = net.build().double().eval(), net.inputs().double()
    sizes = x.shape[2:]
    for tile in ((*sizes[:-1], -(-sizes[-1] // 4)), tuple(-(-size // 3) for size in sizes)):
        found, program = tiled(model, x, tile)
        agree(found, outputs(model, x))
        assert any(isinstance(step, TileLoop) for step in program.steps)


def _peak(run: Any, model: nn.Module, x: Tensor) -> int:
    """Live bytes at the peak of a forward, without weights and without files that are mapped."""
    held = [*model.parameters(), *model.buffers()]
    tracker = LiveTracker(torch.device("cpu"), str)
    tracker.assign("parameters", held)
    tracker.assign("inputs", [x])
    with torch.inference_mode(), tracker:
        tracker.enter("forward")
        run()
    return tracker.finish().peak - sum(t.numel() * t.element_size() for t in held)


class Argmax(nn.Module):
    """What a user would do with the logits, so that both sides end in the same labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return labels(self.model(x))


def labels(logits: Tensor) -> Tensor:
    return logits.argmax(1, keepdim=True).to(torch.uint8)


LARGE: dict[str, Any] = {
    "PlainConvUNet": lambda: PlainConvUNet(
        1,
        3,
        [8, 16, 32],
        nn.Conv3d,
        3,
        [1, 2, 2],
        2,
        3,
        2,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
    ),
    "DynUNet": lambda: DynUNet(3, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]),
    "SegResNet": lambda: SegResNet(3, 8, 1, 3),
    "UNet": lambda: UNet(3, 1, 3, (8, 16, 32), (2, 2), num_res_units=2),
}


def _tiled_peak(model: nn.Module, x: Tensor, length: int) -> int:
    traced = capture(model, x)
    program = build_program(TiledGraph(traced), (*x.shape[2:-1], length))
    (node,) = [n for n in traced.graph.nodes if n.op == "placeholder"]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    disk = Storage("disk", x.device)

    def run() -> None:
        Execution(
            program=program, tensors=tensors, inputs={node: x}, storage=disk, finish=labels
        ).run()

    return _peak(run, model, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_four_slabs_take_less_than_a_third_of_the_whole_volumes_peak(name: str) -> None:
    model, x = LARGE[name]().eval(), torch.randn(1, 1, 16, 16, 128)
    whole = Argmax(model)
    kept = x.numel() * x.element_size()
    part = _tiled_peak(model, x, 32) - kept
    assert part < (_peak(lambda: whole(x), model, x) - kept) / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_peak_does_not_grow_with_the_volume(name: str) -> None:
    model = LARGE[name]().eval()
    peaks = []
    for length in (512, 2048):
        x = torch.randn(1, 1, 8, 8, length)
        peaks.append(_tiled_peak(model, x, 32) - x.numel() * x.element_size())
    assert peaks[1] < 1.1 * peaks[0]  # which tile has the peak varies a little


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_it_does_not_matter_where_maps_are_kept(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LARGE["DynUNet"]().double().eval()
    x = torch.randn(2, 1, 8, 12, 20, dtype=torch.float64)
    keeper = Storage(place, x.device, folder=str(tmp_path))
    found, _ = tiled(model, x, (8, 12, 5), keeper=keeper)
    agree(found, outputs(model, x))
    assert list(tmp_path.iterdir()) == []


def test_maps_may_be_kept_in_half_precision() -> None:
    torch.manual_seed(0)
    model = LARGE["DynUNet"]().eval()
    x = torch.randn(1, 1, 8, 12, 20)
    keeper = Storage("host", x.device, dtype=torch.float16)
    (found,), _ = tiled(model, x, (8, 12, 5), keeper=keeper, outputs=Storage("host", x.device))
    (expected,) = outputs(model, x)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_labels_are_stored_instead_of_logits() -> None:
    torch.manual_seed(0)
    model = LARGE["SegResNet"]().double().eval()
    x = torch.randn(1, 1, 8, 8, 16, dtype=torch.float64)
    (found,), _ = tiled(model, x, (8, 8, 4), finish=labels)
    (expected,) = outputs(model, x)
    assert found.dtype == torch.uint8
    assert torch.equal(found, labels(expected))


class WritesIntoAPart(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :1].relu_()
        return y + 1


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (WritesIntoAPart(), "writes into a part of a tensor that is read again later"),
        (Branch(), "a branch of the forward depends on values"),
        (nn.Flatten(1), "no input has spatial axes"),
    ],
    ids=["part", "branch", "flat"],
)
def test_networks_that_cannot_be_told_part_by_part_are_refused(
    model: nn.Module, words: str
) -> None:
    x = torch.randn(1, 2) if "axes" in words else torch.randn(1, 2, 8, 8)
    with pytest.raises(TilingError, match=words):
        tiled(model, x, (4, 4))


def test_every_place_is_computed_once_but_for_halos() -> None:
    """A network of local operators without skips: one sweep, and nothing but outputs stored."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    found, program = tiled(model.double().eval(), x, (8, 32))
    agree(found, outputs(model, x))
    (sweep,) = program.steps
    assert isinstance(sweep, TileLoop)
    assert sweep.counts == (4, 1)
    assert len(sweep.targets) == 1


@pytest.mark.slow
@settings(max_examples=examples(25), deadline=None)
@given(st.integers(5, 21), st.integers(5, 17), st.integers(1, 25), st.integers(1, 20))
def test_any_size_and_any_tile(height: int, width: int, rows: int, columns: int) -> None:
    torch.manual_seed(height * width)
    model = _Odd().double().eval()
    x = torch.randn(1, 1, height, width, dtype=torch.float64)
    found, _ = tiled(model, x, (rows, columns))
    agree(found, outputs(model, x))


class _Odd(nn.Module):
    """Sizes that do not divide, a gate, two outputs of different resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.gate = nn.Conv2d(6, 6, 1)
        self.group = nn.GroupNorm(2, 6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head, self.coarse = nn.Conv2d(8, 2, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skip = F.leaky_relu(self.norm(self.a(x)))
        deep = self.group(self.down(skip))
        deep = deep * self.gate(F.adaptive_avg_pool2d(deep, 1)).sigmoid()
        up = self.up(deep)[:, :, : skip.shape[2], : skip.shape[3]]
        return {"fine": self.head(torch.cat([skip, up], 1)), "coarse": self.coarse(deep)}


class CutUp(nn.Module):
    """Pieces of a map: of a large one, of a small one, and of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.film = nn.Linear(4, 8)
        self.down = nn.Conv2d(4, 8, 3, stride=8, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        small, other = self.down(left).chunk(2, 1)
        scale, shift = self.film((small * other).mean((2, 3))).chunk(2, 1)
        return self.b(right * scale[..., None, None] + shift[..., None, None])


@pytest.mark.parametrize("tile", [(4, 32), (16, 16), (32, 32)])
def test_pieces_of_maps_and_of_vectors(tile: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, x = CutUp().double().eval(), torch.randn(2, 1, 32, 32, dtype=torch.float64)
    found, _ = tiled(model, x, tile)
    agree(found, outputs(model, x))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_file_whose_filling_stops_does_not_stay(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise error

    monkeypatch.setattr(storage, "_fill", stop)
    disk = Storage("disk", torch.device("cpu"), folder=str(tmp_path))
    told = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(told):
        disk.allocate((1 << 20,), torch.float32)
    assert not list(tmp_path.iterdir())
