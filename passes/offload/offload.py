"""Offloading as a pass: what autograd keeps waits in host memory, or on disk, for the backward."""

from __future__ import annotations

__all__ = ["Offload"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from pocketize.engine.pipeline import history
from pocketize.errors import OptionError, RewriteError
from pocketize.passes.offload.offloading import OffloadedForward
from pocketize.passes.shared.forwards import first_parameter, obstacle, wrapping
from pocketize.passes.shared.order import REBUILDING
from pocketize.passes.shared.regions import survey
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion
from pocketize.plugin.edits import Convert
from pocketize.plugin.options import read_size
from pocketize.units import bytes_text


@dataclass(frozen=True, kw_only=True)
class Offload(Pass):
    """Move large saved tensors off the device in the forward, and back in the backward pass.

    It costs the time of two copies over the bus, or of writing and reading a file, and no
    computation. Weights, inputs and small tensors stay. Together with checkpoints, the inputs of
    the checkpointed modules are what is moved.

    Attributes:
        min_bytes: tensors from this size on are moved, "16MiB" for instance.
        to: "host" is pinned memory of the machine, "disk" temporary files.
        folder: for the files; none is where the system keeps temporary ones, which may be memory.
        device: the type of device that the model will train on, where it is not there yet.
    """

    name: ClassVar[str] = "offload"
    summary: ClassVar[str] = "Move large saved tensors to host memory or disk until backward"
    after: ClassVar[tuple[str, ...]] = (*REBUILDING, "in-place-norm", "amp", "checkpoint")
    conflicts: ClassVar[tuple[str, ...]] = ("recompute",)

    min_bytes: str = "16MiB"
    to: Literal["host", "disk"] = "host"
    folder: str | None = None
    device: str | None = None

    def validate(self) -> None:
        """Refuse a size that is none, and a folder without files."""
        _size(self.min_bytes)
        if self.folder is not None and self.to != "disk":
            raise OptionError("offload: option 'folder' is for to='disk'")

    @property
    def guarantee(self) -> Guarantee:
        """The same numbers, kept elsewhere."""
        return Guarantee.EXACT

    def propose(self, target: Target) -> Proposal:
        """Put the model's forward under the hooks."""
        reason = self._refusal(target.model)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        where = "host memory" if self.to == "host" else "temporary files"
        change = Change(
            "",
            f"saved tensors of {bytes_text(_size(self.min_bytes))} and more move to {where}",
            "nobody reads them before the backward pass",
        )
        edit = Convert("", "offload", self.conversion_options())
        return Proposal((edit,), (change,), notes=self._notes(target))

    def conversion_options(self) -> dict[str, Any]:
        """What its edit says."""
        return {"min_bytes": _size(self.min_bytes), "to": self.to, "folder": self.folder}

    def _refusal(self, model: nn.Module) -> str:
        if wrapping(model, OffloadedForward):
            return "its saved tensors are already offloaded"
        if reason := obstacle(model):
            return reason
        if any(record.name in self.conflicts for record in history(model)):
            return "it was rewritten by recompute, which decides itself what autograd keeps"
        first = first_parameter(model)
        device = self.device or (first.device.type if first is not None else "cpu")
        if self.to == "host" and device == "cpu":
            return (
                "it is on the CPU, whose saved tensors are in host memory already; move it to the "
                "GPU first, or say device='cuda' if it will be there, or to='disk'"
            )
        return ""

    def _notes(self, target: Target) -> tuple[str, ...]:
        try:
            kept = survey(target.model, target.inputs).kept
        except RewriteError:
            return ()  # it asks for values; offloading does not depend on a forecast
        large = [nbytes for nbytes in kept if nbytes >= _size(self.min_bytes)]
        return (
            f"on {target.inputs.describe()}, {len(large)} of {len(kept)} saved tensors would move: "
            f"{bytes_text(sum(large))} of {bytes_text(sum(kept))}",
        )


def _size(text: str) -> int:
    return read_size(text, "offload: option 'min_bytes'", "16MiB")


@conversion("offload")
def _convert(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    reason = obstacle(module)
    if reason or wrapping(module, OffloadedForward):
        raise RewriteError(f"offload: {reason or 'the module is offloaded already'}")
    disk = options.get("to") == "disk"
    forward = OffloadedForward(
        module, int(options["min_bytes"]), disk=disk, folder=options.get("folder")
    )
    forward.install()
    return module
