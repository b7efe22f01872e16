"""What a pass is: it looks at a model, returns edits, and says what they keep.

A pass is a frozen, keyword-only dataclass. Its fields are its options in Python, on the command
line and in a recipe. It gets a :class:`Target` and returns a :class:`Proposal`. It never changes
the model, because only the engine applies edits. So every pass, including those of other packages,
has a dry run and a readable plan, and leaves the model unchanged on an error::

    @dataclass(frozen=True, kw_only=True)
    class Halve(Pass):
        \"\"\"Halve every width.

        Attributes:
            keep: patterns of module paths to leave alone.
        \"\"\"

        name: ClassVar[str] = "halve"
        summary: ClassVar[str] = "Halve every width that can be halved"
        keep: tuple[str, ...] = ()

        @property
        def guarantee(self) -> Guarantee:
            return Guarantee.APPROXIMATE

        def propose(self, target: Target) -> Proposal: ...
"""

from __future__ import annotations

__all__ = [
    "Change",
    "Guarantee",
    "OptionInfo",
    "Pass",
    "PassRecord",
    "Proposal",
    "Refusal",
    "Target",
]

import abc
import dataclasses
import enum
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pocketize.errors import OptionError, nearest
from pocketize.plugin.options import (
    attribute_sentences,
    check_value,
    describe_annotation,
    read_text,
    to_jsonable,
    write_text,
)
from pocketize.plugin.records import Change, PassRecord, Refusal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pocketize.channels.groups import ChannelGroups
    from pocketize.graph.capture import TracedGraph
    from pocketize.graph.inputs import Inputs
    from pocketize.plugin.edits import Edit

_P = TypeVar("_P", bound="Pass")
_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


class Guarantee(enum.Enum):
    """What a rewritten model keeps of the original; ordered from the most to the least."""

    EXACT = "exact"
    """The same function and the same gradients, up to rounding."""
    APPROXIMATE = "approximate"
    """The same shapes, with the original's weights carried over; outputs differ."""
    RETRAIN = "retrain"
    """A new function of the same inputs and outputs, to be trained."""

    def __str__(self) -> str:
        """``"EXACT"``, as plans and reports write it."""
        return self.name


@dataclass(frozen=True)
class Proposal:
    """What a pass returns: what to do, and rows and notes for the plan.

    Attributes:
        edits: the changes as data, in the order in which they are to be applied.
        changes: the same as rows of the plan, one a module.
        refused: what was left alone, with reasons.
        notes: sentences about the whole, such as which width was chosen and why.
        again: run the pass again on its own result, which may allow more: a grouped convolution
            with one channel left in each group can lose whole groups. If the options of the pass
            refer to the model before, this is the pass to run instead.
        warnings: sentences that are given as warnings too.
    """

    edits: tuple[Edit, ...] = ()
    changes: tuple[Change, ...] = ()
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    again: bool | Pass = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a pass looks at. A pass changes nothing that it reaches from here.

    The graph and the channel groups take time, and several passes need neither, so both are made
    on first use and kept.

    Attributes:
        model: the module to be rewritten; the output of the pass before, where there was one.
        inputs: example inputs on the model's device.
        generator: the only source of random numbers a pass may use; None means torch's default.
        variants: the inputs with other settings of the model's attributes, which it must run with.
        record: records the graph; the engine provides it, passes call :meth:`traced`.
        analyse: finds the channel groups; the engine provides it, passes call :meth:`channels`.
        record_variants: records both modes of each variant; passes call :meth:`traces`.
    """

    model: nn.Module
    inputs: Inputs
    generator: torch.Generator | None = None
    variants: tuple[Inputs, ...] = ()
    record: Callable[[bool], TracedGraph] = field(repr=False)
    analyse: Callable[[], ChannelGroups] = field(repr=False)
    record_variants: Callable[[], tuple[TracedGraph, ...]] = field(default=tuple, repr=False)
    _known: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def traced(self, train: bool = False) -> TracedGraph:
        """The model's graph, recorded in training mode or, by default, in evaluation mode."""
        traced: TracedGraph = self._once(("graph", train), lambda: self.record(train))
        return traced

    def traces(self) -> tuple[TracedGraph, ...]:
        """All graphs: evaluation mode, training mode, then both of each variant of the model."""
        variants: tuple[TracedGraph, ...] = self._once("variants", self.record_variants)
        return (self.traced(), self.traced(train=True), *variants)

    def channels(self) -> ChannelGroups:
        """The model's channel groups: what can be resized, and with what."""
        groups: ChannelGroups = self._once("channels", self.analyse)
        return groups

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


@dataclass(frozen=True)
class OptionInfo:
    """One option of a pass, as ``pocketize passes`` shows it.

    Attributes:
        name: the name of the dataclass field.
        type: the type in words, ``"int or none"``.
        default: the default as it is written on the command line; None for a required option.
        help: the field's sentence from the class's docstring (``Attributes:``), or ``""``.
    """

    name: str
    type: str
    default: str | None
    help: str


