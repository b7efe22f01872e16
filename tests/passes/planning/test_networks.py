"""Plans for other people's networks, and counts of what they are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from pocketize import analyse, rewrite
from pocketize.channels.levels import find_levels
from pocketize.errors import PlanningError
from pocketize.passes import Width
from pocketize.passes.planning import plan_widths
from pocketize.passes.planning.network import WeightCounter
from pocketize.zoo.complexity import conv_weights
from tests.passes.planning.nets import parameters


def _nnunet() -> nn.Module:
    return PlainConvUNet(
        1,
        3,
        [4, 8, 16],
        nn.Conv2d,
        3,
        [1, 2, 2],
        2,
        3,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
    )


def _dynunet() -> nn.Module:
    return DynUNet(
        3, 1, 2, [3] * 3, [1, (1, 2, 2), 2], [(1, 2, 2), 2], filters=[4, 8, 12], res_block=True
    )


NETS: list[tuple[Callable[[], nn.Module], str, int]] = [
    (lambda: UNet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=2), "1x1x32x32", 3),
    (lambda: BasicUNet(2, 1, 2, features=(4, 4, 8, 8, 16, 4)), "1x1x32x32", 5),
    (lambda: SegResNet(2, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)), "1x1x16x16", 2),
    (_dynunet, "1x1x8x16x16", 3),
    (_nnunet, "1x1x16x16", 3),
]
COMPLEXITIES = (0.15, 0.08, 0.06, 0.05, 0.04)


@pytest.mark.slow
@pytest.mark.parametrize(("build", "inputs", "levels"), NETS)
def test_a_layer_wise_plan_is_what_the_rewritten_network_is(
    build: Callable[[], nn.Module], inputs: str, levels: int
) -> None:
    net = build()
    budget = parameters(net) // 3
    made = plan_widths(
        net,
        inputs=inputs,
        max_parameters=budget,
        complexity=COMPLEXITIES[:levels],
        degradation="unet",
    )
    small = rewrite(net, Width.from_plan(made), inputs=inputs)
    assert parameters(small) == made.after.parameters <= budget
    assert conv_weights(small) == made.theta
    assert conv_weights(net) == made.before.theta
    buffers = sum(buffer.numel() for buffer in small.buffers())
    assert made.after.stored == made.after.parameters + buffers
    multipliers = made.multipliers
    assert list(multipliers) == sorted(multipliers, reverse=True)  # simpler levels give more


@pytest.mark.parametrize(("build", "inputs", "levels"), NETS[:2])
def test_a_wrong_number_of_complexities_tells_the_levels(
    build: Callable[[], nn.Module], inputs: str, levels: int
) -> None:
    with pytest.raises(PlanningError, match=rf"has {levels} resolution levels: 32x32, 16x16"):
        plan_widths(
            build(),
            inputs=inputs,
            max_parameters=1000,
            complexity=COMPLEXITIES[: levels - 1],
            degradation="unet",
        )


def test_groups_that_move_in_steps_keep_to_the_rounding() -> None:
    net = nn.Sequential(nn.Conv2d(1, 32, 3), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 4, 1))
    asked = {"inputs": "1x1x8x8", "complexity": 0.1, "degradation": "unet", "max_drop": 0.02}
    up = plan_widths(net, rounding="up", **asked)  # type: ignore[arg-type]
    down = plan_widths(net, rounding="down", **asked)  # type: ignore[arg-type]
    exact = 32 * up.multipliers[0]
    assert isinstance(up.widths[0], int)
    assert isinstance(down.widths[0], int)
    assert down.widths[0] <= exact <= up.widths[0]
    assert up.widths[0] % 4 == down.widths[0] % 4 == 0
    small = rewrite(net, Width.from_plan(up), inputs="1x1x8x8")
    assert parameters(small) == up.after.parameters


def test_weights_behind_a_parametrisation_count_once_and_linear_layers_do_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed = weight_norm(nn.Conv2d(1, 6, 3))
            self.grouped = nn.Conv2d(6, 6, 3, groups=6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.grouped(self.normed(x)).mean((2, 3)))

    channels = analyse(Net(), "1x1x8x8")
    sizes = WeightCounter(channels, find_levels(channels)).count({})
    assert sizes.theta == 6 * 9 + 6 * 9
    assert sizes.parameters == sizes.theta + 6 + 6 + 6 + 2 * 6 + 2


def test_a_weight_that_runs_at_two_levels_counts_at_the_finest() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.stem = nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(self.stem(x))
            return self.conv(nn.functional.max_pool2d(x, 2))

    channels = analyse(Shared(), "1x1x8x8")
    sizes = WeightCounter(channels, find_levels(channels)).count({})
    assert sizes.levels == (144 + 36, 0)
    assert sizes.theta == 180
