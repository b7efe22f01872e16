"""Networks that nobody would write: layers of any kind on top of each other, with skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Pick", "RandomNet"]

#: A map is not to become larger than this, nor smaller than a voxel.
_LARGEST = 4000


class Pick(Protocol):
    """Chooses one of several; hypothesis or a generator."""

    def __call__(self, options: Sequence[Any]) -> Any: ...


def _of_rank(name: str, rank: int) -> Any:
    return getattr(nn, f"{name}{rank}d")


class RandomNet(nn.Module):
    """Layers that were picked one by one, as far as they run on the volume.

    Args:
        rank: number of spatial axes.
        sizes: of the volume that it has to run on.
        pick: chooses.
        depth: how many layers are tried.
    """

    def __init__(self, rank: int, sizes: Sequence[int], pick: Pick, depth: int = 6) -> None:
        super().__init__()
        self.rank, self.pick = rank, pick
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, Any]] = []
        self.text: list[str] = []
        maps = [torch.zeros(1, 2, *sizes)]
        kinds = list(self._kinds())
        for _ in range(depth):
            kind = pick(kinds)
            self._kinds()[kind]()
            try:
                with torch.no_grad():
                    made = self._run(self.steps[-1], maps)
                fits = made.numel() <= _LARGEST and min(made.shape) > 0
            except (RuntimeError, ValueError):
                fits = False  # a kernel larger than its map, for instance
            if fits:
                maps.append(made)
                self.text.append(f"{kind}: {self.layers[-1]}")
            else:
                self.steps.pop()
                del self.layers[-1]
        self.outputs = pick([1, 1, 2])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [x]
        for step in self.steps:
            maps.append(self._run(step, maps))
        return maps[-self.outputs :]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pick": None}

    def _run(self, step: tuple[str, Any], maps: list[Tensor]) -> Tensor:
        kind, index = step
        layer: Any = self.layers[index]
        x = maps[-1]
        if kind == "one":
            return layer(x)
        # an earlier map joins, cropped or padded to the size
        other = maps[layer.which % len(maps)]
        pads = [p for a, b in zip(x.shape[2:], other.shape[2:], strict=True) for p in (a - b, 0)]
        other = F.pad(other, pads[::-1], value=layer.value)
        if layer.add and other.shape[1] == x.shape[1]:
            return x + other
        return torch.cat([x, other], 1)

    def _kinds(self) -> dict[str, Callable[[], None]]:
        return {
            "convolution": self._convolution,
            "transposed": self._transposed,
            "pooling": self._pooling,
            "interpolation": self._interpolation,
            "norm": self._norm,
            "padding": self._padding,
            "skip": self._skip,
            "pointwise": self._pointwise,
            "gate": self._gate,
            "slice": self._slice,
        }

    def _add(self, layer: nn.Module, kind: str = "one") -> None:
        self.steps.append((kind, len(self.layers)))
        self.layers.append(layer)

    def _each(self, options: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.pick(options) for _ in range(self.rank))

    def _channels(self) -> int:
        """Return the channels of the last map."""
        x = torch.zeros(1, 2, *(1 for _ in range(self.rank)))
        count = [x.shape[1]]
        for kind, index in self.steps:
            layer: Any = self.layers[index]
            if kind == "one":
                count.append(getattr(layer, "out_channels", count[-1]))
            else:
                other = count[layer.which % len(count)]
                same = layer.add and other == count[-1]
                count.append(count[-1] if same else count[-1] + other)
        return count[-1]

    def _convolution(self) -> None:
        mode = self.pick(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
        kernel = self._each([1, 2, 3, 4, 5])
        dilation = self._each([1, 1, 2])
        padding: Any = self._each([0, 1, 2])
        stride = self._each([1, 1, 1, 2, 3])
        if self.pick([False, False, False, True]):
            stride, padding = (1,) * self.rank, "same"
            kernel = tuple(k | 1 for k in kernel)  # torch warns of even ones
        channels = self._channels()
        self._add(
            _of_rank("Conv", self.rank)(
                channels,
                self.pick([2, 3, 4]),
                kernel,
                stride,
                padding,
                dilation,
                bias=self.pick([True, False]),
                padding_mode=mode,
            )
        )

    def _transposed(self) -> None:
        stride, dilation = self._each([1, 2, 3]), self._each([1, 1, 2])
        extra = tuple(
            min(e, max(s, d) - 1)
            for e, s, d in zip(self._each([0, 0, 1, 2]), stride, dilation, strict=True)
        )
        kernel = self._each([1, 2, 3, 4])
        kind = _of_rank("ConvTranspose", self.rank)
        padding = self._each([0, 0, 1, 2])
        self._add(
            kind(
                self._channels(),
                self.pick([2, 3]),
                kernel,
                stride,
                padding,
                extra,
                1,
                True,
                dilation,
            )
        )

    def _pooling(self) -> None:
        kernel, stride = self._each([1, 2, 3]), self._each([1, 2, 3])
        padding = tuple(min(p, k // 2) for p, k in zip(self._each([0, 1]), kernel, strict=True))
        ceil = self.pick([False, True])
        if self.pick([False, True]):
            layer = _of_rank("MaxPool", self.rank)(
                kernel, stride, padding, self.pick([1, 2]), ceil_mode=ceil
            )
        else:
            layer = _of_rank("AvgPool", self.rank)(
                kernel, stride, padding, ceil, self.pick([False, True])
            )
        self._add(layer)

    def _interpolation(self) -> None:
        linear = ("linear", "bilinear", "trilinear")[self.rank - 1]
        mode = self.pick(["nearest", "nearest-exact", linear, linear])
        corners = {"align_corners": self.pick([False, True])} if mode == linear else {}
        if self.pick([False, True]):
            size = self._each([1, 3, 5, 8, 11])
            self._add(nn.Upsample(size=size, mode=mode, **corners))
        else:
            scale = tuple(self.pick([0.5, 1.0, 1.05, 1.3, 2.0]) for _ in range(self.rank))
            kept = {"recompute_scale_factor": self.pick([None, True])}
            self._add(nn.Upsample(scale_factor=scale, mode=mode, **corners, **kept))

    def _norm(self) -> None:
        channels = self._channels()
        kind = self.pick(["Instance", "Batch", "Group"])
        if kind == "Group":
            groups = self.pick([n for n in range(1, channels + 1) if channels % n == 0])
            self._add(nn.GroupNorm(groups, channels))
        else:
            self._add(_of_rank(f"{kind}Norm", self.rank)(channels, affine=self.pick([True, False])))

    def _padding(self) -> None:
        pads = [self.pick([-1, 0, 0, 1, 2, 3]) for _ in range(2 * self.rank)]
        kind = self.pick(["Zero", "Reflection", "Replication", "Circular"])
        if kind == "Circular":  # torch reads memory that it never wrote where it crops as well
            pads = [abs(pad) for pad in pads]
        self._add(_of_rank(f"{kind}Pad", self.rank)(tuple(pads)))

    def _skip(self) -> None:
        self._add(
            _Skip(self.pick(range(8)), self.pick([False, True]), self.pick([0.0, 1.5])), "two"
        )

    def _pointwise(self) -> None:
        layers: list[nn.Module] = [
            nn.ELU(),
            nn.SiLU(),
            nn.Hardswish(),
            nn.Softmax(1),
            nn.PReLU(),
            nn.Dropout(0.5),
        ]
        self._add(self.pick(layers))

    def _gate(self) -> None:
        self._add(_Gate(self._channels(), self.rank, self.pick([False, True])))

    def _slice(self) -> None:
        self._add(_Slice(self.pick(range(self.rank)), self.pick([1, 2]), self.pick([0, 1])))


class _Skip(nn.Module):
    def __init__(self, which: int, add: bool, value: float) -> None:
        super().__init__()
        self.which, self.add, self.value = which, add, value

    def extra_repr(self) -> str:
        return f"which={self.which}, add={self.add}, value={self.value}"


class _Gate(nn.Module):
    """Squeeze and excite, by the mean or by the largest entry."""

    def __init__(self, channels: int, rank: int, largest: bool) -> None:
        super().__init__()
        self.mix, self.rank, self.largest = nn.Linear(channels, channels), rank, largest

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(2, 2 + self.rank))
        pooled = x.amax(axes) if self.largest else x.mean(axes)
        return x * self.mix(pooled).sigmoid().reshape(*pooled.shape, *(1 for _ in axes))


class _Slice(nn.Module):
    def __init__(self, axis: int, step: int, start: int) -> None:
        super().__init__()
        self.axis, self.step, self.start = axis, step, start

    def forward(self, x: Tensor) -> Tensor:
        where = [slice(None)] * x.ndim
        where[self.axis + 2] = slice(self.start, None, self.step)
        return x[tuple(where)]
