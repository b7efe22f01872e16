"""Operators on bare parameters, through the channel rules, with no model around them.

A model's outputs freeze whatever reaches them; here nothing does, so that what the rules themselves
say can be read off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pocketize.channels.analysis import Analysis
from pocketize.channels.labels import FROZEN, Value, axes_of
from pocketize.graph.capture import TracedGraph, Tracer
from pocketize.graph.inputs import Inputs, as_inputs

__all__ = ["Board"]


class _Bare(nn.Module):
    def __init__(self, function: Callable[..., Any], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.function, self.names = function, list(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Any:
        return self.function(*(getattr(self, name) for name in self.names))


class Board(Analysis):
    """The rules applied to the operators of a function of parameters.

    Args:
        function: takes the parameters in order, returns a tensor or several.
        shapes: the shape of each parameter, by name.
    """

    def __init__(self, function: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        model = _Bare(function, shapes)
        super().__init__(model, as_inputs(torch.zeros(1)))
        self.traced = self.traces[0]
        self.units, self.reasons = self.unions.solve()

    def _freeze_output(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Nothing: this is what a board is for."""

    def _second_size(self, tracer: Tracer, inputs: Inputs) -> list[TracedGraph]:
        return []  # nothing here has a spatial size

    def outputs(self) -> list[Value]:
        """What is known of the results."""
        return [self.values[0][node] for node in self.traced.outputs()]

    def indices(self, axis: str) -> NDArray[np.int64]:
        """The indices of an axis, ``"a0"`` for the first of ``a``."""
        return self.axes[axis[:-1], int(axis[-1])]

    def unit(self, axis: str) -> list[int]:
        """The units of an axis."""
        return [int(u) for u in self.units[self.indices(axis)]]

    def frozen(self, axis: str) -> bool:
        """Whether all of an axis is frozen; some of it alone is an error of the test."""
        found = {unit in self.reasons for unit in self.unit(axis)}
        assert len(found) == 1, f"{axis} is frozen in part"
        return found.pop()

    def reason(self, axis: str) -> str:
        """Why the first index of an axis is frozen."""
        return self.reasons[self.unit(axis)[0]]

    def moved(self, axis: str) -> list[NDArray[np.int64]]:
        """The indices of an axis, moved by running the very operators on numbers.

        Returns:
            One array of each result's shape: the index each element came from, 0 for none.
        """
        name, number = axis[:-1], int(axis[-1])
        numbers: dict[fx.Node, Any] = {}
        for node in self.traced.graph.nodes:
            if node.op == "get_attr":
                shape = node.meta["val"].shape
                value = torch.zeros(shape, dtype=torch.float64)
                if node.meta["tensor"] == name:
                    along = [-1 if a == number else 1 for a in range(len(shape))]
                    value += torch.from_numpy(self.axes[name, number]).reshape(along)
                numbers[node] = value
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
                numbers[node] = node.target(*args, **kwargs)
        return [numbers[node].long().numpy() for node in self.traced.outputs()]

    def follows(self, axis: str) -> bool:
        """Whether the labels of the results are the indices of an axis moved by the operators.

        Every element that came from this axis must be known to have: either its label is of the
        same unit, or its unit is frozen, or the whole result comes from one unit.
        """
        return all(
            self._follows(value, moved)
            for value, moved in zip(self.outputs(), self.moved(axis), strict=True)
        )

    def _follows(self, value: Value, moved: NDArray[np.int64]) -> bool:
        came = moved != FROZEN
        units = self.units[moved]
        safe = ~came | np.isin(units, list(self.reasons))
        if moved.size == 0 or bool((units == units.flat[0]).all()):
            return True
        for label in value.labels:
            spread = np.broadcast_to(label, value.shape)
            if axes_of(label) and bool((safe | (self.units[spread] == units)).all()):
                return True
        return bool(safe.all())
