from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from pocketize.errors import ArtifactError
from pocketize.plugin.edits import (
    Edit,
    Extend,
    Redraw,
    Resize,
    SetArgument,
    SetAttribute,
    edit_from_json,
    read_attribute,
)

EDITS: list[Edit] = [
    Resize("a.b.weight", 1, (0, 2, 5), 8),
    Resize("scale", 0, (3,), 4),
    Extend("a.b.weight", 1, (4, 5), 4),
    SetAttribute("a.b", "num_features", 8, 3),
    SetAttribute("", "normalized_shape.0", 8, 3),
    SetArgument("", "view_1", "size", (2, 64, -1), (2, 16, -1)),
    Redraw(),
    Redraw("a.b"),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.kind)
def test_an_edit_survives_json(edit: Edit) -> None:
    again = edit_from_json(json.loads(json.dumps(edit.to_json())))
    assert again == edit
    assert type(again) is type(edit)
    assert hash(again) == hash(edit)


def test_json_names_the_kind_and_the_fields() -> None:
    assert EDITS[0].to_json() == {
        "edit": "resize",
        "tensor": "a.b.weight",
        "axis": 1,
        "keep": (0, 2, 5),
        "size": 8,
    }


def test_a_redraw_that_an_older_version_wrote_draws_everything() -> None:
    assert edit_from_json({"edit": "redraw"}) == Redraw("")


def test_an_edit_knows_the_module_it_changes() -> None:
    assert [edit.path for edit in EDITS] == ["a.b", "", "a.b", "a.b", "", "", "", "a.b"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, r"unknown kind of edit None; this version knows \['convert', 'extend', 'redraw'"),
        ({"edit": "explode"}, "unknown kind of edit 'explode'"),
        ({"edit": ["resize"]}, r"unknown kind of edit \['resize'\]"),
        ({"edit": "resize"}, "resize: lacks axis, keep, size, tensor"),
        (
            {"edit": "resize", "tensor": "w", "axis": "0", "keep": [0], "size": 2},
            "resize.axis: expected int",
        ),
        (
            {"edit": "resize", "tensor": "w", "axis": 0, "keep": 1, "size": 2},
            "resize.keep: expected list, got 1",
        ),
        (
            {"edit": "resize", "tensor": "w", "axis": 0, "keep": ["a"], "size": 2},
            r"resize.keep\[0\]: expected int",
        ),
        ({"edit": "resize", "tensor": "w", "axis": 0, "keep": [0]}, "resize: lacks size"),
        (
            {"edit": "set-attribute", "module": "", "name": "n", "old": 1, "new": "2"},
            "new: expected float",
        ),
        (
            {"edit": "set-attribute", "module": None, "name": "n", "old": 1, "new": 2},
            "module: expected str",
        ),
    ],
)
def test_what_is_no_edit_of_ours_is_an_error(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        edit_from_json(data)


def test_keys_that_an_edit_does_not_have_are_ignored_from_newer_versions() -> None:
    data = {**Redraw().to_json(), "note": "from the future"}
    assert edit_from_json(data) == Redraw()


class Sizes(NamedTuple):
    first: int
    second: int


class Owner(nn.Module):
    kind = 7

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.sizes = [8, 16]
        self.pair = (8, 4)
        self.named = Sizes(8, 4)
        self.torch_size = torch.Size([8, 2])

    @property
    def wide(self) -> int:
        return 9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 8),
        ("sizes", [8, 16]),
        ("sizes.1", 16),
        ("pair.0", 8),
        ("named.1", 4),
        ("torch_size.1", 2),
    ],
)
def test_an_attribute_or_one_element_of_it_is_read(name: str, value: Any) -> None:
    assert read_attribute(Owner(), name) == value


@pytest.mark.parametrize(
    "name",
    ["missing", "missing.0", "sizes.2", "sizes.-1", "sizes.x", "sizes.", "width.0", "kind", "wide"],
)
def test_what_is_no_attribute_of_the_instance_reads_as_none(name: str) -> None:
    assert read_attribute(Owner(), name) is None
