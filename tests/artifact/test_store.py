from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pocketize.artifact import load, save, skeleton
from pocketize.artifact import store as artifact
from pocketize.engine.pipeline import history, replay, rewrite
from pocketize.errors import ArtifactError
from pocketize.plugin.base import PassRecord
from pocketize.plugin.edits import Edit, Resize, SetAttribute


class Net(nn.Module):
    """A stem, a norm and a head, wide enough to be cut."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.stem(x))))


def cut(model: nn.Module, keep: tuple[int, ...] = (1, 2, 5), size: int = 8) -> nn.Module:
    """Leave a few channels between stem and head, by the hand-written record of a pass."""
    edits: list[Edit] = [
        Resize("stem.weight", 0, keep, size),
        Resize("stem.bias", 0, keep, size),
        *(
            Resize(f"norm.{name}", 0, keep, size)
            for name in ("weight", "bias", "running_mean", "running_var")
        ),
        Resize("head.weight", 1, keep, size),
        SetAttribute("stem", "out_channels", size, len(keep)),
        SetAttribute("norm", "num_features", size, len(keep)),
        SetAttribute("head", "in_channels", size, len(keep)),
    ]
    record = PassRecord(
        "pocket", {"width": 3}, "approximate", "0.0.1", tuple(edit.to_json() for edit in edits)
    )
    # through JSON, as a record comes out of a file
    replay(model, [PassRecord.from_json(json.loads(json.dumps(record.to_json())))])
    return model


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "small.safetensors"


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key


def test_a_rewritten_model_comes_back_with_its_shape_weights_and_history(path: Path) -> None:
    model = trained(cut(Net()))
    save(model, path)
    loaded = load(path, Net)
    assert isinstance(loaded, Net)
    assert_same_state(loaded, model)
    assert loaded.stem.out_channels == loaded.norm.num_features == loaded.head.in_channels == 3
    assert history(loaded) == history(model)
    assert len(history(loaded)) == 1
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(loaded(x), model(x))
    loaded(x).sum().backward()
    assert loaded.stem.weight.grad is not None


def test_a_model_that_was_never_rewritten_can_be_saved_too(path: Path) -> None:
    model = trained(Net())
    save(model, path)
    loaded = load(path, Net)
    assert_same_state(loaded, model)
    assert history(loaded) == history(model) == ()


def test_saving_changes_nothing_and_leaves_one_file(path: Path) -> None:
    model = trained(cut(Net()))
    before = copy.deepcopy(model.state_dict())
    save(model, path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_others_may_read_the_file_as_the_umask_says(path: Path) -> None:
    before = os.umask(0o022)
    try:
        save(Net(), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_same_model_makes_the_same_file(path: Path, tmp_path: Path) -> None:
    model = trained(cut(Net()))
    save(model, path)
    save(copy.deepcopy(model), tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_the_file_is_plain_safetensors_to_others(path: Path) -> None:
    model = trained(Net())
    save(model, path)
    other = Net()
    other.load_state_dict(load_file(path), strict=True)
    assert_same_state(other, model)


def test_weights_are_in_memory_only_once_and_each_owns_its_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(trained(cut(Net())), path)
    seen: list[bool] = []

    def watch(model: nn.Module, records: Any, **more: Any) -> None:
        seen.extend(parameter.is_meta for parameter in model.parameters())
        replay(model, records, **more)

    monkeypatch.setattr(artifact, "replay", watch)
    loaded = load(path, Net)
    assert seen == [True] * 6
    for tensor in loaded.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("hollow", [True, False])
def test_the_dtype_is_that_of_the_saved_model(
    path: Path, dtype: torch.dtype, hollow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(hollow, monkeypatch)
    model = trained(cut(Net())).to(dtype)
    save(model, path)
    loaded = load(path, Net)
    assert_same_state(loaded, model)
    assert loaded.stem.weight.dtype == dtype
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


def force(hollow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hollow:
        monkeypatch.setattr(skeleton, "_build_hollow", lambda factory: None)


@pytest.mark.parametrize("hollow", [True, False])
def test_modes_and_frozen_parameters_are_those_of_the_saved_model(
    path: Path, hollow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(hollow, monkeypatch)
    model = cut(Net())
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    save(model, path)
    loaded = load(path, lambda: Net().eval().requires_grad_(False))
    assert [(m.training) for m in loaded.modules()] == [True, True, False, True]
    frozen = [name for name, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == ["stem.weight"]

    save(model.eval(), path, overwrite=True)
    assert not any(module.training for module in load(path, Net).modules())


def test_an_overridden_train_does_not_disturb_the_modes(path: Path) -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> Frozen:
            raise AssertionError("loading must not call it")

    save(Net().eval(), path)
    assert not any(module.training for module in load(path, Frozen).modules())


@pytest.mark.parametrize("hollow", [True, False])
def test_memory_format_survives(path: Path, hollow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    force(hollow, monkeypatch)
    model = trained(Net()).to(memory_format=torch.channels_last)
    save(model, path)
    loaded = load(path, Net)
    assert_same_state(loaded, model)
    assert model.head.weight.stride() == loaded.head.weight.stride()
    assert loaded.stem.weight.stride() == model.stem.weight.stride()

    volume = nn.Conv3d(2, 3, 3).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    save(volume, path, overwrite=True)
    restored = load(path, lambda: nn.Conv3d(2, 3, 3))
    assert restored.weight.stride() == volume.weight.stride()
    assert torch.equal(restored.weight, volume.weight)


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.again = self.encoder


@pytest.mark.parametrize("hollow", [True, False])
@pytest.mark.parametrize("tied_by_factory", [True, False])
def test_ties_come_back_whoever_made_them(
    path: Path, hollow: bool, tied_by_factory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(hollow, monkeypatch)
    model = Tied()
    save(model, path)
    assert len(load_file(path)) == 3
    loaded = load(path, lambda: Tied(tied_by_factory))
    assert loaded.decoder.weight is loaded.encoder.weight
    assert loaded.again is loaded.encoder
    assert isinstance(loaded.decoder.weight, nn.Parameter)
    assert_same_state(loaded, model)


@pytest.mark.parametrize("hollow", [True, False])
def test_a_tie_that_was_cut_is_not_joined_in_silence(
    path: Path, hollow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(hollow, monkeypatch)
    save(Tied(tied=False), path)
    message = r"encoder.weight and decoder.weight are one tensor in the factory's model and two in"
    with pytest.raises(ArtifactError, match=message):
        load(path, Tied)


def test_views_of_one_memory_are_saved_apart(path: Path) -> None:
    model = Tied(tied=False)
    both = torch.randn(2, 4, 4)
    model.encoder.weight.data, model.decoder.weight.data = both[0], both[1].t()
    save(model, path)
    loaded = load(path, lambda: Tied(tied=False))
    assert_same_state(loaded, model)
    assert loaded.encoder.weight is not loaded.decoder.weight


class Kept(nn.Module):
    """Tensors outside the state_dict, an alias of a parameter, and extra state."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        weight = nn.Parameter(torch.zeros(4))
        self.weight = weight
        self.every = [weight]
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("window", torch.ones(3), persistent=False)
        self.grid = torch.arange(3)
        self.calls = torch.zeros(size)

    def get_extra_state(self) -> Tensor:
        return self.calls

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = state


