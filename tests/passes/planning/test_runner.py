"""Training points: what is trained, what is remembered, and what an interruption leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pocketize.errors import PlanningError
from pocketize.passes.planning import Point, fit_degradation, train_points
from tests.passes.planning.nets import parameters

COMPLEXITIES = {"plain": 0.05, "busy": 0.3}
DATASETS = {"plain": 1, "busy": 6}
MULTIPLIERS = (1, 0.5, 0.25)


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 1, 1))


class Training:
    """Stands for a user's training; an accuracy from size and data, and a note of each call."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.calls: list[tuple[int, int]] = []
        self.first: list[torch.Tensor] = []

    def __call__(self, model: nn.Module, data: int) -> float:
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((data, parameters(model)))
        self.first.append(next(model.parameters()).detach().clone())
        return 1 - 0.01 * data * (8.3 - float(torch.tensor(float(parameters(model))).log()))


def _run(training: Training, cache: Path | None = None, **options: object) -> tuple[Point, ...]:
    return train_points(
        _net(), DATASETS, MULTIPLIERS, training, complexities=COMPLEXITIES, cache=cache, **options
    )  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_data_set_is_trained_at_every_multiplier_and_the_points_can_be_fitted() -> None:
    training = Training()
    points = _run(training, inputs="1x1x12x12")
    assert [(p.dataset, p.complexity) for p in points] == 3 * [("plain", 0.05)] + 3 * [
        ("busy", 0.3)
    ]
    assert [p.weights for p in points[:3]] == [144 + 2304 + 16, 72 + 576 + 8, 36 + 144 + 4]
    fit = fit_degradation(points)
    assert fit.lam > 0
    assert fit.datasets[1].slope > fit.datasets[0].slope


@pytest.mark.slow
def test_every_point_starts_from_new_weights_that_the_seed_decides() -> None:
    net, first, second, other = _net(), Training(), Training(), Training()
    for training, seed in ((first, 0), (second, 0), (other, 1)):
        train_points(
            net,
            {"a": 1},
            (1, 0.5),
            training,
            complexities={"a": 0.1},
            seeds=[seed],
            inputs="1x1x8x8",
        )
    assert not torch.equal(first.first[0], next(net.parameters()))
    for again, changed, drawn in zip(second.first, other.first, first.first, strict=True):
        assert torch.equal(again, drawn)
        assert not torch.equal(changed, drawn)


def test_a_factory_is_called_and_the_random_state_of_the_caller_stays() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    training = Training()
    train_points(_net, {"a": 1}, (1, 0.5), training, complexities={"a": 0.1}, inputs="1x1x8x8")
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(0)
    assert torch.equal(training.first[0], next(_net().parameters()))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_without_training_finished_points(tmp_path: Path) -> None:
    cache = tmp_path / "points.jsonl"
    interrupted = Training(stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        _run(interrupted, cache, inputs="1x1x12x12")
    assert len(cache.read_text(encoding="utf-8").splitlines()) == 1 + 4
    resumed = Training()
    points = _run(resumed, cache, inputs="1x1x12x12")
    assert len(resumed.calls) == 2
    assert points == _run(Training(), inputs="1x1x12x12")
    again = Training()
    assert _run(again, cache, inputs="1x1x12x12") == points
    assert again.calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["points.jsonl"]  # nothing half-written


def test_an_error_in_training_leaves_what_was_finished(tmp_path: Path) -> None:
    cache = tmp_path / "points.jsonl"

    def fails(model: nn.Module, data: int) -> float:
        if data == 6:
            raise RuntimeError("out of memory")
        return 0.5

    with pytest.raises(RuntimeError, match="out of memory"):
        train_points(_net(), DATASETS, MULTIPLIERS, fails, complexities=COMPLEXITIES, cache=cache)
    rows = [json.loads(line) for line in cache.read_text(encoding="utf-8").splitlines()]
    assert [row["multiplier"] for row in rows[1:]] == [1, 0.5, 0.25]


@pytest.mark.slow
def test_another_model_seed_or_choice_of_what_stays_is_another_point(tmp_path: Path) -> None:
    cache = tmp_path / "points.jsonl"

    def points(model: nn.Module, **options: object) -> int:
        training = Training()
        train_points(
            model,
            {"a": 1},
            (1, 0.5),
            training,
            complexities={"a": 0.1},
            cache=cache,
            inputs="1x1x8x8",
            **options,  # type: ignore[arg-type]
        )
        return len(training.calls)

    assert points(_net()) == 2
    assert points(_net(), seeds=[1]) == 2
    assert points(_net(), keep=["0"]) == 2
    assert points(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 1))) == 2
    assert points(_net(), seeds=[0, 1]) == 0
    assert len(cache.read_text(encoding="utf-8").splitlines()) == 1 + 8


