"""Every check of the contract finds the fault it is there for, and none cries without one.

The rewrite here is a fake: a deep copy with one fault planted. A check that never fails would make
the whole contract suite worthless, so there is at least one fault for each of them.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.engine.pipeline import PassPlan
from pocketize.errors import NoEffectWarning
from pocketize.graph.inputs import as_inputs
from pocketize.passes import Pocket
from pocketize.plugin.base import Change, Guarantee, PassRecord
from tests.contract.case import Case
from tests.contract.everything import CHECKS, failures
from tests.contract.snapshot import Snapshot
from tests.contract.test_exact_checks import EXACT_FAULTS
from tests.models.registry import Net, image


def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A user's hook."""
    return output * 0.5


class Victim(nn.Module):
    """A little of everything that a rewrite could lose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 8, 1)
        self.b.weight = self.a.weight
        self.head = nn.Conv2d(8, 2, 1)
        self.act = nn.ReLU()
        self.again = self.act
        self.offset: Tensor
        self.register_buffer("offset", torch.zeros(1, 8, 1, 1), persistent=False)
        self.flavour, self.levels = "plain", [1, 2]
        self.norm.eval()
        self.a.bias.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.stem.register_forward_hook(scale)
        self.stem.weight.grad = torch.ones_like(self.stem.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.act(self.norm(self.stem(x) + self.offset))
        x = self.again(self.a(x) + self.b(x))
        return {"out": self.head(x)}


class Impostor(Victim):
    """Another class that does the same."""


NET = Net("victim", Victim, image(2, 3, 6, 6), frozen={"head": ""})


def keep(model: nn.Module) -> None:
    """The rewrite without a fault."""


def fake_case(
    fault: Callable[[Any], None] = keep, *, on_original: Callable[[Any], None] = keep
) -> Case:
    """A case of the fake rewrite: a deep copy and what was planted in it, or in the original."""
    original = NET.build()
    before = Snapshot(original)
    rewritten = copy.deepcopy(original)
    fault(rewritten)
    on_original(original)

    def again(model: nn.Module) -> nn.Module:
        warnings.warn("fake changed nothing", NoEffectWarning, stacklevel=2)
        return copy.deepcopy(model)

    def in_place(model: nn.Module) -> nn.Module:
        fault(model)
        return model

    return Case(
        build=NET.build,
        inputs=as_inputs(NET.inputs()),
        guarantee=Guarantee.EXACT,
        original=original,
        before=before,
        rewritten=rewritten,
        again=again,
        in_place=in_place,
        reference=NET.build,
        net=NET,
    )


def test_a_faultless_rewrite_passes_every_check() -> None:
    assert failures(fake_case()) == []


def set_mode(model: Victim) -> None:
    model.train()


def set_weight(model: Victim) -> None:
    model.head.weight.data[0, 0, 0, 0] += 1e-4


def rebuild_weight(model: Victim) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def set_gradient(model: Victim) -> None:
    model.stem.weight.grad.add_(1)


def drop_gradient(model: Victim) -> None:
    model.stem.weight.grad = None


def drop_hook(model: Victim) -> None:
    model.stem._forward_hooks.clear()


def add_hook(model: Victim) -> None:
    model.stem.register_forward_hook(scale)


def freeze(model: Victim) -> None:
    model.head.weight.requires_grad_(False)


def set_text(model: Victim) -> None:
    model.flavour = "fancy"


def grow_list(model: Victim) -> None:
    model.levels.append(3)


def draw_from_torch(model: Victim) -> None:
    torch.rand(())


def draw_from_python(model: Victim) -> None:
    random.random()


def write_and_restore(model: Victim) -> None:
    with torch.no_grad():
        model.norm.running_mean.add_(0)


@pytest.mark.parametrize(
    "touch",
    [
        set_mode,
        set_weight,
        rebuild_weight,
        set_gradient,
        drop_gradient,
        drop_hook,
        add_hook,
        freeze,
        set_text,
        grow_list,
        draw_from_torch,
        draw_from_python,
        write_and_restore,
    ],
)
def test_original_untouched_sees_any_touch(touch: Callable[[Any], None]) -> None:
    with torch.random.fork_rng(devices=[]):
        state = random.getstate()
        try:
            found = failures(fake_case(on_original=touch), ["original_untouched"])
        finally:
            random.setstate(state)
    assert len(found) == 1


def turn_into_another_class(model: Victim) -> None:
    model.__class__ = Impostor


def replace_layer(model: Victim) -> None:
    act = nn.LeakyReLU(0.0)
    act.train(model.act.training)
    model.act = act


def rename_key(model: Victim) -> None:
    model.tail = model.head
    del model.head


def make_persistent(model: Victim) -> None:
    model._non_persistent_buffers_set.clear()


def reorder(model: Victim) -> None:
    stem = model.stem
    del model.stem
    model.stem = stem


def buffer_to_parameter(model: Victim) -> None:
    offset = model.offset
    del model.offset
    model.offset = nn.Parameter(offset)


class BareTensor(Victim):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)["out"]


def return_tensor(model: Victim) -> None:
    model.__class__ = BareTensor


def widen_head(model: Victim) -> None:
    model.head = nn.Conv2d(8, 3, 1)


class NestedInTraining(Victim):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return {"out": [out["out"]]} if self.training else out


def nest_in_training(model: Victim) -> None:
    model.__class__ = NestedInTraining


def to_double(model: Victim) -> None:
    model.head.double()
    model.head.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    model.head.register_forward_hook(lambda module, args, output: output.float())


def thaw(model: Victim) -> None:
    model.a.bias.requires_grad_(True)


def lose_format(model: Victim) -> None:
    model.stem.weight.data = model.stem.weight.data.contiguous()


def misshape_gradient(model: Victim) -> None:
    """Surgery that forgets the gradient: torch checks a gradient's shape only when it is set."""
    model.head.bias.grad = torch.zeros(2)
    model.head.bias.data = torch.zeros(1)


