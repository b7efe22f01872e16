"""PocketNet: no channel group is wider than the finest resolution.

Source: Celaya et al., "PocketNet: A Smaller Neural Network for Medical Image Analysis", IEEE TMI
2022. With C convolutions a level, stencil k, dimension n and D poolings, a net that doubles its
widths has C k^n c_in c_out (4^(D+1) - 1) / 3 weights, the pocket net C k^n c_in c_out (D + 1).
"""

from __future__ import annotations

__all__ = ["Pocket"]

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pocketize.channels.groups import ChannelGroup
from pocketize.channels.widths import fit_units, resize_groups
from pocketize.errors import OptionError
from pocketize.passes.widths.features import finest_width
from pocketize.plugin.base import Guarantee, Pass, Proposal, Refusal, Target


@dataclass(frozen=True, kw_only=True)
class Pocket(Pass):
    """Clamp every width to that of the finest resolution.

    Groups that reach an input or an output of the model, and groups that an operator or a check
    freezes, keep their size; the plan lists them with reasons. Groups that have fewer channels
    keep what they have.

    Attributes:
        width: the most channels a group may keep; none takes the width of the features at the
            finest resolution (:mod:`pocketize.passes.widths.features`).
        keep: patterns of module paths (fnmatch) whose channels stay.
        weights: "slice" keeps the channels with the largest weights, "reset" reinitialises all.
    """

    name: ClassVar[str] = "pocket"
    summary: ClassVar[str] = "Clamp all widths to that of the finest resolution (PocketNet)"

    width: int | None = None
    keep: tuple[str, ...] = ()
    weights: Literal["slice", "reset"] = "slice"

    def validate(self) -> None:
        """Refuse widths below one."""
        if self.width is not None and self.width < 1:
            raise OptionError(f"pocket: width must be at least 1, not {self.width}")

    @property
    def guarantee(self) -> Guarantee:
        """Sliced nets approximate the original, redrawn ones have to be trained."""
        return Guarantee.APPROXIMATE if self.weights == "slice" else Guarantee.RETRAIN

    def propose(self, target: Target) -> Proposal:
        """Resize every free group that is wider than the width."""
        channels = target.channels()
        width, why = (self.width, "as given") if self.width else finest_width(channels)
        kept = {
            group: f"kept by keep={pattern!r}"
            for pattern in self.keep
            for group in channels.matching(pattern)
        }
        wanted: dict[ChannelGroup, int] = {}
        refused: list[Refusal] = []
        again = False
        for group in channels.groups:
            if not group.layers and (group.frozen or group.channels <= width):
                continue  # an axis of a raw parameter: no row in the plan
            reason = group.frozen or kept.get(group)
            if reason is not None:
                refused.append(Refusal(group.name, f"{group.channels} channels: {reason}"))
                continue
            if group.channels <= width:
                continue
            units, short = fit_units(group, width)
            if units * group.step > width and short is not None:
                again = True
                refused.append(short)
            if units < group.units:
                wanted[group] = units
        notes = [f"width {width}: {why}"]
        if channels.unreached:
            shown = ", ".join(channels.unreached[:5])
            notes.append(
                f"{len(channels.unreached)} parameters are never read by the forward and stay as "
                f"they are: {shown}{', ...' if len(channels.unreached) > 5 else ''}"
            )
        if any(traced.real for traced in channels.traces):
            notes.append(
                "a branch of the forward depends on values; only the branch taken was seen"
            )
        resized = resize_groups(channels, wanted, weights=self.weights)
        # the second look is at other widths; that of the first holds
        second = replace(self, width=width) if again else False
        return Proposal(resized.edits, resized.changes, tuple(refused), tuple(notes), second)
