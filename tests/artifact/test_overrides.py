"""Models whose classes override what save and load call: the same weights and outputs, or an
ArtifactError that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import load, pocketize, save
from pocketize.artifact import load_weights
from pocketize.errors import ArtifactError


class Block(nn.Conv2d):
    """A convolution whose forward reads a copy of its weight's largest value."""

    def __init__(self, before: int = 8, after: int = 32) -> None:
        super().__init__(before, after, 3, padding=1)


class Net(nn.Module):
    """A net that pocketize narrows; its middle is replaced by that of the class under test."""

    middle: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle_ = nn.Conv2d(1, 8, 3, padding=1), type(self).middle()
        self.norm, self.head = nn.BatchNorm2d(32), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.middle_(self.stem(x).relu())).relu())


class NoAssign(Net):
    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict(state, strict=strict)


class OnlyState(Net):
    def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
        super().load_state_dict(state)


class Lenient(Net):
    def load_state_dict(self, state: Any, strict: bool = False) -> Any:  # type: ignore[override]
        fits = {k: v for k, v in state.items() if self.state_dict()[k].shape == v.shape}
        return super().load_state_dict(fits, strict=False)


class PlainState(Net):
    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        return dict(super().state_dict())


class Wrapped(Net):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"net": super().state_dict(*args, **kwargs), "version": 3}

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        assert state["version"] == 3
        return super().load_state_dict(state["net"], strict=strict)


class Renamed(Net):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"net.{k}": v for k, v in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict({k.removeprefix("net."): v for k, v in state.items()})


class Filtered(Net):
    """Leaves frozen weights out, as adapters do."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {k: v for k, v in state.items() if not k.startswith("stem")}

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict(state, strict=False)


class Silent(Net):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("use export()")


class Caching(Net):
    """Derives a plain tensor from its weights when it loads them."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.zeros(())

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        done = super().load_state_dict(state, strict=strict)
        self.shift = self.head.bias.detach().sum()
        return done

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class Filters(Block):
    def state_dict(self) -> Any:  # type: ignore[override]
        return {}


class Refuses(Block):
    def load_state_dict(self, state: Any) -> Any:  # type: ignore[override]
        raise NotImplementedError


class Transposed(Block):
    """Keeps its kernel under another name and turned round."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}kernel"] = self.weight.detach().movedim(0, 1).contiguous()
        destination[f"{prefix}bias"] = self.bias

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state = dict(state)
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel").movedim(1, 0)
        super()._load_from_state_dict(state, prefix, *rest)
        rest[-2][:] = [key for key in rest[-2] if not key.endswith("kernel")]


class SameName(Block):
    """Keeps its kernel turned round under its own name."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach().flip(0)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state = {**state, f"{prefix}weight": state[f"{prefix}weight"].flip(0)}
        super()._load_from_state_dict(state, prefix, *rest)


class Extra(Block):
    """A plain number of its own that goes through the extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.gain])

    def set_extra_state(self, state: Tensor) -> None:
        self.gain = state.item()


class PreHook(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self._older)
        self.register_load_state_dict_post_hook(lambda module, keys: None)

    @staticmethod
    def _older(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}w" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}w")


class Dropping(Block):
    """A hook that takes a bias out of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(
            lambda module, state, prefix, metadata: state.pop(f"{prefix}bias", None)
        )


def _with(middle: type[nn.Module]) -> type[Net]:
    return type(f"With{middle.__name__}", (Net,), {"middle": middle})


ROOTS = [NoAssign, OnlyState, Lenient, PlainState, Wrapped, Renamed, Filtered, Silent, Caching]
PARTS = [Filters, Refuses, Transposed, SameName, Extra, PreHook, Dropping]
KINDS = [*ROOTS, *map(_with, PARTS)]


def _trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.uniform_(-1.0, 1.0)
    for module in model.modules():
        if isinstance(module, Extra):
            module.gain = 3.0
    return model.eval()