def test_what_the_file_does_not_hold_comes_from_the_factory(path: Path) -> None:
    model = Kept(size=5).bfloat16()
    model.calls += 7
    with torch.no_grad():
        model.weight += 1
    save(model, path)
    loaded = load(path, Kept)
    assert loaded.every[0] is loaded.weight
    assert loaded.weight.tolist() == [1, 1, 1, 1]
    assert loaded.scale.dtype == loaded.window.dtype == torch.bfloat16
    assert loaded.window.tolist() == [1, 1, 1]
    assert loaded.grid.tolist() == [0, 1, 2]
    assert loaded.calls.tolist() == [7] * 5


def test_a_parametrised_model_comes_back(path: Path) -> None:
    def factory() -> nn.Module:
        norm = torch.nn.utils.parametrizations
        return nn.Sequential(norm.weight_norm(nn.Linear(3, 3)), norm.spectral_norm(nn.Linear(3, 3)))

    model = factory().eval()
    save(model, path)
    loaded = load(path, factory)
    assert_same_state(loaded, model)
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), model(x))


def test_attributes_of_parameters_survive(path: Path) -> None:
    def factory() -> nn.Module:
        model = nn.Linear(2, 2)
        model.weight.no_decay = True  # type: ignore[attr-defined]
        return model

    save(factory(), path)
    assert load(path, factory).weight.no_decay


