"""A volume that is read and written tile by tile gives what the network gives for the whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from pocketize import rewrite, run_volume
from pocketize.errors import ExecutionError, InputError, OptionError, PocketizeWarning
from pocketize.memory.tracker import LiveTracker
from pocketize.passes import Patchwise
from pocketize.passes.tiling.sinks import SharedSink, Sink
from pocketize.passes.tiling.sources import VolumeSource
from pocketize.passes.tiling.volumes import estimate_volume
from tests.passes.tiling.nets import DeepSupervision, unet

SHAPE = (13, 17, 20)


def volume(*shape: int, seed: int = 0) -> Any:
    """A CT: int16, in Hounsfield units."""
    return (np.random.default_rng(seed).normal(size=shape) * 500).astype(np.int16)


def window(x: Tensor) -> Tensor:
    return (x.clamp(-1000, 400) + 1000) / 1400


def whole(net: nn.Module, values: Any, prepare: Any = window) -> Tensor:
    first = next(net.parameters())
    x = torch.from_numpy(np.asarray(values))
    x = x[None] if x.ndim == first.ndim - 1 else x[None, None]
    with torch.no_grad():
        made: Tensor = net(prepare(x.to(first.dtype)))[0]
    return made


class Strided(nn.Module):
    """Valid convolutions and a stride: the result is smaller than the volume."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, stride=2)
        self.head = nn.Conv3d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.conv(x).relu())
        return made


def _segresnet() -> nn.Module:
    torch.manual_seed(0)
    return SegResNet(3, init_filters=8, out_channels=3, blocks_down=(1, 1), blocks_up=(1,))


