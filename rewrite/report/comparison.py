"""Two measurements side by side."""

from __future__ import annotations

__all__ = ["Comparison", "compare", "compare_measurements"]

import dataclasses
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocketize.errors import InputError, MeasureError, ReportError
from pocketize.graph.capture import settle_inputs
from pocketize.report.blocks import Block
from pocketize.report.differences import common_modes, status, unlike
from pocketize.report.gate import LimitCheck, Threshold, judge
from pocketize.report.layout import layout, remarks, verdict
from pocketize.report.measurement import Measurement, Mode, check_modes, dump, load, take
from pocketize.report.page import fragment, html
from pocketize.report.render import markdown, text
from pocketize.untrusted import printable


@dataclass(frozen=True)
class Comparison:
    """Two networks side by side.

    The two measurements are the source: text, Markdown and HTML are drawn from them and nothing
    else, so ``Comparison.from_json(comparison.to_json())`` renders to the same characters. No
    rendering has a date or a file's path in it: two reports of the same networks differ in figures
    only.

    ``print(comparison)`` draws it for a terminal.

    Attributes:
        before: The first network.
        after: The second.
        limits: What every rendering checks and tells, see :meth:`with_limits`.
    """

    before: Measurement
    after: Measurement
    limits: tuple[str, ...] = ()

    def with_limits(self, limits: str | Iterable[Threshold | str]) -> Comparison:
        """Return the same comparison with limits, so that every rendering tells the verdict.

        Args:
            limits: as for :meth:`check`.

        Raises:
            ReportError: As :meth:`check`.
        """
        checks = self._judge(limits)
        return dataclasses.replace(self, limits=tuple(str(check.threshold) for check in checks))

    @property
    def status(self) -> str:
        """``"over the limit"``, ``"better"``, ``"ok"`` (within limits), or without limits
        ``"changed"`` or ``"unchanged"``.
        """
        return status(self.before, self.after, self._judge(self.limits))

    @property
    def verdict(self) -> str:
        """One line: the status, both peaks, the parameters, and what the passes promise."""
        return verdict((self.before, self.after), self._judge(self.limits))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What became slower or bigger on the measured machine, a sentence each."""
        return remarks(self.before, self.after)

    def check(self, thresholds: str | Iterable[Threshold | str]) -> list[LimitCheck]:
        """Find the thresholds that the second network exceeds.

        Args:
            thresholds: each a :class:`~pocketize.report.Threshold` or its text, as in
                ``"peak 2% 16MiB"``; a text alone is one threshold.

        Returns:
            Those that are exceeded, in the order given; empty where all hold.

        Raises:
            ReportError: A text is no threshold, or is on a figure that was not taken.
        """
        return [check for check in self._judge(thresholds) if check.over]

    def _judge(self, thresholds: str | Iterable[Threshold | str]) -> list[LimitCheck]:
        given = [thresholds] if isinstance(thresholds, str) else thresholds
        return judge(self.before, self.after, given)

    def _blocks(self) -> list[Block]:
        return layout(self.before, self.after, checks=self._judge(self.limits))

    def __str__(self) -> str:
        return text(self._blocks()).rstrip("\n")

    def to_markdown(self) -> str:
        """Draw the report as Markdown, for a review."""
        return markdown(self._blocks())

    def to_html(self) -> str:
        """Draw the report as one self-contained HTML page."""
        return html(self._blocks())

    def to_json(self) -> str:
        """Write both measurements, limits and verdict as JSON: sorted keys, memory in bytes."""
        told = {"status": self.status, "verdict": self.verdict}
        return dump("comparison", dataclasses.asdict(self) | told)

    @classmethod
    def from_json(cls, source: str) -> Comparison:
        """Read what :meth:`to_json` wrote.

        Raises:
            ReportError: The text is no such JSON, or was written by another schema.
        """
        made = load(cls, "comparison", source, ignored=("status", "verdict"))
        check_modes(made.before)
        check_modes(made.after)
        return _with_common_modes(made).with_limits(made.limits)

    def __repr__(self) -> str:
        return printable(
            f"<Comparison of {self.before.model} and {self.after.model}: {self.verdict}>"
        )

    def _repr_html_(self) -> str:
        return fragment(self._blocks()[1:])


def compare(
    before: nn.Module,
    after: nn.Module,
    inputs: Any = None,
    *,
    modes: Collection[Mode] = ("train", "infer"),
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam",
    estimate: bool = False,
    time_steps: int = 5,
    loss: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    step_in_backward: bool = False,
    anyway: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Compare the memory, size and time of two networks.

    Each side is measured over a training step and over a forward without gradients, each time in a
    fresh process, so that measurements do not affect each other. Neither network is changed.

    Args:
        before: The original.
        after: What became of it, or any other network that takes the same inputs.
        inputs: Whatever :func:`~pocketize.measure` takes: tensors, a tuple, a dict, a text such as
            ``"1x1x96x96x96"``; by default inputs are guessed from ``before``. Both get the same.
        modes: ``"train"``, ``"infer"``, or both.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"`` or ``None`` for a step that updates nothing.
        estimate: Count under fake tensors: any size fits, nothing runs, no time is taken.
        time_steps: Steps to take the median time of; 0 takes no time.
        loss: Turns the network's output into the scalar to differentiate; the default is that of
            :func:`~pocketize.measure`.
        device: Where to measure; by default where the networks are.
        step_in_backward: Update parameters in the backward pass, see
            :func:`pocketize.step_in_backward`.
        anyway: As of :func:`compare_measurements`.
        progress: As of :func:`take`.

    Returns:
        The comparison; ``print()`` it.

    Raises:
        InputError: The inputs cannot be read, or none could be guessed.
        MeasureError: A network could not be measured; the text says which, and in which mode.
        ReportError: The figures of the two cannot be compared, see :func:`compare_measurements`.
    """
    settled = settle_inputs(before, inputs)

    def taken(model: nn.Module, side: str) -> Measurement:
        try:
            return take(
                model,
                settled,
                modes=modes,
                optimizer=optimizer,
                estimate=estimate,
                time_steps=time_steps,
                loss=loss,
                device=device,
                step_in_backward=step_in_backward,
                progress=lambda text: progress(f"{side}, {text}"),
            )
        except (InputError, MeasureError) as error:
            raise type(error)(f"compare, {side}, {error}") from error

    sides = taken(before, "before"), taken(after, "after")
    return compare_measurements(*sides, anyway=anyway)