@dataclass(frozen=True, kw_only=True)
class Pass(abc.ABC):
    """A rewrite. Subclasses are frozen, keyword-only dataclasses; the fields are the options.

    Option values are checked against the field's annotation when a pass is made, wherever they come
    from. Override :meth:`validate` for what an annotation cannot say, such as a range.

    Class attributes:
        name: what the command line and recipes call it; lower case, with ``-`` or ``_``.
        summary: one line for ``pocketize passes``.
        after: names of passes that must come earlier when both are given.
        conflicts: names of passes that cannot be given together with this one.
        positional: the one option that may be given without its name, as in ``Width(0.5)``; it is
            declared with ``field(kw_only=False)``.

    Raises:
        OptionError: on construction, for a value of the wrong type or out of range.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    positional: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the declarations of a pass when it is imported."""
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__ and not (isinstance(cls.name, str) and _NAME.fullmatch(cls.name)):
            raise TypeError(
                f"{cls.__qualname__}.name must be lower-case words joined by - or _, "
                f"such as 'in-place-norm', not {cls.name!r}"
            )
        for attribute in ("after", "conflicts"):
            names = getattr(cls, attribute)
            if not (isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
                raise TypeError(
                    f"{cls.__qualname__}.{attribute} must be a tuple of names of passes, "
                    f"not {names!r}"
                )

    def __post_init__(self) -> None:
        """Check every option and bring it into its canonical form."""
        check_declaration(type(self))
        for name, annotation in _annotations(type(self)).items():
            try:
                value = check_value(getattr(self, name), annotation)
            except OptionError as error:
                raise OptionError(f"{self.name}: option {name!r}: {error}") from None
            object.__setattr__(self, name, value)  # frozen to everyone else
        self.validate()

    def validate(self) -> None:  # noqa: B027  (a hook, not an obligation)
        """Raise :class:`OptionError` for options that are out of range or exclude each other."""

    @property
    @abc.abstractmethod
    def guarantee(self) -> Guarantee:
        """What this pass keeps with these options."""

    @abc.abstractmethod
    def propose(self, target: Target) -> Proposal:
        """Look at the target and return edits; change nothing.

        Raises:
            PatternError: an option names paths that the model does not have.
            RewriteError: the pass cannot work on this model at all.
        """

    def conversion_options(self) -> dict[str, Any]:
        """Return the options of the conversion that follow from those of the pass.

        A saved model is refused if its edits contradict these.
        """
        return {}

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON would give them back."""
        return {
            option.name: to_jsonable(getattr(self, option.name))
            for option in dataclasses.fields(self)
            if getattr(self, option.name) != _default(option)
        }

    def __str__(self) -> str:
        """The pass as the command line writes it: ``pocket:width=16,keep=enc*|dec.0``."""
        options = ",".join(f"{name}={write_text(value)}" for name, value in self.options().items())
        return f"{self.name}:{options}" if options else self.name

    @classmethod
    def from_options(cls: type[_P], options: Mapping[str, Any], *, text: bool = False) -> _P:
        """Make the pass from a mapping of options: from JSON, from TOML, or from text.

        Args:
            options: values by name; what is left out has its default.
            text: all values are text from the command line, to be read by the options' types.

        Raises:
            OptionError: an unknown name (the nearest known one is suggested), a missing required
                option, or a value that does not fit.
        """
        annotations = _annotations(cls)
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in annotations:
                known = ", ".join(annotations) or "none"
                raise OptionError(
                    f"{cls.name}: unknown option {name!r}.{nearest(name, annotations)} "
                    f"Options of {cls.name}: {known}"
                )
            try:
                if text:
                    values[name] = read_text(value, annotations[name])
                else:
                    values[name] = check_value(value, annotations[name], from_file=True)
            except OptionError as error:
                raise OptionError(f"{cls.name}: option {name!r}: {error}") from None
        for option in dataclasses.fields(cls):
            if option.name not in values and _default(option) is MISSING:
                expected = describe_annotation(annotations[option.name])
                raise OptionError(f"{cls.name}: option {option.name!r} is required: {expected}")
        return cls(**values)

    @classmethod
    def describe_options(cls) -> tuple[OptionInfo, ...]:
        """The options with types, defaults and explanations, in the order of declaration."""
        annotations, sentences = _annotations(cls), attribute_sentences(cls)
        defaults = {option.name: _default(option) for option in dataclasses.fields(cls)}
        return tuple(
            OptionInfo(
                name,
                type=describe_annotation(annotations[name]),
                default=None if default is MISSING else write_text(default),
                help=sentences.get(name, ""),
            )
            for name, default in defaults.items()
        )


def check_declaration(cls: type[Pass]) -> None:
    """Check that a subclass of :class:`Pass` is declared as one.

    Raises:
        TypeError: no name or summary, not a keyword-only dataclass of its own (but for the option
            that ``positional`` names), or an option whose type has no textual form.
    """
    for attribute in ("name", "summary"):
        if not isinstance(getattr(cls, attribute, None), str):
            raise TypeError(f"{cls.__qualname__} is a pass without a {attribute!r}")
    own = inspect.get_annotations(cls)
    options = {option.name: option for option in dataclasses.fields(cls)}
    forgotten = [
        name for name, kind in own.items() if name not in options and "ClassVar" not in str(kind)
    ]
    loose = [name for name, option in options.items() if not option.kw_only]
    if forgotten or loose not in ([], [cls.positional]):
        raise TypeError(
            f"{cls.__qualname__} is a pass and must be decorated with "
            "@dataclass(frozen=True, kw_only=True)"
        )
    for name, annotation in _annotations(cls).items():
        default = _default(options[name])
        if default is not MISSING:
            try:
                check_value(default, annotation)
            except OptionError as error:
                raise TypeError(f"{cls.__qualname__}: default of {name!r}: {error}") from None


def _annotations(cls: type[Pass]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {option.name: hints[option.name] for option in dataclasses.fields(cls)}


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default