def _round_trip(kind: Callable[[], nn.Module], path: Path, *, weights: str = "slice") -> None:
    model = kind()
    small = _trained(pocketize(model, inputs="2x1x8x8", weights=weights))
    if isinstance(small, Caching):
        small.shift = small.head.bias.detach().sum()
    save(small, path)
    again = load(path, kind)
    x = torch.randn(2, 1, 8, 8)
    assert small.middle_.weight.shape == (8, 8, 3, 3)
    assert torch.equal(again(x), small(x))
    for (name, old), (_, new) in zip(
        small.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(old, new), name
        assert new.requires_grad


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_class_that_overrides_saving_or_loading_comes_back_as_it_was(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    _round_trip(kind, tmp_path / "x.safetensors")


def test_weights_that_a_class_leaves_out_of_its_state_come_back_too(tmp_path: Path) -> None:
    """They are drawn anew with all others, so the factory's would be wrong."""
    _round_trip(Filtered, tmp_path / "x.safetensors", weights="reset")


def test_methods_that_were_put_on_an_instance_count_as_the_class_own(tmp_path: Path) -> None:
    def make() -> nn.Module:
        net = Net()
        base = net.state_dict
        net.state_dict = lambda: {k: v for k, v in base().items() if "stem" in k}  # type: ignore
        return net

    model = _trained(make())
    save(model, tmp_path / "x.safetensors")
    again = load(tmp_path / "x.safetensors", Net).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), model(x))


class Tempered(Net):
    """A number beside the weights."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().state_dict(*args, **kwargs), "temperature": self.temperature}

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        state = dict(state)
        self.temperature = state.pop("temperature")
        return super().load_state_dict(state, strict=strict)


def test_a_number_in_the_state_must_be_that_of_the_factory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(Tempered(2.0), path)
    assert load(path, lambda: Tempered(2.0)).temperature == 2.0
    with pytest.raises(ArtifactError, match=r"says 1\.0 of 'temperature', and the file says 2\.0"):
        load(path, Tempered)


class Averaged(Net):
    """A tensor beside the weights that is none of them."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {**state, "average": state["stem.bias"] + 1}


def test_a_tensor_in_the_state_that_is_no_buffer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds 'average', which is no parameter or buffer"):
        save(Averaged(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


class Fixing(Net):
    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict({k: v * 2 for k, v in state.items()}, strict=strict)


class Picky(Net):
    def load_state_dict(self, path: str) -> Any:  # type: ignore[override]
        with open(path) as file:
            return file.read()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Fixing, r"load_state_dict\(\) of Fixing changes 'stem.weight'"),
        (Picky, r"load_state_dict\(\) of Picky does not take what its state_dict\(\) returns"),
    ],
)
def test_a_class_that_cannot_load_its_own_state_is_told_what_to_do(
    kind: type[nn.Module], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save(kind(), path)
    with pytest.raises(ArtifactError, match=says):
        load(path, kind)


# -- weights from a file -------------------------------------------------------------------------


LOADED = [Net, *ROOTS[:7], Caching, *map(_with, (Transposed, SameName, Extra, PreHook))]


@pytest.mark.parametrize("kind", LOADED, ids=lambda kind: kind.__name__)
def test_weights_that_torch_saved_load_as_the_class_says(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    model, again = _trained(kind()), kind()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    load_weights(again, tmp_path / "x.pt")
    left = dict(model.named_parameters())
    for name, tensor in again.named_parameters():
        assert torch.equal(tensor, left[name]) or (kind is Filtered and "stem" in name), name


@pytest.mark.parametrize("kind", [Silent, _with(Filters)])
def test_weights_load_into_a_class_that_torch_itself_cannot_save(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    model, again = _trained(Net()), kind()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    load_weights(again, tmp_path / "x.pt")
    assert torch.equal(again.stem.weight, model.stem.weight)


def test_older_names_load_where_a_hook_takes_them_and_nothing_may_be_left(tmp_path: Path) -> None:
    kind = _with(PreHook)
    model = _trained(kind())
    state = model.state_dict()
    state["middle_.w"] = state.pop("middle_.weight")
    torch.save(state, tmp_path / "old.pt")
    again = kind()
    load_weights(again, tmp_path / "old.pt")
    assert torch.equal(again.middle_.weight, model.middle_.weight)
    state["middle_.v"] = state.pop("middle_.w")
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ArtifactError, match=r"its load_state_dict\(\) raises RuntimeError"):
        load_weights(kind(), tmp_path / "bad.pt")


def test_a_class_that_skips_what_does_not_fit_may_not_leave_weights_as_built(
    tmp_path: Path,
) -> None:
    state = _trained(Net()).state_dict()
    state["norm.weight"] = torch.ones(16)
    del state["stem.weight"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match=r"leaves stem\.weight as it was built\n.*not in the"):
        load_weights(Lenient(), tmp_path / "x.pt")
