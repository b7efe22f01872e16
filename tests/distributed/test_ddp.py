"""Under DistributedDataParallel two processes train a rewritten net as one does on both batches."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pocketize import rewrite
from pocketize.errors import PocketizeWarning
from pocketize.passes import Amp, Checkpoint, InPlaceNorm, Offload, Recompute
from pocketize.plugin.base import Pass
from tests.distributed.group import SyncNorm, Unet, Work, batch, result_of, train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

BLOCKS = Checkpoint(only=("encoder", "bottom", "decoder"))

#: Label -> the norm, the activation and the passes.
CASES: dict[str, tuple[Any, type[nn.Module], tuple[Pass, ...]]] = {
    "untouched": (SyncNorm, nn.ReLU, ()),
    "checkpoint, batch norm": (SyncNorm, nn.ReLU, (BLOCKS,)),
    "checkpoint, instance norm": (nn.InstanceNorm2d, nn.ReLU, (BLOCKS,)),
    "offload": (SyncNorm, nn.ReLU, (Offload(to="disk", min_bytes="1B"),)),
    "checkpoint and offload": (SyncNorm, nn.ReLU, (BLOCKS, Offload(to="disk", min_bytes="1B"))),
    "recompute": (functools.partial(nn.GroupNorm, 2), nn.SiLU, (Recompute(min_bytes=0),)),
    "in-place norm": (functools.partial(nn.GroupNorm, 2), nn.LeakyReLU, (InPlaceNorm(),)),
}


def original(name: str) -> nn.Module:
    norm, activation, _ = CASES[name]
    torch.manual_seed(0)
    return Unet(norm, activation).double()


def rewritten(name: str) -> nn.Module:
    _, _, passes = CASES[name]
    model = original(name)
    with warnings.catch_warnings():
        # A pass that changes nothing would make the comparison one of the original with itself.
        warnings.simplefilter("error", PocketizeWarning)
        return rewrite(model, *passes, inputs="2x1x12x12") if passes else model


def together(name: str) -> dict[str, Any]:
    model = rewritten(name)
    return train(DistributedDataParallel(model), model, batch())


def mixed() -> dict[str, Any]:
    torch.manual_seed(0)
    model = rewrite(Unet(nn.InstanceNorm2d, nn.ReLU), Amp(), inputs="2x1x12x12")
    return train(DistributedDataParallel(model), model, batch(torch.float32))


WORK: dict[str, Work] = {f"ddp {name}": functools.partial(together, name) for name in CASES}
WORK["ddp amp"] = mixed


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_statistics_are_those_of_one_process(name: str, folder: Path):
    model = original(name)
    expected = train(model, model, batch())
    for found in result_of(f"ddp {name}", folder):
        for key in ("losses", "gradients", "state"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)


def test_mixed_precision_keeps_float32_weights_that_agree_in_both_processes(folder: Path):
    first, second = result_of("ddp amp", folder)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert {t.dtype for t in first["state"].values()} == {torch.float32}
    torch.manual_seed(0)
    model = Unet(nn.InstanceNorm2d, nn.ReLU)
    expected = train(model, model, batch(torch.float32))
    torch.testing.assert_close(first["losses"], expected["losses"], rtol=2e-2, atol=1e-3)
    assert not torch.equal(first["losses"], expected["losses"])
