"""The thesis' efficiency tables beside ours: whole, by slabs of 16, cascade, and exact tiles.

    python tools/reproduce/patchwise.py
    python tools/reproduce/patchwise.py --volumes brain --rows whole slabs
    python tools/reproduce/patchwise.py --measure 96x96x96

Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023, segmented brain (240x240x155, 4
channels) and liver (512x512x450, 1 channel) volumes with a 3D U-Net on an A40. The zoo's
``patchwise_unet3d`` is that network. Here nothing runs: the live tensors of a forward pass at the
full sizes are counted on tensors without memory. With ``--measure`` volumes of a smaller size run
on this machine, and live tensors and CPU seconds of a forward pass are measured. Neither stage of a
cascade runs on fewer than 16 voxels along an axis.

The thesis kept the autograd graph in inference. So every row is estimated twice: as it was run
there, with gradients enabled and the graph of what is being computed alive (where slabs are cut,
of one slab), and under ``torch.inference_mode``. Exact tiles run under the latter only. The thesis'
figures are a graphics card's, with its framework's workspaces, and do not say whether a GB is 10^9
bytes; ours are bytes of tensors, in GiB, with all that exact tiles keep on the device, or without
what they keep in files. Ratios are to the first row.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from costs import costs
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from pocketize import measure, plan, rewrite
from pocketize.passes import Cascade, Patchwise
from pocketize.zoo.patchwise import UNet3d

SLAB = 16


@dataclass(frozen=True)
class Printed:
    """What the thesis prints of a run.

    Attributes:
        peak: GB; of what did not run the least that it would take.
        seconds: of inference; None did not run.
    """

    peak: float
    seconds: float | None


@dataclass(frozen=True)
class Volume:
    """What the thesis segments.

    Attributes:
        sizes: of the volume.
        channels: of the image.
        classes: background included.
        scale: of the cascade's first stage.
        paper: what is printed, by row.
    """

    sizes: tuple[int, int, int]
    channels: int
    classes: int
    scale: float
    paper: dict[str, Printed]

    def net(self) -> nn.Module:
        return UNet3d(self.channels, self.classes).eval()

    def tiled(self, tiles: Patchwise) -> nn.Module:
        return rewrite(self.net(), tiles, inputs=f"1x{self.channels}x96x96x96")

    def cascade(self, *passes: Patchwise) -> Cascade:
        inputs = f"1x{self.channels}x96x96x96"
        made = Cascade(self.net(), self.net(), scale=self.scale, passes=passes, inputs=inputs)
        return made.eval()


VOLUMES = {
    "brain": Volume(
        (240, 240, 155),
        channels=4,
        classes=4,
        scale=0.3,
        paper={
            "whole": Printed(21.5, 0.35),
            "slabs": Printed(2.9, 0.67),
            "cascade": Printed(2.8, 0.91),
        },
    ),
    "liver": Volume(
        (512, 512, 450),
        channels=1,
        classes=3,
        scale=0.2,
        paper={
            "whole": Printed(325, None),
            "slabs": Printed(10.6, 4.49),
            "cascade": Printed(12.4, 5.90),
        },
    ),
}


class Kept(nn.Module):
    """A network whose graph is kept while it runs, though the caller wants no gradients."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            y: Tensor = self.net(x)
        return y


class KeptSlabs(nn.Module):
    """Slabs of a volume one after the other; each has a graph, which goes with it."""

    def __init__(self, net: nn.Module, classes: int) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False):
            found = x.new_empty((x.shape[0], self.classes, *x.shape[2:]))
            for start in range(0, x.shape[-1], SLAB):
                slab = x[..., start : start + SLAB]
                short = slab.shape[-1]
                with torch.enable_grad():
                    y = self.net(nn.functional.pad(slab, (0, SLAB - short)))
                found[..., start : start + short] = y.detach()[..., :short]
                del y
        return found


