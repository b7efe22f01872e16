from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from pocketize.errors import ArtifactError, OptionError
from pocketize.graph.inputs import as_inputs
from pocketize.plugin.base import (
    Guarantee,
    OptionInfo,
    Pass,
    PassRecord,
    Proposal,
    Target,
    check_declaration,
)


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    """Halve widths.

    Attributes:
        width: the most channels
            a layer keeps.
        keep: patterns of paths to leave alone.
    """

    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "Halve every width"
    width: int | None = None
    keep: tuple[str, ...] = ()
    weights: Literal["slice", "reset"] = "slice"
    factor: float = 0.5

    def validate(self) -> None:
        if self.width is not None and self.width < 1:
            raise OptionError(f"{self.name}: width must be 1 or more, got {self.width}")

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.RETRAIN if self.weights == "reset" else Guarantee.APPROXIMATE

    def propose(self, target: Target) -> Proposal:
        return Proposal(notes=(f"{target.inputs.describe()}",))


@dataclass(frozen=True, kw_only=True)
class Needy(Halve):
    name: ClassVar[str] = "needy"
    target: int


def test_options_are_fields_and_are_checked_in_python() -> None:
    made = Halve(width=16, keep=["enc*"])  # type: ignore[arg-type]
    assert made.keep == ("enc*",)
    assert made == Halve(width=16, keep=("enc*",))
    assert hash(made) == hash(copy.deepcopy(made)) == hash(pickle.loads(pickle.dumps(made)))
    with pytest.raises(OptionError, match=r"halve: option 'width': expected int or none, got '16'"):
        Halve(width="16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        Halve(widht=16)  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        made.width = 3  # type: ignore[misc]


def test_the_guarantee_may_depend_on_options() -> None:
    assert Halve().guarantee is Guarantee.APPROXIMATE
    assert Halve(weights="reset").guarantee is Guarantee.RETRAIN
    assert str(Guarantee.EXACT) == "EXACT"
    assert Guarantee("exact") is Guarantee.EXACT


def test_only_options_that_differ_from_the_default_are_told() -> None:
    assert Halve().options() == {}
    assert str(Halve()) == "halve"
    changed = Halve(width=16, keep=("a", "b*"), factor=0.25)
    assert changed.options() == {"width": 16, "keep": ["a", "b*"], "factor": 0.25}
    assert json.loads(json.dumps(changed.options())) == changed.options()
    assert str(changed) == "halve:width=16,keep=a|b*,factor=0.25"


def test_a_pass_is_made_again_from_its_options() -> None:
    changed = Halve(width=16, keep=("a", "b*"), weights="reset")
    assert Halve.from_options(changed.options()) == changed
    as_text = {"width": "none", "keep": "a|b*", "weights": "reset"}
    assert Halve.from_options(as_text, text=True) == Halve(keep=("a", "b*"), weights="reset")
    assert Halve.from_options({"width": "none"}) == Halve()


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (
            {"widht": 16},
            False,
            "halve: unknown option 'widht'. Did you mean 'width'? "
            "Options of halve: width, keep, weights, factor",
        ),
        ({"width": 1.5}, False, "halve: option 'width': expected int or none, got 1.5 (float)"),
        ({"width": "wide"}, True, "halve: option 'width': expected int or none, got 'wide'"),
        (
            {"weights": "drop"},
            False,
            "halve: option 'weights': expected 'slice' or 'reset', got 'drop'",
        ),
        ({"width": 0}, False, "halve: width must be 1 or more, got 0"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], text: bool, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Halve.from_options(options, text=text)
    assert str(caught.value) == message


def test_a_required_option_must_be_given() -> None:
    assert Needy.from_options({"target": 3}).target == 3
    assert Needy(target=3).options() == {"target": 3}
    with pytest.raises(OptionError, match="needy: option 'target' is required: int"):
        Needy.from_options({})


def test_options_are_described_for_readers() -> None:
    assert Halve.describe_options() == (
        OptionInfo("width", "int or none", "none", "the most channels a layer keeps."),
        OptionInfo("keep", "list of str", "[]", "patterns of paths to leave alone."),
        OptionInfo("weights", "'slice' or 'reset'", "slice", ""),
        OptionInfo("factor", "float", "0.5", ""),
    )
    assert Needy.describe_options()[-1] == OptionInfo("target", "int", None, "")


def test_a_bad_name_shows_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"name must be lower-case words joined by - or _, .*'Big'"):

        class Big(Halve):
            name: ClassVar[str] = "Big"

    with pytest.raises(TypeError, match=r"\.after must be a tuple of names of passes, not 'amp'"):

        class Late(Halve):
            name: ClassVar[str] = "late"
            after: ClassVar[tuple[str, ...]] = "amp"  # type: ignore[assignment]


