"""One module, one save, one load."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pocketize import history, load, pocketize, rewrite, save
from pocketize.errors import ArtifactError
from pocketize.passes import Cascade, Patchwise
from tests.passes.cascade.nets import Small

X = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def build(**options: object) -> Cascade:
    return Cascade(Small(1, 3), Small(1, 2), scale=(0.5, 0.25), crop=3, **options)


def trained(cascade: nn.Module) -> nn.Module:
    """With weights that are nobody's initial ones."""
    with torch.no_grad():
        for parameter in cascade.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return cascade.eval()


def agree(one: nn.Module, other: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights every time."""
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore::pocketize.errors.CropWarning")
def test_safetensors(tmp_path: Path) -> None:
    cascade = trained(build())
    cascade.stage1.head.bias.requires_grad_(False)
    save(cascade, tmp_path / "cascade.safetensors")
    again = load(tmp_path / "cascade.safetensors", build)
    agree(cascade, again)
    assert isinstance(again, Cascade)
    assert (again.crop, again.classes, again.training) == ((3, 3), 3, False)
    assert not again.stage1.head.bias.requires_grad
    assert again.stage2.first.in_channels == 4


@pytest.mark.filterwarnings("ignore::pocketize.errors.CropWarning")
def test_pickles_and_copies(tmp_path: Path) -> None:
    cascade = trained(build())
    torch.save(cascade, tmp_path / "cascade.pt")
    agree(cascade, torch.load(tmp_path / "cascade.pt", weights_only=False))
    agree(cascade, copy.deepcopy(cascade))


@pytest.mark.filterwarnings("ignore::pocketize.errors.CropWarning")
def test_a_state_dict_goes_into_another_cascade(tmp_path: Path) -> None:
    cascade = trained(build())
    torch.save(cascade.state_dict(), tmp_path / "state.pt")
    again = build().eval()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    agree(cascade, again)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pocketize.errors.CropWarning")
def test_passes_on_the_second_stage_and_on_the_cascade_come_back(tmp_path: Path) -> None:
    factory = functools.partial(build, passes=("pocket:width=4",))
    cascade = trained(rewrite(factory(), "pocket:width=2,keep=stage1.*", inputs=X))
    save(cascade, tmp_path / "cascade.safetensors")
    again = load(tmp_path / "cascade.safetensors", factory)
    agree(cascade, again)
    assert history(again) == history(cascade)
    assert [r.name for r in history(again.stage2)] == ["extend-inputs", "pocket"]


@pytest.mark.slow
def test_a_stage_that_was_rewritten_before_is_rewritten_in_the_factory(tmp_path: Path) -> None:
    def factory() -> Cascade:
        return Cascade(pocketize(Small(1, 3), 3), pocketize(Small(1, 2), 2))

    cascade = trained(factory())
    save(cascade, tmp_path / "cascade.safetensors")
    agree(cascade, load(tmp_path / "cascade.safetensors", factory))


@pytest.mark.slow
def test_a_patch_wise_second_stage_comes_back(tmp_path: Path) -> None:
    def factory() -> Cascade:
        tiles = Patchwise(mode="exact", size=8, progress=False)
        return Cascade(Small(1, 3), Small(1, 2), passes=(tiles,), inputs=X)

    cascade = trained(factory())
    save(cascade, tmp_path / "cascade.safetensors")
    agree(cascade, load(tmp_path / "cascade.safetensors", factory))


@torch.no_grad()
def test_a_cascade_without_crop_is_exported() -> None:
    cascade = trained(Cascade(Small(1, 3), Small(1, 2), scale=0.5))
    program = torch.export.export(cascade, (X,))
    assert torch.allclose(program.module()(X), cascade(X), rtol=1e-5, atol=1e-6)


def test_the_wrong_factory_is_told(tmp_path: Path) -> None:
    save(build(), tmp_path / "cascade.safetensors")
    with pytest.raises(ArtifactError, match=r"stage1\.head\.weight"):
        load(tmp_path / "cascade.safetensors", lambda: Cascade(Small(1, 4), Small(1, 2)))
