"""The form of operators that move channels to space, or back, in blocks."""

from __future__ import annotations

__all__ = ["Shuffled"]

from torch import Tensor, fx

from pocketize.passes.tiling.forms import Context, Form, InputBoxes
from pocketize.passes.tiling.intervals import Box


class Shuffled(Form):
    """A pixel shuffle, which makes a block of pixels of each, or its inverse.

    Args:
        node: the operator; it is called on the blocks that a box touches.
        source: the input map.
        factor: the length of a block.
        up: channels become space.
    """

    cheap = True

    def __init__(self, node: fx.Node, source: fx.Node, factor: int, *, up: bool) -> None:
        super().__init__(node)
        self.source, self.factor, self.up = source, factor, up

    def input_boxes(self, box: Box) -> InputBoxes:
        """The pixels whose blocks the box touches, or the blocks that become its pixels."""
        n = self.factor
        if self.up:
            return {self.source: tuple((low // n, -(-high // n)) for low, high in box)}
        return {self.source: tuple((low * n, high * n) for low, high in box)}

    def run(self, box: Box, context: Context) -> Tensor:
        """Shuffle, and cut blocks that are in the box in part."""
        read = self.input_boxes(box)[self.source]
        assert callable(self.node.target)
        x: Tensor = self.node.target(context.part(self.source, read), self.factor)
        for axis, ((low, high), (start, _)) in enumerate(zip(box, read, strict=True)):
            if self.up:
                x = x.narrow(axis + 2, low - start * self.factor, high - low)
        return x