def test_loading_leaves_the_random_state_alone(path: Path) -> None:
    save(Net(), path)
    before = torch.random.get_rng_state()
    load(path, Net)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_device_is_the_callers_choice(path: Path) -> None:
    save(Kept(), path)
    loaded = load(path, Kept, device="meta")
    assert loaded.weight.is_meta
    assert loaded.window.is_meta


# what can go wrong: saving


class Odd(nn.Module):
    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make

    def get_extra_state(self) -> Any:
        return self.make()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Odd(lambda: {"a": 1}),
            r"'_extra_state' in the state_dict of Odd is no tensor but dict, and safetensors holds "
            r"tensors only. If it comes from get_extra_state, return a tensor there",
        ),
        (
            Odd(lambda: torch.eye(2).to_sparse()),
            "'_extra_state' of Odd is sparse_coo; safetensors holds plain dense tensors only",
        ),
        (nn.Linear(2, 2, device="meta"), r"'weight' of Linear has no data \(it is on the meta"),
        (Odd(lambda: torch.zeros(1, dtype=torch.complex128)), "cannot write .*: .*complex128"),
        (nn.LazyLinear(3), r"'weight' of LazyLinear is not initialised yet \(a lazy module\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_safetensors_cannot_hold_is_named(path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        save(model, path)
    assert list(path.parent.iterdir()) == []


def test_an_existing_file_is_not_overwritten_unless_asked(path: Path) -> None:
    save(Net(), path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"small\.safetensors exists already"):
        save(trained(Net()), path)
    assert path.read_bytes() == before
    save(trained(Net()), path, overwrite=True)
    assert path.read_bytes() != before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no folder .*nowhere"):
        save(Net(), tmp_path / "nowhere" / "a.safetensors")


# what can go wrong: loading


def test_a_factory_of_another_width_is_told_what_differs(path: Path) -> None:
    save(cut(Net()), path)
    with pytest.raises(ArtifactError) as caught:
        load(path, lambda: Net(width=16))
    message = str(caught.value)
    assert message.startswith("the factory does not build the model that was saved: cannot resize")
    assert f"{path} was saved from a Net, the factory builds a Net. Give the factory the" in message
    assert "rewritten by pocketize" in message


def test_a_factory_of_another_model_is_told_which_keys_differ(path: Path) -> None:
    save(Net(), path)

    def factory() -> nn.Module:
        model = Net(width=4)
        model.tail = nn.Conv2d(1, 1, 1)
        del model.norm
        return model

    with pytest.raises(ArtifactError) as caught:
        load(path, factory)
    assert str(caught.value) == (
        f"{path} does not fit the factory's model:\n"
        "  not in the file: tail.weight, tail.bias\n"
        "  not in the model: norm.bias, norm.num_batches_tracked, norm.running_mean, "
        "norm.running_var, norm.weight\n"
        "  other shapes: stem.weight (8x1x3x3 in the file, 4x1x3x3 in the model), "
        "stem.bias (8 in the file, 4 in the model), "
        "head.weight (2x8x1x1 in the file, 2x4x1x1 in the model)\n"
        f"{path} was saved from a Net, the factory builds a Net. Give the factory the options that "
        "the saved model had before it was rewritten"
    )


def test_only_the_first_few_differences_are_listed(path: Path) -> None:
    save(nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)]), path)
    with pytest.raises(ArtifactError, match=r"not in the model: .* and 35 more"):
        load(path, lambda: nn.Identity())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_factory_that_rewrites_is_told_to_build_the_original(path: Path) -> None:
    save(cut(Net()), path)
    with pytest.raises(
        ArtifactError, match=r"rewritten already \(pocket\)\. Build the model as it"
    ):
        load(path, lambda: cut(Net()))


def test_a_lazy_factory_is_told_to_run_its_model(path: Path) -> None:
    save(nn.Linear(2, 3), path)
    with pytest.raises(ArtifactError, match="the factory must run its model once: weight is not"):
        load(path, lambda: nn.LazyLinear(3))


