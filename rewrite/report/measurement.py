"""The figures of one network: :func:`take` measures them, :class:`Measurement` holds them.

Text, Markdown and HTML are made from these dataclasses only, so a report renders in the same way
after it was written to JSON and read again.
"""

from __future__ import annotations

__all__ = [
    "Environment",
    "Measurement",
    "Rewrite",
    "RewriteRow",
    "check_modes",
    "dump",
    "load",
    "take",
]

import dataclasses
import json
import platform
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from pocketize.engine.pipeline import history
from pocketize.errors import InputError, MeasureError, ReportError
from pocketize.graph.capture import settle_inputs
from pocketize.memory import MemoryProfile, measure
from pocketize.plugin.base import PassRecord
from pocketize.report.layers import LayerSummary, layers_of
from pocketize.report.layout import layout, verdict
from pocketize.report.page import fragment, html
from pocketize.report.render import markdown, text
from pocketize.untrusted import printable, read_as, read_json, scrub
from pocketize.version import VERSION

_T = TypeVar("_T")

#: Raised by one whenever a reader of the older documents would misread a newer one.
SCHEMA = 2

Mode = Literal["train", "infer"]

#: What :func:`~pocketize.measure` differentiates where no loss is given.
_LOSS = "mean of squares of the outputs"


@dataclass(frozen=True)
class RewriteRow:
    """One thing that a pass changed, or (``what`` empty) refused to change."""

    path: str
    what: str
    why: str


@dataclass(frozen=True)
class Rewrite:
    """One pass that was applied to the network."""

    name: str
    guarantee: str
    options: dict[str, Any]
    version: str
    changed: tuple[RewriteRow, ...]
    refused: tuple[RewriteRow, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in sorted(self.options.items()))
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class Environment:
    """Where the figures were taken.

    Attributes:
        machine: system, architecture and processor; no name of a host.
        threads: that torch used within an operator.
    """

    pocketize: str
    python: str
    machine: str
    threads: int


@dataclass(frozen=True)
class Measurement:
    """One network as it was measured. Its JSON is a baseline for later comparisons.

    Attributes:
        model: name of the network.
        train: a training step; ``None`` if it was not taken.
        infer: a forward without gradients; ``None`` if it was not taken.
        layers: modules that hold parameters or have settings, in the order of ``named_modules``.
        passes: what was applied to the network, in order.
        loss: what a training step differentiates.
        exported: the forward is one flat graph that calls no module, as in an exported program.
        environment: where the figures were taken.
    """

    model: str
    train: MemoryProfile | None
    infer: MemoryProfile | None
    layers: tuple[LayerSummary, ...]
    passes: tuple[Rewrite, ...]
    loss: str
    exported: bool
    environment: Environment

    @property
    def profiles(self) -> tuple[MemoryProfile, ...]:
        """The modes that were taken: one or two, the training step first."""
        return tuple(profile for profile in (self.train, self.infer) if profile is not None)

    @property
    def conditions(self) -> dict[str, str]:
        """What the figures hold for, by the names that reports use."""
        profile = self.profiles[0]
        optimizer = profile.optimizer or "none"
        optimizer += ", in the backward pass" if profile.step_in_backward else ""
        return {
            "figures": "estimated" if profile.estimated else "measured",
            "input": profile.input,
            "dtype": profile.dtype,
            "device": profile.device,
            **({"optimizer": optimizer, "loss": self.loss} if self.train else {}),
            "threads": str(self.environment.threads),
            "torch": profile.torch,
            "python": self.environment.python,
            "machine": self.environment.machine,
            "pocketize": self.environment.pocketize,
        }

    def __str__(self) -> str:
        return text(layout(self)).rstrip("\n")

    def to_markdown(self) -> str:
        """Draw the figures as Markdown."""
        return markdown(layout(self))

    def to_html(self) -> str:
        """Draw the figures as one self-contained HTML page."""
        return html(layout(self))

    def __repr__(self) -> str:
        return printable(f"<Measurement of {self.model}: {verdict((self,))}>")

    def _repr_html_(self) -> str:
        return fragment(layout(self)[1:])

    def to_json(self) -> str:
        """Write the figures as JSON: sorted keys, memory as integers in bytes."""
        return dump("measurement", dataclasses.asdict(self))

    @classmethod
    def from_json(cls, source: str) -> Measurement:
        """Read what :meth:`to_json` wrote.

        Raises:
            ReportError: the text is no such JSON, or was written by another schema.
        """
        made = load(cls, "measurement", source)
        check_modes(made)
        return made


