"""The thesis' efficiency tables beside ours: whole, by slabs of 16, cascade, and exact tiles.

    python tools/reproduce/patchwise.py
    python tools/reproduce/patchwise.py --volumes brain --rows whole slabs
    python tools/reproduce/patchwise.py --volumes brain --measure 64x64x64 --threads 1

Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023, segmented brain (240x240x155, 4
channels) and liver (512x512x450, 1 channel) volumes with a 3D U-Net on an A40. The zoo's
``patchwise_unet3d`` is that network. Here nothing runs: the live tensors of a forward pass at the
full sizes are counted on tensors without memory. With ``--measure`` volumes of a smaller size run
on this machine, and live tensors and seconds of a forward pass are measured. Neither stage of a
cascade runs on fewer than 16 voxels along an axis.

The thesis kept the autograd graph in inference. So every row is estimated twice: as it was run
there, with gradients enabled and the graph of what is being computed alive (where slabs are cut,
of one slab), and under ``torch.inference_mode``. The thesis' figures are a graphics card's, with
its framework's workspaces, and do not say whether a GB is 10^9 bytes; ours are bytes of tensors,
in GiB, with all that exact tiles keep on the device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from pocketize import measure, rewrite
from pocketize.passes import Cascade, Patchwise
from pocketize.zoo.patchwise import UNet3d

SLAB = 16


@dataclass(frozen=True)
class Volume:
    """What the thesis segments.

    Attributes:
        sizes: of the volume.
        channels: of the image.
        classes: background included.
        scale: of the cascade's first stage.
        paper: peaks as they are printed, by row.
    """

    sizes: tuple[int, int, int]
    channels: int
    classes: int
    scale: float
    paper: dict[str, str]

    def net(self) -> nn.Module:
        return UNet3d(self.channels, self.classes).eval()

    def cascade(self, *passes: Patchwise) -> Cascade:
        inputs = f"1x{self.channels}x96x96x96"
        made = Cascade(self.net(), self.net(), scale=self.scale, passes=passes, inputs=inputs)
        return made.eval()


_PAPER = {
    "brain": {"whole": "21.5 GB", "slabs": "2.9 GB", "cascade": "2.8 GB"},
    "liver": {"whole": ">= 325 GB", "slabs": "10.6 GB", "cascade": "12.4 GB"},
}
VOLUMES = {
    "brain": Volume((240, 240, 155), 4, 4, 0.3, _PAPER["brain"]),
    "liver": Volume((512, 512, 450), 1, 3, 0.2, _PAPER["liver"]),
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


def exact(volume: Volume) -> nn.Module:
    """By tiles of a slab's size, to the whole volume's answer."""
    tiles = Patchwise(mode="exact", size=SLAB, progress=False)
    return rewrite(volume.net(), tiles, inputs=f"1x{volume.channels}x96x96x96")


def slabs(volume: Volume) -> nn.Module:
    tiles = Patchwise(mode="slab", size=SLAB, progress=False)
    return rewrite(volume.net(), tiles, inputs=f"1x{volume.channels}x96x96x96")


#: Row: the network that runs as the thesis ran it, None where it did not, and ours.
ROWS: dict[str, tuple[Callable[[Volume], nn.Module] | None, Callable[[Volume], nn.Module]]] = {
    "whole": (lambda v: Kept(v.net()), Volume.net),
    "slabs": (lambda v: KeptSlabs(v.net(), v.classes), slabs),
    "cascade": (
        lambda v: KeptCascade(v.cascade(), v.classes),
        lambda v: v.cascade(Patchwise(mode="slab", size=SLAB, progress=False)),
    ),
    "exact": (None, exact),
}


def measured(names: list[str], rows: list[str], sizes: tuple[int, ...]) -> str:
    """Run what is asked for, and write the table; times are ratios to the first row's."""
    lines = []
    for name in names:
        volume = VOLUMES[name]
        shape = (volume.channels, *sizes)
        first: dict[int, float] = {}
        for row in tqdm(rows, name, disable=None):
            line = [f"{name} {'x'.join(map(str, shape))}", row]
            for column, make in enumerate(ROWS[row]):
                if make is None:
                    line += ["-", "-"]
                    continue
                x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
                profile = measure(make(volume), x, "infer", time_steps=3)
                assert profile.step_seconds is not None  # time_steps asks for them
                seconds = profile.step_seconds[0]
                ratio = seconds / first.setdefault(column, seconds)
                line += [f"{profile.peak / 2**20:.0f} MiB", f"{seconds:.2f} s, {ratio:.2f}x"]
            lines.append(line)
    headers = ("volume", "run", "graph kept", "", "inference_mode", "")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def peak(net: nn.Module, volume: Volume) -> int:
    """Estimate the peak of a forward pass, in bytes."""
    x = torch.empty(1, volume.channels, *volume.sizes)
    return measure(net, x, "infer", estimate=True).peak


def table(names: list[str], rows: list[str]) -> str:
    """Estimate what is asked for, and write the table; ratios are to its first row."""
    lines = []
    for name in names:
        volume = VOLUMES[name]
        first: list[int] = []
        for row in tqdm(rows, name, disable=None):
            kept, ours = ROWS[row]
            found = [peak(make(volume), volume) if make else 0 for make in (kept, ours)]
            first = first or found
            told = [f"{a / 2**30:.2f} GiB" if a else "-" for a in found]
            ratios = [f"{a / b:.2f}" if a and b else "-" for a, b in zip(found, first, strict=True)]
            sizes = "x".join(map(str, (volume.channels, *volume.sizes)))
            pairs = [text for pair in zip(told, ratios, strict=True) for text in pair]
            lines.append([f"{name} {sizes}", row, volume.paper.get(row, "-"), *pairs])
    headers = ("volume", "run", "thesis, A40", "graph kept", "", "inference_mode", "")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", nargs="+", choices=list(VOLUMES), default=list(VOLUMES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--measure", metavar="HxWxD", help="measure at this size instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
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
