"""A checkpointed block finds in backward what its forward found, or says what was changed."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from pocketize import plan, rewrite
from pocketize.engine.surgery import apply_edits
from pocketize.errors import ExecutionError, PocketizeWarning
from pocketize.graph.clone import clone
from pocketize.passes import Checkpoint
from pocketize.plugin.edits import Convert
from tests.passes.shared.uses import function_transforms

X = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Outer(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.part, self.last = nn.Conv2d(1, 4, 1), part, nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.first(x)))


class Stateful(nn.Module):
    """Keeps about everything in attributes that a module may keep there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.shift = nn.Parameter(torch.zeros(4, 1, 1))
        self.scale, self.calls = 2.0, 0
        self.seen: list[int] = []
        self.options = {"a": {"b": 1.0}}
        self.plain = torch.ones(1, dtype=torch.float64)
        self.table: Any = None
        self.last: Any = None
        more = SimpleNamespace(bias=0.5, plain=torch.ones(1, dtype=torch.float64))
        #: An object of the user's, with another one in it.
        self.held = SimpleNamespace(calls=0, seen=[], inner=[more])
        more.outer = self.held

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype) * 1.0
        y = torch.tanh(self.conv(x)) * self.scale + self.table
        self.held.calls += 1
        self.held.seen.append(self.held.calls)
        y = torch.tanh(y * self.held.inner[0].plain) + self.held.inner[0].bias
        self.last = torch.exp(y * self.options["a"]["b"])
        return torch.sin(self.last * self.plain) + self.shift


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Tanh()
    )


def pair(part: nn.Module) -> tuple[Any, Any]:
    model = Outer(part).double()
    made = clone(model)  # the plan is tested elsewhere
    apply_edits(made, [Convert("part", Checkpoint.name, {})])
    return model, made


