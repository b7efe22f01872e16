"""The comparison as data, as in JSON; figures that follow from others are not in it.

Text, Markdown and HTML are made from these dataclasses only, so a report renders in the same way
after it was written to JSON and read again.
"""

from __future__ import annotations

__all__ = [
    "SCHEMA",
    "Document",
    "Environment",
    "ModuleMemory",
    "Peak",
    "Rewrite",
    "RewriteRow",
    "Side",
    "dump",
    "load",
    "scrub",
]

import dataclasses
import json
import re
from typing import Any

from pocketize.errors import ReportError
from pocketize.untrusted import read_as, read_json

#: Raised by one whenever a reader of the older documents would misread a newer one.
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Peak:
    """One profile's peak: a training step's or a forward's.

    Attributes:
        bytes: Bytes at the peak: live tensors on CPU, the allocator's on CUDA.
        categories: Bytes at the peak by category, in no order.
        reserved: Bytes that the CUDA allocator reserved, where there is one.
        rss: Growth of the process' resident set over the measurement, in bytes, where known.
        step_seconds: Median and interquartile spread of a step's duration, where it was timed.
        isolated: Whether a fresh process measured it.
        why_not_isolated: The reason, where it was meant to be and was not.
    """

    bytes: int
    categories: dict[str, int]
    reserved: int | None
    rss: int | None
    step_seconds: tuple[float, float] | None
    isolated: bool
    why_not_isolated: str | None


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two networks.

    Attributes:
        model: Name of its class.
        weight_bytes: Bytes of parameters and buffers.
        macs: Multiply-accumulates of the convolutions and linear layers of one forward.
        not_counted: Operators that multiply and are not in ``macs``; only in the JSON where there
            are any.
    """

    model: str
    parameters: int
    weight_bytes: int
    macs: int
    training: Peak
    inference: Peak
    not_counted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModuleMemory:
    """Bytes that live tensors of one module hold at the training peak, where it has any."""

    path: str
    before: int | None
    after: int | None


@dataclasses.dataclass(frozen=True)
class RewriteRow:
    """One thing that a pass changed, or (``what`` empty) refused to change."""

    path: str
    what: str
    why: str


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One pass that lies between the two networks."""

    name: str
    guarantee: str
    options: dict[str, Any]
    version: str
    changed: tuple[RewriteRow, ...]
    refused: tuple[RewriteRow, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Environment:
    """What the figures hold for.

    Attributes:
        method: ``"measured"`` on real tensors or ``"estimated"`` under fake ones.
        threads: Threads that torch used within an operator.
    """

    method: str
    device: str
    dtype: str
    input: str
    optimizer: str
    loss: str
    torch: str
    pocketize: str
    python: str
    machine: str
    threads: int


@dataclasses.dataclass(frozen=True)
class Document:
    """A whole comparison."""

    schema: int
    before: Side
    after: Side
    modules: tuple[ModuleMemory, ...]
    rewrites: tuple[Rewrite, ...]
    environment: Environment


def scrub(text: str) -> str:
    """Remove from a text what differs between runs and machines: memory addresses and folders."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    absolute = r"(?<![\w.)\]])(?:~|[A-Za-z]:)?[/\\](?:[\w.+-]+[/\\])+([\w.+-]+)"
    return re.sub(absolute, r"\1", text)


def dump(document: Document) -> str:
    """Write a document as JSON: sorted keys, two spaces, a final newline."""
    data = dataclasses.asdict(document)
    for side in (data["before"], data["after"]):
        if not side["not_counted"]:
            del side["not_counted"]  # so that older versions read the document
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def load(text: str) -> Document:
    """Read a document back.

    Raises:
        ReportError: The text is no JSON, of another schema, or lacks or misspells a field.
    """
    try:
        data = read_json(text)
    except ValueError as error:
        raise ReportError(
            f"report: not JSON ({error}). Comparison.from_json reads what to_json() wrote."
        ) from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ReportError(
            f"report: expected a comparison of schema {SCHEMA}, got {schema!r}. "
            "Make the report again, or read it with the version of pocketize that wrote it."
        )
    try:
        return read_as(Document, data, "report")
    except ValueError as error:
        raise ReportError(str(error)) from None
