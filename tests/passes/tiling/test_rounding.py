"""Results between tile loops may be rounded; the guarantee and the plan say so."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DynUNet

from pocketize import plan, rewrite
from pocketize.errors import OptionError
from pocketize.passes import Patchwise
from pocketize.plugin.base import Guarantee


def _net() -> DynUNet:
    torch.manual_seed(0)
    return DynUNet(3, 1, 3, [3] * 3, [1, 2, 2], [2] * 2, filters=[4, 8, 8]).eval()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_waits_is_rounded_and_nothing_else(dtype: str) -> None:
    net, x = _net(), torch.randn(1, 1, 16, 16, 32)
    rounded = rewrite(net, Patchwise(size=8, keep_dtype=dtype), inputs=x)  # type: ignore[arg-type]
    with torch.inference_mode():
        expected, found = net(x), rounded(x)
    apart = float((found - expected).abs().max() / expected.abs().max())
    assert found.dtype == torch.float32
    assert 1e-5 < apart < 0.05


@pytest.mark.slow
def test_the_pass_declares_it_and_the_plan_says_by_how_much() -> None:
    net = _net()
    kept = Patchwise(size=8, keep_dtype="bfloat16")
    assert Patchwise(size=8).guarantee is Guarantee.EXACT
    assert kept.guarantee is Guarantee.APPROXIMATE
    text = str(plan(net, kept, inputs="1x1x16x16x32"))
    assert "runs by tiles of 16x16x8, with bfloat16 results between tile loops" in text
    assert "with bfloat16 between tile loops, to 0.0" in text
    half, whole = (
        next(
            line
            for line in str(plan(net, each, inputs="1x1x16x16x32")).splitlines()
            if "are kept on the device" in line
        )
        for each in (kept, Patchwise(size=8))
    )
    assert half != whole


def test_rounding_is_for_exact_inference() -> None:
    with pytest.raises(OptionError, match="inference"):
        Patchwise(size=8, keep_dtype="bfloat16", train=True)
    with pytest.raises(OptionError, match="mode='exact'"):
        Patchwise(mode="slab", size=8, keep_dtype="bfloat16")
    with pytest.raises(OptionError, match="bfloat16"):
        Patchwise(size=8, keep_dtype="int8")  # type: ignore[arg-type]
