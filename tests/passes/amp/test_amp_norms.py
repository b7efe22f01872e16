"""Under autocast every norm keeps its statistics in float32, also those torch would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import plan, rewrite
from pocketize.passes import Amp

NORMS = {
    "batch": lambda: nn.BatchNorm2d(8),
    "batch without weight": lambda: nn.BatchNorm2d(8, affine=False),
    "batch without anything": lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(8),
    "instance, affine": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance, tracking": lambda: nn.InstanceNorm2d(8, track_running_stats=True, momentum=0.01),
    "group": lambda: nn.GroupNorm(4, 8),
    "group without weight": lambda: nn.GroupNorm(4, 8, affine=False),
    "layer": lambda: nn.LayerNorm([16, 16]),
    "layer without weight": lambda: nn.LayerNorm([16, 16], elementwise_affine=False),
}


def inputs() -> Tensor:
    # A mean that is no 16-bit number, and large against the spread: rounding it would show.
    return torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.05 + 3.14


class Normed(nn.Module):
    """A norm that gets 16-bit input, as it does behind a convolution."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)
        nn.init.eye_(self.conv.weight.data[:, :, 0, 0])
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", NORMS)
def test_normalises_as_float32_statistics_of_the_rounded_input_would(kind: str, train: bool):
    norm = NORMS[kind]()
    made: Any = rewrite(Normed(norm).train(train), Amp(), inputs=inputs())
    reference = NORMS[kind]().train(train)
    for _ in range(3):
        expected = reference(inputs().bfloat16().float())
        found = made(inputs())
    # Rounding the result is all that may differ: half a unit in the last of 8 bits.
    error = (found - expected).abs() / expected.abs().clamp(min=1e-2)
    assert error.max() < 2**-8
    for a, b in zip(made.norm.buffers(), reference.buffers(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", NORMS)
def test_keeps_statistics_for_the_backward_in_float32(kind: str):
    made: Any = rewrite(Normed(NORMS[kind]()), Amp(), inputs=inputs())
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(inputs()).sum()
    statistics = [t for t in kept if t.numel() in (2 * 8, 8, 2 * 4, 1) and t.is_floating_point()]
    statistics = [t for t in statistics if t.shape != made.conv.weight.shape]
    assert statistics
    assert {t.dtype for t in statistics} <= {torch.float32}


def test_the_plan_lists_the_norms_and_why_and_leaves_others_alone():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    rows = plan(model, Amp(), inputs="2x1x16x16").passes[0].changes
    assert [row.path for row in rows] == ["", "1"]
    assert "no weight" in rows[1].why


def test_a_norm_with_a_forward_of_its_own_is_left_alone():
    class Mine(nn.InstanceNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.Sequential(nn.Conv2d(1, 8, 3), Mine(8))
    assert [row.path for row in plan(model, Amp(), inputs="2x1x16x16").passes[0].changes] == [""]


def test_functional_norms_without_weights_are_told():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.instance_norm(self.conv(x))

    notes = plan(Functional(), Amp(), inputs="2x1x16x16").passes[0].notes
    assert sum("instance_norm in the model itself" in note for note in notes) == 1


def test_an_instance_norm_takes_a_single_sample():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8))
    made = rewrite(model, Amp(), inputs="2x1x16x16")
    x = torch.randn(1, 16, 16)
    assert torch.equal(made(x), made(x[None])[0])


def test_gradients_of_a_converted_norm_are_those_of_the_norm():
    made: Any = rewrite(Normed(nn.InstanceNorm2d(8)), Amp(), inputs=inputs())
    x = torch.randn(2, 8, 16, 16)
    weights = torch.randn(2, 8, 16, 16)
    low, exact = (x.bfloat16().requires_grad_(), x.bfloat16().float().requires_grad_())
    (made.norm(low).float() * weights).sum().backward()
    (nn.InstanceNorm2d(8)(exact) * weights).sum().backward()
    torch.testing.assert_close(low.grad.float(), exact.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", NORMS)
def test_an_empty_batch_is_taken_where_torch_takes_one_under_autocast(kind: str, train: bool):
    model = Normed(NORMS[kind]()).train(train)
    made = rewrite(model, Amp(), inputs=inputs())
    empty = inputs()[:0]

    def outcome(run: Any) -> Any:
        try:
            return tuple(run(empty).shape)
        except (IndexError, ValueError, RuntimeError) as error:
            return type(error)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outcome(model)
    assert outcome(made) == expected
