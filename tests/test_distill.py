"""The loss of a distillation is what its source says, and neither network is left changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import Distillation, rewrite
from pocketize.distill import distillation_loss, feature_layers
from pocketize.errors import InputError, OptionError, PatternError
from pocketize.passes import Width

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.fine(x)).relu()
        return self.head(self.up(self.down(y).relu()) + y)


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = Net()
    return teacher, rewrite(teacher, Width(0.5), inputs=X)


def test_the_loss_is_the_divergence_of_softened_classes() -> None:
    ours, theirs = torch.randn(2, 2, 3, 4, 4).unbind(0)
    p, q = (theirs / 3).softmax(1), (ours / 3).softmax(1)
    by_hand = 9 * (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(distillation_loss(ours, theirs, 3.0), by_hand, rtol=1e-5)
    assert float(distillation_loss(ours, ours)) == pytest.approx(0, abs=1e-6)
    both = distillation_loss({"a": ours, "b": [theirs]}, {"a": theirs, "b": [theirs]}, 3.0)
    assert torch.allclose(both, by_hand / 2, rtol=1e-5)


def test_a_single_class_is_that_of_a_sigmoid() -> None:
    ours, theirs = torch.randn(2, 2, 1, 5).unbind(0)
    two = [torch.cat([each, torch.zeros_like(each)], 1) for each in (ours, theirs)]
    assert torch.allclose(distillation_loss(ours, theirs), distillation_loss(*two))
    assert float(distillation_loss(ours, theirs)) > 0


@pytest.mark.slow
def test_both_networks_stay_as_they_are_and_the_student_learns() -> None:
    teacher, student = pair()
    teacher.train()
    distil = Distillation(teacher, student, X, features=("down",))
    assert [tuple(p.shape) for p in distil.parameters()] == [(16, 8, 1, 1), (16,)]
    was = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.Adam([*student.parameters(), *distil.parameters()], 1e-2)
    losses = []
    for _ in range(8):
        outputs, loss = distil(X)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert outputs.shape == (2, 3, 8, 8)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(was[name], tensor) for name, tensor in teacher.state_dict().items())
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert distil.adapters[0].weight.grad is not None
    for network in (teacher, student):
        assert not any(module._forward_hooks for module in network.modules())
    again = pickle.loads(pickle.dumps(distil))
    assert torch.equal(again.eval()(X)[1], distil.eval()(X)[1])


def test_features_of_one_width_need_no_adapter() -> None:
    teacher, student = pair()
    weighed = Distillation(teacher, student, X, features=("head",), feature_weight=2.0)
    assert not list(weighed.parameters())
    student.eval()
    teacher.eval()
    with torch.no_grad():
        ours, theirs = student(X), teacher(X)
        apart = (ours - theirs).square().mean() / theirs.var()
        plain = distillation_loss(ours, theirs)
        assert torch.allclose(weighed(X)[1], plain + 2 * apart, rtol=1e-5)


@pytest.mark.slow
def test_layers_at_each_resolution_are_found() -> None:
    teacher, student = pair()
    layers = feature_layers(teacher, X)
    assert layers == ("up", "down")
    assert float(Distillation(teacher, student, X, features=layers)(X)[1].detach()) > 0


def test_what_does_not_match_is_refused() -> None:
    teacher, student = pair()
    rows: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"temperature": 0.0}, OptionError, "temperature must be a positive number"),
        ({"temperature": "2"}, OptionError, "temperature must be a positive number"),
        ({"feature_weight": float("nan")}, OptionError, "feature_weight must be a positive"),
        ({"features": "down", "inputs": X}, OptionError, r"such as \('down',\)"),
        ({"features": ("down",)}, InputError, "needs example inputs"),
        ({"features": ("dawn",), "inputs": X}, PatternError, "no layer 'dawn'.*down"),
    ]
    for options, error, text in rows:
        with pytest.raises(error, match=text):
            Distillation(teacher, student, **options)
    with pytest.raises(InputError, match="of the same shapes"):
        distillation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, 3))
    with pytest.raises(InputError, match="of the same shapes"):
        distillation_loss([], [])
    with pytest.raises(OptionError, match="temperature must be a positive number"):
        distillation_loss(X, X, 0.0)
    coarse = Net()
    coarse.down = nn.Conv2d(8, 16, 4, stride=4)
    coarse.up = nn.ConvTranspose2d(16, 8, 4, stride=4)
    with pytest.raises(InputError, match="only channels, axis 1, may differ"):
        Distillation(teacher, coarse, X, features=("down",))


def test_only_numbers_in_floating_point_are_logits() -> None:
    ours, theirs = torch.randn(2, 2, 3, 4, 4).unbind(0)
    both = distillation_loss((ours, ours.argmax(1)), (theirs, theirs.argmax(1)))
    assert torch.equal(both, distillation_loss(ours, theirs))


def test_adapters_take_features_under_another_default_dtype() -> None:
    teacher, student = pair()
    torch.set_default_dtype(torch.float64)
    try:
        distil = Distillation(teacher, student, X, features=("down",))
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(distil(X)[1].detach()) > 0