def thaw_norm(model: Victim) -> None:
    model.norm.train()


class Reshaped(nn.Conv2d):
    """A converted layer, which is one of the old class still."""


def lose_attribute_in_converting(model: Victim) -> None:
    model.head.__class__ = Reshaped
    model.head.stride = "wide"


def lose_attribute(model: Victim) -> None:
    del model.flavour


class CallsForwardItself(Victim):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.act(self.norm(0.5 * self.stem.forward(x) + self.offset))
        x = self.again(self.a(x) + self.b(x))
        return {"out": self.head(x)}


def hook_that_does_not_fire(model: Victim) -> None:
    model.__class__ = CallsForwardItself


def untie_weights(model: Victim) -> None:
    model.b.weight = nn.Parameter(model.b.weight.detach().clone())


def untie_modules(model: Victim) -> None:
    model.again = nn.ReLU()


def hold_something_uncopyable(model: Victim) -> None:
    model.generator = (item for item in ())


def lie_about_size(model: Victim) -> None:
    model.stem.out_channels = 4


def lie_about_features(model: Victim) -> None:
    model.norm.num_features = 4


def overflow(model: Victim) -> None:
    model.offset.fill_(float("inf"))


def hide_nan(model: Victim) -> None:
    model.norm.running_var[0] = float("nan")


def forge_history(model: Victim) -> None:
    record = PassRecord("fake", {}, "exact", "0", ({"edit": "resize"},))
    model._pocketize_history = (record,)


def shift(model: Victim) -> None:
    model.head.bias.data += 1e-6


def shift_statistics(model: Victim) -> None:
    model.norm.momentum = 0.2
    model.norm.train()


class Detached(Victim):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {key: value.detach() for key, value in super().forward(x).items()}


def stop_training(model: Victim) -> None:
    model.__class__ = Detached


class RootOfZero(Victim):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {key: value + (value * 0).sqrt() for key, value in super().forward(x).items()}


def explode_in_backward(model: Victim) -> None:
    model.__class__ = RootOfZero


