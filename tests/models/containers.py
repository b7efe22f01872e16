"""Several inputs, and outputs in every container."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.registry import image, net

_HEAD = {"head": "output"}


class Body(nn.Module):
    """stem -> tail -> head, the layers that the nets below share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 2, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.tail(self.stem(x).relu()).relu()


_MOVES: dict[str, Any] = {"movable": ["stem", "tail"], "frozen": _HEAD}


@net(
    "inputs",
    inputs=lambda: (image()(), image(2, 4, 16, 16)()),
    movable=["stem", "other", "tail"],
    frozen=_HEAD,
)
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.other = nn.Conv2d(4, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.tail((self.stem(x) + self.other(y)).relu()).relu())


@net("inputs", inputs=lambda: {"batch": {"image": image()()}}, **_MOVES)
class DictArgument(Body):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.features(batch["image"]))


@net("inputs", inputs=lambda: {"image": image()(), "other": image()()}, **_MOVES)
class DictWithoutSuchParameters(Body):
    """A dict whose keys are no parameters of forward is one positional argument."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.features(batch["image"] + batch["other"]))


@net("inputs", inputs=lambda: {"x": image()(), "scale": torch.tensor(2.0)}, **_MOVES)
class KeywordInputs(Body):
    """Keyword-only arguments; a zero-dimensional tensor among them, and a flag left to default."""

    def forward(self, *, x: Tensor, scale: Tensor, power: int | None = None) -> Tensor:
        y = self.head(self.features(x)) * scale
        return y if power is None else y**power


@net("inputs", inputs=lambda: ([image()(), image()()], 3), **_MOVES)
class ListArgument(Body):
    """A list of tensors and a plain number."""

    def forward(self, xs: list[Tensor], times: int) -> Tensor:
        return self.head(self.features(sum(xs[1:], xs[0]) * times))


@net("inputs", inputs=lambda: (image()(), image(2, 1, 16, 16)() > 0), **_MOVES)
class MaskInput(Body):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.features(x).masked_fill(mask, 0.0)
        return self.head(torch.where(mask, y, y + 1))


@net(
    "inputs",
    inputs=lambda: (image()(), torch.tensor([3.0, 7.0])),
    movable=["stem", "tail", "time.0"],
    frozen=_HEAD,
)
class TimeConditioned(Body):
    """A diffusion U-Net's time embedding: sines of a scalar, added to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(4, device=t.device, dtype=t.dtype))
        angles = t[:, None] * frequencies[None]
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        return self.head((self.tail(self.stem(x).relu()) + embedding[:, :, None, None]).relu())


@net(
    "inputs",
    inputs=lambda: (image()(), image(2, 5)()),
    movable=["stem", "tail"],
    shrinks=["film"],
    frozen=_HEAD,
)
class FeatureWiseModulation(Body):
    """FiLM: one linear layer gives scale and shift, cut apart by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.film = nn.Linear(5, 32)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.film(code)[:, :, None, None].chunk(2, dim=1)
        return self.head(self.features(x) * (1 + scale) + shift)


@net("outputs", movable=["stem"], frozen={"tail": "output", "head": "output"})
class TupleOutput(Body):
    """Features go out as well: what reaches any output stays."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.features(x)
        return self.head(y), y


@net("outputs", **_MOVES)
class DictOutput(Body):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.head(self.features(x))
        return {"logits": y, "probability": y.softmax(1), "size": tuple(x.shape[2:]), "aux": None}


@net("outputs", **_MOVES)
class NestedOutput(Body):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.head(self.features(x))
        return {"out": [y, (F.avg_pool2d(y, 2), {"deep": F.avg_pool2d(y, 4)})], "n": 3}


@dataclass
class Prediction:
    logits: Tensor
    mask: Tensor
    hidden: list[Tensor]


@net("outputs", **_MOVES)
class DataclassOutput(Body):
    """An ordinary dataclass, not registered with torch's pytrees."""

    def forward(self, x: Tensor) -> Prediction:
        y = self.head(self.features(x))
        return Prediction(y, y > 0, [y.mean((2, 3))])


class Pair(NamedTuple):
    logits: Tensor
    score: Tensor


@net("outputs", **_MOVES)
class NamedTupleOutput(Body):
    def forward(self, x: Tensor) -> Pair:
        y = self.head(self.features(x))
        return Pair(y, y.amax((1, 2, 3)))


@net("outputs", **_MOVES)
class ScalarOutput(Body):
    """The model returns its own loss."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).square().mean()


@net("outputs integer-output", **_MOVES)
class ClassMapOutput(Body):
    """Class numbers: the channel axis is gone, and the head may still not move."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).argmax(dim=1)


@net(
    "outputs deep-supervision",
    movable=["stem", "tail"],
    frozen={"head": "output", "deep": "output"},
)
class DeepSupervision(Body):
    """A list in training, one tensor in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        early = self.stem(x).relu()
        y = self.head(self.tail(early).relu())
        if self.training:
            return [y, F.avg_pool2d(self.deep(early), 2)]
        return y


@net(
    "outputs deep-supervision",
    movable=["stem", "tail"],
    frozen={"head": "output", "deep": "output"},
)
class StackedSupervision(DeepSupervision):
    """DynUNet's way: all heads stacked along a new axis, by a flag of the module."""

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x).relu()
        y = self.head(self.tail(early).relu())
        if self.training:
            return torch.stack([y, self.deep(early)], dim=1)
        return y


@net("outputs frozen", movable=[], frozen={"0": "output", "2": "output"})
def encoder_returning_everything() -> nn.Module:
    """Nothing can move: every width is seen outside."""
    return Everything(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))


class Everything(nn.Sequential):
    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        seen = []
        for layer in self:
            x = layer(x)
            seen.append(x)
        return seen