@pytest.mark.slow
def test_a_changed_complexity_needs_no_training(tmp_path: Path) -> None:
    cache, again = tmp_path / "points.jsonl", Training()
    _run(Training(), cache, inputs="1x1x12x12")
    points = train_points(
        _net(),
        DATASETS,
        MULTIPLIERS,
        again,
        complexities={"plain": 0.1, "busy": 0.4},
        cache=cache,
        inputs="1x1x12x12",
    )
    assert again.calls == []
    assert points[0].complexity == 0.1


HEADER = '{"pocketize": "trained points", "format": 1}'
POINT = '{"model": "m", "dataset": "a", "multiplier": 1, "seed": 0, "weights": 9, "seconds": 1'
FOREIGN = [
    ("", "is no cache of trained points: expected the first line"),
    ('{"loss": 0.1}\n', "is no cache of trained points"),
    (f"{HEADER}\n{POINT}", r"line 2, is no trained point \(Expecting .*\); delete the line"),
    (f"{HEADER}\n{POINT}}}\n", r"line 2, is no trained point \('accuracy'\)"),
    (f'{HEADER}\n{POINT}, "accuracy": NaN}}\n', "NaN is no number of JSON"),
    (f'{HEADER}\n{POINT}, "accuracy": 1e999}}\n', "accuracy or weights out of range"),
    (f"{HEADER}\n{'[' * 100_000}\n", "line 2, is no trained point"),
]


@pytest.mark.parametrize(("content", "message"), FOREIGN)
def test_a_damaged_or_foreign_cache_is_told_and_left_alone(
    tmp_path: Path, content: str, message: str
) -> None:
    cache, training = tmp_path / "points.jsonl", Training()
    cache.write_text(content, encoding="utf-8")
    with pytest.raises(PlanningError, match=message):
        _run(training, cache)
    assert training.calls == []
    assert cache.read_text(encoding="utf-8") == content


def test_a_folder_or_binary_file_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(PlanningError, match="cannot be read as a cache"):
        _run(Training(), tmp_path)
    binary = tmp_path / "weights.pt"
    binary.write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(PlanningError, match="cannot be read as a cache"):
        _run(Training(), binary)


@pytest.mark.parametrize("returned", [float("nan"), -1.0, None, "good"])
def test_a_training_that_returns_no_accuracy_is_told(returned: object) -> None:
    with pytest.raises(PlanningError, match=r"train returned .* for 'plain' at multiplier 1"):
        train_points(
            _net(),
            DATASETS,
            MULTIPLIERS,
            lambda model, data: returned,  # type: ignore[arg-type, return-value]
            complexities=COMPLEXITIES,
        )


BAD = [
    ({"multipliers": (0.5, 0.25)}, "multipliers must have 1 and others"),
    ({"multipliers": (1,)}, "multipliers must have 1 and others"),
    ({"multipliers": (1, 2)}, "above 0 and at most 1, not 2"),
    ({"multipliers": (1, 0.5, 0.5)}, "multipliers must be some, and different"),
    ({"complexities": {"plain": 0.1}}, "complexities has no entry for 'busy'"),
    ({"datasets": {}}, "no data sets"),
    ({"seeds": ()}, "seeds must be some, and different"),
    ({"model": lambda: 3}, "the factory must return an nn.Module, got 3"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_what_cannot_be_trained_is_told_before_anything_is(
    options: dict[str, object], message: str
) -> None:
    training = Training()
    given = {
        "model": _net(),
        "datasets": DATASETS,
        "multipliers": MULTIPLIERS,
        "train": training,
        "complexities": COMPLEXITIES,
    }
    with pytest.raises(PlanningError, match=message):
        train_points(**{**given, **options})  # type: ignore[arg-type]
    assert training.calls == []
