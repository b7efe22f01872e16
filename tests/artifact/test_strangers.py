"""Saved models that somebody else wrote: what they may decide, and what they may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pocketize import load, rewrite, save
from pocketize.artifact import load_weights, read_header
from pocketize.engine.pipeline import history
from pocketize.errors import ArtifactError
from pocketize.passes import Offload, Patchwise


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    return nn.Sequential(*layers).double().eval()


X = torch.ones(1, 1, 16, 16, dtype=torch.float64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def edited(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(read_header(path).metadata["pocketize"])
    change(data)
    save_file(load_file(path), path, {"pocketize": json.dumps(data)})


def tiled(folder: Path | None, **more: Any) -> nn.Module:
    place = None if folder is None else str(folder)
    given = Patchwise(size=8, keep="disk", output="disk", folder=place, progress=False, **more)
    return rewrite(net(), given, inputs=X)


def in_all_options(folder: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for record in data["records"]:
            record["options"]["folder"] = folder
            for edit in record["edits"]:
                edit["options"]["folder"] = folder

    return change


def offloaded(folder: Path | None) -> nn.Module:
    place = None if folder is None else str(folder)
    return rewrite(net(), Offload(to="disk", min_bytes="1B", folder=place), inputs=X)


@pytest.mark.parametrize("make", [tiled, offloaded])
def test_the_folder_of_a_pass_comes_from_who_loads(
    path: Path, make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    mine.mkdir()
    made = make(theirs)
    save(made, path)
    assert str(theirs) not in path.read_bytes().decode("latin-1")
    edited(path, in_all_options(str(theirs)))
    theirs.rmdir()
    for folder in (None, mine):
        loaded = load(path, net, folder=folder)
        with torch.no_grad():
            assert torch.equal(loaded(X), made.forward(X) if theirs.exists() else net()(X))
        loaded(X).sum().backward()
        (record,) = history(loaded)
        assert record.options.get("folder") == (None if folder is None else str(mine))
        assert not theirs.exists()


def test_a_folder_for_files_that_nobody_makes_is_left_out(path: Path, tmp_path: Path) -> None:
    save(rewrite(net(), Patchwise(size=8, progress=False), inputs=X), path)
    (record,) = history(load(path, net, folder=tmp_path))
    assert "folder" not in record.options


def test_a_model_that_goes_on_needs_a_folder_from_who_loads(path: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    save(tiled(theirs, resume=True), path)
    with pytest.raises(ArtifactError, match=r"load\(path, factory, folder='...'\) or --folder"):
        load(path, net)
    with torch.no_grad():
        torch.testing.assert_close(load(path, net, folder=tmp_path / "mine")(X), net()(X))
    assert (tmp_path / "mine").exists()
    assert not theirs.exists()


def option(name: str, value: Any) -> Callable[[Any], None]:
    return lambda data: data["records"][0]["options"].update({name: value})


def in_record(name: str, value: Any) -> Callable[[Any], None]:
    return lambda data: data["records"][0].update({name: value})


def in_edit(name: str, value: Any) -> Callable[[Any], None]:
    return lambda data: data["records"][0]["edits"][0]["options"].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (option("size", 4), "contradicts itself: its options say .*'size': 4, .*its edit says"),
        (in_edit("mode", "slab"), "contradicts itself"),
        (in_edit("train", True), "contradicts itself"),
        (option("reduce", "argmax"), "says 'exact', and with its options .* 'approximate'"),
        (option("colour", "red"), "unknown option 'colour'"),
        (in_record("guarantee", "retrain"), "says 'retrain'"),
        (in_record("name", "pocket"), "unknown option"),
        (in_record("name", "nobody"), "the pass 'nobody', which is not installed here"),
    ],
)
def test_a_record_that_says_other_than_its_edits_is_refused(
    path: Path, change: Callable[[Any], None], message: str
) -> None:
    save(tiled(None), path)
    edited(path, change)
    with pytest.raises(ArtifactError, match=message):
        load(path, net)


def test_a_conversion_of_another_pass_is_refused(path: Path) -> None:
    save(rewrite(net().float(), "amp", inputs=X.float()), path)
    edited(path, lambda data: data["records"][0]["edits"][0].update({"conversion": "offload"}))
    with pytest.raises(ArtifactError, match="has a conversion of another, 'offload'"):
        load(path, net)


def test_shapes_that_are_not_in_the_file_take_no_memory(path: Path) -> None:
    save(rewrite(net(), "bottleneck:force=2", inputs=X), path)
    edited(path, in_edit("ranks", [10**7, 10**7]))  # 7 PiB of weights
    with pytest.raises(ArtifactError, match="other shapes"):
        load(path, net)


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(path: Path) -> None:
    model, other = net(), net()
    with torch.no_grad():
        other[0].weight.zero_()
    save(other, path.with_name("other"))
    save(model, path)

    def factory() -> nn.Module:
        path.with_name("other").replace(path)
        return net()

    assert torch.equal(load(path, factory)(X), model(X))


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(path: Path) -> None:
    save(nn.Linear(100, 100), path)

    def factory() -> nn.Module:
        path.write_bytes(path.read_bytes()[:-8])
        return nn.Linear(100, 100)

    with pytest.raises(ArtifactError, match="became shorter while it was read"):
        load(path, factory)


def crafted(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (f'{{"a": {ENTRY}, "a": {ENTRY}}}', "not a safetensors file"),
        (f'{{"a": {ENTRY}, "b": {ENTRY}}}', "before 'b' is a hole, or another tensor"),
        ('{"a": ' * 50_000, "not a safetensors file"),
        (f'{{"__metadata__": {{"x": 1}}, "a": {ENTRY}}}', "its metadata is no mapping from text"),
        (f'{{"__metadata__": [], "a": {ENTRY}}}', "its metadata is no mapping from text"),
        (f'{{"a": {ENTRY.replace("F32", "F99")}}}', "the type 'F99', which is not known here"),
        (f'{{"a": {ENTRY.replace("[1]", "[-1]")}}}', "has the shape"),
        (f'{{"a": {ENTRY.replace("[1]", "[true]")}}}', "has the shape"),
        (f'{{"a": {ENTRY.replace("[1]", "[1.0]")}}}', "has the shape"),
        (f'{{"a": {ENTRY.replace("[1]", "[1099511627776]")}}}', "which does not fit the shape"),
        (f'{{"a": {ENTRY.replace("[1]", f"[0, {2**61}]")}}}', "has the shape"),
        (f'{{"a": {ENTRY.replace("[0, 4]", "[4, 8]")}}}', "before 'a' is a hole"),
        (f'{{"a": {ENTRY.replace("[0, 4]", "[0, 4.0]")}}}', "lies at"),
        (f'{{"a": {ENTRY.replace("[0, 4]", "[4, 0]")}}}', "which does not fit the shape"),
        (f'{{"a": {ENTRY.replace("[0, 4]", "[0, NaN]")}}}', "not a safetensors file"),
        ("{}", "4 bytes at its end belong to no tensor"),
    ],
)
def test_a_crafted_header_is_refused(path: Path, header: str, message: str) -> None:
    crafted(path, header.encode(), bytes(4))
    for read in (read_header, lambda p: load(p, net), lambda p: load_weights(net(), p)):
        with pytest.raises(ArtifactError, match=message):
            read(path)


def test_bytes_that_are_no_bools_are_true(path: Path) -> None:
    crafted(
        path, b'{"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}', bytes((0, 1, 255))
    )
    model = nn.Module()
    model.register_buffer("a", torch.zeros(3, dtype=torch.bool))
    load_weights(model, path)
    assert model.a.tolist() == [False, True, True]
    assert model.a.sum() == 2