def test_a_model_in_place_of_the_factory_is_explained(path: Path) -> None:
    save(Net(), path)
    with pytest.raises(
        ArtifactError, match=r"factory must be a function .*lambda: Net\(width=64\)"
    ):
        load(path, Net())


def rewrite_metadata(path: Path, **changes: Any) -> None:
    tensors = load_file(path)
    with safetensors.safe_open(path, framework="pt") as opened:
        data = json.loads(opened.metadata()["pocketize"])
    data |= changes
    data = {key: value for key, value in data.items() if value is not None}
    save_file(tensors, path, {"pocketize": json.dumps(data)})


def test_a_newer_format_is_refused_with_both_versions(path: Path) -> None:
    save(cut(Net()), path)
    rewrite_metadata(path, format=artifact.FORMAT + 1, pocketize="9.0.0", records="new")
    message = (
        r"was written by pocketize 9\.0\.0 in format 2; this is pocketize \S+, which reads formats "
        r"up to 1\. Install a newer pocketize"
    )
    with pytest.raises(ArtifactError, match=message):
        load(path, Net)


def test_another_version_with_the_same_format_works_and_is_logged(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = cut(Net())
    save(model, path)
    rewrite_metadata(path, pocketize="9.0.0")
    with caplog.at_level(logging.INFO, logger="pocketize"):
        assert_same_state(load(path, Net), model)
    assert "was written by pocketize 9.0.0, in a format that this version reads" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "is damaged: 'format'"),
        ({"format": "1"}, "is damaged: recipe.format: expected int, got '1'"),
        ({"state": []}, "is damaged: recipe.state: expected dict"),
        ({"state": {}}, "is damaged: recipe.state: lacks buffers, channels_last"),
        ({"ties": "none"}, "is damaged: recipe.ties: expected dict"),
        ({"records": [{"name": "pocket"}]}, "a record of a pass needs exactly the keys"),
        (
            {"records": [PassRecord("x", {}, "exact", "1", ({"edit": "explode"},)).to_json()]},
            "unknown kind of edit 'explode'",
        ),
    ],
)
def test_a_damaged_recipe_is_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    save(Net(), path)
    rewrite_metadata(path, **changes)
    with pytest.raises(ArtifactError, match=message):
        load(path, Net)


def test_a_missing_key_is_named(path: Path) -> None:
    save(Net(), path)
    tensors = load_file(path)
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    del tensors["norm.bias"]
    save_file(tensors, path, metadata)
    with pytest.raises(ArtifactError, match=r"(?s)not in the file: norm\.bias\n"):
        load(path, Net)


def test_plain_weights_are_told_from_a_saved_model(path: Path) -> None:
    save_file(Net().state_dict(), path)
    message = r"holds plain weights and no recipe: .* model\.load_state_dict\(safetensors"
    with pytest.raises(ArtifactError, match=message):
        load(path, Net)


def test_a_truncated_file_is_refused_before_anything_is_built(path: Path) -> None:
    save(Net(), path)
    path.write_bytes(path.read_bytes()[:-7])

    def factory() -> nn.Module:
        pytest.fail("nothing must be built")

    with pytest.raises(ArtifactError, match=r"is truncated: it has [0-9,]+ of [0-9,]+ bytes"):
        load(path, factory)


def test_a_pickle_is_not_opened(path: Path) -> None:
    torch.save(Net(), path)
    with pytest.raises(ArtifactError, match=r"is not a safetensors file: it looks like one that"):
        load(path, Net)


class Wrapper(nn.Module):
    """Somebody's module around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_passes_of_a_part_are_not_lost_in_silence(tmp_path: Path) -> None:
    """The file of the whole holds the part's weights, and not how it was rewritten."""

    def part() -> nn.Module:
        return rewrite(Net(), "amp", inputs="1x1x8x8")

    path, x = tmp_path / "whole.safetensors", torch.randn(1, 1, 8, 8)
    whole = Wrapper(part())
    save(whole, path)
    with pytest.raises(ArtifactError, match=r"the part 'net' of the Wrapper .* by amp"):
        load(path, lambda: Wrapper(Net()))
    again = load(path, lambda: Wrapper(part()))
    assert torch.equal(again(x), whole(x))
