"""A recipe that any checkpoint can carry."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import apply_recipe, history, pocketize, recipe, rewrite
from pocketize.errors import ArtifactError, OptionError, RewriteError
from tests.artifact.test_store import Net, assert_same_state, cut, trained


class Deep(nn.Module):
    """A network that pocket and recompute both change."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.down(torch.relu(self.stem(x))))))


X = torch.randn(2, 1, 8, 8)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return trained(rewrite(Deep(), "pocket", "recompute:min_bytes=0", inputs=X))


def carried(model: nn.Module) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(recipe(model)))
    return data


def test_a_recipe_and_a_state_dict_make_the_model_again(small: nn.Module) -> None:
    fresh = Deep()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    again = apply_recipe(fresh, carried(small), weights=small.state_dict())
    assert_same_state(again, small)
    assert torch.equal(again(X), small(X))
    assert history(again) == history(small)
    assert "forward" in vars(again)  # it recomputes
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert history(fresh) == ()


def test_the_recipe_of_a_model_that_was_made_from_a_recipe_is_the_same(small: nn.Module) -> None:
    assert recipe(apply_recipe(Deep(), recipe(small))) == recipe(small)


def test_weights_are_cut_and_modes_stay_where_none_are_given() -> None:
    model = trained(Net()).eval()
    again = apply_recipe(model, recipe(cut(Net())), inplace=True)
    assert again is model
    assert not model.training
    assert_same_state(model, cut(_copy(Net, model)))


def _copy(make: Any, like: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = make()
    rows = [1, 2, 5]
    full = made.state_dict()
    for key, value in like.state_dict().items():
        if full[key].shape == value.shape:
            full[key].copy_(value)
        elif key == "head.weight":
            full[key][:, rows] = value
        else:
            full[key][rows] = value
    return made


def test_a_model_that_was_not_rewritten_has_a_recipe_too() -> None:
    assert recipe(Net())["records"] == []
    assert_same_state(apply_recipe(Net(), recipe(Net()), weights=(net := Net()).state_dict()), net)


def test_weights_of_another_structure_are_refused(small: nn.Module) -> None:
    model = Deep()
    with pytest.raises(ArtifactError, match=r"weights do not fit the recipe:.*\n?.*down.weight"):
        apply_recipe(model, recipe(small), weights=Deep().state_dict(), inplace=True)
    state = dict(small.state_dict())
    del state["head.bias"]
    with pytest.raises(ArtifactError, match=r"not in the weights: head\.bias"):
        apply_recipe(model, recipe(small), weights=state, inplace=True)
    assert model.down.out_channels == 8
    assert history(model) == ()


def test_another_model_is_refused(small: nn.Module) -> None:
    with pytest.raises(ArtifactError, match=r"does not fit the model.*that of a Deep.*is a Net"):
        apply_recipe(Net(), recipe(small))
    with pytest.raises(ArtifactError, match="expected size 8, got shape"):
        apply_recipe(Deep(16), recipe(small))
    # no edit tells that this is another network
    plain = rewrite(Deep(), "recompute:min_bytes=0", inputs=X)
    with pytest.raises(ArtifactError, match="8x4x3x3 in the recipe, 16x4x3x3 in the model"):
        apply_recipe(Deep(16), recipe(plain))


def test_a_model_is_not_rewritten_twice(small: nn.Module) -> None:
    with pytest.raises(ArtifactError, match=r"rewritten already \(pocket, recompute\)"):
        apply_recipe(small, recipe(small))


def test_a_wrapper_around_a_rewritten_model_has_no_recipe(small: nn.Module) -> None:
    with pytest.raises(ArtifactError, match=r"its part '0' was"):
        recipe(nn.Sequential(small))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, r"this is no recipe: \{\}\. Give what"),
        (None, r"this is no recipe: None\. Give what"),
        ("recipe.json", r"this is no recipe: 'recipe.json'\. Give what"),
        ({"format": 1}, r"this is no recipe.*lacks [\w, ]+\. Give what"),
        ({"format": 99, "pocketize": "9.0"}, "Install a newer pocketize"),
    ],
)
def test_what_is_no_recipe_is_refused(data: Any, text: str) -> None:
    with pytest.raises(ArtifactError, match=text):
        apply_recipe(Net(), data)


def test_a_recipe_with_a_damaged_record_is_refused(small: nn.Module) -> None:
    data = carried(small)
    data["records"][0]["edits"][0]["edit"] = "explode"
    with pytest.raises(ArtifactError, match="explode"):
        apply_recipe(Deep(), data)
    data = carried(small)
    del data["records"][0]["name"]
    with pytest.raises(ArtifactError, match="the recipe is damaged"):
        apply_recipe(Deep(), data)


def test_a_tie_of_tensors_of_different_shapes_is_refused(small: nn.Module) -> None:
    data = recipe(small)
    first, *_, second = data["shapes"]
    assert data["shapes"][first] != data["shapes"][second]
    for alias, key in ((first, second), (second, first)):
        with pytest.raises(ArtifactError, match=f"damaged: it ties {alias} to {key}"):
            apply_recipe(small, {**data, "ties": {alias: key}})


def test_ties_that_were_made_after_building_are_made_again() -> None:
    class Pair(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))

    model = Pair()
    model[1].weight = model[0].weight
    again: Any = apply_recipe(Pair(), recipe(model), weights=model.state_dict())
    assert again[0].weight is again[1].weight


def test_passes_are_given_as_a_keyword_too() -> None:
    model = Deep()
    one = rewrite(model, passes=["pocket", "recompute:min_bytes=0"], inputs=X)
    assert [record.name for record in history(one)] == ["pocket", "recompute"]
    assert_same_state(one, pocketize(model, inputs=X))
    with pytest.raises(OptionError, match="not both ways"):
        rewrite(model, "pocket", passes=["pocket"])
    with pytest.raises(OptionError, match="takes a list of passes, got 'pocket'"):
        rewrite(model, passes="pocket")
    with pytest.raises(RewriteError, match="no pass was given"):
        rewrite(model, passes=[])
