"""What runs a volume in each row of the comparison, and the networks that it is run through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import monai.networks.nets as monai
import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.passes import Patchwise
from tools.bench.memory_nets import NETS

__all__ = ["SUBJECTS", "WAYS", "Sliding", "Subject", "Way", "Whole"]

Size = tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A network.

    Attributes:
        title: what the table calls it.
        build: makes it.
        multiple: its volumes are multiples of this along every axis.
        classes: its output channels.
    """

    title: str
    build: Callable[[], nn.Module]
    multiple: int
    classes: int = 2

    def whole(self, sizes: Size) -> nn.Module:
        """Return the network for a volume that may have to be padded first."""
        net = self.build().eval()
        fits = all(size % self.multiple == 0 for size in sizes)
        return net if fits else Whole(net, self.multiple).eval()


class Whole(nn.Module):
    """A network that takes volumes of any size: zeros behind them, cut off again from the output.

    Args:
        net: the network.
        multiple: what it takes is a multiple of this along every axis.
    """

    def __init__(self, net: nn.Module, multiple: int) -> None:
        super().__init__()
        self.net, self.multiple = net, multiple

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.shape[2:]
        pads = [pad for size in reversed(sizes) for pad in (0, -size % self.multiple)]
        y: Tensor = self.net(F.pad(x, pads))
        return y[(..., *(slice(size) for size in sizes))]


class Sliding(nn.Module):
    """MONAI's ``SlidingWindowInferer`` around a network.

    The weights of a window are computed once, beforehand, as ``cache_roi_weight_map=True`` does:
    otherwise it asks for values, which an estimate does not have.

    Args:
        net: the network.
        tile: size of a window.
        options: of the inferer.
    """

    weights: Tensor

    def __init__(self, net: nn.Module, tile: Size, **options: Any) -> None:
        super().__init__()
        self.net, self.tile, self.options = net, tile, options
        made = compute_importance_map(tile, mode=options["mode"], sigma_scale=0.125).float()
        self.register_buffer("weights", made.expand(tile).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # made anew each time: it would take no part in a copy of this module
        inferer = SlidingWindowInferer(self.tile, 1, progress=False, **self.options)
        inferer.roi_weight_map = self.weights
        y: Tensor = inferer(x, self.net)
        return y


@dataclass(frozen=True)
class Way:
    """One row.

    Attributes:
        title: what the table calls it.
        prepare: takes the network, the volume's and the tile's sizes, returns what runs a volume.
        exact: options of exact tiles; empty where something else runs.
        thin: tiles are cut this often once more, along the last axis.
        windows: the network sees windows, not the volume.
        labels: labels come out instead of logits.
        counted: live tensors are counted, nothing else: what is stitched is not there.
        note: what the reader must know.
    """

    title: str
    prepare: Callable[[Subject, Size, Size], nn.Module]
    exact: dict[str, Any] = field(default_factory=dict)
    thin: int = 1
    windows: bool = False
    labels: bool = False
    counted: bool = False
    note: str = ""

    def tile(self, tile: Size) -> Size:
        """Return the size of this row's tiles, from the one that is asked for."""
        return (*tile[:-1], -(-tile[-1] // self.thin))


def _sliding(title: str, *, note: str = "", **options: Any) -> Way:
    return Way(
        title,
        lambda subject, sizes, tile: Sliding(subject.build().eval(), tile, **options).eval(),
        windows=True,
        counted=options.get("device") == "meta",
        note=note,
    )


def _windows(title: str, **options: Any) -> Way:
    def prepare(subject: Subject, sizes: Size, tile: Size) -> nn.Module:
        made = Patchwise(mode="window", size=tile, progress=False, **options)
        return rewrite(subject.build().eval(), made, inputs=_example(tile), inplace=True)

    return Way(title, prepare, windows=True, labels="reduce" in options)


def _exact(title: str, *, thin: int = 1, **options: Any) -> Way:
    def prepare(subject: Subject, sizes: Size, tile: Size) -> nn.Module:
        made = Patchwise(mode="exact", size=tile, progress=False, **options)
        return rewrite(subject.whole(sizes), made, inputs=_example(sizes), inplace=True)

    return Way(title, prepare, exact=options, thin=thin, labels="reduce" in options)


def _example(sizes: Sequence[int]) -> Tensor:
    return torch.zeros(1, 1, *sizes)


_PLAIN = {"overlap": 0.25, "mode": "constant"}
_GAUSSIAN = {"overlap": 0.5, "mode": "gaussian"}
#: ``device="meta"`` takes what is stitched and has no memory: what is left is the network's share.
_ELSEWHERE = {**_GAUSSIAN, "device": "meta"}
_BUFFERED = {"buffer_steps": 1, "buffer_dim": -1}
_SHARE = "what is stitched is elsewhere and not counted"

WAYS = {
    "whole": Way("whole", lambda subject, sizes, tile: subject.whole(sizes)),
    "monai": _sliding("MONAI, 0.25 constant", **_PLAIN),
    "monai-gauss": _sliding("MONAI, 0.5 Gaussian", **_GAUSSIAN),
    "monai-buffer": _sliding("MONAI, 0.5 Gaussian, buffered", **_GAUSSIAN, **_BUFFERED),
    "monai-away": _sliding("MONAI, 0.5 Gaussian, device=another", note=_SHARE, **_ELSEWHERE),
    "monai-buffer-away": _sliding(
        "MONAI, 0.5 Gaussian, buffered, device=another", note=_SHARE, **_ELSEWHERE, **_BUFFERED
    ),
    "window": _windows("Patchwise window, 0.25 constant", overlap=0.25),
    "window-gauss": _windows("Patchwise window, 0.5 Gaussian", overlap=0.5, weights="gaussian"),
    "window-argmax": _windows(
        "Patchwise window, 0.5 Gaussian, argmax",
        overlap=0.5,
        weights="gaussian",
        reduce="argmax",
    ),
    "exact": _exact("Patchwise exact", keep="device", output="device"),
    "exact-disk": _exact("Patchwise exact, on disk", keep="disk", output="disk"),
    "exact-thin": _exact(
        "Patchwise exact, on disk, tiles a quarter as long", thin=4, keep="disk", output="disk"
    ),
    "exact-argmax": _exact(
        "Patchwise exact, on disk, argmax", keep="disk", output="disk", reduce="argmax"
    ),
}
"""By the name that the command line takes, in the order of the table."""


def _segresnet() -> nn.Module:
    return monai.SegResNet(
        spatial_dims=3, in_channels=1, out_channels=2, init_filters=32, blocks_down=(1, 2, 2, 4)
    )


def _many(levels: int, classes: int) -> nn.Module:
    net: Any = NETS["plainconv" if levels == 4 else "plainconv6"].build()
    heads = net.decoder.seg_layers
    heads[-1] = nn.Conv3d(heads[-1].in_channels, classes, 1)
    return net  # type: ignore[no-any-return]


SUBJECTS = {
    "dynunet": Subject("DynUNet", NETS["dynunet"].build, 8),
    "segresnet": Subject("SegResNet", _segresnet, 8),
    "monai-unet": Subject("MONAI UNet", NETS["monai-unet"].build, 16),
    "plainconv": Subject("PlainConvUNet", NETS["plainconv"].build, 8),
    "plainconv104": Subject("PlainConvUNet, 6 levels, 104 classes", lambda: _many(6, 104), 32, 104),
}
"""By the name that the command line takes."""
