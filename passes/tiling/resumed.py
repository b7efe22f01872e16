"""A forward by tiles that goes on where an earlier one was interrupted."""

from __future__ import annotations

__all__ = ["ResumableExecution"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pocketize._torch import pytree
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.intervals import Region
from pocketize.passes.tiling.keeping import Kept
from pocketize.passes.tiling.program import Program, Sweep
from pocketize.passes.tiling.resuming import Journal, JournalKeeper


class ResumableExecution(Execution):
    """One forward, whose progress is in a journal.

    Args:
        program: what to do.
        tensors: parameters and buffers by name.
        inputs: the input tensors by placeholder, on any device.
        journal: of this program, these tensors and these inputs.
        device: where tiles are computed.
        dtype: in which floating maps are kept; None for their own.
        finish: what is stored of an output; see :class:`Execution`.
        progress: is told how many tiles are done, and of how many.
    """

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[fx.Node, Tensor],
        journal: Journal,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(
            program,
            tensors,
            inputs,
            JournalKeeper(journal, device, dtype=dtype),
            outputs=JournalKeeper(journal, device),
            finish=finish,
            progress=progress,
        )
        self.journal = journal
        self._number = 0
        #: tiles of the current sweep that are done
        self._passed = 0
        #: small results that are in the journal, and names of those that nothing reads any more
        self._written: set[str] = set()
        self._idle: list[str] = []

    def _begin(self) -> int:
        """Read what earlier steps left behind, and return the step to go on with."""
        state = self.journal.state
        if not state:
            return 0
        by_name = {node.name: node for node in self.program.graph.nodes}
        device = self.keeper.device
        self._number, self._passed = int(state["step"]), int(state["tile"])
        self._done = int(state["done"])
        here = _on(device)
        self.norms = {by_name[name]: here(tensor) for name, tensor in state["norms"].items()}
        self._measures = {by_name[name]: here(held) for name, held in state["measures"].items()}
        freed: set[fx.Node] = set()
        for step in self.program.steps[: self._number]:
            freed.update(step.frees)
        for step in self.program.steps[: self._number]:
            maps = step.targets if isinstance(step, Sweep) else ()
            small = step.gathers if isinstance(step, Sweep) else (step.node,)
            for node in maps:
                if node not in freed:
                    made = self.finished if self._is_finished(node) else self.stored
                    made[node] = self._room(node)
            for node in small:
                if node not in freed and node not in self.norms:
                    self.stored[node] = here(self.journal.get(node.name))
                    self._written.add(node.name)
        for node in freed:
            self.stored.pop(node, None)
        return self._number

    def _step(self, number: int) -> None:
        self._number = number
        super()._step(number)
        self._passed = 0

    def _free(self, nodes: Sequence[fx.Node]) -> None:
        """Give back memory; files go when it is noted that nothing reads them any more."""
        super()._free(nodes)
        self._idle += [node.name for node in nodes if node.op != "placeholder"]
        if isinstance(self.program.steps[self._number], Sweep) or self.journal.is_due():
            self._commit(self._number + 1, 0)
            self.journal.settle()

    def _write(self, room: Kept, node: fx.Node, region: Region) -> None:
        super()._write(room, node, region)
        self.journal.wrote(node.name, room.view(region))

    def _tiles(self, step: Sweep) -> Sequence[tuple[int, ...]]:
        return super()._tiles(step)[self._passed :]

    def _tell(self) -> None:
        super()._tell()
        if isinstance(self.program.steps[self._number], Sweep):
            self._passed += 1
            if self.journal.is_due():
                self._commit(self._number, self._passed)

    def _commit(self, step: int, tile: int) -> None:
        there = _on(torch.device("cpu"))
        for node, value in self.stored.items():
            new = not isinstance(value, Kept) and node.name not in self._written
            if new and node.op != "placeholder":
                self.journal.put(node.name, _alone(value))
                self._written.add(node.name)
        self.journal.commit(
            {
                "step": step,
                "tile": tile,
                "done": self._done,
                "norms": {node.name: there(tensor) for node, tensor in self.norms.items()},
                "measures": {node.name: there(held) for node, held in self._measures.items()},
            },
            self._idle,
        )
        self._idle.clear()


def _alone(value: Any) -> Any:
    """Copy tensors out of what they are views of, of which a file would have all."""
    return pytree.tree_map_only(Tensor, lambda t: t.cpu().clone(), value)


def _on(device: torch.device) -> Callable[[Any], Any]:
    return lambda value: pytree.tree_map_only(Tensor, lambda t: t.to(device), value)
