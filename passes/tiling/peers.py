"""The processes that share the tiles of a volume."""

from __future__ import annotations

__all__ = ["Peers", "group_name", "peers_of"]

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from pocketize.errors import InputError

#: The name of the group of all processes.
WORLD = "world"


class Peers:
    """A process group, as much of it as tiles need.

    Args:
        group: of torch.distributed.
        device: where tiles are computed.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # gloo sends what is in host memory, NCCL what is on the GPU
        nccl = f"{device.type}:nccl" in dist.get_backend_config(group)
        self.device = device if nccl else torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, in the order of their ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check(self, described: Any, tensors: Mapping[str, Tensor]) -> None:
        """Check that all processes are about to do the same; their inputs' values are not compared.

        Args:
            described: the sizes of the inputs and how they are cut.
            tensors: parameters and buffers by name.

        Raises:
            InputError: they are not; all processes raise.
        """
        self.agree("inputs or tiles", described)
        sums = {
            name: str(float(tensor.detach().sum(dtype=torch.float64)))
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
        self.agree("weights", sorted(sums.items()))

    def agree(self, what: str, value: Any) -> None:
        """Check that all processes gave the same.

        Raises:
            InputError: one gave something else; all processes raise.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(
                    f"patchwise: rank 0 and rank {rank} of the group have different {what}: "
                    f"{_difference(values[0], other)}; every process calls the same network with "
                    "the same volume"
                )

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Send tensors to other ranks and receive others, from each rank in the order of sending.

        Args:
            sends: rank and what goes there.
            receives: rank and where what comes from there is written.
        """
        rooms = [(rank, place, self._like(place)) for rank, place in receives]
        parcels = [(rank, self._bytes(tensor)) for rank, tensor in sends]
        operations = [self._operation(dist.isend, parcel, rank) for rank, parcel in parcels]
        operations += [self._operation(dist.irecv, room, rank) for rank, _, room in rooms]
        if not operations:
            return
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for _, place, room in rooms:
            place.copy_(room.view(place.dtype).reshape(place.shape))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give all processes what one has; it is written over elsewhere."""
        mine = self.rank == source
        parcel = self._bytes(tensor) if mine else self._like(tensor)
        if not parcel.numel():
            return
        dist.broadcast(parcel, dist.get_global_rank(self.group, source), group=self.group)
        if not mine:
            tensor.copy_(parcel.view(tensor.dtype).reshape(tensor.shape))

    def _operation(self, kind: Any, parcel: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(kind, parcel, dist.get_global_rank(self.group, rank), group=self.group)

    def _bytes(self, tensor: Tensor) -> Tensor:
        """Return the bytes of a tensor: not every backend knows every dtype."""
        return tensor.contiguous().to(self.device).reshape(-1).view(torch.uint8)

    def _like(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def group_name(group: Any) -> Any:
    """Return the name by which a process group is found again; anything else as it is."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        return group
    return WORLD if group is dist.group.WORLD else group.group_name


def peers_of(name: str | None, device: torch.device) -> Peers | None:
    """Return the processes of a group; None where there is no name.

    Args:
        name: "world" for all processes, or the ``group_name`` of a process group.
        device: where tiles are computed.

    Raises:
        InputError: there is no such group here, or this process is not in it.
    """
    if name is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            f"patchwise: group={name!r} needs an initialised process group; start the processes "
            "with torchrun and call torch.distributed.init_process_group() first, or rewrite "
            "without group"
        )
    return Peers(_resolved(name), device)


def _resolved(name: str) -> dist.ProcessGroup:
    if name == WORLD:
        world = dist.group.WORLD
        assert world is not None  # it is initialised
        return world
    try:
        resolve: Any = c10d._resolve_process_group  # type: ignore[attr-defined]
        found: dist.ProcessGroup = resolve(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"patchwise: this process is in no process group named {name!r}; say group='world', "
            "or the group_name of a group that torch.distributed.new_group made here"
        ) from error
    return found


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = next((one, two) for one, two in zip(a, b, strict=True) if one != two)
    return f"{a} and {b}"
