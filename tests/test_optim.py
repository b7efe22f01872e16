"""The optimizer in the backward pass: an ordinary loop's numbers, bit by bit, or an error."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

import tests.models as zoo
from pocketize import rewrite, step_in_backward
from pocketize.engine.pipeline import history
from pocketize.errors import ExecutionError
from pocketize.graph.capture import find_tensors
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs, as_inputs, to_model
from pocketize.passes import Checkpoint, InPlaceNorm, Offload, Patchwise, Recompute
from pocketize.plugin.base import Pass
from tests.contract.cases import _every_child
from tests.lifecycle.networks import COMBINATIONS, PASSES, Rewrite, untouched, volume

Make = Callable[[Any], Optimizer]
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 2, 3)
    return nn.Sequential(*layers).double()


def loss_of(outputs: Any) -> Tensor:
    """Return a loss whose gradient differs from element to element."""
    found = [t for t in find_tensors(outputs) if t.is_floating_point() and t.requires_grad]
    total = torch.zeros((), dtype=torch.float64)
    for t in found:
        weights = torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)
        total = total + (t * weights + t.square()).mean()
    return total


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1)


def train(
    model: nn.Module,
    optimizer: Any,
    inputs: Any = X,
    steps: int = 3,
    scheduler: Any = None,
    loss: Callable[[Any], Tensor] = loss_of,
) -> list[Tensor]:
    """Train as everybody does; return parameters and buffers."""
    given = inputs if isinstance(inputs, Inputs) else Inputs((inputs,))
    for k in range(steps):
        torch.manual_seed(k)
        optimizer.zero_grad()
        loss(given.call(model)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def both(make: Make, build: Callable[[], nn.Module] = net, **more: Any) -> None:
    """Hold that both ways to train give the same bits."""
    ordinary, stepping = build(), build()
    expected = train(ordinary, make(list(ordinary.parameters())), **more)
    assert equal(train(stepping, step_in_backward(stepping, make), **more), expected)
    assert all(p.grad is None for p in stepping.parameters())


@contextmanager
def refused(text: str) -> Iterator[None]:
    with pytest.raises(ExecutionError, match=f"^step_in_backward: .*{text}"):
        yield


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd with momentum": momentum,
    "adam": Adam,
    "adamw": AdamW,
    "adamw, foreach": lambda p: AdamW(p, foreach=True, amsgrad=True),
    "adamw, fused": lambda p: AdamW(p, fused=True),
    "adam, lr in a tensor": lambda p: Adam(p, lr=torch.tensor(1e-3, dtype=torch.float64)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5),
    "nadam": torch.optim.NAdam,
    "adagrad": torch.optim.Adagrad,
}


class TestAsInAnOrdinaryLoop:
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_the_same_weights_state_and_losses(self, make: Make) -> None:
        both(make)

    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_checkpoints_interchange_both_ways(self, make: Make) -> None:
        ordinary, stepping = net(), net()
        plain = make(list(ordinary.parameters()))
        ours = step_in_backward(stepping, make)
        train(ordinary, plain)
        train(stepping, ours)
        one, other = plain.state_dict(), ours.state_dict()
        assert one["param_groups"] == other["param_groups"]
        assert str(one["state"]) == str(dict(sorted(other["state"].items())))
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        there = torch.load(file)
        ours.load_state_dict(plain.state_dict())
        plain.load_state_dict(there)
        assert equal(train(ordinary, plain), train(stepping, ours))

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda o: CosineAnnealingLR(o, 3),
            lambda o: OneCycleLR(o, max_lr=0.1, total_steps=5),
        ],
    )
    def test_schedulers(self, schedule: Any) -> None:
        ordinary, stepping = net(), net()
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that of a step that was overridden
            expected = train(ordinary, plain, scheduler=schedule(plain))
            assert equal(train(stepping, ours, scheduler=schedule(ours)), expected)
        assert ours.param_groups[0]["lr"] == plain.param_groups[0]["lr"] != 1e-3

    def test_a_scheduler_of_a_metric(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        scheduler = ReduceLROnPlateau(ours, patience=0)
        for _ in range(3):
            train(model, ours, steps=1)
            scheduler.step(1.0)
        assert ours.param_groups[0]["lr"] < 1e-3

    def test_parameter_groups_of_an_optimizer_that_is_given(self) -> None:
        def made(model: nn.Module) -> Optimizer:
            decayed = [p for p in model.parameters() if p.ndim > 1]
            others = [p for p in model.parameters() if p.ndim <= 1]
            groups = [
                {"params": decayed, "weight_decay": 0.3},
                {"params": others, "weight_decay": 0.0, "lr": 0.1},
            ]
            return AdamW(groups)

        ordinary, stepping = net(), net()
        plain, given = made(ordinary), made(stepping)
        ours = step_in_backward(stepping, given)
        assert ours is given
        assert isinstance(ours, AdamW)
        assert equal(train(ordinary, plain), train(stepping, ours))

    def test_a_group_that_is_added_later(self) -> None:
        models, optimizers = (net(), net()), []
        for make in (lambda m, p: AdamW(p), lambda m, p: step_in_backward(m, AdamW(p))):
            model = models[len(optimizers)]
            optimizers.append(make(model, model[0].parameters()))
            optimizers[-1].add_param_group({"params": model[3].parameters(), "lr": 0.1})
        assert equal(*(train(m, o) for m, o in zip(models, optimizers, strict=True)))

    def test_a_parameter_that_was_taken_out_of_its_group(self) -> None:
        def use(model: Any, optimizer: Any) -> list[Tensor]:
            train(model, optimizer)
            optimizer.param_groups[0]["params"].pop(0)
            train(model, optimizer)
            return list(model.parameters())

        ordinary, stepping = net(), net()
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        assert equal(use(ordinary, plain), use(stepping, ours))
        assert stepping[0].weight.grad is not None

    @pytest.mark.parametrize("make", [momentum, AdamW])
    def test_frozen_unfrozen_and_unused_parameters(self, make: Make) -> None:
        def use(model: Any, optimizer: Any) -> list[Tensor]:
            train(model, optimizer)
            model[0].requires_grad_(True)
            model[3].bias.requires_grad_(False)
            train(model, optimizer, steps=2)
            model[3].bias.requires_grad_(True)
            train(model[:2], optimizer, steps=1)  # nothing reaches the rest
            return train(model, optimizer, steps=1)

        ordinary, stepping = net(), net()
        ordinary[0].requires_grad_(False)
        stepping[0].requires_grad_(False)
        plain, ours = make(list(ordinary.parameters())), step_in_backward(stepping, make)
        assert not stepping[0].weight.requires_grad
        assert equal(use(ordinary, plain), use(stepping, ours))

    def test_a_closure(self) -> None:
        def use(model: nn.Module, optimizer: Any) -> list[Tensor]:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model(X))
                loss.backward()
                return loss

            losses = [optimizer.step(closure).detach() for _ in range(3)]
            return losses + list(model.parameters())

        ordinary, stepping = net(), net()
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        assert equal(use(ordinary, plain), use(stepping, ours))

    def test_two_backward_passes_of_different_parameters(self) -> None:
        def use(model: Any, optimizer: Any) -> list[Tensor]:
            for _ in range(3):
                optimizer.zero_grad()
                middle = model[:3](X)
                model[3](middle.detach()).square().sum().backward()
                middle.square().sum().backward()
                optimizer.step()
            return list(model.parameters())

        ordinary, stepping = net(), net()
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        assert equal(use(ordinary, plain), use(stepping, ours))

    def test_gradients_by_hand_and_hooks_on_parameters(self) -> None:
        def use(model: Any, optimizer: Any) -> list[Tensor]:
            model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
            for _ in range(2):
                optimizer.zero_grad()
                model[:3](X).square().sum().backward()
                model[3].bias.grad = torch.ones(2, dtype=torch.float64)
                optimizer.step()
            return list(model.parameters())

        ordinary, stepping = net(), net()
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        assert equal(use(ordinary, plain), use(stepping, ours))

    def test_clipping_each_gradient_before_its_update(self) -> None:
        def clip(parameter: Tensor) -> None:
            nn.utils.clip_grad_norm_(parameter, 0.01)

        ordinary, stepping = net(), net()
        for model in (ordinary, stepping):
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(clip)
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        assert equal(train(ordinary, plain), train(stepping, ours))

    def test_sparse_gradients(self) -> None:
        def build() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)).double()

        both(lambda p: SGD(p, lr=0.1), build, inputs=torch.tensor([1, 1, 4]))

    def test_backward_within_autocast(self) -> None:
        def build() -> nn.Module:
            return net().float()

        def loss(outputs: Any) -> Tensor:
            return loss_of(outputs.float())

        with torch.autocast("cpu", dtype=torch.bfloat16):
            both(AdamW, build, inputs=X.float(), loss=loss)

    def test_a_gradient_penalty(self) -> None:
        def use(model: Any, optimizer: Any) -> list[Tensor]:
            x = X.clone().requires_grad_()
            for _ in range(3):
                optimizer.zero_grad()
                loss = loss_of(model(x))
                (inner,) = torch.autograd.grad(loss, x, create_graph=True)
                (loss + inner.square().sum()).backward(inputs=list(model.parameters()))
                optimizer.step()
            return list(model.parameters())

        ordinary, stepping = net(), net()
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        assert equal(use(ordinary, plain), use(stepping, ours))

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_compiled_model(self, backend: str) -> None:
        torch._dynamo.reset()
        ordinary, stepping = net(), net()
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        expected = train(torch.compile(ordinary, backend=backend), plain)
        assert equal(train(torch.compile(stepping, backend=backend), ours), expected)

    def test_gradients_never_exist_together(self) -> None:
        stepping, alive = net(), []
        gradients: list[weakref.ref[torch.UntypedStorage]] = []

        def note(parameter: Tensor) -> None:
            assert parameter.grad is not None
            alive.append(sum(ref() is not None for ref in gradients))
            gradients.append(weakref.ref(parameter.grad.untyped_storage()))

        for parameter in stepping.parameters():
            parameter.register_post_accumulate_grad_hook(note)
        train(stepping, step_in_backward(stepping, Adam))
        assert len(alive) == 3 * len(list(stepping.parameters()))
        assert not any(alive)


class TestWhatCannotBe:
    def test_accumulation(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        loss_of(model(X)).backward()
        with refused("accumulated with that of another"):
            loss_of(model(X)).backward()
        model.zero_grad()
        with refused("a second gradient of 3.weight arrived.* updated 7 of 7"):
            loss_of(model[3](model[:3](X).detach())).backward()
        with refused("the gradient of .* was dropped or replaced"):
            ours.step()
        train(model, ours)  # and on it goes

    def test_a_second_pass_through_the_same_graph(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        loss = loss_of(model(X))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        ours.step()

    @pytest.mark.parametrize("foreach", [False, True])
    def test_clipping_by_the_global_norm(self, foreach: bool) -> None:
        ours = step_in_backward(model := net(), AdamW)
        loss_of(model(X)).backward()
        assert "freed after the update" in repr(model[0].weight.grad)
        with refused("clipped by a global norm"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
        ours.step()

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_gradient_scaler(self, fused: bool) -> None:
        model = net().float()
        ours = step_in_backward(model, lambda p: AdamW(p, fused=fused))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(X.float()).square().sum()).backward()
        with refused("GradScaler"):
            scaler.step(ours)
        switched_off = torch.amp.GradScaler("cpu", enabled=False)
        ours.step()
        ours.zero_grad()
        switched_off.scale(model(X.float()).square().sum()).backward()
        switched_off.step(ours)

    def test_create_graph(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        before = copy.deepcopy(model.state_dict())
        with refused("create_graph=True"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a cycle
            loss_of(model.eval()(X)).backward(create_graph=True)
        assert equal(list(model.state_dict().values()), list(before.values()))
        ours.close()

    def test_gradients_that_are_dropped(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        loss_of(model(X)).backward()
        with refused("have updated 7 of 7 parameters since .* cannot be dropped"):
            ours.zero_grad()
        model.zero_grad()
        with refused("the gradient of 3.* was dropped or replaced between backward"):
            ours.step()

    def test_gradients_of_zero(self) -> None:
        ours = step_in_backward(net(), AdamW)
        with refused("gradients of zero"):
            ours.zero_grad(set_to_none=False)

    def test_a_learning_rate_that_changes_before_the_step(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        loss_of(model(X)).backward()
        ours.param_groups[0]["lr"] *= 0.5
        with refused("options of parameter group 0 .* were changed .* scheduler.step"):
            ours.step()
        rate = torch.tensor(1e-3)
        ours = step_in_backward(model := net(), lambda p: AdamW(p, lr=rate))
        loss_of(model(X)).backward()
        rate.mul_(0.5)
        with refused("options of parameter group 0 .* were changed"):
            ours.step()

    def test_a_weight_that_is_written_before_the_step(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        loss_of(model(X)).backward()
        with torch.no_grad():
            model[0].weight.mul_(0.9)
        with refused("0.weight was written to between"):
            ours.step()

    def test_an_exception_in_the_backward_pass(self) -> None:
        model = net()
        ours = step_in_backward(model, AdamW)
        saved = copy.deepcopy((model.state_dict(), ours.state_dict()))
        y = model[1](model[0](X))
        y.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model[3](model[2](y)).sum().backward()
        with refused("updated 3 of 7 parameters .* ended with an exception, only these"):
            ours.zero_grad()
        model.load_state_dict(saved[0])
        ours.load_state_dict(saved[1])
        other = net()
        expected = train(other, AdamW(other.parameters()))
        stepped = train(model, ours)
        assert equal(stepped[:7], expected[:7])  # the norm has seen one batch more

    def test_going_on_after_an_exception(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        y = model[:3](X)
        y.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model[3](y).sum().backward()
        ours.step()
        train(model, ours)

    def test_reentrant_checkpoints_with_a_shared_weight(self) -> None:
        from torch.utils.checkpoint import checkpoint

        layer = nn.Linear(3, 3).double()
        ours = step_in_backward(layer, AdamW)
        x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
        y: Any = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
        with refused("accumulated with that of another"):
            y.sum().backward()
        ours.step()

    def test_optimizers(self) -> None:
        class Foreign(SGD):
            pass

        with refused("test_optim.*Foreign may need all gradients at once"):
            step_in_backward(net(), Foreign)
        with refused("LBFGS may need all gradients"):
            step_in_backward(net(), torch.optim.LBFGS)
        with refused("differentiable=True"):
            step_in_backward(net(), lambda p: AdamW(p, differentiable=True))
        with refused("got list"):
            step_in_backward(net(), lambda p: p)  # type: ignore[arg-type, return-value]
        model = net()
        scheduled = AdamW(model.parameters())
        CosineAnnealingLR(scheduled, 3)
        with refused("create the scheduler of what it returns"):
            step_in_backward(model, scheduled)
        hooked = AdamW(model.parameters())
        hooked.register_step_pre_hook(lambda *_: None)
        with refused("a hook before the optimizer's step"):
            step_in_backward(model, hooked)
        ours = step_in_backward(model, AdamW)
        with refused("a hook before the optimizer's step"):
            ours.register_step_pre_hook(lambda *_: None)
        with refused("steps in the backward pass"):
            step_in_backward(model, ours)
        with refused("another optimizer updates 0.weight .* close"):
            step_in_backward(model, AdamW)
        train(model, ours)

    def test_several_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        there = torch.distributed
        there.init_process_group("gloo", store=there.HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(net().float())
            with refused("DistributedDataParallel averages gradients"):
                step_in_backward(wrapped, AdamW)
            ours = step_in_backward(model := net(), AdamW)
            monkeypatch.setattr(there, "get_world_size", lambda: 2)
            before = copy.deepcopy(list(model.parameters()))
            with refused("there are several processes"):
                loss_of(model(X)).backward()
            assert equal(list(model.parameters()), before)
            ours.close()
            with refused("there are several processes"):
                step_in_backward(net(), AdamW)
        finally:
            there.destroy_process_group()


class TestItsLife:
    def test_step_hooks_run_once(self) -> None:
        seen: list[Any] = []
        ours = step_in_backward(model := net(), AdamW)
        ours.register_step_post_hook(lambda *_: seen.append(1))
        train(model, ours)
        ours.close()
        ours.register_step_pre_hook(lambda *_: seen.append(2))
        train(model, ours, steps=1)
        assert seen == [1, 1, 1, 2, 1]

    def test_copies_and_pickles_are_ordinary(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        train(model, ours)
        copies = [copy.deepcopy((model, ours)), pickle.loads(pickle.dumps((model, ours)))]
        expected = train(model, ours)
        for made, optimizer in copies:
            assert type(optimizer) is AdamW
            assert equal(train(made, optimizer), expected)
            assert next(made.parameters()).grad is not None

    def test_close(self) -> None:
        ordinary, stepping = net(), net()
        plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
        scheduler = CosineAnnealingLR(ours, 9)
        train(stepping, ours, scheduler=scheduler)
        ours.close()
        after = train(stepping, ours, scheduler=scheduler)
        assert stepping[0].weight.grad is not None
        ours.zero_grad(set_to_none=False)
        assert equal(after, train(ordinary, plain, steps=6, scheduler=CosineAnnealingLR(plain, 9)))
        assert step_in_backward(stepping, AdamW)  # nobody else is in the way

    def test_it_ends_with_the_optimizer(self) -> None:
        ours = step_in_backward(model := net(), AdamW)
        gone = weakref.ref(ours)
        del ours
        assert gone() is None
        loss_of(model(X)).backward()
        assert model[0].weight.grad is not None
        assert step_in_backward(model, AdamW)

    @pytest.mark.slow
    def test_a_rewritten_copy_has_no_hooks(self) -> None:
        ours = step_in_backward(model := untouched(), AdamW)
        made = rewrite(model, Recompute(min_bytes=0), inputs=volume())
        loss_of(made(volume())).backward()
        assert made.get_parameter("head.weight").grad is not None
        before = [p.detach().clone() for p in model.parameters()]
        ours.step()
        assert equal(before, list(model.parameters()))


EVERY = {"untouched": Rewrite(()), **PASSES, **COMBINATIONS}


class TestWithPasses:
    """A weight is not updated while a later part of the backward pass still reads it."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", EVERY)
    def test_the_life_net(self, name: str) -> None:
        # With dropout where the plan does not refuse it; recompute must draw the same masks.
        variant = "dropout" if name in ("recompute", "checkpoint", "offload") else ""
        made = (lambda: untouched(variant=variant)) if name == "untouched" else None
        build = made or (lambda: EVERY[name].fresh(variant=variant))
        for make in (momentum, AdamW):
            both(make, build, inputs=volume())
        stepping, plain = build(), untouched(variant=variant)
        found = train(stepping, step_in_backward(stepping, momentum), volume())
        expected = train(plain, momentum(list(plain.parameters())), volume())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.slow
    def test_two_forwards_then_one_backward(self) -> None:
        def loss(model: nn.Module) -> Callable[[Any], Tensor]:
            return lambda outputs: loss_of(outputs) + loss_of(model(2 * volume()))

        for each in PASSES.values():
            ordinary, stepping = each.fresh(), each.fresh()
            plain, ours = AdamW(ordinary.parameters()), step_in_backward(stepping, AdamW)
            expected = train(ordinary, plain, volume(), loss=loss(ordinary))
            assert equal(train(stepping, ours, volume(), loss=loss(stepping)), expected)


