"""Every activation of torch under the passes that keep something else than autograd would."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.passes import Checkpoint, Offload, Recompute
from pocketize.plugin.base import Pass

OTHER = {"MultiheadAttention", "Threshold", "GLU"}  # no maps, required arguments, half the channels
KINDS = [getattr(nn, n) for n in nn.modules.activation.__all__ if n not in OTHER]


class Activations(nn.Module):
    """The sum of all activations of one map, in place where they can be."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        plain = [kind() for kind in KINDS]
        writing = [k(inplace=True) for k in KINDS if "inplace" in inspect.signature(k).parameters]
        self.activations = nn.ModuleList([*plain, *writing])
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(sum(each(y.clone()) for each in self.activations))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize(
    "given",
    [
        Recompute(keep=(), min_bytes=0),
        Offload(to="disk", min_bytes="1B"),
        Checkpoint(only=("activations.*",)),
    ],
    ids=lambda given: given.name,
)
def test_activations_have_the_same_gradients_in_training(given: Pass) -> None:
    torch.manual_seed(0)
    model = Activations().double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    found = []
    for net in (copy.deepcopy(model), rewrite(model, given, inputs=x)):
        torch.manual_seed(1)
        net(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(found[1], found[0])
