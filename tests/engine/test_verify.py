"""The check: what runs on a copy without memory against what was predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketize import analyse
from pocketize.channels.groups import ChannelGroups
from pocketize.channels.labels import Value
from pocketize.engine.verify import (
    Mismatch,
    backward_failure,
    check_edits,
    predicted_shape,
    split_channel,
)
from pocketize.errors import RewriteError
from pocketize.plugin.edits import Edit, Resize, SetAttribute
from tests.contract.snapshot import Snapshot

INPUT = "2x3x8x8"


class Between(nn.Module):
    """stem -> a function -> head."""

    def __init__(self, function: Callable[[Tensor], Any] = torch.relu, out: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.function = function
        self.head = nn.Conv2d(out, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.function(self.stem(x)))


def halved(channels: ChannelGroups, *paths: str) -> tuple[Edit, ...]:
    """Edits that keep every other unit of the groups of some layers."""
    groups = {g for path in paths for g in channels.matching(path)}
    return channels.resize({group: np.arange(0, group.units, 2) for group in groups})


def check(model: nn.Module, *paths: str) -> Mismatch | None:
    channels = analyse(model, INPUT)
    return check_edits(model, channels, halved(channels, *paths))


# -- prediction ----------------------------------------------------------------------------------


def test_the_predicted_shape_counts_what_stays_on_every_labelled_axis() -> None:
    stays = np.array([True, True, False, True, False, False, True, True])
    value = Value((5, 3, 4), (np.array([1, 2, 3]).reshape(1, 3, 1), np.array([[[4, 5, 6, 7]]])))
    assert predicted_shape(value, stays) == (5, 2, 2)


def test_the_predicted_shape_of_a_split_axis_drops_rows_and_columns_that_are_gone() -> None:
    stays = np.array([True, True, False, True, True, False, True])
    label = np.array([[1, 2, 3], [4, 5, 6]])
    assert predicted_shape(Value((2, 3), (label,)), stays) == (2, 2)


# -- edits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_right_edits_pass_and_the_model_stays_as_it_was(train: bool) -> None:
    model = Between().train(train)
    before = Snapshot(model)
    assert check(model, "stem") is None
    assert list(before.differences(Snapshot(model))) == []


def test_no_edit_at_all_passes() -> None:
    model = Between()
    assert check_edits(model, analyse(model, INPUT), ()) is None


@pytest.mark.parametrize("left_out", ["stem.weight", "stem.bias", "head.weight"])
def test_a_tensor_that_was_left_out_is_caught(left_out: str) -> None:
    model = Between()
    channels = analyse(model, INPUT)
    edits = [
        e for e in halved(channels, "stem") if not str(e).startswith(f"Resize(tensor={left_out!r}")
    ]
    assert len(edits) == 2
    mismatch = check_edits(model, channels, edits)
    assert mismatch is not None
    assert "aten.conv2d.default at test_verify.py:" in mismatch.text
    assert "expected" in mismatch.text


@pytest.mark.parametrize(
    "edit", [Resize("stem.bias", 0, (0, 3), 8), Resize("stem.bias", 0, (0, 1, 2), 8)]
)
def test_a_channel_that_stays_here_and_goes_there_is_told(edit: Resize) -> None:
    channels = analyse(Between(), INPUT)
    edits = [Resize("stem.weight", 0, (0, 1), 8), edit, Resize("head.weight", 1, (0, 1), 8)]
    assert split_channel(channels, edits).endswith("which is the same channel, stays")
    assert "index 2 of stem.weight axis 0 is dropped, but index 2 of stem.bias axis 0" in (
        split_channel(channels, [*edits[:1], replace(edit, keep=(0, 1, 2)), edits[2]])
    )
    assert split_channel(channels, [*edits[:1], replace(edit, keep=(0, 1)), edits[2]]) == ""


def test_edits_that_do_not_fit_the_model_are_an_error_of_their_own() -> None:
    model = Between()
    with pytest.raises(RewriteError, match="expected size 9"):
        check_edits(model, analyse(model, INPUT), [Resize("stem.weight", 0, (0,), 9)])


def test_a_view_that_would_run_and_be_silently_wrong_is_caught() -> None:
    model = Between(lambda y: y.reshape(y.shape[0], 8, -1, y.shape[-1]))
    mismatch = check(model, "stem")
    assert mismatch is not None
    assert "expected 2x4x8x8, got 2x8x4x8" in mismatch.text
    assert (8, 4) in mismatch.sizes
    assert mismatch.expected == ((2, 4, 8, 8),)
    assert mismatch.units
    with torch.no_grad():  # it does run
        assert nn.Conv2d(8, 2, 1)(torch.rand(2, 4, 8, 8).reshape(2, 8, -1, 8)).shape == (2, 2, 4, 8)


def test_a_slice_at_a_literal_place_is_caught() -> None:
    mismatch = check(Between(lambda y: y[:, 3:], out=5), "stem")
    assert mismatch is not None
    assert "aten.slice.Tensor at test_verify.py:" in mismatch.text
    assert "expected 2x3x8x8, got 2x2x8x8" in mismatch.text
    assert mismatch.arguments == {"start": 2}


def test_a_slice_of_the_right_size_at_the_wrong_place_is_caught() -> None:
    mismatch = check(Between(lambda y: y[:, 3:5], out=2), "stem")
    assert mismatch is not None
    assert "expected start=2, got 3" in mismatch.text


def test_a_size_that_raises_is_caught_where_it_raises() -> None:
    mismatch = check(Between(lambda y: (y * 2).split([5, 3], 1)[0], out=5), "stem")
    assert mismatch is not None
    assert "aten.split_with_sizes.default at test_verify.py:" in mismatch.text
    assert mismatch.position[0] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.relu() if y.shape[1] > 4 else y.sigmoid(),
        lambda y: y.relu() if y.shape[1] > 4 else y,
        lambda y: y if y.shape[1] > 4 else y.relu(),
    ],
    ids=["another", "one less", "one more"],
)
def test_another_sequence_of_operators_is_caught(function: Callable[[Tensor], Tensor]) -> None:
    assert check(Between(function), "stem") is not None


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda y, width: y.relu() if width > 4 else y, "fewer operators ran than before"),
        (lambda y, width: y if width > 4 else y.relu(), "more operators ran than before"),
    ],
    ids=["one less", "one more"],
)
def test_another_sequence_at_the_very_end_is_caught(
    function: Callable[[Tensor, int], Tensor], says: str
) -> None:
    class Last(Between):
        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return function(self.head(y), y.shape[1])

    mismatch = check(Last(), "stem")
    assert mismatch is not None
    assert says in mismatch.text


def test_copies_and_casts_may_come_and_go() -> None:
    """A contiguous() after which nothing has changed is no operator of the function."""
    model = Between(lambda y: y.contiguous() if y.shape[1] > 4 else y)
    assert check(model, "stem") is None


def test_outputs_of_another_shape_are_caught() -> None:
    model = Between()
    channels = analyse(model, INPUT)
    edits = [Resize("head.weight", 0, (1,), 2), Resize("head.bias", 0, (1,), 2)]
    mismatch = check_edits(model, channels, edits)
    assert mismatch is not None
    assert "the outputs have other shapes" in mismatch.text


def test_outputs_nested_otherwise_are_caught() -> None:
    class Nests(Between):
        def forward(self, x: Tensor) -> Any:
            y = self.stem(x)
            out = self.head(y)
            return out if y.shape[1] > 4 else [out]

    mismatch = check(Nests(), "stem")
    assert mismatch is not None
    assert "the outputs have other shapes" in mismatch.text


def test_a_difference_in_training_mode_only_is_caught() -> None:
    class Modes(Between):
        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.head(y.reshape(len(y), 8, -1, y.shape[-1]) if self.training else y)

    mismatch = check(Modes(), "stem")
    assert mismatch is not None
    assert mismatch.position[0] == 1


def test_an_attribute_that_follows_makes_the_edits_right() -> None:
    class Remembers(Between):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x).reshape(len(x), self.width, -1, x.shape[-1]))

    model = Remembers()
    channels = analyse(model, INPUT)
    edits = halved(channels, "stem")
    assert check_edits(model, channels, edits) is not None
    assert check_edits(model, channels, [*edits, SetAttribute("", "width", 8, 4)]) is None


def test_a_model_that_branches_on_values_is_checked_on_real_tensors() -> None:
    model = Between(lambda y: y.relu() if y.sum() > -1e9 else y.sigmoid())
    assert check(model, "stem") is None
    wrong = Between(lambda y: y.reshape(len(y), 8, -1, 8) if y.sum() > -1e9 else y)
    assert check(wrong, "stem") is not None


# -- backward ------------------------------------------------------------------------------------


class Sized(torch.autograd.Function):
    """A forward for any size, a backward for the one it was written for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gradient,) = grads
        return (gradient * torch.ones(8, 1, 1)) * 2


def apply_sized(x: Tensor) -> Tensor:
    return Sized.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def failure_of(model: nn.Module) -> Exception | None:
    channels = analyse(model, INPUT)
    return backward_failure(model, channels, halved(channels, "stem"))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_backward_written_for_another_size_is_caught_in_every_grad_mode(context: Any) -> None:
    with context():
        assert failure_of(Between(apply_sized)) is not None


def test_a_backward_that_works_passes() -> None:
    model = Between()
    before = Snapshot(model)
    assert failure_of(model) is None
    assert list(before.differences(Snapshot(model))) == []


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_model_that_could_never_be_trained_is_not_held_to_it() -> None:
    assert failure_of(Between(lambda y: Broken.apply(y))) is None  # type: ignore[no-untyped-call]


def test_a_model_without_anything_to_train_passes() -> None:
    assert failure_of(Between().requires_grad_(False)) is None