def _leaky(model: nn.Module) -> nn.Module:
    """Replace ReLUs, since norms in place cannot invert them."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.ReLU:
                setattr(module, name, nn.LeakyReLU(0.1, child.inplace))
    return model


WAYS: dict[str, Callable[[zoo.Net], tuple[Pass, ...]]] = {
    "recompute-conv": lambda n: (Recompute(keep="conv", min_bytes=0),),
    "recompute-level": lambda n: (Recompute(keep="level", min_bytes=0),),
    "in-place-norm": lambda n: (InPlaceNorm(),),
    "checkpoint": lambda n: (_every_child(n),),
    "offload": lambda n: (Offload(to="disk", min_bytes="64B"),),
    "patchwise": lambda n: (Patchwise(size=8, train=True, progress=False),),
}
AWKWARD = dict.fromkeys(n for tag in ("reuse", "ties", "computed-weight") for n in zoo.nets(tag))
_FAST = {"shared_conv", "tied_weights", "transposed_tie", "spectral_norm_parametrized"}


@pytest.mark.each_value
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "given",
    [pytest.param(n, marks=[] if n.name in _FAST else pytest.mark.slow) for n in AWKWARD],
    ids=str,
)
def test_shared_tied_and_computed_weights(given: zoo.Net, way: str) -> None:
    model = given.build().double().train()
    model = _leaky(model) if way == "in-place-norm" else model
    inputs = to_model(as_inputs(given.inputs(), model), model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a pass that changes nothing
        made = rewrite(model, *WAYS[way](given), inputs=inputs)
    if not history(made):
        pytest.skip("nothing changes")
    both(AdamW, lambda: clone(made), inputs=inputs)


class TwoRoles(nn.Module):
    """Its weight is trained by one convolution, and read without a gradient by another."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.act = nn.LeakyReLU(0.1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        for trained in (self.first, not self.first):
            weight = self.conv.weight if trained else self.conv.weight.detach()
            y = self.act(F.conv2d(y, weight, padding=1))
        return y


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        (),
        (Recompute(keep="conv", min_bytes=0),),
        (Recompute(keep="level", min_bytes=0),),
        (InPlaceNorm(),),
        (Checkpoint(only=("stem",)),),
        (Offload(to="disk", min_bytes="64B"),),
        (Patchwise(size=8, train=True, progress=False),),
    ],
    ids=lambda given: str(given),
)
def test_a_weight_that_is_read_after_its_update_is_an_error(
    given: tuple[Pass, ...], first: bool
) -> None:
    """The later convolution of the backward pass reads the weight that the other one trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = rewrite(TwoRoles(first).double(), *given, inputs=volume()) if given else None
    build = (lambda: clone(made)) if made is not None else (lambda: TwoRoles(first).double())
    if first or (given and given[0].name == "patchwise"):
        both(AdamW, build, inputs=volume())  # in one node of the graph, or read before
        return
    stepping = build()
    with pytest.raises(RuntimeError, match=r"inplace operation|written to|in-place operation"):
        train(stepping, step_in_backward(stepping, AdamW), volume())
