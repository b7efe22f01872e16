"""Under fully_shard (FSDP2) a rewritten net trains as one process does, or says why it cannot."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pocketize import rewrite
from pocketize.errors import RewriteError
from pocketize.passes import Amp, Checkpoint, InPlaceNorm, Offload, Recompute
from pocketize.plugin.base import Pass
from tests.distributed.group import PROCESSES, SyncNorm, Unet, Work, batch, result_of, train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

BLOCKS = ("encoder", "bottom", "decoder")
#: Label -> the norm, the activation, the passes, and what is sharded by itself.
CASES: dict[str, tuple[Any, type[nn.Module], tuple[Pass, ...], tuple[str, ...]]] = {
    "untouched": (SyncNorm, nn.ReLU, (), BLOCKS),
    "checkpoint": (SyncNorm, nn.ReLU, (Checkpoint(only=BLOCKS),), BLOCKS),
    "checkpoint, model sharded whole": (SyncNorm, nn.ReLU, (Checkpoint(only=BLOCKS),), ()),
    "checkpoint, layers sharded": (
        SyncNorm,
        nn.ReLU,
        (Checkpoint(only=BLOCKS),),
        tuple(f"{block}.{index}" for block in BLOCKS for index in (0, 3)),
    ),
    "in-place norm": (
        functools.partial(nn.GroupNorm, 2),
        nn.LeakyReLU,
        (InPlaceNorm(),),
        BLOCKS,
    ),
}


def sharded(model: nn.Module, units: tuple[str, ...]) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for path in units:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def original(name: str) -> nn.Module:
    norm, activation, _, _ = CASES[name]
    torch.manual_seed(0)
    return Unet(norm, activation).double()


def together(name: str) -> dict[str, Any]:
    _, _, passes, units = CASES[name]
    model = original(name)
    model = sharded(rewrite(model, *passes, inputs="2x1x12x12") if passes else model, units)
    return train(model, model, batch())


def mixed() -> dict[str, Any]:
    torch.manual_seed(0)
    model = rewrite(Unet(nn.InstanceNorm2d, nn.ReLU), Amp(), inputs="2x1x12x12")
    model = sharded(model, BLOCKS)
    return train(model, model, batch(torch.float32))


def refused(given: Pass) -> dict[str, Any]:
    """What a pass says of sharded weights; every process says it before it waits for others."""
    torch.manual_seed(0)
    model = rewrite(Unet(nn.InstanceNorm2d, nn.ReLU), given, inputs="2x1x12x12")
    model = sharded(model, BLOCKS)
    try:
        model(batch(torch.float32))
    except (RewriteError, RuntimeError) as error:
        return {"error": str(error)}
    return {"error": ""}


WORK: dict[str, Work] = {f"fsdp {name}": functools.partial(together, name) for name in CASES}
WORK["fsdp amp"] = mixed
WORK["fsdp offload"] = functools.partial(refused, Offload(to="disk", min_bytes="1B"))
WORK["fsdp recompute"] = functools.partial(refused, Recompute(min_bytes=0))


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_statistics_are_those_of_one_process(name: str, folder: Path):
    model = original(name)
    expected = train(model, model, batch())
    for found in result_of(f"fsdp {name}", folder):
        for key in ("losses", "gradients", "state"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)


def test_mixed_precision_keeps_float32_weights(folder: Path):
    first, second = result_of("fsdp amp", folder)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert {t.dtype for t in first["state"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "instead"), [("offload", "offload_policy"), ("recompute", "checkpoint")]
)
def test_passes_that_cannot_work_on_sharded_weights_say_so_and_what_can(
    name: str, instead: str, folder: Path
):
    for found in result_of(f"fsdp {name}", folder):
        assert "sharded" in found["error"]
        assert instead in found["error"]