class KeptCascade(nn.Module):
    """A cascade of such slabs, whose first stage had a graph too."""

    def __init__(self, cascade: Cascade, classes: int) -> None:
        super().__init__()
        self.cascade, self.slabs = cascade, KeptSlabs(cascade.stage2, classes)
        cascade.stage1 = Kept(cascade.stage1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            y: Tensor = self.slabs(torch.cat([x, self.cascade.guide(x)], 1))
        return y


SLABS = Patchwise(mode="slab", size=SLAB, progress=False)
TILES = Patchwise(mode="exact", size=SLAB, progress=False)
FILES = Patchwise(mode="exact", size=SLAB, keep="disk", output="disk", progress=False)

#: Row: the network that runs as the thesis ran it, None where it did not, and ours.
ROWS: dict[str, tuple[Callable[[Volume], nn.Module] | None, Callable[[Volume], nn.Module]]] = {
    "whole": (lambda v: Kept(v.net()), Volume.net),
    "slabs": (lambda v: KeptSlabs(v.net(), v.classes), lambda v: v.tiled(SLABS)),
    "cascade": (lambda v: KeptCascade(v.cascade(), v.classes), lambda v: v.cascade(SLABS)),
    "exact": (None, lambda v: v.tiled(TILES)),
    "exact, in files": (None, lambda v: v.tiled(FILES)),
}


def peak(make: Callable[[Volume], nn.Module], volume: Volume) -> int:
    """Estimate the peak of a forward pass, in bytes."""
    x = torch.empty(1, volume.channels, *volume.sizes)
    return measure(make(volume), x, "infer", estimate=True).peak


def peak_beside_files(volume: Volume) -> int:
    """Return the peak of tiles that keep all in files, in bytes: the plan knows what is no memory.

    An estimate on tensors without memory has no files, and counts them as memory.
    """
    with torch.device("meta"):
        net = volume.net()
    sizes = "x".join(map(str, volume.sizes))
    told = str(plan(net, FILES, inputs=f"1x{volume.channels}x{sizes}"))
    found = re.search(r"on the device peak at\s+([\d.]+)\s+(MiB|GiB)", told)
    if found is None:
        raise ValueError(f"the plan tells no peak:\n{told}")
    return round(float(found[1]) * {"MiB": 2**20, "GiB": 2**30}[found[2]])


def table(names: list[str], rows: list[str]) -> str:
    """Estimate what is asked for, and write the table."""
    lines = []
    for name in names:
        volume = VOLUMES[name]
        first: list[int] = []
        for row in tqdm(rows, name, disable=None):
            kept, ours = ROWS[row]
            found = [
                peak(kept, volume) if kept else 0,
                peak_beside_files(volume) if row == "exact, in files" else peak(ours, volume),
            ]
            first = first or found
            cells = [
                f"{a / 2**30:.2f} GiB{_ratio(a, b)}" if a else "-"
                for a, b in zip(found, first, strict=True)
            ]
            lines.append([_shape(name, volume.sizes), row, _printed_peak(volume, row), *cells])
    headers = ("volume", "run", "thesis, A40", "graph kept", "inference_mode")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def measured(names: list[str], rows: list[str], sizes: tuple[int, ...]) -> str:
    """Run what is asked for at a size, and write the table."""
    lines = []
    for name in names:
        volume = VOLUMES[name]
        x = torch.randn(1, volume.channels, *sizes, generator=torch.Generator().manual_seed(0))
        first: dict[int, tuple[int, float]] = {}
        for row in tqdm(rows, name, disable=None):
            cells = []
            for column, make in enumerate(ROWS[row]):
                if make is None:
                    cells += ["-", "-"]
                    continue
                found = costs(make(volume), (x,), times=3)
                to = first.setdefault(column, found)
                cells.append(f"{found[0] / 2**20:.0f} MiB{_ratio(found[0], to[0])}")
                cells.append(f"{found[1]:.2f} s{_ratio(found[1], to[1])}")
            lines.append([_shape(name, sizes), row, _printed_seconds(volume, row), *cells])
    headers = ("volume", "run", "thesis, A40, full size", "graph kept", "", "inference_mode", "")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _ratio(value: float, to: float) -> str:
    return f", {value / to:.2f}x" if to else ""


def _shape(name: str, sizes: tuple[int, ...]) -> str:
    return f"{name} {'x'.join(map(str, (VOLUMES[name].channels, *sizes)))}"


def _printed_peak(volume: Volume, row: str) -> str:
    if row not in volume.paper:
        return "-"
    value, whole = volume.paper[row], volume.paper["whole"]
    if value.seconds is None:
        return f"at least {value.peak:g} GB, did not run"
    ratio = _ratio(value.peak, whole.peak if whole.seconds else 0)
    return f"{value.peak:g} GB{ratio}"


def _printed_seconds(volume: Volume, row: str) -> str:
    value, whole = volume.paper.get(row), volume.paper["whole"]
    if value is None or value.seconds is None:
        return "-"
    return f"{value.seconds:.2f} s{_ratio(value.seconds, whole.seconds or 0)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", nargs="+", choices=list(VOLUMES), default=list(VOLUMES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--measure", metavar="HxWxD", help="measure at this size instead")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        sizes = tuple(map(int, arguments.measure.split("x")))
        sys.stdout.write(measured(arguments.volumes, arguments.rows, sizes) + "\n")
        return 0
    sys.stdout.write(table(arguments.volumes, arguments.rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