FAULTS: list[tuple[str, Callable[[Any], None]]] = [
    ("same_classes", turn_into_another_class),
    ("same_classes", replace_layer),
    ("same_keys", rename_key),
    ("same_keys", make_persistent),
    ("same_keys", reorder),
    ("same_keys", buffer_to_parameter),
    ("same_outputs_in_shape", return_tensor),
    ("same_outputs_in_shape", widen_head),
    ("same_outputs_in_shape", nest_in_training),
    ("same_tensor_kinds", to_double),
    ("same_tensor_kinds", thaw),
    ("same_tensor_kinds", lose_format),
    ("same_tensor_kinds", misshape_gradient),
    ("same_modes", set_mode),
    ("same_modes", thaw_norm),
    ("same_python_attributes", set_text),
    ("same_python_attributes", lose_attribute),
    ("same_python_attributes", lose_attribute_in_converting),
    ("hooks_survive", drop_hook),
    ("hooks_survive", add_hook),
    ("hooks_survive", hook_that_does_not_fire),
    ("ties_survive", untie_weights),
    ("ties_survive", untie_modules),
    ("copies", hold_something_uncopyable),
    ("pickles", hold_something_uncopyable),
    ("trains", freeze),
    ("trains", stop_training),
    ("attributes_agree", lie_about_size),
    ("attributes_agree", lie_about_features),
    ("finite", overflow),
    ("finite", hide_nan),
    ("remembers", forge_history),
    ("in_place", rebuild_weight),
    ("in_place", replace_layer),
    ("in_place", drop_gradient),
    ("exact_outputs", shift),
    ("exact_outputs", shift_statistics),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_the_check_finds_its_fault(name: str, fault: Callable[[Any], None]) -> None:
    found = failures(fake_case(fault), [name])
    assert len(found) == 1
    assert found[0].startswith(f"{name}: ")


def test_independent_sees_shared_memory_and_shared_modules() -> None:
    case = fake_case()
    case.rewritten.head.weight.data = case.original.head.weight.data  # type: ignore[union-attr]
    assert "head.weight shares memory" in failures(case, ["independent"])[0]
    case = fake_case()
    case.rewritten.act = case.original.act
    assert "module 'act' is the original's own" in failures(case, ["independent"])[0]
    case = fake_case()
    assert failures(replace(case, rewritten=case.original), ["independent"])


def test_hooks_survive_sees_a_bound_method_of_the_original() -> None:
    case = fake_case()
    case.original.stem.register_forward_hook(scale.__get__(case.original))  # type: ignore[union-attr]
    case.rewritten.stem.register_forward_hook(scale.__get__(case.original))  # type: ignore[union-attr]
    assert "bound to the original" in failures(case, ["hooks_survive"])[0]


def test_idempotent_sees_a_second_change_and_a_missing_warning() -> None:
    def shrink_again(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        model.norm.weight.data = torch.ones(4)  # type: ignore[union-attr]
        return model

    case = replace(fake_case(), again=shrink_again)
    assert "a second run changed norm.weight: (8,) -> (4,)" in failures(case, ["idempotent"])[0]
    case = replace(fake_case(), again=copy.deepcopy)
    assert "no NoEffectWarning" in failures(case, ["idempotent"])[0]


def test_in_place_sees_a_copy() -> None:
    case = replace(fake_case(), in_place=copy.deepcopy)
    assert "returned another module" in failures(case, ["in_place"])[0]


def test_trains_sees_gradients_that_are_not_finite() -> None:
    case = fake_case(explode_in_backward)
    assert "trains: a gradient or the loss is not finite" in failures(case, ["trains"])[0]


def test_an_error_inside_a_check_is_a_failure_with_its_name() -> None:
    def break_forward(model: Any) -> None:
        model.forward = None

    found = failures(fake_case(break_forward), ["finite"])
    assert found == ["finite: TypeError: 'NoneType' object is not callable"]


def test_changes_that_the_plan_states_are_no_fault() -> None:
    plan = PassPlan(rewrite=Pocket(), changes=(Change("act", "ReLU -> LeakyReLU"),))
    case = replace(fake_case(replace_layer), plan=plan)
    assert failures(case, ["same_classes"]) == []


def test_every_check_has_a_fault() -> None:
    tried = {name for name, _ in [*FAULTS, *EXACT_FAULTS]}
    alone = {"original_untouched", "independent", "idempotent"}
    assert tried | alone == set(CHECKS)
