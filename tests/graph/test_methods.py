"""Classes that mean something else by a method of nn.Module: it works, or the method is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import (
    analyse,
    capture,
    compare,
    fit,
    history,
    load,
    measure,
    pocketize,
    rewrite,
    save,
)
from pocketize.errors import CaptureError, ModelError, NoEffectWarning
from tests.toys import Net as Toy

INPUT = "2x3x8x8"


class TrainsOnData(Toy):
    def train(self, loader: Any, epochs: int = 1) -> None:  # type: ignore[override]
        raise RuntimeError("no data")


class TrainsWithoutMode(Toy):
    def train(self) -> None:  # type: ignore[override]
        nn.Module.train(self, True)


class GivesNothingBack(Toy):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def eval(self) -> None:  # type: ignore[override]
        super().eval()

    def to(self, device: Any) -> None:  # type: ignore[override]
        super().to(device)


class KeepsNormInEval(Toy):
    def train(self, mode: bool = True) -> KeepsNormInEval:
        super().train(mode)
        self.norm.eval()
        return self


class EvaluatesOnData(Toy):
    def eval(self, loader: Any) -> None:  # type: ignore[override]
        raise RuntimeError("no data")


class ReadOnly(Toy):
    closed = False

    def __init__(self) -> None:
        super().__init__()
        self.closed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.closed and name != "training":
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)


class Slotted(Toy):
    __slots__ = ("gain",)

    def __init__(self) -> None:
        super().__init__()
        self.gain = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class FindsAnything(Toy):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None


class CopiesByBuilding(Toy):
    def __deepcopy__(self, memo: Any) -> CopiesByBuilding:
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made


class TrainableOnly(Toy):
    def parameters(self, recurse: bool = True) -> Any:
        return (p for p in super().parameters(recurse) if p.ndim > 1)


class CallsDifferently(Toy):
    def __call__(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().__call__(x) * scale


class KeywordOnly(Toy):
    def forward(self, *, image: Tensor) -> Tensor:
        return super().forward(image)


class Shy(Toy):
    """Nothing of it can be shown."""

    def __repr__(self) -> str:
        raise ValueError("no")

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        raise TypeError("no")

    def __dir__(self) -> Any:
        raise RuntimeError("no")

    @property
    def device(self) -> Any:
        raise RuntimeError("no")


WORK = [
    TrainsOnData,
    TrainsWithoutMode,
    GivesNothingBack,
    KeepsNormInEval,
    EvaluatesOnData,
    ReadOnly,
    Slotted,
    FindsAnything,
    TrainableOnly,
    CallsDifferently,
    KeywordOnly,
    Shy,
]


def _given(model: nn.Module, x: Tensor) -> Any:
    return {"image": x} if isinstance(model, KeywordOnly) else x


def _output(model: nn.Module, x: Tensor) -> Tensor:
    for module in nn.Module.modules(model):
        module.training = False
    with torch.no_grad():
        return model(**_given(model, x)) if isinstance(model, KeywordOnly) else model(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORK, ids=lambda kind: kind.__name__)
def test_a_class_with_methods_of_its_own_is_rewritten_saved_and_measured(
    kind: type[Toy], tmp_path: Path
) -> None:
    model, x = kind(), torch.randn(2, 3, 8, 8)
    given = _given(model, x)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    small = pocketize(model, inputs=given)
    assert type(small) is kind
    assert small.deep.out_channels == 4
    assert [record.name for record in history(small)] == ["pocket"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    save(small, tmp_path / "x.safetensors")
    again = load(tmp_path / "x.safetensors", kind)
    assert torch.equal(_output(again, x), _output(small, x))
    assert measure(small, given, estimate=True).peak > 0
    lean = rewrite(model, "recompute:min_bytes=1", inputs=given)
    assert torch.allclose(_output(lean, x), _output(model, x), atol=1e-6)


class CopiesAsItself(Toy):
    def __deepcopy__(self, memo: Any) -> CopiesAsItself:
        return self


class NamesSome(Toy):
    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return list(super().named_parameters(*args, **kwargs))[:2]


class NamesWithoutOptions(Toy):
    def named_parameters(self) -> Any:  # type: ignore[override]
        return super().named_parameters()


class Groups(Toy):
    def parameters(self) -> Any:  # type: ignore[override]
        return [{"params": list(super().parameters()), "lr": 1.0}]


class ListsModules(Toy):
    def modules(self) -> Any:
        return [self.stem]


class Unhashable(Toy):
    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


class Hooks(Toy):
    def register_forward_hook(self, function: Any) -> Any:  # type: ignore[override]
        raise RuntimeError


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (CopiesAsItself, "the whole of the copy is that of the model.*let __deepcopy__ return"),
        (NamesSome, r"NamesSome\) has a named_parameters\(\) of its own that lists other things"),
        (NamesWithoutOptions, r"named_parameters\(\) of its own that raises TypeError"),
        (Groups, r"parameters\(\) of its own that gives a dict"),
        (ListsModules, r"modules\(\) of its own that lists other.*give this method another name"),
        (Unhashable, "a class that defines __eq__ needs __hash__ too"),
        (Hooks, r"register_forward_hook\(\) of its own that raises TypeError"),
    ],
)
def test_what_cannot_be_relied_on_is_named_and_nothing_is_changed(
    kind: type[Toy], says: str
) -> None:
    model = kind()
    for run in (
        lambda: pocketize(model, inputs=INPUT),
        lambda: rewrite(model, "recompute:min_bytes=1", inputs=INPUT),
        lambda: measure(model, INPUT, estimate=True),
    ):
        with pytest.raises(CaptureError, match=says):
            run()
    assert model.deep.weight.shape == (16, 4, 3, 3)


def test_a_part_that_copies_as_itself_is_named() -> None:
    class Frozen(nn.Conv2d):
        def __deepcopy__(self, memo: Any) -> Frozen:
            return self

    model = nn.Sequential(Frozen(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1))
    with pytest.raises(CaptureError, match="cannot be copied: 0 of the copy is that of the model"):
        pocketize(model, inputs=INPUT)
    assert model[0].weight.shape == (4, 3, 1, 1)


def test_a_class_that_copies_by_building_itself_is_rewritten_once() -> None:
    small = pocketize(CopiesByBuilding(), inputs=INPUT)
    assert small.deep.out_channels == 4
    with pytest.raises(CaptureError, match="let a __deepcopy__ of its own copy the layers as they"):
        rewrite(small, "recompute:min_bytes=1", inputs=INPUT)


class CallsForward(Toy):
    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def test_a_call_that_runs_no_hooks_cannot_be_tiled() -> None:
    with pytest.warns(NoEffectWarning, match=r"has a __call__\(\) of its own that runs no forward"):
        rewrite(CallsForward(), "patchwise:size=4", inputs=INPUT)


@pytest.mark.parametrize("use", [pocketize, measure, compare, analyse, capture, fit, save])
def test_what_is_no_model_is_told_what_to_give(use: Any, tmp_path: Path) -> None:
    more = {fit: {"memory": "1GiB"}, save: {"path": tmp_path / "a"}, compare: {"after": Toy()}}
    given = {} if use is save else {"inputs": INPUT}
    for wrong, says in (
        (Toy, r"got the class Net\. Make a model of it, Net\(\.\.\.\)"),
        (Toy().state_dict(), r"got OrderedDict, which holds weights and no code\. Build the model"),
        (lambda: Toy(), r"got function\. If it builds the model, call it"),
        (None, "got NoneType$"),
    ):
        with pytest.raises(ModelError, match=says):
            use(wrong, **given, **more.get(use, {}))
