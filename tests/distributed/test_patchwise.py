"""Two processes that share the tiles of a volume give what one process gives, bit by bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from monai.networks.nets import DynUNet, SegResNet
from torch import Tensor, nn

from pocketize import load, rewrite, save
from pocketize.errors import InputError, OptionError
from pocketize.graph.inputs import Inputs, as_inputs
from pocketize.memory.tracker import LiveTracker
from pocketize.passes import Patchwise
from pocketize.passes.tiling.exact import prepare
from pocketize.passes.tiling.forward import Tiling
from pocketize.passes.tiling.processes import ShardLayout, group_name
from tests.distributed.group import PROCESSES, result_of
from tests.passes.tiling.nets import DeepSupervision, SmallUNet, TwoInputs, double

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

#: Tiles along the first axis, along the last one, along both, and fewer tiles than processes.
TILES = {"first": (6, 99, 99), "last": (99, 99, 7), "both": (99, 8, 9), "one": (99, 99, 99)}
MODES: dict[str, dict[str, Any]] = {
    "slab": {"mode": "slab", "size": 7},
    "slab-batch": {"mode": "slab", "size": 4, "batch": 3},
    "slab-single": {"mode": "slab", "size": 40},
    "window": {"mode": "window", "size": 12, "overlap": 0.5, "weights": "gaussian"},
    "window-batch": {"mode": "window", "size": (12, 14, 8), "overlap": 0.6, "batch": 2},
    "window-single": {"mode": "window", "size": 40},
}


def _dynunet() -> nn.Module:
    torch.manual_seed(0)
    filters = [4, 8, 8]
    return DynUNet(3, 1, 3, [3] * 3, [1, 2, 2], [2] * 2, filters=filters).double().eval()


def _unet() -> nn.Module:
    torch.manual_seed(0)
    return SmallUNet(3).double().eval()


def _group_norms() -> nn.Module:
    torch.manual_seed(0)
    return SegResNet(3, init_filters=8, out_channels=2, blocks_down=(1, 1), blocks_up=(1,)).eval()


class Attention(nn.Module):
    """A whole coarse map mixes, a channel gate and a flip reach across all tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = SmallUNet(3)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Conv3d(3, 3, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Any:
        x = self.unet(x)
        x = x * self.gate(x)
        coarse = nn.functional.avg_pool3d(x, 4)
        mixed = coarse.flatten(2).softmax(-1).view_as(coarse)
        up = nn.functional.interpolate(mixed, x.shape[2:], mode="trilinear")
        return {"main": x + up + x.flip(-1), "coarse": mixed}


def _attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention().double().eval()


#: Each net with the tiles that it is tried with: each kind of net meets shards along either axis.
NETS = {
    "dynunet": (_dynunet, ("first", "last", "both", "one")),
    "attention": (_attention, ("first", "both")),
    "groups": (_group_norms, ("last", "one")),
}


def _volume(net: str) -> Tensor:
    x = double(1, 1, 16, 16, 24)
    return x.float() if net == "groups" else x


def exact() -> dict[str, Any]:
    group = "world" if dist.is_initialized() else None
    made: dict[str, Any] = {}
    for net, (build, names) in NETS.items():
        x = _volume(net)
        for name in names:
            tiled = rewrite(build(), Patchwise(size=TILES[name], group=group), inputs=x)
            with torch.inference_mode():
                made[f"{net}-{name}"] = tiled(x)
    x = _volume("dynunet")
    folder = tempfile.mkdtemp()  # each process has its own
    labels = Patchwise(
        size=(99, 99, 7), reduce="argmax", keep="disk", output="disk", group=group, folder=folder
    )
    with torch.no_grad():
        made["labels"] = rewrite(_dynunet(), labels, inputs=x)(x).clone()
    return made


def parts() -> dict[str, Any]:
    group = "world" if dist.is_initialized() else None
    x = _volume("dynunet")
    made: dict[str, Any] = {}
    for name, options in MODES.items():
        for reduce in (None, "argmax"):
            tiled = rewrite(_unet(), Patchwise(**options, group=group, reduce=reduce), inputs=x)
            with torch.inference_mode():
                made[f"{name}-{reduce}"] = tiled(x)
    torch.manual_seed(0)
    deep, several = DeepSupervision().double().eval(), TwoInputs().double().eval()
    image = double(2, 1, 12, 30)
    given = {"mask": double(2, 1, 12, 30, seed=1), "vector": double(2, 3)}
    for mode in ("slab", "exact"):
        tiling = Patchwise(mode=mode, size=8, group=group)  # type: ignore[arg-type]
        with torch.inference_mode():
            found = rewrite(deep, tiling, inputs=image)(image)
            made[f"{mode}-deep"] = [found.main, *found.coarse]
            tiled = rewrite(several, tiling, inputs=Inputs((image,), given))
            made[f"{mode}-several"] = tiled(image, **given)
    return made


def share() -> dict[str, Any]:
    """Return the most bytes of live tensors of a forward, the input left out."""
    group = "world" if dist.is_initialized() else None
    torch.manual_seed(0)
    net = SmallUNet(3).eval()
    x = torch.randn(1, 1, 16, 16, 384)
    tiled = rewrite(net, Patchwise(size=8, group=group, reduce="argmax"), inputs=x)
    with torch.inference_mode():
        tiled(x)  # recorded
        tracker = LiveTracker(torch.device("cpu"), str)
        tracker.assign("inputs", [x])
        tracker.enter("forward")
        with tracker:
            tiled(x)
    return {"peak": tracker.finish().peak - x.numel() * x.element_size()}


def groups() -> dict[str, Any]:
    """Groups of one process each: by the object, by name, and one that this process is not in."""
    own = [dist.new_group([rank]) for rank in range(PROCESSES)]
    x = _volume("dynunet")
    mine = own[dist.get_rank()]
    tiled = rewrite(_dynunet(), Patchwise(size=7, group=mine), inputs=x)
    with torch.inference_mode():
        made = {"own": tiled(x)}
        strange = rewrite(_dynunet(), Patchwise(size=7, group="no such group"), inputs=x)
        try:
            strange(x)
        except InputError as error:
            made["error"] = str(error)
    made["names"] = [group_name(dist.group.WORLD), group_name(mine) == mine.group_name]
    return made


def different() -> dict[str, Any]:
    """What is said where the processes do not do the same."""
    x = _volume("dynunet")
    if dist.get_rank():
        x = x[..., :16]
    tiled = rewrite(_dynunet(), Patchwise(size=7, group="world"), inputs=_volume("dynunet"))
    made = {}
    with torch.inference_mode():
        try:
            tiled(x)
        except InputError as error:
            made["sizes"] = str(error)
        next(tiled.parameters()).add_(dist.get_rank())
        try:
            tiled(_volume("dynunet"))
        except InputError as error:
            made["weights"] = str(error)
    return made


WORK = {
    "exact": exact,
    "parts": parts,
    "share": share,
    "groups": groups,
    "different": different,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are rounded as in the processes, which have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["exact", "parts"])
def test_processes_that_share_tiles_return_what_one_returns(folder: Path, name: str) -> None:
    alone = WORK[name]()
    for made in result_of(name, folder):
        assert made.keys() == alone.keys()
        for key, expected in alone.items():
            torch.testing.assert_close(made[key], expected, rtol=0, atol=0, msg=key)


def test_each_process_holds_its_share(folder: Path) -> None:
    alone = share()["peak"]
    for made in result_of("share", folder):
        assert made["peak"] < 0.6 * alone


def test_a_group_is_found_by_itself_and_by_its_name(folder: Path) -> None:
    x = _volume("dynunet")
    with torch.inference_mode():
        expected = rewrite(_dynunet(), Patchwise(size=7), inputs=x)(x)
    for made in result_of("groups", folder):
        assert torch.equal(made["own"], expected)
        assert made["names"] == ["world", True]
        assert "no process group named 'no such group'" in made["error"]


def test_processes_that_do_not_do_the_same_are_told(folder: Path) -> None:
    for made in result_of("different", folder):
        assert "rank 0 and rank 1 of the group have different inputs" in made["sizes"]
        assert "24" in made["sizes"]
        assert "16" in made["sizes"]
        assert "different weights" in made["weights"]


def test_without_a_process_group_the_error_says_what_to_call(tmp_path: Path) -> None:
    x = _volume("dynunet")
    made = rewrite(_dynunet(), Patchwise(size=7, group="world"), inputs=x)
    save(made, tmp_path / "net.safetensors")
    for model in (made, load(tmp_path / "net.safetensors", _dynunet)):
        with torch.inference_mode(), pytest.raises(InputError, match="init_process_group"):
            model(x)


def test_groups_are_for_inference_without_resume(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="DistributedDataParallel"):
        Patchwise(size=7, group="world", train=True)
    with pytest.raises(OptionError, match="one process"):
        Patchwise(
            size=7, group="world", resume=True, keep="disk", output="disk", folder=str(tmp_path)
        )


def test_what_is_read_beyond_a_shard_is_stored_and_no_more() -> None:
    torch.manual_seed(0)
    net = SmallUNet(2).eval()
    program = prepare(net, as_inputs(torch.randn(1, 1, 8, 64), net), Tiling(size=(8, 8))).program
    layout = ShardLayout(program, 4)
    assert layout.axis == 1
    for node, owned in layout.owned.items():
        width = node.meta["val"].shape[-1]
        assert [box[1] for box in owned] == [
            (width * rank // 4, width * (rank + 1) // 4) for rank in range(4)
        ]
        if node in program.outputs:
            continue
        for (low, high), (first, last) in zip(
            [box[1] for box in owned],
            [box[1] for box in layout.held[node]],
            strict=True,
        ):
            assert first <= low
            assert last >= high
            assert last - first <= (high - low) + 8