def test_an_undecorated_pass_is_refused() -> None:
    class Forgot(Halve):
        name: ClassVar[str] = "forgot"
        extra: int = 3

    with pytest.raises(TypeError, match=r"must be decorated with @dataclass\(frozen=True, kw_only"):
        Forgot()


def test_positional_options_are_refused() -> None:
    @dataclass(frozen=True)
    class Positional(Halve):
        name: ClassVar[str] = "positional"
        extra: int = 3

    with pytest.raises(TypeError, match=r"must be decorated with @dataclass\(frozen=True, kw_only"):
        check_declaration(Positional)


def test_a_pass_without_a_name_and_one_with_a_wrong_default_are_refused() -> None:
    class Nameless(Pass):
        pass

    with pytest.raises(TypeError, match="is a pass without a 'name'"):
        check_declaration(Nameless)

    @dataclass(frozen=True, kw_only=True)
    class Wrong(Halve):
        name: ClassVar[str] = "wrong"
        size: int = "big"  # type: ignore[assignment]

    with pytest.raises(TypeError, match="default of 'size': expected int, got 'big'"):
        check_declaration(Wrong)


def test_a_target_records_and_analyses_once_and_only_when_asked() -> None:
    calls: list[Any] = []
    model = nn.Conv2d(1, 2, 3)

    def record(train: bool) -> Any:
        calls.append(train)
        return f"graph {train}"

    def analyse() -> Any:
        calls.append("channels")
        return "groups"

    target = Target(
        model=model, inputs=as_inputs(torch.zeros(1, 1, 8, 8)), record=record, analyse=analyse
    )
    assert calls == []
    assert target.traced() == target.traced(train=False) == "graph False"
    assert target.traced(train=True) == "graph True"
    assert target.channels() == target.channels() == "groups"
    assert calls == [False, True, "channels"]
    assert Halve().propose(target).notes == ("1x1x8x8 float32",)


def test_a_record_goes_through_json() -> None:
    record = PassRecord("halve", {"width": 16}, "retrain", "0.1.0", ({"kind": "resize"},))
    assert PassRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    tuples = PassRecord("halve", {"keep": ("a",)}, "retrain", "1", ({"keep": (1, 2)},))
    assert PassRecord.from_json(json.loads(json.dumps(tuples.to_json()))) == tuples
    assert copy.deepcopy(record) == record == pickle.loads(pickle.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "record of a pass.name: expected str, got 3"),
        ({"edits": {}}, "record of a pass.edits: expected list, got {}"),
        ({"edits": ["x"]}, r"record of a pass.edits\[0\]: expected dict, got 'x'"),
        ({"extra": 1}, "a record of a pass needs exactly the keys name, options, guarantee"),
    ],
)
def test_a_foreign_record_is_refused(change: dict[str, Any], message: str) -> None:
    record = PassRecord("halve", {}, "retrain", "0.1.0").to_json()
    with pytest.raises(ArtifactError, match=message):
        PassRecord.from_json({**record, **change})


def test_a_record_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ArtifactError, match="needs exactly the keys"):
        PassRecord.from_json("halve")
