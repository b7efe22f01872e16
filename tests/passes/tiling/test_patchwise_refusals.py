"""What the exact mode leaves alone, and what it says of options that cannot be."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize import plan, rewrite
from pocketize.errors import InputError, NoEffectWarning, OptionError, OrderError
from pocketize.passes import Amp, Patchwise
from pocketize.passes.tiling import forward as tiled_forward
from pocketize.passes.tiling.forms import Convolution
from tests.passes.tiling.nets import double, unet


def refused(model: nn.Module, x: Tensor, **options: Any) -> str:
    (told,) = plan(model, Patchwise(**({"size": 4} | options)), inputs=x).passes
    assert not told.edits
    (refusal,) = told.refused
    return refusal.why


class Around(nn.Module):
    """A convolution, and something that a recording does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(2))


class Counting(Around):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x)


class Averaging(Around):
    mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.mean.add_(x.mean((0, 2, 3)))
        return x


class Noisy(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + torch.randn_like(x))


class Branching(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else x.expand(-1, 2, -1, -1)


class Flat(Around):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x.flatten(1), -1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counting, "changes the attribute calls"),
        (Averaging, "writes into mean"),
        (Noisy, "draws random numbers"),
        (Branching, "depends on values"),
        (Flat, "can be computed part by part"),
    ],
)
def test_a_forward_that_operators_do_not_tell_is_left_alone(
    kind: type[nn.Module], reason: str
) -> None:
    assert reason in refused(kind().eval(), double(2, 1, 8, 8).float())


class Flagging(Around):
    """Sets a flag when it first runs, as libraries do that install what they need lazily."""

    ready = False

    def forward(self, x: Tensor) -> Tensor:
        self.ready = True
        return self.conv(x)


class Preparing(Flagging):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) if self.ready else self.conv(x * 2)
        self.ready = True
        return x


@pytest.mark.slow
def test_a_flag_set_once_does_not_matter_unless_it_changes_what_is_computed() -> None:
    x = double(1, 1, 8, 8).float()
    model = Flagging().eval()
    with torch.no_grad():
        assert torch.allclose(rewrite(model, Patchwise(size=4), inputs=x)(x), model(x), atol=1e-6)
    assert "changes the attribute ready" in refused(Preparing().eval(), x)


def test_a_hook_inside_is_named() -> None:
    model = unet()
    model.down.register_forward_hook(lambda module, args, output: None)
    assert "down has a forward hook" in refused(model, double(1, 1, 8, 8).float())


def test_inputs_without_axes_to_cut_are_refused() -> None:
    assert "no input has spatial axes" in refused(nn.Linear(4, 4), torch.zeros(2, 4))


