"""Which of the parts of a volume a call computes: those that no other process does, or did."""

from __future__ import annotations

__all__ = ["Stretch", "output_keeper", "peers_for"]

from collections.abc import Iterator
from dataclasses import replace

import torch

from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.cutting import PatchForward, is_fake
from pocketize.passes.tiling.keeping import Keeper
from pocketize.passes.tiling.peers import Peers, peers_of
from pocketize.passes.tiling.recording import tensors_by_name
from pocketize.passes.tiling.resuming import Journal, JournalKeeper


class Stretch:
    """Numbers of parts that follow each other, at least one.

    A process that has none computes the nearest, so as to know what the network returns; nothing
    comes of it that another does not compute alike.

    Args:
        count: of all parts.
        peers: who shares them; None for nobody.
        journal: what was computed before; None for nothing.
    """

    def __init__(self, count: int, peers: Peers | None, journal: Journal | None) -> None:
        self.count, self.peers, self.journal = count, peers, journal
        first, stop = self.bounds(peers.rank) if peers is not None else (0, count)
        if journal is not None:
            first = int(journal.state.get("done", 0))
        self.first = min(first, count - 1)
        self.stop = max(stop, self.first + 1)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.stop))

    def bounds(self, rank: int) -> tuple[int, int]:
        """Return the first part of a process, and the one after its last."""
        assert self.peers is not None
        size = self.peers.size
        return self.count * rank // size, self.count * (rank + 1) // size

    def note(self, number: int) -> None:
        """Say that a part is done, and all before it."""
        if self.journal is not None and number >= self.first and self.journal.is_due():
            self.journal.commit({"done": number + 1})


def peers_for(forward: PatchForward, inputs: Inputs) -> Peers | None:
    """Return who shares the tiles of a call; None for nobody, as where gradients are wanted.

    Raises:
        InputError: there is no such group, or its processes are not about to do the same.
    """
    if is_fake(inputs) or torch.is_grad_enabled():
        return None
    peers = peers_of(forward.tiling.group, forward.device(inputs))
    if peers is not None:
        shapes = [list(tensor.shape) for tensor in inputs.tensors()]
        alike = replace(forward.tiling, folder=None, progress=False)  # each may have its own
        peers.check([*shapes, alike], tensors_by_name(forward.module))
    return peers


def output_keeper(forward: PatchForward, device: torch.device, journal: Journal | None) -> Keeper:
    """Return what makes room for the outputs of a call."""
    if journal is not None:
        return JournalKeeper(journal, device)
    return Keeper(forward.tiling.output, device, folder=forward.tiling.folder)