class Flipped(nn.Module):
    """Reads its own output again, so that it must be stored before it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.mul_(y.mean((2, 3, 4), keepdim=True))
        return y


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "unet": (lambda: unet(3), SHAPE),
    "unet-2d": (lambda: unet(2, channels=2), (2, 37, 21)),
    "strided": (Strided, (2, *SHAPE)),
    "segresnet": (_segresnet, (12, 16, 20)),
    "flipped": (Flipped, SHAPE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_source_by_tiles_gives_the_whole_volumes_output(name: str) -> None:
    build, shape = NETS[name]
    torch.manual_seed(0)
    net = build().double().eval()
    values = volume(*shape)
    expected = whole(net, values)
    rank = expected.ndim - 1
    for size in (5, (6, 7, 8)[:rank]):
        made = run_volume(net, values, size=size, prepare=window)
        assert made.shape == expected.shape
        assert made.dtype == np.float64
        assert np.abs(made - expected.numpy()).max() < 1e-10 * float(expected.abs().max())
    labels = run_volume(net, values, size=6, axis=0, prepare=window, reduce="argmax", keep="disk")
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, expected.argmax(0).numpy())


@pytest.mark.slow
def test_probabilities_and_half_precision() -> None:
    values, net = volume(*SHAPE), unet(3)
    expected = whole(net, values).softmax(0).numpy()
    made = run_volume(net, values, size=6, prepare=window, reduce="softmax")
    assert made.dtype == np.float16
    assert np.abs(made - expected).max() < 1e-3
    wide = np.zeros(expected.shape, np.float32)
    assert run_volume(net, values, wide, size=6, prepare=window, reduce="softmax") is wide
    assert np.abs(wide - expected).max() < 1e-6
    half = run_volume(unet(3).bfloat16(), values, size=6, prepare=window)
    assert half.dtype == np.float32
    rounded = run_volume(net, values, size=6, prepare=window, keep_dtype="bfloat16")
    assert 0 < np.abs(rounded - whole(net, values).numpy()).max() < 0.1


def test_channels_that_are_independent() -> None:
    values = volume(*SHAPE)
    for classes in (1, 3):
        net = unet(3, classes=classes)
        logits = whole(net, values)
        expected = (logits > 0).numpy().astype(np.uint8)
        made = run_volume(net, values, size=6, prepare=window, reduce="binary")
        assert made.dtype == np.uint8
        assert np.array_equal(made, expected if classes > 1 else expected[0])
        assert 0 < made.mean() < 1
        made = run_volume(net, values, size=6, prepare=window, reduce="sigmoid")
        assert made.dtype == np.float16
        assert np.abs(made - logits.sigmoid().numpy()).max() < 1e-3


def test_labels_of_many_classes_are_uint16() -> None:
    net = nn.Sequential(nn.Conv2d(1, 300, 1)).eval()
    values = volume(9, 8).astype(np.float32)
    expected = whole(net, values, lambda x: x).argmax(0).numpy()
    labels = run_volume(net, values, size=4, reduce="argmax")
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, expected)
    narrow = np.zeros(values.shape, np.uint8)
    with pytest.raises(InputError, match="out has dtype uint8, which does not hold the result"):
        run_volume(net, values, narrow, size=4, reduce="argmax")


@pytest.mark.slow
def test_sources_and_sinks_of_many_kinds(tmp_path: Path) -> None:
    values, net = volume(2, *SHAPE), unet(3, channels=2)
    expected = whole(net, values).argmax(0).numpy()
    np.save(tmp_path / "x.npy", values.astype(">i2"))  # big-endian
    stored = zarr.open_array(
        store=str(tmp_path / "x.zarr"),
        mode="w",
        shape=values.shape,
        chunks=(1, 5, 5, 5),
        dtype="i2",
    )
    stored[:] = values
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = values
        out = file.create_dataset("y", SHAPE, "u1")
        sources: list[Any] = [
            np.load(tmp_path / "x.npy", mmap_mode="r"),
            stored,
            file["x"],
            torch.from_numpy(values),
            [values[0], stored[1]],
        ]
        for source in sources:
            made = run_volume(net, source, size=6, prepare=window, reduce="argmax")
            assert np.array_equal(made, expected)
        sinks: list[Any] = [
            out,
            zarr.open_array(
                store=str(tmp_path / "y.zarr"), mode="w", shape=SHAPE, chunks=(4, 4, 4), dtype="i2"
            ),
            np.memmap(tmp_path / "y", np.uint8, "w+", shape=SHAPE),
            torch.zeros(SHAPE, dtype=torch.uint8),
        ]
        for sink in sinks:
            assert run_volume(net, values, sink, size=6, prepare=window, reduce="argmax") is sink
            assert np.array_equal(np.asarray(sink[:]), expected)


def test_a_sink_is_made_when_its_shape_is_known_and_blocks_are_told() -> None:
    made: list[Any] = []
    told: list[tuple[Any, Any]] = []

    def create(shape: Any, dtype: Any, block: Any) -> Any:
        made.append((shape, dtype, block))
        return np.full(shape, 99, dtype)

    out = run_volume(
        unet(3).double(),
        volume(*SHAPE),
        create,
        size=(6, 99, 7),
        reduce="argmax",
        on_block=lambda index, part: told.append((index, part.copy())),
    )
    assert made == [(SHAPE, np.uint8, (5, 17, 7))]
    assert out.max() <= 2
    again = np.zeros_like(out)
    for index, part in told:
        assert not again[index].any()  # each box once
        again[index] = part + 1
    assert np.array_equal(again - 1, out)
    assert len(told) == 3 * 3


@pytest.mark.slow
def test_nothing_is_read_or_written_as_a_whole() -> None:
    class Watched:
        shape, dtype = (16, 16, 96), np.dtype(np.int16)
        largest = 0

        def __getitem__(self, index: tuple[slice, ...]) -> Any:
            part = volume(*self.shape)[index]
            self.largest = max(self.largest, part.size)
            return part

    source, net = Watched(), unet(3)
    tracker = LiveTracker(torch.device("cpu"), str)
    tracker.enter("forward")
    with tracker:
        run_volume(net, source, size=8, keep="disk", reduce="argmax", prepare=window)
    peak = tracker.finish().peak
    assert source.largest <= 16 * 16 * 12  # a tile with its halo
    estimate = estimate_volume(net, source.shape, size=8, keep="disk", reduce="argmax")
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    # the source's float32 part, and prepare, are not in the estimate
    assert estimate.peak - weights <= peak + 4096 < estimate.peak + 4 * 16 * 16 * 12 * 4
    assert estimate.tiles == 12
    assert estimate.result == 16 * 16 * 96
    assert "12 tiles of 16x16x8 in 2 loops" in str(estimate)


@pytest.mark.slow
def test_tiles_are_found_for_a_peak() -> None:
    net, shape = unet(3), (16, 16, 64)
    found = estimate_volume(net, shape, max_peak="700KiB", keep="disk")
    assert found.peak <= 700 * 1024
    assert found.tiles > 1
    values = volume(*shape)
    made = run_volume(net, values, max_peak="700KiB", keep="disk", prepare=window)
    assert np.abs(made - whole(net, values).numpy()).max() < 1e-5
    with pytest.raises(OptionError, match="no tile keeps the live tensors"):
        run_volume(net, values, max_peak="10KiB", keep="disk")


class NeedsEven(nn.Module):
    """A U-Net whose sizes must be multiples of 4, as most are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.down = nn.Conv3d(4, 4, 3, stride=4, padding=1)
        self.up = nn.ConvTranspose3d(4, 4, 4, stride=4)
        self.norm = nn.InstanceNorm3d(4)
        self.head = nn.Conv3d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        made: Tensor = self.head(torch.cat([self.norm(x), self.up(self.down(x))], 1))
        return made


