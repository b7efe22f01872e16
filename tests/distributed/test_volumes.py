"""Two processes write their tiles to one array, which no process holds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
import zarr
from torch import Tensor

from pocketize import run_volume
from pocketize.cli import main
from pocketize.errors import InputError
from tests.distributed.group import PROCESSES, result_of
from tests.passes.tiling.nets import unet
from tests.passes.tiling.test_volumes import Flipped

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

SHAPE = (12, 13, 22)
#: Tiles and chunks that do not fit, along either axis; a chunk larger than what a process has.
CASES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "last": ((99, 99, 5), (5, 5, 5)),
    "first": ((3, 7, 99), (5, 13, 4)),
    "large": ((99, 99, 4), (12, 13, 22)),
}


def build() -> Any:
    return unet(3).double()


def _volume() -> Any:
    return (np.random.default_rng(0).normal(size=SHAPE) * 500).astype(np.int16)


def _prepare(x: Tensor) -> Tensor:
    return x / 500


def _folder() -> str:
    """A folder that all processes know."""
    told = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    return str(told[0])


def _zarr(path: str, shape: Any, chunks: Any, dtype: str) -> Any:
    if dist.get_rank() == 0:
        zarr.open_array(store=path, mode="w", shape=shape, chunks=chunks, dtype=dtype)
    dist.barrier()
    return zarr.open_array(store=path, mode="r+")


def volumes() -> dict[str, Any]:
    folder, made = _folder(), {}
    options: dict[str, Any] = {"prepare": _prepare, "group": "world"}
    for name, (size, chunks) in CASES.items():
        out = _zarr(f"{folder}/{name}.zarr", SHAPE, chunks, "u1")
        voxels = []
        run_volume(
            build(),
            _volume(),
            out,
            size=size,
            reduce="argmax",
            on_block=lambda _, part, voxels=voxels: voxels.append(part.size),
            **options,
        )
        made[name] = torch.from_numpy(out[:])
        made[f"{name}-written"] = torch.tensor(sum(voxels))
    out = _zarr(f"{folder}/logits.zarr", (3, *SHAPE), (2, 5, 5, 5), "f8")
    run_volume(build(), _volume(), out, size=5, **options)
    made["logits"] = torch.from_numpy(out[:])
    padded = _zarr(f"{folder}/padded.zarr", SHAPE, (5, 5, 5), "u1")
    run_volume(build(), _volume(), padded, size=(2, 9, 9), pad_to=16, reduce="argmax", **options)
    made["padded"] = torch.from_numpy(padded[:])
    torch.manual_seed(0)
    net = Flipped().double().eval()  # its output is read again, and written by one process
    out = _zarr(f"{folder}/again.zarr", (3, *SHAPE), (2, 5, 5, 5), "f8")
    run_volume(net, _volume(), out, size=5, **options)
    made["again"] = torch.from_numpy(out[:])
    if dist.get_rank() == 0:
        np.lib.format.open_memmap(f"{folder}/x.npy", "w+", "u1", SHAPE).flush()
    dist.barrier()
    mapped = np.load(f"{folder}/x.npy", mmap_mode="r+")
    run_volume(build(), _volume(), mapped, size=5, reduce="argmax", **options)
    made["mapped"] = torch.from_numpy(np.load(f"{folder}/x.npy"))
    made["errors"] = []
    file = h5py.File(f"{folder}/{dist.get_rank()}.h5", "w")
    hdf = file.create_dataset("y", SHAPE, "u1", chunks=(4, 4, 4))
    for wrong in (None, np.zeros(SHAPE, np.uint8), hdf, np.load(f"{folder}/x.npy", mmap_mode="c")):
        with pytest.raises(InputError) as raised:
            run_volume(build(), _volume(), wrong, size=5, reduce="argmax", **options)
        made["errors"].append(str(raised.value))
    return made


def command() -> dict[str, Any]:
    """The command, as torchrun would start it; then again, over what is there."""
    folder = _folder()
    np.save(f"{folder}/in{dist.get_rank()}.npy", _volume())
    words = ["run", "tests.distributed.test_volumes:build", f"{folder}/in{dist.get_rank()}.npy"]
    words += ["-o", f"{folder}/out.zarr", "--size", "5", "--argmax", "--normalise", "0", "500"]
    os.environ["WORLD_SIZE"] = str(PROCESSES)
    try:
        codes = [main(words)]
        dist.barrier()
        made = torch.from_numpy(zarr.open(f"{folder}/out.zarr", mode="r")[:])
        codes += [main(words), main([*words[:-1], "1", "--force"])]
    finally:
        del os.environ["WORLD_SIZE"]
    dist.barrier()
    return {"codes": codes, "labels": made, "names": sorted(os.listdir(folder))}


WORK = {"volumes": volumes, "volume-command": command}


def _expected(net: Any = None, *pads: int) -> Tensor:
    x = torch.from_numpy(_volume())[None, None].double() / 500
    x = torch.nn.functional.pad(x, pads)
    with torch.no_grad():
        made: Tensor = (net or build())(x)[0]
    return made


def test_processes_write_one_array(folder: Path) -> None:
    results = result_of("volumes", folder)
    labels = _expected().argmax(0)
    for name in CASES:
        assert all(torch.equal(each[name], labels) for each in results)
        written = [int(each[f"{name}-written"]) for each in results]
        assert sum(written) == labels.numel()
        assert min(written) > 0
    torch.manual_seed(0)
    again = _expected(Flipped().double().eval())
    padded = _expected(None, 0, 10, 0, 3, 0, 4).argmax(0)[:12, :13, :22]
    for each in results:
        assert torch.allclose(each["logits"], _expected(), atol=1e-10)
        assert torch.allclose(each["again"], again, atol=1e-8)
        assert torch.equal(each["mapped"], labels)
        assert torch.equal(each["padded"], padded)


def test_what_processes_cannot_write_together_is_refused(folder: Path) -> None:
    for each in result_of("volumes", folder):
        assert len(each["errors"]) == 4
        assert all("open the same zarr array in each process" in text for text in each["errors"])
        assert "h5py._hl.dataset.Dataset together" in each["errors"][2]


def test_torchrun_starts_the_command(folder: Path) -> None:
    for each in result_of("volume-command", folder):
        assert each["codes"] == [0, 2, 0]
        assert torch.equal(each["labels"], _expected().argmax(0))
        assert each["names"] == ["in0.npy", "in1.npy", "out.zarr"]
