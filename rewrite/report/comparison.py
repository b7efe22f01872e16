"""Measure two networks the same way and put the figures side by side."""

from __future__ import annotations

__all__ = ["Comparison", "build", "compare"]

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocketize.engine.pipeline import history
from pocketize.errors import MeasureError
from pocketize.graph.capture import settle_inputs
from pocketize.memory import MemoryProfile, measure
from pocketize.plugin.base import PassRecord
from pocketize.report.document import (
    SCHEMA,
    Document,
    Environment,
    ModuleMemory,
    Peak,
    Rewrite,
    RewriteRow,
    Side,
    dump,
    load,
    scrub,
)
from pocketize.report.gate import Threshold, Violation, check
from pocketize.report.layout import layout, remarks, verdict
from pocketize.report.render import html, markdown, text
from pocketize.version import VERSION


@dataclass(frozen=True)
class Comparison:
    """Two networks side by side.

    The JSON document is the source: text, Markdown and HTML are drawn from it and nothing else, so
    ``Comparison.from_json(comparison.to_json())`` renders to the same characters. No rendering has
    a date or a file's path in it: two reports of the same networks differ in figures only.

    ``print(comparison)`` draws it for a terminal.

    Attributes:
        document: The figures, as dataclasses in the JSON's shape. Memory in bytes, time in seconds.
    """

    document: Document

    @property
    def verdict(self) -> str:
        """One line: both peaks, the parameters as a figure of their own, and what is promised."""
        return verdict(self.document)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What became slower or bigger on the measured machine, a sentence each."""
        return remarks(self.document)

    def check(self, thresholds: str | Iterable[Threshold | str]) -> list[Violation]:
        """Find the thresholds that the second network exceeds.

        Args:
            thresholds: each a :class:`~pocketize.report.Threshold` or its text, as in
                ``"peak 2% 16MiB"``; a text alone is one threshold.

        Returns:
            The violations, in the order of the thresholds; empty where all hold.

        Raises:
            ReportError: A text is no threshold, or is on a figure that was not taken.
        """
        return check(self.document, [thresholds] if isinstance(thresholds, str) else thresholds)

    def __str__(self) -> str:
        return text(layout(self.document)).rstrip("\n")

    def to_markdown(self) -> str:
        """Draw the report as Markdown, for a review."""
        return markdown(layout(self.document))

    def to_html(self) -> str:
        """Draw the report as one self-contained HTML page."""
        return html(layout(self.document))

    def to_json(self) -> str:
        """Write the document as JSON: sorted keys, memory as integers in bytes."""
        return dump(self.document)

    @classmethod
    def from_json(cls, source: str) -> Comparison:
        """Read what :meth:`to_json` wrote.

        Raises:
            ReportError: The text is no such JSON, or was written by another schema.
        """
        return cls(load(source))

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


#: Modules that are listed of each side; the report shows those of both.
_LARGEST = 10

#: What :func:`~pocketize.measure` differentiates where no loss is given.
_LOSS = "mean of squares of the outputs"

Mode = Literal["train", "infer"]


def compare(
    before: nn.Module,
    after: nn.Module,
    inputs: Any = None,
    *,
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam",
    estimate: bool = False,
    time_steps: int = 5,
    loss: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    step_in_backward: bool = False,
) -> Comparison:
    """Compare the memory, size and time of two networks.

    Each side is measured over a training step and over a forward without gradients, each time in a
    fresh process, so that measurements do not affect each other. Neither network is changed.

    Args:
        before: The original.
        after: What became of it, or any other network that takes the same inputs.
        inputs: Whatever :func:`~pocketize.measure` takes: tensors, a tuple, a dict, a text such as
            ``"1x1x96x96x96"``; by default inputs are guessed from ``before``. Both get the same.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"`` or ``None`` for a step that updates nothing.
        estimate: Count under fake tensors: any size fits, nothing runs, no time is taken.
        time_steps: Steps to take the median time of; 0 takes no time.
        loss: Turns the network's output into the scalar to differentiate; the default is that of
            :func:`~pocketize.measure`.
        device: Where to measure; by default where the networks are.
        step_in_backward: Update parameters in the backward pass, see
            :func:`pocketize.step_in_backward`.

    Returns:
        The comparison; ``print()`` it.

    Raises:
        InputError: The inputs cannot be read, or none could be guessed.
        MeasureError: A network could not be measured; the text says which, and in which mode.
    """
    settled = settle_inputs(before, inputs)
    steps = 0 if estimate else time_steps

    def taken(model: nn.Module, side: str, mode: Mode) -> MemoryProfile:
        try:
            return measure(
                model,
                settled,
                mode,
                optimizer if mode == "train" else None,
                loss=loss if mode == "train" else None,
                estimate=estimate,
                device=device,
                time_steps=steps,
                isolate=not estimate,
                step_in_backward=step_in_backward and mode == "train",
            )
        except MeasureError as error:
            raise MeasureError(f"compare, {side} ({mode}): {error}") from error

    profiles = {
        side: (taken(model, side, "train"), taken(model, side, "infer"))
        for side, model in (("before", before), ("after", after))
    }
    names = type(before).__name__, type(after).__name__
    described = getattr(loss, "__name__", type(loss).__name__) if loss else _LOSS
    return build(
        names, profiles["before"], profiles["after"], between(before, after), loss=described
    )


def between(before: nn.Module, after: nn.Module) -> tuple[PassRecord, ...]:
    """Give the passes that were applied to ``after`` and not already to ``before``."""
    old, new = history(before), history(after)
    return new[len(old) :] if new[: len(old)] == old else new


def build(
    names: tuple[str, str],
    before: tuple[MemoryProfile, MemoryProfile],
    after: tuple[MemoryProfile, MemoryProfile],
    records: Iterable[PassRecord] = (),
    *,
    loss: str = _LOSS,
) -> Comparison:
    """Make a comparison of profiles that were taken already, such as on another machine.

    Args:
        names: What to call the two networks.
        before: Profiles of a training step and of a forward of the first.
        after: The same of the second.
        records: The passes that lie between them.
        loss: What was differentiated.
    """
    trained = before[0]
    optimizer = trained.optimizer or "none"
    optimizer += ", in the backward pass" if trained.step_in_backward else ""
    return Comparison(
        Document(
            schema=SCHEMA,
            before=_side(names[0], *before),
            after=_side(names[1], *after),
            modules=_modules(before[0].modules, after[0].modules),
            rewrites=tuple(_rewrite(record) for record in records),
            environment=Environment(
                method="estimated" if trained.estimated else "measured",
                device=trained.device,
                dtype=trained.dtype,
                input=trained.input,
                optimizer=optimizer,
                loss=scrub(loss),
                torch=trained.torch,
                pocketize=VERSION,
                python=platform.python_version(),
                machine=f"{platform.system()} {platform.machine()}",
                threads=torch.get_num_threads(),
            ),
        )
    )


def _side(name: str, training: MemoryProfile, inference: MemoryProfile) -> Side:
    return Side(
        model=name,
        parameters=training.parameters,
        weight_bytes=training.weight_bytes,
        macs=inference.macs,
        training=_peak(training),
        inference=_peak(inference),
        not_counted=inference.not_counted,
    )


def _peak(profile: MemoryProfile) -> Peak:
    times = profile.step_seconds
    return Peak(
        bytes=profile.peak,
        categories=dict(profile.categories),
        reserved=profile.reserved,
        rss=profile.rss,
        # Digits below microseconds have no meaning.
        step_seconds=None if times is None else (round(times[0], 6), round(times[1], 6)),
        isolated=profile.isolated,
        why_not_isolated=scrub(profile.why_not_isolated) if profile.why_not_isolated else None,
    )


def _modules(before: dict[str, int], after: dict[str, int]) -> tuple[ModuleMemory, ...]:
    """The largest of either side, by their bytes before; ties by name, so that reports diff."""

    def largest(held: dict[str, int]) -> list[str]:
        return sorted((path for path in held if held[path] > 0), key=lambda p: (-held[p], p))

    paths = dict.fromkeys(largest(before)[:_LARGEST] + largest(after)[:_LARGEST])
    rows = [ModuleMemory(path, before.get(path), after.get(path)) for path in paths]
    return tuple(sorted(rows, key=lambda row: (-(row.before or 0), -(row.after or 0), row.path)))


def _rewrite(record: PassRecord) -> Rewrite:
    return Rewrite(
        name=record.name,
        guarantee=record.guarantee.upper(),
        options=dict(record.options),
        version=record.version,
        changed=tuple(
            RewriteRow(change.path, scrub(change.what), scrub(change.why))
            for change in record.changes
        ),
        refused=tuple(RewriteRow(r.path, "", scrub(r.why)) for r in record.refused),
        notes=tuple(scrub(note) for note in record.notes),
    )