@pytest.mark.slow
def test_a_form_that_is_wrong_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Convolution.run

    def wrong(self: Convolution, region: Any, context: Any) -> Tensor:
        return right(self, region, context) * 1.01

    monkeypatch.setattr(Convolution, "run", wrong)
    reason = refused(unet(), double(1, 1, 16, 16).float())
    assert "differ from the whole volume's by" in reason
    assert "more than rounding explains" in reason


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "say size"),
        ({"size": 4, "max_peak": "1MiB"}, "not both"),
        ({"size": 0}, "at least 1 voxel along each axis, got 0; the nearest is [1]"),
        ({"size": (4, -2)}, "the nearest is [4, 1]"),
        ({"size": ()}, "at least 1 voxel"),
        ({"size": 4, "mode": "slab", "overlap": 0.5}, "'overlap' is for mode='window'"),
        ({"size": 4, "keep": "host", "mode": "slab"}, "'keep' is for mode='exact'"),
        ({"size": 4, "batch": 2}, "'batch' is for mode='slab' or 'window'"),
        ({"size": (4, 4), "mode": "slab"}, "slabs are cut along one axis"),
        ({"size": 4, "mode": "window", "overlap": 1.0}, "from 0 to below 1, got 1.0"),
        ({"size": 4, "mode": "window", "overlap": -0.1}, "such as 0"),
        ({"size": 4, "mode": "window", "batch": 0}, "at least 1, got 0"),
        ({"max_peak": "much"}, "expected a size such as '2GiB'"),
        ({"size": 4, "folder": "/tmp"}, "'folder' is for"),
        ({"size": 4, "mode": "slabs"}, "'exact', 'slab' or 'window'"),
        ({"size": 4, "reduce": "max"}, "argmax"),
    ],
)
def test_options_that_cannot_be_are_told(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Patchwise(**options)
    assert text in str(caught.value)


def test_axes_and_ranks_that_do_not_fit_say_which_do() -> None:
    x = double(1, 1, 8, 8).float()
    assert "axis=2 is none of the 2 spatial axes" in refused(unet(), x, axis=2)
    assert "the nearest is 1" in refused(unet(), x, axis=2)
    assert "size has 3 numbers and the input 2 spatial axes" in refused(unet(), x, size=(4, 4, 4))


def test_labels_need_channels_to_choose_among() -> None:
    x = double(1, 1, 8, 8).float()
    reason = refused(unet(classes=1), x, reduce="argmax")
    assert "2 to 256 channels" in reason


def test_passes_that_change_the_network_come_before() -> None:
    with pytest.raises(OrderError, match="patchwise must come after amp"):
        plan(unet(), Patchwise(size=4), Amp(), inputs="1x1x8x8")


@pytest.mark.slow
def test_volumes_of_another_rank_are_refused_when_they_come() -> None:
    made = rewrite(nn.Conv2d(1, 2, 3).eval(), Patchwise(size=(4, 4)), inputs="1x1x8x8")
    with torch.inference_mode(), pytest.raises(InputError, match="size has 2 numbers"):
        made[0](double(1, 1, 8)) if isinstance(made, nn.Sequential) else _as_volume(made)


def _as_volume(made: nn.Module) -> Tensor:
    """Let the same module see three axes."""
    other = nn.Conv3d(1, 2, 3).eval()
    forward: Any = vars(made)["forward"]
    forward.module = other
    result: Tensor = forward(torch.zeros(1, 1, 4, 4, 4))
    return result


def test_nothing_changes_where_nothing_can_be_tiled() -> None:
    with pytest.warns(NoEffectWarning, match="no input has spatial axes"):
        rewrite(nn.Linear(4, 4), Patchwise(size=4), inputs=torch.zeros(2, 4))


class _Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        return


def test_a_bar_appears_on_terminals_for_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_forward, "PATIENCE", 0.0)
    for wanted, terminal in ((True, True), (False, True), (True, False)):
        screen = _Terminal()
        if not terminal:
            monkeypatch.setattr(screen, "isatty", lambda: False)
        monkeypatch.setattr(sys, "stderr", screen)
        bar = tiled_forward.ProgressBar(wanted)
        bar(1, 4)
        bar(4, 4)
        assert ("1/4" in screen.text) == (wanted and terminal)
        monkeypatch.undo()
        monkeypatch.setattr(tiled_forward, "PATIENCE", 0.0)


def test_an_axis_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(OptionError, match="'axis' is for a single size"):
        Patchwise(size=(4, 4), axis=0)
    with pytest.raises(OptionError, match="'axis' is for mode='exact' or 'slab'"):
        Patchwise(mode="window", size=4, axis=0)


@pytest.mark.slow
def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    x = double(1, 1, 16, 16)
    tiling = Patchwise(size=4, keep="disk", folder=str(tmp_path / "gone"))
    made = rewrite(unet().double(), tiling, inputs=x)
    with torch.inference_mode(), pytest.raises(InputError, match=r"gone.*make the folder"):
        made(x)


@pytest.mark.slow
def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    x = double(1, 1, 16, 16)
    made = rewrite(unet().double(), Patchwise(size=4, keep="disk", folder=str(tmp_path)), inputs=x)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with torch.inference_mode(), pytest.raises(InputError, match=r"KiB in .*No space left"):
        made(x)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_system_that_reserves_nothing_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(file: int, start: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    x = double(1, 1, 16, 16)
    model = unet().double()
    made = rewrite(model, Patchwise(size=4, keep="disk", folder=str(tmp_path)), inputs=x)
    monkeypatch.setattr(os, "posix_fallocate", unknown, raising=False)
    with torch.inference_mode():
        assert (made(x) - model(x)).abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["slab", "window"])
def test_an_empty_volume_is_refused(mode: str) -> None:
    made = rewrite(unet(), Patchwise(mode=mode, size=4), inputs=torch.randn(1, 1, 8, 8))  # type: ignore[arg-type]
    with torch.inference_mode(), pytest.raises(InputError, match="the volume is empty"):
        made(torch.randn(1, 1, 0, 8))
