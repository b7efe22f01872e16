"""Keep the results of convolutions, or fewer, and build the rest again in the backward pass."""

from __future__ import annotations

__all__ = ["Recompute"]

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pocketize.errors import OptionError
from pocketize.passes.recompute.around import recording_of
from pocketize.passes.recompute.costs import Cost, Costs
from pocketize.passes.recompute.sites import Site, chosen, find_sites, freed
from pocketize.passes.shared.forwards import obstacle
from pocketize.passes.shared.order import REBUILDING
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.edits import Convert
from pocketize.units import bytes_text

_MODES = ("conv", "block", "level")


@dataclass(frozen=True, kw_only=True)
class Recompute(Pass):
    """Store less for the backward pass and build again what it reads, exactly as it was.

    The model stays as it is: each forward pass is followed operator by operator, and autograd is
    told how to have a tensor again instead of saving it. Norms, activations, concatenations,
    dropout, pooling and interpolation are always built again; what they cost is small beside a
    convolution. ``activation(norm(x))`` and the convolution of a concatenation are differentiated
    as one, which is where most of the rest goes. Tensors that only the model's Python code still
    holds lose their memory when nothing will read them again.

    Running statistics are updated once, random numbers are drawn again as they were, and autocast
    is in the state it was. What happens inside ``torch.utils.checkpoint`` is left to it, and so is
    everything under ``torch.compile``, which plans recomputation itself.

    Attributes:
        keep: what is stored: "conv" the result of every convolution and linear layer; "block" of
            the last one of each block; "level" only what crosses from one resolution to another.
        min_bytes: tensors of fewer bytes are stored in any case.
    """

    name: ClassVar[str] = "recompute"
    summary: ClassVar[str] = "Store results of convolutions, or fewer, and rebuild the rest"
    after: ClassVar[tuple[str, ...]] = REBUILDING
    conflicts: ClassVar[tuple[str, ...]] = ("in-place-norm", "offload")

    keep: Literal["conv", "block", "level"] = "conv"
    min_bytes: int = 65536

    def validate(self) -> None:
        """Refuse a negative size."""
        if self.min_bytes < 0:
            raise OptionError(f"recompute: min_bytes must not be negative, got {self.min_bytes}")

    @property
    def guarantee(self) -> Guarantee:
        """The same operators run on the same tensors."""
        return Guarantee.EXACT

    def conversion_options(self) -> dict[str, Any]:
        """What its edit says."""
        return {"min_bytes": self.min_bytes}

    def propose(self, target: Target) -> Proposal:
        """Choose what is stored and let the model record its forward passes."""
        reason = _unfit(target)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        captured = target.captured(train=True)
        sites = find_sites(captured)
        frees = freed(captured, sites)
        rebuilt = {mode: chosen(sites, mode) for mode in _MODES}
        costs = Costs(target.model, target.inputs)
        before = costs.plain()
        found = {
            mode: costs.recomputed(_names(rebuilt[mode]), self.min_bytes, frees) for mode in _MODES
        }
        mine = found[self.keep]
        if before is not None and mine is not None and mine.stored >= before.stored:
            why = (
                f"nothing to gain: {bytes_text(before.stored)} are stored for the backward pass, "
                f"{bytes_text(mine.stored)} would be"
            )
            return Proposal(refused=(Refusal("", why),), notes=tuple(_notes(before, found)))
        options = {
            "rebuilt": sorted(_names(rebuilt[self.keep])),
            "frees": {name: list(parts) for name, parts in sorted(frees.items())},
            **self.conversion_options(),
        }
        return Proposal(
            edits=(Convert("", self.name, options),),
            changes=(_summary(before, mine), *_rows(rebuilt[self.keep])),
            notes=tuple(_notes(before, found)),
        )


def _unfit(target: Target) -> str:
    if recording_of(target.model) is not None:
        return "it recomputes already"
    return obstacle(target.model)


def _names(sites: Iterable[Site]) -> frozenset[str]:
    return frozenset(site.name for site in sites)


def _summary(before: Cost | None, after: Cost | None) -> Change:
    if before is None or after is None:
        return Change("", "records its forward passes", "its size could not be worked out")
    stored = f"{bytes_text(before.stored)} -> {bytes_text(after.stored)}"
    return Change("", f"stored for the backward pass: {stored}", "the rest is rebuilt")


def _rows(rebuilt: Mapping[Site, str]) -> Iterable[Change]:
    for site, why in rebuilt.items():
        yield Change(site.path, f"result rebuilt, {bytes_text(site.nbytes)}", why)


def _notes(before: Cost | None, found: dict[str, Cost | None]) -> Iterable[str]:
    if before is None:
        yield "the model does not run on fake tensors, so what is saved could not be worked out"
        return
    yield f"as it is: {bytes_text(before.stored)} stored for the backward pass"
    for mode, cost in found.items():
        if cost is not None:
            share = 100 * cost.flops / max(1, 3 * before.flops)
            yield (
                f"keep={mode!r}: {bytes_text(cost.stored)} stored, "
                f"{cost.flops / 1e9:.3g} GFLOP of convolutions and products again "
                f"({share:.0f} % of a training step)"
            )
