"""What calibration did: the network, and how far each layer is from the one before the cut."""

from __future__ import annotations

__all__ = ["CalibratedLayer", "CalibratedNetwork"]

from collections.abc import Iterator
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer.

    Attributes:
        path: of the module, the same in both networks.
        before: relative error of its outputs on the calibration images, as the network was when
            the layer's turn came: the norm of the difference to the large network's outputs, of
            the channels that are left, over the norm of these.
        after: the same once it was solved; ``None`` if it was not.
        why_not: the reason why it was not; empty if it was.
        weights: relative change of its weights; where a block replaced a convolution, relative
            difference of the map that the block is to the convolution's weights.
        block: whether a block stands there, where a convolution was.
        few: whether it was solved from fewer output positions than it has inputs, as in classifiers
            or at the lowest resolution: it fits the images, and perhaps no others.
    """

    path: str
    before: float | None
    after: float | None
    why_not: str = ""
    weights: float | None = None
    block: bool = False
    few: bool = False


@dataclass(frozen=True)
class CalibratedNetwork:
    """A calibrated network.

    ``print(calibration)`` shows the layers.

    Attributes:
        model: a copy of the rewritten network with new weights and statistics.
        layers: in the order in which the forward calls them.
        images: how many were used.
        before: relative error of the network's outputs on the images, before.
        after: the same, after.
    """

    model: nn.Module
    layers: tuple[CalibratedLayer, ...]
    images: int
    before: float
    after: float

    @property
    def summary(self) -> str:
        """One line for a report."""
        word = "image" if self.images == 1 else "images"
        return (
            f"calibrated on {self.images} {word}: outputs differ by {self.after:.1%} "
            f"(was {self.before:.1%})"
        )

    @property
    def _advice(self) -> Iterator[str]:
        if self.after > self.before:
            yield (
                "the outputs differ more than before: give more images, like those of training; a "
                "network that is not trained yet needs no calibration"
            )
        if few := [each.path for each in self.layers if each.few]:
            yield (
                "give more images, these layers have fewer output positions on them than inputs: "
                + ", ".join(few)
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that stay with the network: the summary, advice, blocks, layers not solved."""
        blocks = [
            f"{each.path} {_share(each.after)} ({_share(each.weights) or '-'})"
            for each in self.layers
            if each.block
        ]
        left = [f"{each.path} ({each.why_not})" for each in self.layers if each.why_not]
        told = {
            "relative error of the blocks' outputs on the images (of their weights): ": blocks,
            "not calibrated: ": left,
        }
        return (
            self.summary,
            *self._advice,
            *(head + ", ".join(each) for head, each in told.items() if each),
        )

    def __str__(self) -> str:
        rows = [
            (
                layer.path,
                _share(layer.before),
                _share(layer.after),
                _share(layer.weights),
                layer.why_not,
            )
            for layer in self.layers
        ]
        head = ("layer", "outputs differ by", "solved", "weights differ by", "why not")
        told = "\n".join((self.summary, *self._advice))
        return f"{told}\n\n{tabulate(rows, head, disable_numparse=True)}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