def test_a_volume_is_padded_to_sizes_that_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, values = NeedsEven().double().eval(), volume(*SHAPE)
    with pytest.raises(InputError, match="runs with pad_to=4, which adds zeros at the end"):
        run_volume(net, values, size=4)
    x = nn.functional.pad(window(torch.from_numpy(values).double()), (0, 0, 0, 3, 0, 3))
    expected = whole(net, x, lambda x: x)[:, :13, :17, :20]
    for more in ({}, {"resume": True, "folder": str(tmp_path)}):
        made = run_volume(net, values, size=(1, 99, 6), pad_to=4, prepare=window, **more)
        assert made.shape == expected.shape
        assert np.abs(made - expected.numpy()).max() < 1e-10
    labels = run_volume(net, values, size=5, pad_to=(4, 4, 8), prepare=window, reduce="argmax")
    assert labels.shape == SHAPE
    assert estimate_volume(net, SHAPE, size=5, pad_to=4).result == 3 * 13 * 17 * 20 * 8
    with pytest.raises(InputError, match="one for each of 3 axes"):
        run_volume(net, values, size=5, pad_to=(4, 4))
    with pytest.raises(InputError, match="padding cannot be cut off"):
        run_volume(Strided().eval(), volume(2, *SHAPE), size=5, pad_to=4)


# -- prepare ---------------------------------------------------------------------------------------


def test_a_prepare_that_looks_beyond_a_voxel_is_refused() -> None:
    net, values = unet(3), volume(*SHAPE)
    values[:, :, :8] = -1000  # air, in which each part looks normalised
    for prepare in (
        lambda x: (x - x.mean()) / (x.std() + 1),
        lambda x: x / x.amax().clamp_min(1),
        lambda x: x + torch.rand_like(x) * 100,
        lambda x: nn.functional.avg_pool3d(x, 3, 1, 1),
    ):
        with pytest.raises(InputError, match="from that voxel alone"):
            run_volume(net, values, size=4, prepare=prepare)
    with pytest.raises(InputError, match=r"same shape, got \[1, 1, 13, 17, 4\] for \[1, 1, 13"):
        run_volume(net, values, size=4, prepare=lambda x: x[..., :4])
    with pytest.raises(InputError, match="same shape, got ndarray"):
        run_volume(net, values, size=4, prepare=lambda x: x.numpy())


def test_a_prepare_that_writes_into_its_argument_is_fine() -> None:
    net, values = unet(3).double(), volume(*SHAPE)
    made = run_volume(
        net, values, size=4, prepare=lambda x: x.clamp_(-1000, 400).add_(1000).div_(9)
    )
    expected = whole(net, values, lambda x: (x.clamp(-1000, 400) + 1000) / 9)
    assert np.abs(made - expected.numpy()).max() < 1e-8


# -- resuming --------------------------------------------------------------------------------------


class Stop(BaseException):
    """Ends a run as Ctrl-C does."""


@pytest.mark.slow
def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketize.passes.tiling.resume.INTERVAL", 0.0)
    net, values = unet(3).double(), volume(*SHAPE)
    expected = whole(net, values).argmax(0).numpy()
    reads, limit = 0, 10**9

    class Source:
        shape, dtype = values.shape, values.dtype

        def __getitem__(self, index: Any) -> Any:
            nonlocal reads
            reads += 1
            if reads > limit:
                raise Stop
            return values[index]

    options: dict[str, Any] = {
        "size": (5, 99, 7),
        "reduce": "argmax",
        "resume": True,
        "folder": str(tmp_path),
        "prepare": window,
    }
    made = run_volume(net, Source(), **options)
    assert np.array_equal(made, expected)
    assert not list(tmp_path.iterdir())
    every, reads, limit = reads, 0, reads - 4
    out = np.full(SHAPE, 9, np.uint8)
    with pytest.raises(Stop):
        run_volume(net, Source(), out, **options)
    assert (out == 9).all()  # it is written at the end
    (state,) = tmp_path.iterdir()
    reads, limit = 0, 10**9
    # another prepare is another volume
    other = run_volume(net, Source(), **{**options, "prepare": lambda x: x / 500})
    assert np.array_equal(other, whole(net, values, lambda x: x / 500).argmax(0).numpy())
    assert list(tmp_path.iterdir()) == [state]
    reads = 0
    assert run_volume(net, Source(), out, **options) is out
    assert np.array_equal(out, expected)
    tiles = 3 * 3
    assert every == 2 * tiles  # once to recognise the volume, and once for the network
    assert reads == tiles + 4
    assert not list(tmp_path.iterdir())