def take(
    model: nn.Module,
    inputs: Any = None,
    *,
    modes: Collection[Mode] = ("train", "infer"),
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam",
    estimate: bool = False,
    time_steps: int = 5,
    loss: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    step_in_backward: bool = False,
    name: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Measure one network: each mode in a fresh process, so that they do not affect each other.

    Args:
        model: any module; it is not changed.
        inputs: as for :func:`~pocketize.measure`; guessed by default.
        modes: ``"train"``, ``"infer"``, or both.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"`` or ``None`` for a step that updates nothing.
        estimate: count on fake tensors: any size fits, nothing runs, no time is taken.
        time_steps: steps to take the median time of; 0 takes no time.
        loss: turns the network's output into the scalar to differentiate; the default is that of
            :func:`~pocketize.measure`.
        device: where to measure; by default where the network is.
        step_in_backward: update parameters in the backward pass, see
            :func:`pocketize.step_in_backward`.
        name: what to call the network; by default the name of its class.
        progress: called with what is measured next, once a mode.

    Raises:
        InputError: the inputs cannot be read, or none could be guessed.
        MeasureError: the network could not be measured; the text says in which mode.
    """
    if not modes or (wrong := set(modes) - {"train", "infer"}):
        got = ", ".join(map(repr, sorted(wrong))) if modes else "none"
        raise MeasureError(f"modes must be 'train', 'infer' or both, got {got}")
    settled = settle_inputs(model, inputs)
    profiles: dict[str, MemoryProfile] = {}
    for mode in modes:
        training = mode == "train"
        progress(f"{'a training step' if training else 'inference'} of {type(model).__name__}")
        try:
            profile = measure(
                model,
                settled,
                mode,
                optimizer if training else None,
                loss=loss if training else None,
                estimate=estimate,
                device=device,
                time_steps=0 if estimate else time_steps,
                isolate=not estimate,
                step_in_backward=step_in_backward and training,
            )
        except (InputError, MeasureError) as error:
            raise type(error)(f"{mode}: {error}") from error
        why, times = profile.why_not_isolated, profile.step_seconds
        profiles[mode] = dataclasses.replace(
            profile,
            why_not_isolated=scrub(why) if why else None,
            # digits below microseconds have no meaning
            step_seconds=None if times is None else (round(times[0], 6), round(times[1], 6)),
        )
    described = getattr(loss, "__name__", type(loss).__name__) if loss else _LOSS
    return Measurement(
        model=name or type(model).__name__,
        train=profiles.get("train"),
        infer=profiles.get("infer"),
        layers=layers_of(model),
        passes=tuple(map(_rewrite, history(model))),
        loss=scrub(described),
        exported=_is_exported(model),
        environment=Environment(
            pocketize=VERSION,
            python=platform.python_version(),
            machine=_machine(),
            threads=torch.get_num_threads(),
        ),
    )


def _is_exported(model: nn.Module) -> bool:
    if not isinstance(model, fx.GraphModule):
        return False
    calls = (node.target for node in model.graph.nodes if node.op == "call_module")
    return all(target == "_guards_fn" for target in calls)


def _machine() -> str:
    machine = f"{platform.system()} {platform.machine()}"
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return machine
    return f"{machine}, {found[1]}" if found else machine


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


def dump(kind: str, data: dict[str, Any]) -> str:
    """Write a document as JSON: sorted keys, two spaces, a final newline."""
    document = {"kind": kind, "schema": SCHEMA, **data}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def load(target: type[_T], kind: str, source: str, ignored: Sequence[str] = ()) -> _T:
    """Read what :func:`dump` wrote as a dataclass, without the fields that follow from others.

    Raises:
        ReportError: the text is no JSON, of another kind or schema, or lacks or misspells a field.
    """
    try:
        data = read_json(source)
    except ValueError as error:
        raise ReportError(f"{kind}: not JSON ({error}); expected what to_json() wrote") from error
    data = dict(data) if isinstance(data, dict) else {}
    schema, found = data.pop("schema", None), data.pop("kind", None)
    if schema != SCHEMA:
        raise ReportError(
            f"{kind}: expected schema {SCHEMA}, got {schema!r}. Make the file again, or read it "
            "with the version of pocketize that wrote it."
        )
    if found != kind:
        raise ReportError(f"expected a {kind}, got a {found!r:.100}")
    for name in ignored:
        data.pop(name, None)
    try:
        return read_as(target, data, kind)
    except ValueError as error:
        raise ReportError(str(error)) from None


def check_modes(read: Measurement) -> None:
    """Check that a measurement that was read has figures, each under its own mode.

    Raises:
        ReportError: it has not.
    """
    for mode, profile in (("train", read.train), ("infer", read.infer)):
        if profile is not None and profile.mode != mode:
            raise ReportError(f"measurement: {mode} holds figures of mode {profile.mode!r:.100}")
    if not read.profiles:
        raise ReportError("measurement: holds neither a training step nor a forward")
