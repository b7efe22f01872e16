"""More input channels: guidance from another network, a prior, a second modality.

The network computes what it did before until the new weights, all zero, have learnt something.
"""

from __future__ import annotations

__all__ = ["ExtendInputs"]

from dataclasses import dataclass, field
from typing import ClassVar

from pocketize.errors import OptionError, RewriteError
from pocketize.passes.cascade.extension import extend_inputs
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Target


@dataclass(frozen=True, kw_only=True)
class ExtendInputs(Pass):
    """Let a network read more input channels, behind those it has.

    Every weight that reads the input grows by zeros: the first convolution, the shortcut beside it,
    a patch embedding, a later layer that the input is concatenated to. Parameters stay the objects
    they are, with their gradients and whether they are frozen; an optimiser that has taken a step
    keeps moments of the old shape, so make a new one.

    Registered passes keep what a network takes and returns. This one does not, so it is given in
    Python only, and alone: ``rewrite(model, ExtendInputs(4), inputs=x)`` with an ``x`` of the
    channels that the model has now.

    Attributes:
        channels: how many channels come behind those that the network reads.
        argument: which of the network's input tensors, in the order of the arguments.
    """

    name: ClassVar[str] = "extend-inputs"
    summary: ClassVar[str] = "Read more input channels, with weights that start at zero"
    positional: ClassVar[str] = "channels"

    channels: int = field(kw_only=False)
    argument: int = 0

    def validate(self) -> None:
        """Refuse to add nothing."""
        if self.channels < 1:
            raise OptionError(f"extend-inputs: channels must be at least 1, not {self.channels}")
        if self.argument < 0:
            raise OptionError(
                f"extend-inputs: argument counts input tensors from 0, got {self.argument}"
            )

    @property
    def guarantee(self) -> Guarantee:
        """The same function of the channels that the network had."""
        return Guarantee.EXACT

    def propose(self, target: Target) -> Proposal:
        """Extend every weight that reads the input.

        Raises:
            RewriteError: the input is read by something that cannot be extended.
        """
        recordings = [target.captured(train) for train in (False, True)]
        try:
            edits = extend_inputs(target.model, recordings, self.channels, argument=self.argument)
        except RewriteError as error:
            name = type(target.model).__name__
            raise RewriteError(
                f"extend-inputs: {name} cannot read {self.channels} more channels: {error}"
            ) from error
        changes = tuple(
            Change(
                edit.path,
                f"{edit.size} -> {edit.size + len(edit.new)} on axis {edit.axis} of {edit.tensor}",
                "it reads the input",
            )
            for edit in edits
        )
        return Proposal(edits=edits, changes=changes)