def both(part: nn.Module, use: Callable[[Any], Any]) -> None:
    """Use the untouched and the checkpointed network alike, and compare all that comes of it."""
    results = []
    for model in pair(part):
        told = use(model)
        gradients = [p.grad for p in model.parameters()]
        results.append([told, *gradients, *model.parameters(), *model.buffers()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def loss(model: nn.Module, scale: float = 1.0) -> Tensor:
    return model(X * scale).square().mean()


def test_statistics_are_updated_once_also_where_a_class_lists_no_buffers():
    class Silent(nn.Sequential):
        def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
            return iter(())

    part = Silent(*normed())
    _, made = pair(part)
    before = made.part[1].num_batches_tracked.item()
    loss(made).backward()
    assert made.part[1].num_batches_tracked.item() == before + 1


def test_counters_lists_and_lazily_built_tables_are_updated_once():
    def use(model: Any) -> Any:
        for step in range(3):
            loss(model, step + 1.0).backward()
        held = model.part.held
        return model.part.calls, model.part.seen, model.part.table, held.calls, held.seen

    both(Stateful(), use)


def test_attributes_changed_in_between_are_changed_for_the_next_forward_only():
    def use(model: Any) -> Any:
        value = loss(model)
        model.part.scale, model.part.options["a"]["b"] = 7.0, 3.0
        model.part.plain = model.part.plain * 2
        model.part.seen.append(0)
        held = model.part.held
        held.inner[0].bias, held.new = 9.0, 1
        held.inner[0].plain = held.inner[0].plain * 2
        held.seen.append(0)
        value.backward()
        inner = held.inner[0].bias, held.inner[0].plain, held.inner[0].outer is held
        state = model.part.scale, model.part.options, model.part.seen, model.part.plain
        return *state, held.seen, held.calls, held.new, *inner

    both(Stateful(), use)


@dataclass(slots=True)
class Slots:
    value: float = 1.0


class Private:
    __slots__ = ("__value",)

    def __init__(self) -> None:
        self.__value = 1.0

    value = property(lambda self: self.__value, lambda self, v: setattr(self, "_Private__value", v))


class Items:
    """The only item of a container, as an attribute."""

    value = property(lambda self: next(iter(self)), lambda self, v: (self.clear(), self.add(v)))

    def add(self, value: float) -> None:
        self.append(value)  # type: ignore[attr-defined]


class Keys:
    value = property(lambda self: self["value"], lambda self, v: self.update(value=v))


HOLDERS: dict[str, Any] = {
    "slots": Slots,
    "slots and attributes": type("Both", (Slots,), {}),
    "private slots": Private,
    "list": lambda: type("List", (Items, list), {})([1.0]),
    "deque": lambda: type("Deque", (Items, deque), {})([1.0]),
    "set": lambda: type("Set", (Items, set), {"add": set.add})([1.0]),
    "dict": lambda: type("Dict", (Keys, dict), {})(value=1.0),
    "OrderedDict": lambda: type("Ordered", (Keys, OrderedDict), {})(value=1.0),
    "defaultdict": lambda: type("Default", (Keys, defaultdict), {})(float, value=1.0),
}


class Holds(nn.Module):
    """Counts in an object, and computes with the count."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.conv, self.held = nn.Conv2d(4, 4, 1), [held]

    def forward(self, x: Tensor) -> Tensor:
        (held,) = self.held
        held.value = held.value + 1
        return torch.tanh(self.conv(x) * held.value)


@pytest.mark.parametrize("kind", HOLDERS)
def test_objects_are_as_they_were_whatever_they_keep_their_state_in(kind: str):
    def use(model: Any) -> Any:
        (held,) = model.part.held
        value = loss(model)
        held.value = 7.0
        value.backward()
        return held.value

    both(Holds(HOLDERS[kind]()), use)


def test_an_attribute_that_a_forward_adds_to_slots_is_added_once():
    class Lazy:
        __slots__ = ("value",)

    class Fills(Holds):
        def forward(self, x: Tensor) -> Tensor:
            (held,) = self.held
            if not hasattr(held, "value"):
                held.value, x = 1.0, x * 2
            return torch.tanh(self.conv(x))

    both(Fills(Lazy()), lambda model: [loss(model).backward(), model.part.held[0].value][1])


@pytest.mark.slow
def test_steps_whose_output_stays_in_an_attribute_do_not_keep_each_other_alive():
    _, model = pair(Stateful())
    counts = []
    for _ in range(4):
        loss(model)  # without a backward, which would free more
        gc.collect()
        counts.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
    assert counts[3] == counts[1]


@pytest.mark.parametrize("toggled", ["part", "part.1"])
def test_modes_toggled_in_between_hold_afterwards_and_not_in_the_second_run(toggled: str):
    def use(model: Any) -> Any:
        value = loss(model)
        model.get_submodule(toggled).eval()
        value.backward()
        return [module.training for module in model.modules()]

    both(normed(), use)


@pytest.mark.parametrize("before", [True, False])
def test_parameters_frozen_or_unfrozen_in_between(before: bool):
    def use(model: Any) -> Any:
        model.part.requires_grad_(before)
        value = loss(model)
        model.part.requires_grad_(not before)
        value.backward()
        return [parameter.requires_grad for parameter in model.parameters()]

    both(normed(), use)


def test_global_settings_changed_in_between():
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            made = torch.ones(x.shape[-1]) * 0.1  # of the default type
            return torch.tanh(torch.tanh(self.conv(x)) * made)

    def use(model: Any) -> Any:
        value = loss(model)
        try:
            torch.set_default_dtype(torch.float64)
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            value.backward()
            return torch.get_default_dtype() is torch.float64, torch.backends.mkldnn.enabled
        finally:
            torch.set_default_dtype(torch.float32)
            torch.backends.mkldnn.enabled = True  # type: ignore[assignment]

    both(Makes(), use)


def test_weights_passed_to_functional_call_are_those_of_the_second_run():
    def use(model: Any) -> Any:
        given = {n: (p.detach() * 1.1).requires_grad_() for n, p in model.named_parameters()}
        torch.func.functional_call(model, given, (X,)).square().sum().backward()
        return [tensor.grad for tensor in given.values()]

    both(normed(), use)


def test_weights_adapted_in_an_inner_loop_are_those_of_the_second_run():
    def use(model: Any) -> Any:
        fast = dict(model.named_parameters())
        for _ in range(2):
            value = torch.func.functional_call(model, fast, (X,)).square().mean()
            steps = torch.autograd.grad(value, list(fast.values()), create_graph=True)
            fast = {n: p - 0.1 * d for (n, p), d in zip(fast.items(), steps, strict=True)}
        torch.func.functional_call(model, fast, (2 * X,)).square().mean().backward()

    both(normed(), use)


def test_parameters_exchanged_for_others_in_between():
    def use(model: Any) -> Any:
        value, first = loss(model), list(model.parameters())
        model.part[0].weight = nn.Parameter(model.part[0].weight.detach() * 2)
        model.part[3] = nn.Conv2d(4, 4, 1).double().requires_grad_(False)
        model.part[3].load_state_dict({"weight": torch.ones(4, 4, 1, 1), "bias": torch.ones(4)})
        return torch.autograd.grad(value, first)

    both(normed(), use)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_two_forwards_of_normed_weights_before_one_backward(norm: Any):
    torch.manual_seed(0)
    part = nn.Sequential(norm(nn.Conv2d(4, 4, 3)), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Tanh())
    both(part, lambda model: (loss(model) + loss(model, 2.0)).backward())


def test_a_gan_whose_critic_sees_real_and_made_images_and_is_frozen_for_the_other_step():
    def use(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        (loss(model) - loss(model, 0.5)).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.requires_grad_(False)
        made = X.clone().requires_grad_()
        model(made).mean().backward()
        model.requires_grad_(True)
        return made.grad

    both(normed(), use)


def test_gradient_penalties_and_partial_and_repeated_backwards():
    def use(model: Any) -> Any:
        x = X.clone().requires_grad_()
        value = model(x).square().mean()
        (weight,) = torch.autograd.grad(value, [model.last.weight], retain_graph=True)
        (first,) = torch.autograd.grad(value, [x], create_graph=True)
        (first.square().sum() + value).backward()
        return weight, first

    both(normed(), use)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")  # by torch, for jvp
def test_function_transforms_and_dual_numbers():
    both(normed(), lambda model: function_transforms(model, X))


def test_an_empty_batch():
    def use(model: Any) -> Any:
        x = torch.empty(0, 1, 8, 8, dtype=torch.float64, requires_grad=True)
        model(x).sum().backward()
        return x.grad

    both(normed(), use)


def stepping(model: nn.Module) -> None:
    """Train with an optimizer that updates each weight as soon as its gradient is there."""

    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(0.5 * parameter.grad)  # type: ignore[operator]
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        loss(model).backward()


def test_an_optimizer_in_backward_may_step_on_what_the_second_run_does_not_reach():
    both(Stateful(), stepping)  # its shift is the last that is added, and autograd keeps nothing


def test_an_optimizer_in_backward_with_a_weight_that_two_blocks_share():
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = (
                nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Tanh(), nn.Conv2d(1, 1, 1))
                for _ in range(2)
            )
            self.second[0].weight = self.first[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).tanh()

    model = Shares().double()
    made = rewrite(model, Checkpoint(only=("first", "second")), inputs=X)
    stepping(model)
    stepping(made)
    torch.testing.assert_close(list(made.parameters()), list(model.parameters()))


def write(model: Any, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight": (lambda m: write(m, "part.conv.weight"), "parameter 'conv.weight' was written to"),
    "bias": (lambda m: write(m, "part.conv.bias"), "parameter 'conv.bias' was written to"),
    "plain": (lambda m: m.part.plain.mul_(2), "a tensor attribute was written to"),
    "plain in an object": (
        lambda m: m.part.held.inner[0].plain.mul_(2),
        "a tensor attribute was written to",
    ),
    "memory": (
        lambda m: setattr(m.part.conv.weight, "data", m.part.conv.weight * 2),
        "parameter 'conv.weight' was given other memory",
    ),
    "load": (
        lambda m: m.part.load_state_dict({k: v * 2 for k, v in m.part.state_dict().items()}),
        "parameter 'conv.weight' was written to",
    ),
    "cast": (lambda m: m.part.float(), "parameter 'shift' was given other memory"),
    "step": (
        lambda m: torch.optim.SGD([{"params": m.part.parameters()}], lr=0.1).step(),
        "parameter 'conv.weight' was written to",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_second_run_reads_must_not_be_written_in_between(change: str):
    _, model = pair(Stateful())
    value = loss(model)
    value.backward(retain_graph=True)  # so that an optimizer has gradients to step with
    todo, why = CHANGES[change]
    todo(model)
    with pytest.raises(ExecutionError, match=rf"^checkpoint: {why}.*Call backward\(\) first"):
        value.backward()


class Nested(nn.Module):
    """A block that takes lists, which it empties, dicts, and arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, skips: list[Tensor], *, more: dict[str, Any]) -> Tensor:
        y = torch.tanh(self.one(skips.pop()))
        skips.append(y)
        return torch.tanh(self.two(y * more["given"][0][0] + skips.pop(0)))


class Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.part = nn.Conv2d(1, 4, 1), Nested()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.part([self.first(x), self.first(x * 2)], more={"given": ([c], 3)})


def giving() -> tuple[nn.Module, nn.Module]:
    model = Gives().double()
    return model, rewrite(model, Checkpoint(only=("part",)), inputs=(X, X[0]))


def test_lists_that_a_block_changes_are_as_they_were_in_the_second_run():
    model, made = giving()
    for net in (model, made):
        net(X, X[0]).square().mean().backward()
    for a, b in zip(model.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("position", [0, 1])
def test_inputs_written_in_between_are_told_wherever_they_are(position: int):
    _, made = giving()
    given = [X.clone(), X[0].clone()]
    value = made(*given).square().mean()
    given[position].add_(1)
    if position == 0:  # the first convolution's alone, as in the untouched network
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
        return
    with pytest.raises(ExecutionError, match=r"^checkpoint: input 2 was written to"):
        value.backward()


def test_inputs_with_a_class_of_their_own_are_what_the_second_run_gets():
    class Named(Tensor):
        label: str

    kinds: list[Any] = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            kinds.append((type(x), getattr(x, "label", "")))
            return torch.exp(torch.tanh(self.conv(x)))

    made = rewrite(
        nn.Sequential(Looks(), nn.Conv2d(4, 1, 1)).double(), Checkpoint(only=("0",)), inputs=X
    )
    x = X.as_subclass(Named)
    x.label = "left"
    kinds.clear()
    out = made(x)
    out.sum().backward()
    assert type(out) is Named
    assert kinds == [(Named, "left")] * 2


def test_a_tensor_handed_over_in_an_attribute_is_that_of_its_forward():
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.given = nn.Conv2d(4, 4, 1), X.new_zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.tanh(self.conv(x)) * self.given)

    def use(model: Any) -> None:
        total: Any = 0
        for scale in (1.0, 2.0):
            model.part.given = model.last.weight.flatten()[0] * scale
            total = total + loss(model)
        total.backward()

    both(Takes(), use)


def test_blocks_that_read_a_tensor_from_elsewhere_are_refused():
    outside = torch.ones(1, dtype=torch.float64)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.tanh(self.conv(x)) * outside * torch.tensor(2.0))

    (row,) = plan(Outer(Reads()).double(), Checkpoint(only=("part",)), inputs=X).passes[0].refused
    assert "neither its own nor among its arguments" in row.why


