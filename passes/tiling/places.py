"""Forms of operators that leave every place to itself, but cannot be called as they were."""

from __future__ import annotations

__all__ = ["Expanded", "Piece", "Redirected"]

from typing import Any

from torch import Tensor, fx

from pocketize.passes.tiling.forms import Context, Pointwise
from pocketize.passes.tiling.intervals import Region


class Redirected(Pointwise):
    """Another operator with the same arguments, such as the one that writes nothing in place."""

    def __init__(self, node: fx.Node, maps: list[fx.Node], target: Any) -> None:
        super().__init__(node, maps)
        self.target = target

    def call(self, args: Any, kwargs: Any, region: Region) -> Any:
        """Call the other operator."""
        return self.target(*args, **kwargs)


class Expanded(Pointwise):
    """A map repeated along axes of size 1, to the size of the region."""

    def call(self, args: Any, kwargs: Any, region: Region) -> Any:
        """Expand the part."""
        x, sizes = args[0], list(self.node.meta["val"].shape)
        return x.expand(*sizes[:2], *(high - low for low, high in region))


class Piece(Pointwise):
    """One of several results that an operator makes of its channels."""

    def __init__(self, node: fx.Node, maps: list[fx.Node], split: fx.Node, index: int) -> None:
        super().__init__(node, maps)
        self.split, self.index = split, index

    def run(self, region: Region, context: Context) -> Tensor:
        """Split the part and take one piece."""
        x = context.part(next(iter(self.maps)), region)
        args, kwargs = fx.node.map_arg((self.split.args, self.split.kwargs), lambda _: x)
        assert callable(self.split.target)
        result: Tensor = self.split.target(*args, **kwargs)[self.index]
        return result
