"""What the plan converts and what it leaves alone, with the reasons."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketize.engine.pipeline import PassPlan, history, plan, replay, rewrite
from pocketize.errors import NoEffectWarning, OptionError, OrderError, PatternError
from pocketize.passes import InPlaceNorm
from pocketize.plugin.base import Guarantee

INPUT = "2x3x8x8"


class Chain(nn.Module):
    """Convolution, something, convolution."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.middle = nn.Sequential(*middle)
        self.last = nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.middle(self.first(x))))


class Written(Chain):
    """As a chain, with code of one's own between the convolutions."""

    def __init__(self, between: Callable[[Written, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.other = nn.InstanceNorm2d(8)
        self.relu = nn.ReLU()
        self.leaky = nn.LeakyReLU(0.1, inplace=True)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.between(self, self.first(x))))


def _plan(model: nn.Module, **options: Any) -> PassPlan:
    return plan(model, InPlaceNorm(**options), inputs=INPUT).passes[0]


def _refused(planned: PassPlan) -> dict[str, str]:
    return {row.path: row.why for row in planned.refused}


def _changed(planned: PassPlan) -> dict[str, str]:
    return {row.path: row.what for row in planned.changes}


def _same_training(model: nn.Module, **options: Any) -> nn.Module:
    """Rewrite and compare a training step in float64; return the rewritten model."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made = rewrite(copy.deepcopy(model), InPlaceNorm(**options), inputs=INPUT)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for module in (model, made):
        module.train()
        module(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), made.parameters(), strict=True):
        largest = max(float(cast(Tensor, a.grad).abs().max()), 1.0)
        assert float((cast(Tensor, a.grad) - cast(Tensor, b.grad)).abs().max()) < 1e-10 * largest, (
            name
        )
    for a, b in zip(model.buffers(), made.buffers(), strict=True):
        assert torch.allclose(a, b)
    return made


@pytest.mark.parametrize(
    ("norm", "activation", "what"),
    [
        (nn.BatchNorm2d(8), nn.LeakyReLU(0.1), "BatchNorm2d + LeakyReLU(0.1) in place"),
        (nn.SyncBatchNorm(8), nn.LeakyReLU(), "SyncBatchNorm + LeakyReLU(0.01) in place"),
        (nn.BatchNorm2d(8), nn.PReLU(8), "BatchNorm2d + PReLU in place"),
        (nn.InstanceNorm2d(8), nn.ELU(inplace=True), "InstanceNorm2d + ELU(1) in place"),
        (
            nn.GroupNorm(2, 8),
            nn.LeakyReLU(0.2, inplace=True),
            "GroupNorm + LeakyReLU(0.2) in place",
        ),
    ],
)
def test_layers_are_converted_and_rows_say_what_is_saved(
    norm: nn.Module, activation: nn.Module, what: str
) -> None:
    planned = _plan(Chain(norm, nn.Dropout(0.0), activation))
    inplace = getattr(activation, "inplace", False)
    saved = "2.2 KiB" if inplace else "4.5 KiB"  # of 2 x 8 x 6 x 6 numbers, twice without inplace
    assert _changed(planned) == {
        "middle.0": f"{what}: {saved} less kept",
        "middle.2": "passes on what a norm has activated",
    }
    assert planned.notes == (f"1 norms keep {saved} less for the backward, at {INPUT} float32",)
    assert planned.guarantee is Guarantee.EXACT
    made = _same_training(Chain(norm, nn.Dropout(0.0), activation))
    assert isinstance(made.get_submodule("middle.0"), type(norm))


def test_a_norm_that_a_convolution_reads_keeps_its_output_alone() -> None:
    net = Chain(nn.BatchNorm2d(8))
    assert _changed(_plan(net)) == {"middle.0": "BatchNorm2d in place: 2.2 KiB less kept"}
    _same_training(net)


def _called(net: Written, x: Tensor) -> Tensor:
    return F.leaky_relu(net.norm(x), 0.2)


def test_an_activation_that_the_models_own_forward_calls_is_skipped() -> None:
    net = Written(_called)
    planned = _plan(net)
    assert _changed(planned) == {
        "norm": "BatchNorm2d + LeakyReLU(0.2) in place: 4.5 KiB less kept",
        "": "its forward skips activations that a norm has computed",
    }
    made = _same_training(net)
    assert type(made) is Written


def _resnet_like(net: Written, x: Tensor) -> Tensor:
    y = net.leaky(net.norm(x))
    y = net.other(y) + y
    return cast(Tensor, net.leaky(y))


def test_a_shared_activation_is_skipped_in_one_place_and_runs_in_the_other() -> None:
    net = Written(_resnet_like)
    planned = _plan(net)
    assert set(_changed(planned)) == {"norm", "leaky"}
    assert _refused(planned) == {"other": "add reads it, not an activation"}
    _same_training(net)


def _twice(net: Written, x: Tensor) -> Tensor:
    y = net.norm(x)
    return F.leaky_relu(y, 0.1) + y


def _added_in_place(net: Written, x: Tensor) -> Tensor:
    y = F.leaky_relu(net.norm(x), 0.1)
    y += x
    return y


def _view_written(net: Written, x: Tensor) -> Tensor:
    y = F.leaky_relu(net.norm(x), 0.1)
    z = y * 2
    y[:, 0].zero_()
    return z + y


def _reused(net: Written, x: Tensor) -> Tensor:
    y = cast(Tensor, net.leaky(net.norm(x)))
    return cast(Tensor, net.leaky(net.norm(y)))


def _region(net: Written, x: Tensor) -> Tensor:
    return cast(Tensor, checkpoint(lambda t: net.leaky(net.norm(t)), x, use_reentrant=False))


def _reentrant(net: Written, x: Tensor) -> Tensor:
    return cast(Tensor, checkpoint(lambda t: net.leaky(net.norm(t)), x, use_reentrant=True))


def _kept_by_others(net: Written, x: Tensor) -> Tensor:
    return cast(Tensor, net.leaky(net.norm(x))) + F.conv2d(
        x, net.last.weight[:1].expand(8, 8, 3, 3), padding=1
    )


def _functional(net: Written, x: Tensor) -> Tensor:
    return F.leaky_relu(F.instance_norm(x), 0.1)


@pytest.mark.parametrize(
    ("between", "path", "why"),
    [
        (_twice, "norm", "the tensor between norm and activation is read 2 times"),
        (_added_in_place, "norm", "add_ at test_plan.py:"),
        (_view_written, "norm", "writes into the tensor that would be kept"),
        (_reused, "norm", "the norm is used 2 times in one forward"),
        (_region, "norm", "it stands in a checkpointed region"),
        (_reentrant, "norm", "it runs without gradients"),
        (_kept_by_others, "norm", "nothing to save: its input is kept for conv2d anyway"),
        (_functional, "", "the forward of Written calls instance_norm itself"),
        (
            lambda net, x: F.prelu(net.norm(x), torch.full((1,), 0.2)),
            "norm",
            "prelu is called as a function",
        ),
        (lambda net, x: net.norm(x), "last", ""),
    ],
)
def test_code_that_forbids_it_is_refused_with_the_reason(
    between: Callable[[Written, Tensor], Tensor], path: str, why: str
) -> None:
    planned = _plan(Written(between))
    if why:
        assert why in _refused(planned)[path]
        assert not planned.edits
    else:
        assert _changed(planned) == {"norm": "BatchNorm2d in place: 2.2 KiB less kept"}


class Own(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _hooked(table: str) -> nn.Module:
    net = Chain(nn.Sequential(nn.BatchNorm2d(8)), nn.LeakyReLU())
    if table == "norm":
        net.middle[0][0].register_forward_hook(lambda module, args, output: None)  # type: ignore[index]
    elif table == "around":
        net.middle[0].register_forward_hook(lambda module, args, output: None)
    elif table == "backward":
        net.middle[0][0].register_full_backward_hook(lambda module, i, o: None)  # type: ignore[index]
    else:
        net.middle[1].register_forward_pre_hook(lambda module, args: None)
    return net


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Chain(nn.BatchNorm2d(8), nn.ReLU()), "activation relu is not invertible; use recompute"),
        (Chain(nn.BatchNorm2d(8), nn.GELU()), "activation gelu is not invertible; use recompute"),
        (Chain(nn.BatchNorm2d(8), nn.SiLU()), "activation silu is not invertible; use recompute"),
        (Chain(nn.BatchNorm2d(8), nn.LeakyReLU(0.0)), "leaky_relu(0) is not invertible"),
        (Chain(nn.BatchNorm2d(8), nn.LeakyReLU(-0.1)), "leaky_relu(-0.1) is not invertible"),
        (Chain(nn.BatchNorm2d(8), nn.Dropout(0.5), nn.LeakyReLU()), "dropout is active between"),
        (Chain(nn.BatchNorm2d(8), nn.MaxPool2d(2)), "max_pool2d reads it, not an activation"),
        (Chain(Own(8), nn.LeakyReLU()), "Own has a forward of its own"),
        (_hooked("norm"), "a forward hook reads the tensor between norm and activation"),
        (_hooked("around"), "a forward hook of middle.0 reads the tensor between"),
        (_hooked("backward"), "a backward hook reads the tensor between"),
        (_hooked("activation"), "a forward pre-hook of middle.1 reads the tensor between"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_layers_that_forbid_it_are_refused_with_the_reason(net: nn.Module, why: str) -> None:
    (found,) = _refused(_plan(net)).values()
    assert why in found


def test_a_norm_whose_output_leaves_the_model_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert _refused(_plan(net)) == {"1": "its output is an output of the model"}


def test_a_second_application_finds_everything_done() -> None:
    net = Chain(nn.BatchNorm2d(8), nn.LeakyReLU())
    once = rewrite(net, InPlaceNorm(), inputs=INPUT)
    assert _refused(_plan(once)) == {"middle.0": "already in place"}
    with pytest.warns(NoEffectWarning, match="already in place"):
        rewrite(once, InPlaceNorm(), inputs=INPUT)


def test_pocket_still_works_afterwards_but_must_be_given_first() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(),
        nn.Conv2d(8, 2, 1),
    )
    once = rewrite(net, InPlaceNorm(), inputs=INPUT)
    small = rewrite(once, "pocket:width=4", inputs=INPUT)
    assert small.get_submodule("2").num_features == 4
    assert small(torch.randn(2, 3, 8, 8)).grad_fn is not None
    with pytest.raises(OrderError, match="must come after pocket"):
        plan(net, InPlaceNorm(), "pocket", inputs=INPUT)


def test_history_replays_on_a_fresh_model_and_on_one_without_memory() -> None:
    net = Written(_called)
    made = rewrite(net, InPlaceNorm(), inputs=INPUT)
    for device in ("cpu", "meta"):
        fresh = Written(_called).to(device)
        replay(fresh, history(made))
        assert type(fresh.norm).__name__ == "InPlaceBatchNorm2d"
        assert "forward" in vars(fresh)


def test_keep_leaves_layers_alone_and_knows_its_paths() -> None:
    net = Chain(nn.BatchNorm2d(8), nn.LeakyReLU(), nn.InstanceNorm2d(8), nn.LeakyReLU())
    planned = _plan(net, keep=("middle.0",))
    assert _refused(planned) == {"middle.0": "kept by keep='middle.0'"}
    assert "middle.2" in _changed(planned)
    assert set(_refused(_plan(net, keep=("mid*",)))) == {"middle.0", "middle.2"}
    with pytest.raises(PatternError, match=r"'nowhere' matches no module of Chain"):
        _plan(net, keep=("nowhere",))


def test_relus_are_exchanged_on_request_and_the_plan_says_that_it_is_a_new_function() -> None:
    net = Chain(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    planned = _plan(net, activation="leaky_relu:0.01")
    assert planned.guarantee is Guarantee.RETRAIN
    assert _changed(planned) == {
        "middle.0": "BatchNorm2d + LeakyReLU(0.01) in place: 2.2 KiB less kept",
        "middle.1": "ReLU -> LeakyReLU(0.01), computed by the norm before it",
    }
    assert "a new function, so the model has to be trained" in planned.notes[1]
    made = rewrite(net, InPlaceNorm(activation="leaky_relu:0.01"), inputs=INPUT)
    twin = copy.deepcopy(net)
    twin.middle[1] = nn.LeakyReLU(0.01)
    x = torch.randn(2, 3, 8, 8)
    for train in (True, False):
        for module in (made, twin):
            module.train(train)
        assert torch.allclose(made(x), twin(x), atol=1e-6)
        with torch.no_grad():
            assert torch.allclose(made(x), twin(x), atol=1e-6)
    assert isinstance(made.get_submodule("middle.1"), nn.ReLU)
    assert "replaced_by=leaky_relu(0.01)" in repr(made)


def test_relus_that_stand_elsewhere_too_or_are_functions_are_not_exchanged() -> None:
    reused = Written(lambda net, x: net.relu(net.other(net.relu(net.norm(x)) + x) * 2))
    found = _refused(_plan(reused, activation="leaky_relu:0.01"))
    assert "the ReLU relu after it is called elsewhere too" in found["norm"]
    called = Written(lambda net, x: F.relu(net.norm(x)))
    found = _refused(_plan(called, activation="leaky_relu:0.01"))
    assert "called as a function by the model" in found["norm"]


@pytest.mark.parametrize("text", ["relu", "leaky_relu:0", "leaky_relu:2", "leaky_relu:x", "elu:1"])
def test_other_exchanges_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"a slope between 0 and 1"):
        InPlaceNorm(activation=text)


def test_a_frozen_half_is_converted_and_works_once_it_is_thawed() -> None:
    net = Chain(nn.BatchNorm2d(8), nn.LeakyReLU())
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    made = rewrite(net, InPlaceNorm(), inputs=INPUT)
    for module in (net, made):
        module.train()
        for parameter in module.parameters():
            parameter.requires_grad_(True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(net(x), made(x), atol=1e-6)


def test_a_branch_on_values_is_planned_on_real_tensors() -> None:
    def between(net: Written, x: Tensor) -> Tensor:
        y = F.leaky_relu(net.norm(x), 0.1)
        return y * 2 if bool(y.sum() > -1e9) else y

    planned = _plan(Written(between))
    assert "norm" in _changed(planned)


def test_planning_changes_nothing_and_draws_no_random_numbers() -> None:
    net = Chain(nn.BatchNorm2d(8), nn.LeakyReLU())
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _plan(net)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert type(net.middle[0]) is nn.BatchNorm2d
    assert not net.middle[0]._forward_hooks
