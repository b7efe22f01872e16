"""Tensors of classes of their own, such as MONAI's: what comes out is as the network returns it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from pocketize import compare, measure, plan, pocketize, rewrite
from pocketize.passes import Offload, Patchwise
from pocketize.passes.offload.offload import OffloadedForward
from pocketize.plugin.registry import list_passes


class Named(Tensor):
    """Of the default mechanism: results are of the class, without attributes."""


class Noted(Tensor):
    """Results carry the note of the first argument that has one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        notes = [vars(a)["note"] for a in args if isinstance(a, cls) and "note" in vars(a)]
        if isinstance(made, cls) and notes:
            made.note = notes[0]  # type: ignore[attr-defined]
        return made


def meta(x: Tensor) -> Tensor:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    return MetaTensor(x, affine=affine, meta={"filename_or_obj": "a.nii", "note": [1]})


def named(x: Tensor) -> Tensor:
    made = x.as_subclass(Named)
    made.note = "lost"  # type: ignore[attr-defined]
    return made


def noted(x: Tensor) -> Tensor:
    made = x.as_subclass(Noted)
    made.note = {"kept": 1}  # type: ignore[attr-defined]
    return made


KINDS: dict[str, Callable[[Tensor], Tensor]] = {"meta": meta, "named": named, "noted": noted}


def bare(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor) if isinstance(x, MetaTensor | Named | Noted) else x


class Several(nn.Module):
    """Returns several maps in a nest, one of which its forward makes plain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)
        self.b = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = nn.functional.leaky_relu(self.norm(self.a(x)))
        z = self.b(y)
        return {"out": z, "deep": [y], "plain": bare(z * 2)}


MODES: dict[str, tuple[Patchwise, bool]] = {
    "exact": (Patchwise(size=8, progress=False), False),
    "train": (Patchwise(size=8, train=True, progress=False), True),
    "train in inference": (Patchwise(size=8, train=True, progress=False), False),
    "slab": (Patchwise(mode="slab", size=8, progress=False), False),
    "slab in training": (Patchwise(mode="slab", size=8, progress=False), True),
    "window": (Patchwise(mode="window", size=8, progress=False), False),
    "window in training": (Patchwise(mode="window", size=8, progress=False), True),
}


def leaves(value: Any) -> list[Tensor]:
    return [value["out"], *value["deep"], value["plain"]]


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_outputs_by_tiles_have_the_class_and_the_attributes_of_the_networks_own(
    mode: str, kind: str
) -> None:
    torch.manual_seed(0)
    model, values = Several(), torch.randn(1, 1, 8, 16)
    given, train = MODES[mode]
    tiled = rewrite(model, given, inputs=KINDS[kind](values)).train(train)
    model.train(train)
    with torch.set_grad_enabled(train):
        expected, made = leaves(model(KINDS[kind](values))), leaves(tiled(KINDS[kind](values)))
        without = leaves(tiled(values))
    for want, got, plain in zip(expected, made, without, strict=True):
        assert type(got) is type(want)
        assert vars(got).keys() == vars(want).keys()
        if isinstance(want, MetaTensor):
            assert torch.equal(got.affine, want.affine)
            assert got.meta["filename_or_obj"] == "a.nii"
            assert got.applied_operations == want.applied_operations
            assert got.is_batch == want.is_batch
        else:
            assert vars(got) == vars(want)
        assert type(plain) is Tensor
        assert torch.equal(got.as_subclass(Tensor), plain)
        assert got.requires_grad == want.requires_grad
    if train:
        made[0].square().sum().backward()
        assert all(p.grad is not None for p in tiled.parameters())


@pytest.mark.slow
def test_gradients_reach_an_input_of_a_class_of_its_own() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh()).double()
    values = torch.randn(1, 1, 8, 16, dtype=torch.float64)
    tiled = rewrite(net, MODES["train"][0], inputs=values)
    x, y = meta(values.clone()).requires_grad_(), values.clone().requires_grad_()
    tiled(x).square().sum().backward()
    net(y).square().sum().backward()
    torch.testing.assert_close(x.grad.as_subclass(Tensor), y.grad)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "window"])
def test_labels_keep_the_metadata(mode: str) -> None:
    net, values = nn.Conv2d(1, 3, 3, padding=1).eval(), torch.randn(1, 1, 8, 16)
    given = Patchwise(mode=mode, size=8, reduce="argmax", progress=False)  # type: ignore[arg-type]
    with torch.inference_mode():
        labels = rewrite(net, given, inputs=values)(meta(values))
    assert labels.dtype is torch.uint8
    assert labels.meta["filename_or_obj"] == "a.nii"


def net() -> nn.Module:
    torch.manual_seed(0)
    parts = [
        [nn.Conv2d(i, o, 3, padding=1), nn.InstanceNorm2d(o, affine=True), nn.LeakyReLU(0.1)]
        for i, o in ((1, 4), (4, 8), (8, 8))
    ]
    return nn.Sequential(*(nn.Sequential(*part) for part in parts), nn.Conv2d(8, 2, 1))


OPTIONS = {"width": "width:scale=0.5", "patchwise": "patchwise:size=8,progress=false"}


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pocketize.errors.NoEffectWarning")
@pytest.mark.parametrize("kind", ["meta", "noted"])
@pytest.mark.parametrize("name", [each.name for each in list_passes()])
def test_every_pass_plans_for_an_example_of_a_class_as_for_a_plain_one(
    name: str, kind: str
) -> None:
    values, given = torch.randn(2, 1, 16, 16), OPTIONS.get(name, name)
    dress = KINDS[kind]
    model = net()
    assert str(plan(model, given, inputs=dress(values))) == str(plan(model, given, inputs=values))
    made = rewrite(model, given, inputs=dress(values), seed=0)
    with torch.no_grad():
        want, got = model.eval()(dress(values)), made.eval()(dress(values))
    assert type(got) is type(want)
    assert vars(got).keys() == vars(want).keys()
    made.train()
    trained = made(dress(values))
    assert type(trained) is type(want)
    trained.square().mean().backward()


@pytest.mark.slow
def test_measurements_and_comparisons_take_examples_of_a_class() -> None:
    values, model = torch.randn(2, 1, 8, 8), net()
    for estimate in (True, False):
        dressed = measure(model, meta(values), estimate=estimate)
        assert dressed.peak == measure(model, values, estimate=estimate).peak
    small = pocketize(model, 2, inputs=meta(values))
    told = compare(model, small, inputs={"input": meta(values)}, estimate=True)
    assert str(told) == str(compare(model, small, inputs={"input": values}, estimate=True))
    assert copy.deepcopy(small)(meta(values)).meta["filename_or_obj"] == "a.nii"


@pytest.mark.parametrize("kind", [Tensor, Named, Noted, MetaTensor])
def test_offload_moves_activations_of_any_class(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[type] = []
    place = OffloadedForward.place

    def counted(self: OffloadedForward, tensor: Tensor) -> Any:
        moved.append(type(tensor))
        return place(self, tensor)

    monkeypatch.setattr(OffloadedForward, "place", counted)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 1, 3))
    lean = rewrite(net, Offload(to="disk", min_bytes="1KiB"), inputs="1x1x16x16")
    moved.clear()
    lean(torch.rand(1, 1, 16, 16).as_subclass(kind)).sum().backward()
    assert moved == [Tensor]
