"""Both stages train, each on its own, and what one learns does not disturb the other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.passes import Cascade
from tests.passes.cascade.nets import Small, balls


def losses(
    step: Callable[[Tensor, Tensor], Tensor], parameters: list[nn.Parameter], axes: int
) -> list[float]:
    optimiser = torch.optim.Adam(parameters, 1e-2)
    found = []
    for epoch in range(50):
        x, y = balls(4, 12, axes, seed=epoch % 3)
        optimiser.zero_grad()
        loss = step(x, y)
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
def test_both_stages_learn_one_after_the_other() -> None:
    torch.manual_seed(0)
    cascade = Cascade(Small(1, 2, 3), Small(1, 2, 3), scale=0.5)
    cascade.train()
    cascade.stage1.train()
    untouched = copy.deepcopy(cascade.stage2.state_dict())
    first = losses(
        lambda x, y: F.cross_entropy(cascade.stage1(cascade.shrink(x)), cascade.shrink_labels(y)),
        list(cascade.stage1.parameters()),
        3,
    )
    assert all(torch.equal(v, untouched[k]) for k, v in cascade.stage2.state_dict().items())
    cascade.train()
    untouched = copy.deepcopy(cascade.stage1.state_dict())
    second = losses(
        lambda x, y: F.cross_entropy(cascade.refine(x, cascade.guide_by_labels(y)), y),
        list(cascade.stage2.parameters()),
        3,
    )
    assert all(torch.equal(v, untouched[k]) for k, v in cascade.stage1.state_dict().items())
    assert sum(first[-3:]) < 0.6 * sum(first[:3])
    assert sum(second[-3:]) < 0.6 * sum(second[:3])
    assert cascade.stage2.first.weight[:, 1:].abs().max() > 0.01
    x, y = balls(4, 12, 3, seed=9)
    found = cascade.eval()(x).argmax(1)
    dice = 2 * (found * y).sum() / (found.sum() + y.sum())
    assert dice > 0.7


def test_stage_2_trains_on_stage_1s_own_predictions() -> None:
    torch.manual_seed(0)
    cascade = Cascade(Small(1, 2), Small(1, 2), scale=0.5, guidance="softmax").train()
    untouched = copy.deepcopy(cascade.stage1.state_dict())
    found = losses(
        lambda x, y: F.cross_entropy(cascade(x), y), list(cascade.stage2.parameters()), 2
    )
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    assert all(p.grad is None for p in cascade.stage1.parameters())
    assert all(torch.equal(v, untouched[k]) for k, v in cascade.stage1.state_dict().items())


def test_gradients_reach_stage_1_only_where_both_train_jointly() -> None:
    x, y = balls(2, 16)
    for joint in (False, True):
        torch.manual_seed(0)
        cascade = Cascade(Small(1, 2), Small(1, 2), guidance="softmax", joint=joint).train()
        with torch.no_grad():
            cascade.stage2.first.weight[:, 1:].normal_()
        F.cross_entropy(cascade(x), y).backward()
        assert all((p.grad is not None) is joint for p in cascade.stage1.parameters())
        assert all(p.grad is not None for p in cascade.stage2.parameters())


def test_the_stages_have_modes_of_their_own() -> None:
    cascade = Cascade(Small(1, 2), Small(1, 2))
    assert cascade.train() is cascade
    assert (cascade.training, cascade.stage1.training, cascade.stage2.training) == (
        True,
        False,
        True,
    )
    assert not cascade.stage1.norm.training
    cascade.stage1.train()
    cascade.stage2.eval()
    assert (cascade.stage1.norm.training, cascade.stage2.norm.training) == (True, False)
    cascade.eval()
    assert not any(module.training for module in cascade.modules())
    joint = Cascade(Small(1, 2), Small(1, 2), guidance="softmax", joint=True).train()
    assert all(module.training for module in joint.modules())
