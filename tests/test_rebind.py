from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from pocketize import rebind, rewrite, step_in_backward
from pocketize.errors import ExecutionError

X = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.01)]
    more = [nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers, *more, nn.Conv2d(16, 1, 1)).double()


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(X).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        scheduler.step()


@pytest.mark.parametrize(
    ("make", "rewritten"),
    [
        pytest.param(
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), True, marks=pytest.mark.slow
        ),
        (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2), False),
        (lambda p: torch.optim.AdamW([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}]), False),
    ],
)
def test_steps_go_on_as_they_would_have(make: Any, rewritten: bool) -> None:
    runs = []
    for _ in range(2):
        model = net()
        optimizer = make(list(model.parameters()))
        runs.append((model, optimizer, StepLR(optimizer, 2)))
        train(*runs[-1], 2)
    (model, optimizer, scheduler), reference = runs
    lean = rewrite(model, "in-place-norm", inputs=X) if rewritten else copy.deepcopy(model)
    untouched = copy.deepcopy(model.state_dict())
    rebind(optimizer, model, lean)
    train(lean, optimizer, scheduler, 3)
    train(*reference, 3)
    for ours, theirs in zip(lean.parameters(), reference[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert scheduler.get_last_lr() == reference[2].get_last_lr()
    for key, value in model.state_dict().items():
        assert torch.equal(value, untouched[key])
    assert set(optimizer.state) <= set(lean.parameters())


def test_a_waiting_gradient_and_other_parameters_go_along() -> None:
    model, other = net(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=0.1)
    lean = copy.deepcopy(model)
    model(X).sum().backward()
    rebind(optimizer, model, lean)
    assert optimizer.param_groups[0]["params"][-1] is other
    before = lean[0].weight.clone()
    optimizer.step()
    assert not torch.equal(lean[0].weight, before)
    rebind(optimizer, lean, lean)  # as after a rewrite in place
    assert optimizer.param_groups[0]["params"][0] is lean[0].weight


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight if tied else nn.Parameter(self.a.weight.detach().clone())


class Mine(torch.optim.SGD):
    pass


def test_what_would_not_be_exact_is_refused_and_changes_nothing() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    retrained = copy.deepcopy(model)
    nn.init.zeros_(retrained[0].weight)
    resized, more = copy.deepcopy(model), copy.deepcopy(model)
    resized[3] = nn.Conv2d(8, 12, 3, bias=False)
    more[3] = nn.Sequential(more[3])
    tied, untied = Tied(True), copy.deepcopy(Tied(False))
    untied.load_state_dict(tied.state_dict())
    for given, before, after, says in (
        (optimizer, model, resized, r"3\.weight has the shape \[16, 8"),
        (optimizer, model, more, "has a new parameter, 3"),
        (optimizer, model, copy.deepcopy(model)[:4], r"has no 4\."),
        (optimizer, model, copy.deepcopy(model).float(), "is torch.float64 on cpu before, torch"),
        (optimizer, model, retrained, r"0\.weight has other values"),
        (optimizer, net(), net(), "updates no parameter of this Sequential"),
        (torch.optim.SGD(tied.parameters()), tied, untied, "tied to another parameter in one"),
        (torch.optim.SGD(untied.parameters()), untied, tied, "tied to another parameter in one"),
        (Mine(model.parameters()), model, net(), "Mine may refer to parameters elsewhere"),
        (step_in_backward(net(), torch.optim.SGD), model, net(), r"Call its close\(\) before"),
    ):
        held = [id(p) for group in given.param_groups for p in group["params"]]
        with pytest.raises(ExecutionError, match=rf"rebind: .*{says}.*Make the optimizer after"):
            rebind(given, before, after)
        assert held == [id(p) for group in given.param_groups for p in group["params"]]
