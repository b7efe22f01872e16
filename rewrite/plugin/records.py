"""The rows of a plan, and the record of a rewrite that stays with the model."""

from __future__ import annotations

__all__ = ["Change", "PassRecord", "Refusal"]

import dataclasses
from dataclasses import dataclass
from typing import Any

from pocketize.errors import ArtifactError
from pocketize.plugin.options import to_jsonable
from pocketize.untrusted import read_as


@dataclass(frozen=True)
class Change:
    """One row of a plan: something that will change.

    Attributes:
        path: module path, as in ``model.get_submodule(path)``.
        what: what changes, short: ``"64 -> 16 channels"``.
        why: the reason, or ``""`` where the pass as a whole is the reason.
    """

    path: str
    what: str
    why: str = ""


@dataclass(frozen=True)
class Refusal:
    """One row of a plan: something that the pass was meant to change, and will not.

    Attributes:
        path: module path.
        why: the reason, in words that tell what to do about it.
    """

    path: str
    why: str


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to a model: enough to read it later, and to repeat it by shape.

    Attributes:
        name: the pass.
        options: those that differed from the defaults.
        guarantee: ``"exact"``, ``"approximate"`` or ``"retrain"``, with these options.
        version: the version of pocketize that applied it.
        edits: the edits as JSON-able mappings, in the order in which they were applied.
        changes: the rows of the plan that were carried out.
        refused: the rows of the plan that were not, with reasons.
        notes: the plan's sentences about the whole.
        variants: the settings of attributes that the model was recorded with, besides its own.
    """

    name: str
    options: dict[str, Any]
    guarantee: str
    version: str
    edits: tuple[dict[str, Any], ...] = ()
    changes: tuple[Change, ...] = ()
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    variants: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Hold options and edits as JSON gives them back: a record equals itself read again."""
        object.__setattr__(self, "options", to_jsonable(self.options))
        object.__setattr__(self, "edits", tuple(to_jsonable(edit) for edit in self.edits))

    def __repr__(self) -> str:
        counts = f"{len(self.changes)} changed, {len(self.refused)} left alone"
        return f"<PassRecord {self.name} ({self.guarantee}): {counts}>"

    def to_json(self) -> dict[str, Any]:
        """The record as a mapping that :mod:`json` can write."""
        data: dict[str, Any] = to_jsonable(dataclasses.asdict(self))
        if not self.variants:
            del data["variants"]
        return data

    @classmethod
    def from_json(cls, data: Any) -> PassRecord:
        """Read a record that :meth:`to_json` wrote.

        Raises:
            ArtifactError: the mapping is none of ours.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name != "variants"]
        if not isinstance(data, dict) or data.keys() - {"variants"} != set(names):
            raise ArtifactError(
                f"a record of a pass needs exactly the keys {', '.join(names)}; got {data!r:.200}"
            )
        try:
            return read_as(cls, data, "record of a pass")
        except ValueError as error:
            raise ArtifactError(str(error)) from None