# -- refusals --------------------------------------------------------------------------------------


class WholeMap(nn.Module):
    """Sorts the voxels of the finest map, which no tile can do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        made: Tensor = self.conv(x[:, :1]) + x.flatten(2).sort(-1).values.view_as(x)
        return made


def test_an_operator_that_needs_the_whole_volume_is_refused_unless_allowed() -> None:
    torch.manual_seed(0)
    net, values = WholeMap().double().eval(), volume(*SHAPE)
    with pytest.raises(ExecutionError, match=r"sort.default in the network itself.* allow_whole"):
        run_volume(net, values, size=5)
    wide = nn.Conv3d(2, 2, 9, padding=4)  # its weight is larger than the volume
    narrow = nn.Sequential(nn.Conv3d(1, 2, 3), nn.MaxPool3d(4), wide).eval()
    run_volume(narrow, values[:9, :9], size=5)
    with pytest.warns(PocketizeWarning, match="cannot be computed by tiles"):
        made = run_volume(net, values, size=5, allow_whole=True)
    expected = whole(net, values, lambda x: x)
    assert np.abs(made - expected.numpy()).max() < 1e-9


@pytest.mark.slow
def test_what_does_not_fit_is_refused() -> None:
    net, values = unet(3), volume(*SHAPE)

    def refused(error: type[Exception], text: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=text):
            run_volume(*args, **{"size": 5, **options})

    refused(InputError, r"shape \(13, 17\) does not fit 3 spatial axes", net, values[..., 0])
    refused(InputError, "does not fit 3 spatial axes", net, values[None, None])
    refused(InputError, "has no voxels", net, values[:0])
    refused(InputError, "run on an input of 1x13x13x17x20", net, np.stack([values] * 13))
    refused(InputError, "volumes of one shape", net, [values, values[1:]])
    refused(InputError, "str has no shape, dtype", net, "ct.nii.gz")
    refused(InputError, "no real numbers", net, values.astype(complex))
    refused(InputError, r"out has shape \(13, 17, 21\)", net, values, np.zeros((13, 17, 21)))
    wrong = np.zeros((3, *SHAPE), np.int32)
    refused(InputError, "out has dtype int32", net, values, wrong)
    refused(InputError, "2 spatial|did not run", net, values, size=(5, 5))
    refused(OptionError, "size", net, values, size=None)
    refused(OptionError, "axis", net, values, size=(5, 5, 5), axis=1)
    refused(
        InputError, "reduce is one of argmax, softmax, sigmoid, binary", net, values, reduce="max"
    )
    refused(InputError, "needs 2 to 65536 channels", unet(3, classes=1), values, reduce="argmax")
    refused(ExecutionError, "in training mode", unet(3).train(), values)
    refused(ExecutionError, "meta device", unet(3).to("meta"), values)
    refused(ExecutionError, "returns 2 tensors in a Outputs", DeepSupervision().eval(), values[0])
    program = torch.fx.symbolic_trace(nn.Sequential(nn.Conv3d(1, 2, 3))).eval()
    refused(ExecutionError, "is a program, which may hold for the sizes alone", program, values)
    tiled = rewrite(unet(3), Patchwise(size=8), inputs="1x1x16x16x16")
    refused(ExecutionError, "already runs patch-wise, in mode 'exact'", tiled, values)
    hooked = unet(3)
    hooked.register_forward_hook(lambda *_: None)
    refused(ExecutionError, "has a forward hook", hooked, values)
    mixed = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv1d(1, 1, 1)).eval()
    refused(InputError, "do not tell the number of spatial axes", mixed, values)
    flat = nn.Sequential(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    refused(ExecutionError, "returns 1x4 .*expected one floating-point map", flat, values)


def test_a_source_that_lies_about_its_shape_is_refused() -> None:
    class Short:
        shape, dtype = SHAPE, np.dtype(np.int16)

        def __getitem__(self, index: Any) -> Any:
            return volume(13, 17, 19)[index]

    with pytest.raises(InputError, match=r"returned \(1, 13, 17, \d\) for a box of \(1, 13, 17"):
        run_volume(unet(3), Short(), size=5)


def test_channels_are_told_by_the_number_of_axes() -> None:
    cpu = torch.device("cpu")
    assert VolumeSource(volume(3, 4, 5), 3, cpu, torch.float32).shape == (1, 1, 3, 4, 5)
    assert VolumeSource(volume(3, 4, 5), 2, cpu, torch.float32).shape == (1, 3, 4, 5)
    several = VolumeSource([volume(4, 5), volume(4, 5, seed=1)], 2, cpu, torch.float32)
    assert several.shape == (1, 2, 4, 5)
    part = several.read(((1, 3), (0, 5)))
    assert torch.equal(part[0, 1], torch.from_numpy(volume(4, 5, seed=1)[1:3]).float())


def test_a_sink_where_the_source_is_is_refused(tmp_path: Path) -> None:
    net, values = unet(3), volume(*SHAPE)
    np.save(tmp_path / "x.npy", values)
    again = [np.load(tmp_path / "x.npy", mmap_mode="r+") for _ in range(2)]
    store = str(tmp_path / "x.zarr")
    zarr.open_array(store=store, mode="w", shape=SHAPE, chunks=(4, 4, 4), dtype="i2")
    arrays = [zarr.open_array(store=store, mode="r+") for _ in range(2)]
    both = np.zeros((2, *SHAPE), np.int16)
    pairs = [
        (values, values),
        (values, values[:]),
        again,
        arrays,
        (torch.from_numpy(values), values),
    ]
    for source, out in pairs:
        with pytest.raises(InputError, match="out is where the source is"):
            run_volume(net, source, out, size=5, reduce="argmax")
    run_volume(net, both[0], both[1], size=5, reduce="argmax")


def test_autocast_and_compile_are_as_without_tiles() -> None:
    net, values = unet(3), volume(*SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        expected = whole(net, values)
        made = run_volume(net, values, size=5, prepare=window)
    assert expected.dtype == torch.bfloat16
    assert made.dtype == np.float32
    scale = float(expected.abs().max())
    assert np.abs(made - expected.float().numpy()).max() < 0.02 * scale
    exact = whole(net, values).numpy()
    assert np.abs(made - exact).max() > 1e-4 * scale  # it was rounded
    with torch.inference_mode():
        made = run_volume(torch.compile(net, backend="eager"), values, size=5, prepare=window)
    assert np.abs(made - exact).max() < 1e-5 * scale


def test_a_sink_without_slices_is_refused() -> None:
    with pytest.raises(InputError, match="slice assignment"):
        Sink(object(), SHAPE, np.uint8, channels=False)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 40])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_no_two_processes_write_to_one_chunk_at_the_same_time(ranks: int, chunk: int) -> None:
    size, tiles = 29, 7
    bounds = [size * (tiles * rank // ranks) // tiles for rank in range(ranks + 1)]
    together = np.zeros((2, 5, size), np.int32)

    class Chunked:
        shape, dtype, chunks = (2, 5, size), np.dtype(np.float32), (1, 2, chunk)

        def __init__(self) -> None:
            self.written: list[tuple[int, int]] = []

        def __setitem__(self, index: Any, values: Any) -> None:
            together[index] += 1
            assert (values == np.arange(size)[index[2]]).all()
            self.written.append((index[2].start, index[2].stop))

    at_once: list[set[int]] = []
    sinks = []
    for rank in range(ranks):
        group: Any = SimpleNamespace(rank=rank, size=ranks, gather=lambda value: [value])
        slab = bounds[rank], bounds[rank + 1]
        sink = SharedSink(
            Chunked(), (2, 5, size), np.float32, channels=True, group=group, axis=1, slab=slab
        )
        for start in range(*slab, 2):
            stop = min(start + 2, slab[1])
            part = torch.arange(start, stop).float().expand(1, 2, 5, -1)
            sink.write(((0, 5), (start, stop)), part)
        at_once.append({at // chunk for low, high in sink.out.written for at in range(low, high)})
        sinks.append(sink)
    assert sum(map(len, at_once)) == len(set().union(*at_once))
    for sink in sinks:
        sink.finish()
    assert (together == 1).all()


def test_a_result_on_disk_vanishes_with_the_array() -> None:
    folder = tempfile.mkdtemp()
    made = run_volume(unet(3), volume(*SHAPE), size=5, keep="disk", folder=folder)
    assert made.shape == (3, *SHAPE)
    assert not list(Path(folder).iterdir())
