"""The rewritten architecture without its run-time passes."""

from __future__ import annotations

import copy
import io
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import apply_recipe, history, plain, recipe, rewrite
from pocketize.graph.capture import capture
from tests.artifact.test_store import assert_same_state

X = torch.randn(2, 1, 8, 8)


class Net(nn.Module):
    """Norms with an activation module, and with an activation function."""

    def __init__(self, act: type[nn.Module] = nn.LeakyReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), act())
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.InstanceNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x)))
        return self.head(nn.functional.leaky_relu(x, 0.2))


RUNTIME = [
    ["recompute:min_bytes=0"],
    ["in-place-norm"],
    ["checkpoint:only=stem"],
    ["offload:to=disk,min_bytes=1B"],
    ["patchwise:size=4"],
    ["patchwise:size=4,mode=window"],
    ["amp"],
    ["in-place-norm", "amp"],
]


def names(passes: list[str]) -> str:
    return "+".join(passes)


@pytest.mark.parametrize("passes", RUNTIME, ids=names)
def test_plain_is_the_model_as_it_was(passes: list[str]) -> None:
    model = Net()
    lean = rewrite(model, passes=passes, inputs=X)
    before = copy.deepcopy(lean.state_dict())
    made = plain(lean)
    for (path, ours), theirs in zip(made.named_modules(), model.modules(), strict=True):
        assert type(ours) is type(theirs), path
        assert vars(ours).keys() - {"_pocketize_history"} == vars(theirs).keys(), path
    assert_same_state(made, model)
    assert history(made) == ()
    for train in (True, False):
        assert torch.equal(made.train(train)(X), model.train(train)(X))
    # the rewritten model is as it was
    assert [record.name for record in history(lean)] == [text.partition(":")[0] for text in passes]
    assert all(torch.equal(value, before[key]) for key, value in lean.state_dict().items())
    assert recipe(made)["records"] == []


@pytest.mark.filterwarnings("ignore:.*torch.*deprecated")
@pytest.mark.parametrize("passes", RUNTIME, ids=names)
def test_torchscript_and_fusing_take_it(passes: list[str]) -> None:
    made: Any = plain(rewrite(Net().eval(), passes=passes, inputs=X))
    expected = made(X)
    scripted = torch.jit.script(made)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(X), expected)
    fused = torch.ao.quantization.fuse_modules(made, [["stem.0", "stem.1"]])
    assert isinstance(fused.stem[1], nn.Identity)
    torch.testing.assert_close(fused(X), expected)


def test_widths_and_blocks_stay_and_the_recipe_makes_them_again() -> None:
    model = Net()
    lean = rewrite(
        model,
        "pocket:width=4",
        "separable:weights=reset,min_channels=2,activations=any",
        "recompute:min_bytes=0",
        inputs=X,
    ).eval()
    made: Any = plain(lean)
    assert made.conv.state_dict().keys() == lean.conv.state_dict().keys()
    assert made.head.in_channels < 8
    assert torch.equal(made(X), lean(X))
    assert [record.name for record in history(made)] == ["pocket", "separable"]
    again = apply_recipe(Net(), recipe(made), weights=made.state_dict())
    assert torch.equal(again.eval()(X), made(X))


def test_an_exchanged_relu_is_a_leaky_relu() -> None:
    lean = rewrite(Net(nn.ReLU), "in-place-norm:activation=leaky_relu:0.05", inputs=X)
    made: Any = plain(lean)
    assert type(made.stem[2]) is nn.LeakyReLU
    assert made.stem[2].negative_slope == 0.05
    assert type(made.stem[1]) is nn.BatchNorm2d
    torch.testing.assert_close(made(X), lean(X))
    # of this pass something is left: it stays in the history
    assert [record.name for record in history(made)] == ["in-place-norm"]


def test_prelu_norms_of_a_plain_model_train_as_they_did() -> None:
    model = Net(nn.PReLU)
    made = plain(rewrite(model, "in-place-norm", inputs=X))
    for net in (model, made):
        net(X).square().sum().backward()
    for (name, ours), theirs in zip(made.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_forward_of_the_users_own_stays() -> None:
    model = Net()
    model.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), model)  # type: ignore[method-assign]
    made = plain(rewrite(model, "recompute:min_bytes=0", "amp", inputs=X))
    assert torch.equal(made(X), model(X))
    assert isinstance(vars(made)["forward"], types.MethodType)


def test_a_part_that_was_rewritten_alone_is_plain_too() -> None:
    model = nn.Sequential(rewrite(Net(), "recompute:min_bytes=0", inputs=X), nn.ReLU())
    made: Any = plain(model)
    assert history(made[0]) == ()
    assert "forward" not in vars(made[0])


def test_a_model_that_was_not_rewritten_is_copied() -> None:
    model = Net()
    made = plain(model)
    assert made is not model
    assert_same_state(made, model)
    targets = [[str(n.target) for n in capture(net, X).operators()] for net in (made, model)]
    assert targets[0] == targets[1]
