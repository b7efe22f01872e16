from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pocketize.artifact.skeleton import build
from pocketize.errors import ArtifactError


class Buffers(nn.Module):
    """Holds every kind of tensor that a state_dict does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.rates = torch.linspace(0, 1, 3).tolist()
        self.grid = torch.arange(5)
        self.register_buffer("window", torch.ones(3), persistent=False)


class Norming(nn.Module):
    """Reads the data of a parameter while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = float(self.conv.weight.norm())


class Aliased(nn.Module):
    """Holds a parameter in a plain list too, created before it was registered."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(3))
        self.weight = weight
        self.all = [weight]


class Derived(nn.Module):
    """Holds a tensor that was computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.doubled = {"of": self.weight.detach() * 2}


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def __deepcopy__(self, memo: object) -> Uncopyable:
        raise TypeError("no copies")


def test_only_parameters_lose_their_data() -> None:
    model, hollow = build(Buffers)
    assert hollow
    assert isinstance(model, Buffers)
    assert model.conv.weight.is_meta
    assert model.conv.weight.requires_grad
    assert model.rates == [0.0, 0.5, 1.0]
    assert model.grid.tolist() == [0, 1, 2, 3, 4]
    assert isinstance(model.window, Tensor)
    assert model.window.tolist() == [1, 1, 1]


def test_weights_that_do_not_fit_into_memory_are_never_touched() -> None:
    width, layers = 1 << 13, 1000
    model, hollow = build(lambda: nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]))
    assert hollow
    size = sum(p.nbytes for p in model.parameters())
    assert size == layers * 4 * (width * width + width)  # 250 GiB


@pytest.mark.parametrize("factory", [Norming, Aliased, Derived, Uncopyable])
def test_a_model_that_needs_its_data_is_built_for_real(factory: Callable[[], nn.Module]) -> None:
    model, hollow = build(factory)
    assert not hollow
    assert not any(p.is_meta for p in model.parameters())
    if isinstance(model, Aliased):
        assert model.all[0] is model.weight


def test_ties_and_attributes_of_parameters_survive() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = nn.Parameter(torch.ones(3), requires_grad=False)
            shared.group = "slow"  # type: ignore[attr-defined]
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.one, self.two = shared, shared

    model, hollow = build(Tied)
    assert hollow
    assert isinstance(model, Tied)
    assert model.second.weight is model.first.weight
    assert model.one is model.two
    assert model.one.group == "slow"  # type: ignore[attr-defined]
    assert not model.one.requires_grad


def test_random_state_and_later_modules_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    build(Buffers)
    build(Norming)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not nn.Linear(2, 2).weight.is_meta


def test_the_factorys_own_error_comes_through() -> None:
    def factory() -> nn.Module:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        build(factory)


def test_a_model_in_place_of_a_factory_is_explained() -> None:
    with pytest.raises(
        ArtifactError, match=r"factory must be a function that builds the model, .*"
    ):
        build(nn.Linear(2, 2))
    with pytest.raises(ArtifactError, match="got str"):
        build("net:UNet")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"factory must return the model.*it returned NoneType"):
        build(lambda: None)  # type: ignore[arg-type, return-value]
