"""Outputs of any nesting come back in float32, in containers of the type that the model gave."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.passes import Amp
from tests.passes.amp.test_amp import X


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@dataclasses.dataclass(frozen=True)
class Result:
    logits: Tensor
    features: dict[str, Any]
    name: str = "result"


class Plain:
    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.me = self


class Mapped(OrderedDict):  # type: ignore[type-arg]
    """A mapping that pytree does not know."""


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return Result(
            y, {"pair": Pair(y, x), "list": [y, (x, None)], "o": Plain(y), "m": Mapped(a=y)}
        )


def test_outputs_of_any_nesting_are_float32_again_in_containers_of_the_same_type():
    out = rewrite(Nested(), Amp(), inputs=X)(X)
    assert type(out) is Result
    pair, items = out.features["pair"], out.features["list"]
    assert (type(pair), type(items)) == (Pair, list)
    assert type(out.features["o"]) is Plain
    assert type(out.features["m"]) is Mapped
    found = [
        out.logits,
        *pair,
        items[0],
        items[1][0],
        out.features["o"].value,
        out.features["m"]["a"],
    ]
    assert [t.dtype for t in found] == [torch.float32] * 7
    assert pair.high is X
    assert items[1][0] is X
    assert items[1][1] is None