def compare_measurements(
    before: Measurement, after: Measurement, *, anyway: bool = False
) -> Comparison:
    """Put two measurements side by side. A mode that only one of them has is left out.

    Args:
        before: The first, from :func:`take` or from JSON.
        after: The second.
        anyway: Compare also what was taken under different conditions; the report says which.

    Raises:
        ReportError: The two differ in inputs, dtype, device, optimizer or loss, one is estimated
            and the other measured, or, for measured figures, they are of different machines or
            numbers of threads; or only one of them is an exported program; or they have no mode
            in common.
    """
    differences = [
        f"{name} is {old} before and {new} after"
        for name, (old, new) in unlike(before, after).items()
    ]
    if differences and not anyway:
        flat = (
            ". The graph of an exported program keeps the mode in which it was exported, frees "
            "tensors at other moments than the module does, and calls no module to which its "
            "tensors would belong"
        )
        raise ReportError(
            f"these figures are not alike: {'; '.join(differences)}"
            f"{flat if before.exported != after.exported else ''}. Measure both in the same way, "
            "or compare them anyway (anyway=True, --anyway)"
        )
    return _with_common_modes(Comparison(before, after))


def _with_common_modes(made: Comparison) -> Comparison:
    common = {mode for mode, _ in common_modes((made.before, made.after))}
    if not common:
        raise ReportError(
            "there is nothing to compare: one network was measured in a training step only, the "
            "other in inference only"
        )
    left_out: dict[str, Any] = {mode: None for mode in ("train", "infer") if mode not in common}
    before, after = (dataclasses.replace(side, **left_out) for side in (made.before, made.after))
    return Comparison(before, after, made.limits)