def test_a_block_that_depends_on_something_else_that_changed_is_told():
    steps = [True]

    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.conv(x))
            return torch.tanh(y) if steps[0] else y[:, :, 1:].exp().tanh()

    _, model = pair(Switches())
    value = loss(model)
    steps[0] = False
    with pytest.raises(RuntimeError, match="checkpoint"):
        value.backward()


def hook(*_: Any) -> None: ...


@contextmanager
def everywhere() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_hooks_registered_after_the_rewrite_run_once_and_the_first_time_with_a_warning():
    _, model = pair(normed())
    calls: list[int] = []
    handle = model.part[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(PocketizeWarning, match=r"^checkpoint: 0 of a checkpointed Sequential has"):
        value = loss(model)
    value.backward()
    loss(copy.deepcopy(model)).backward()  # no second warning, which would be an error here
    assert calls == [1, 1]
    handle.remove()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss(model)
    _, fresh = pair(normed())
    with everywhere(), pytest.warns(PocketizeWarning, match="every module of a checkpointed"):
        loss(fresh).backward()


def test_hooks_registered_or_removed_between_forward_and_backward_do_not_matter():
    def use(model: Any) -> Any:
        calls: list[int] = []
        value = loss(model)
        model.part[0].register_forward_hook(lambda *_: calls.append(1))
        value.backward()
        return calls, len(model.part[0]._forward_hooks)

    both(normed(), use)


class Interrupts(TorchDispatchMode):
    """Raises ``KeyboardInterrupt`` in place of one operator."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def test_interrupts_leave_modes_buffers_and_weights_as_they_are():
    _, model = pair(normed())
    stopped = 0
    for after in range(1, 40, 2):
        model.train()
        value = loss(model)
        model.eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        places = [{**vars(m), **m._buffers, **m._parameters} for m in model.modules()]
        try:
            with Interrupts(after):
                value.backward()
        except KeyboardInterrupt:
            stopped += 1
        model.zero_grad()
        now = [{**vars(m), **m._buffers, **m._parameters} for m in model.modules()]
        for old, new in zip(places, now, strict=True):
            assert old.keys() == new.keys()
            assert all(old[name] is new[name] for name in old)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert stopped > 5


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
class Scaled(nn.Module):
    """Multiplies by an attribute, and lets somebody know when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.scale = nn.Conv2d(1, 4, 3), nn.Sigmoid(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        told(self.scale)
        return self.act(self.conv(x).sigmoid() * self.scale)


def told(scale: float) -> None:
    """Replaced by a test."""


def test_a_forward_in_another_thread_does_not_see_what_a_second_run_puts_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = rewrite(nn.Sequential(Scaled(), nn.Conv2d(4, 1, 1)), Checkpoint(only=("0",)))
    x = torch.randn(1, 1, 8, 8)
    loss = net(x).sum()
    net[0].scale = 2.0
    seen: list[float] = []
    began = threading.Event()

    def second_run(scale: float) -> None:
        seen.append(scale)
        if scale == 1.0:
            thread.start()
            began.wait()
            time.sleep(0.05)  # for the other thread to come to the block

    def forward() -> None:
        began.set()
        net(x)

    thread = threading.Thread(target=forward)
    monkeypatch.setattr(sys.modules[__name__], "told", second_run)
    loss.backward()
    thread.join()
    assert seen == [1.0, 2.0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_modules_inside_update_their_statistics_once():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    part = nn.Sequential(nn.Conv2d(4, 4, 1), scripted, nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Tanh())

    def use(model: Any) -> None:
        for _ in range(2):
            value = loss(model)
            model.eval()
            value.backward()
            model.train()

    both(part, use)


def test_checkpoints_of_torch_inside_and_around():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

        def some(self, x: Tensor) -> Tensor:
            return torch.tanh(self.one(x))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.utils.checkpoint.checkpoint(self.some, torch.tanh(x), use_reentrant=False)
            return torch.tanh(self.two(y))

    def use(model: Any) -> None:
        out = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
        out.square().mean().backward()

    both(Inner(), use)


def test_copies_made_between_forward_and_backward_are_networks_of_their_own():
    def use(model: Any) -> Any:
        value = loss(model)
        twin = copy.deepcopy(model)
        value.backward()
        loss(twin, 2.0).backward()
        return [parameter.grad for parameter in twin.parameters()]

    both(normed(), use)
