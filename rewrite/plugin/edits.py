"""Changes to a model, as data.

A pass returns edits; :mod:`pocketize.engine.surgery` alone applies them. An edit can be written to
JSON and read again, so that a saved model can be rebuilt by shape.
"""

from __future__ import annotations

__all__ = [
    "Convert",
    "Edit",
    "Extend",
    "Redraw",
    "Resize",
    "SetArgument",
    "SetAttribute",
    "edit_from_json",
    "read_attribute",
]

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from pocketize.errors import ArtifactError
from pocketize.untrusted import read_as

_KINDS: dict[str, type[Edit]] = {}


@dataclass(frozen=True)
class Edit:
    """Base class of edits."""

    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            _KINDS[cls.kind] = cls

    @property
    def path(self) -> str:
        """Path of the module that changes."""
        path: str = getattr(self, "module", "")
        return path

    @property
    def what(self) -> str:
        """What changes there, in a few words for the plan."""
        return self.kind

    def to_json(self) -> dict[str, Any]:
        """Return the edit as a JSON-able dict."""
        return {"edit": self.kind} | {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)
        }


@dataclass(frozen=True)
class _AxisEdit(Edit):
    """A change to the size of one axis of a parameter or buffer."""

    tensor: str
    axis: int

    @property
    def path(self) -> str:
        return self.tensor.rpartition(".")[0]

    def _sizes(self, before: int, after: int) -> str:
        return f"axis {self.axis} of {self.tensor.rpartition('.')[2]}: {before} -> {after}"


@dataclass(frozen=True)
class Resize(_AxisEdit):
    """Keep some indices on one axis of a parameter or buffer, and of its gradient.

    Attributes:
        keep: ascending indices that stay.
        size: the size of the axis before.
    """

    kind: ClassVar[str] = "resize"
    keep: tuple[int, ...]
    size: int

    @property
    def what(self) -> str:
        """Sizes of the axis before and after."""
        return self._sizes(self.size, len(self.keep))


@dataclass(frozen=True)
class Extend(_AxisEdit):
    """Add zeros on one axis of a parameter or buffer, and of its gradient: a resize undone.

    Attributes:
        new: ascending indices, on the axis as it will be, of what is added; what was there fills
            the others in its order.
        size: the size of the axis before.
    """

    kind: ClassVar[str] = "extend"
    new: tuple[int, ...]
    size: int

    @property
    def what(self) -> str:
        """Sizes of the axis before and after."""
        return self._sizes(self.size, self.size + len(self.new))

    @property
    def old(self) -> tuple[int, ...]:
        """Ascending indices, on the axis as it will be, of what was there before."""
        added = set(self.new)
        return tuple(i for i in range(self.size + len(self.new)) if i not in added)


@dataclass(frozen=True)
class SetAttribute(Edit):
    """Give a Python attribute of a module another value.

    Attributes:
        module: path of the module.
        name: the attribute; ``"normalized_shape.0"`` names one element of a tuple or list.
        old: the value before, a number.
        new: the value after.
    """

    kind: ClassVar[str] = "set-attribute"
    module: str
    name: str
    old: int | float
    new: int | float

    @property
    def what(self) -> str:
        """The attribute before and after."""
        old, new = (f"{n:.6g}" if isinstance(n, float) else str(n) for n in (self.old, self.new))
        return f"{self.name} {old} -> {new}"


@dataclass(frozen=True)
class SetArgument(Edit):
    """Give an argument of an operator in a ``GraphModule`` another value.

    Exported programs have sizes as literals in their graph.

    Attributes:
        module: path of the ``GraphModule``.
        node: name of the node.
        argument: name of the argument in the operator's schema.
        old: the numbers before; one for a number, several for a list.
        new: the numbers after, as many.
    """

    kind: ClassVar[str] = "set-argument"
    module: str
    node: str
    argument: str
    old: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def what(self) -> str:
        """The argument before and after."""
        before, after = (", ".join(map(str, numbers)) for numbers in (self.old, self.new))
        return f"{self.argument} of {self.node}: {before} -> {after}"


@dataclass(frozen=True)
class Redraw(Edit):
    """Draw weights anew from the distribution that the model was initialised with.

    Attributes:
        module: path of a module that a conversion makes, whose weights alone are drawn, as the
            weights that stood there were; ``""`` draws all weights of the model.
    """

    kind: ClassVar[str] = "redraw"
    module: str = ""

    @property
    def what(self) -> str:
        """Which weights are drawn."""
        return "its weights drawn anew" if self.module else "all weights drawn anew"


@dataclass(frozen=True)
class Convert(Edit):
    """Let a module run another way, by a conversion that a pass has registered in code.

    Attributes:
        module: path of the module, ``""`` for the model itself.
        conversion: name of the conversion, see :mod:`pocketize.plugin.conversions`.
        options: arguments of the conversion: text, numbers, lists and dicts, as JSON has them.
    """

    kind: ClassVar[str] = "convert"
    module: str
    conversion: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def what(self) -> str:
        """The conversion and its options."""
        options = ", ".join(f"{name}={value!r:.60}" for name, value in self.options.items())
        return f"converted by {self.conversion}" + (f" ({options})" if options else "")


def edit_from_json(data: dict[str, Any]) -> Edit:
    """Read an edit that :meth:`Edit.to_json` wrote.

    Raises:
        ArtifactError: the kind is unknown or fields are missing or of the wrong type.
    """
    kind = _KINDS.get(str(data.get("edit")))
    if kind is None:
        raise ArtifactError(
            f"unknown kind of edit {data.get('edit')!r}; this version knows {sorted(_KINDS)}"
        )
    names = {field.name for field in dataclasses.fields(kind)}
    try:
        return read_as(kind, {k: v for k, v in data.items() if k in names}, kind.kind)
    except ValueError as error:
        raise ArtifactError(f"edit {data!r:.200}: {error}") from None


def read_attribute(module: Any, name: str) -> Any:
    """Return an attribute, or one element of it for ``"name.0"``; ``None`` if there is none."""
    base, dot, index = name.partition(".")
    value = vars(module).get(base)
    if not dot:
        return value
    inside = isinstance(value, tuple | list) and index.isdecimal() and int(index) < len(value)
    return value[int(index)] if inside else None
