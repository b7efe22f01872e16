"""Blocks in place of convolutions are solved as the one linear map that they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import Pass, calibrate, history, rewrite
from pocketize.calibration.chains import find_chain, fit_chain
from pocketize.calibration.windows import rows
from pocketize.passes import Bottleneck, CompactBlock, Separable, Width

ANY: dict[str, Any] = {"activations": "any", "min_channels": 1}
SWAPS: dict[str, Pass] = {
    "bottleneck": Bottleneck(ratio=2, **ANY),
    "separable": Separable(**ANY),
    "compact": CompactBlock(ratio=2, multiplier=2, **ANY),
}


def images() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, 6, 12, 14, generator=draw).cumsum(-1) for _ in range(3)]


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, **options), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("swap", SWAPS)
def test_a_chain_is_the_map_that_it_composes(swap: str) -> None:
    x = images()[0].double()
    net = network(stride=(1, 2), dilation=(2, 1)).double()
    block = rewrite(net, SWAPS[swap], inputs=x)[0]  # type: ignore[index]
    chain = find_chain(block)
    assert chain is not None
    with torch.no_grad():
        whole = block(x).movedim(1, -1).flatten(0, -2)
        places = torch.arange(len(whole))
        made = rows(chain.window, x, places, slice(None), 0) @ chain.composed(chain.weights())
    assert torch.allclose(made + block[-1].bias, whole, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_block_is_nearer_on_the_images_than_its_last_layer_alone(swap: str, bias: bool) -> None:
    net, x = network(bias=bias).eval(), images()
    small = rewrite(net, SWAPS[swap], inputs=x[0])
    found = calibrate(net, small, x)
    (first,) = [layer for layer in found.layers if layer.path == "0"]
    assert first.before is not None
    assert first.after is not None
    assert first.weights is not None
    assert first.after < 0.9 * first.before
    wanted = torch.cat([net[0](one) for one in x])  # type: ignore[index]
    given = torch.cat([found.model[0](one) for one in x])  # type: ignore[index]
    with torch.no_grad():
        error = float((given - wanted).norm() / wanted.norm())
    assert first.after == pytest.approx(error, rel=0.02)
    assert [layer.path for layer in found.layers] == ["0", "2"]
    told = f"(of their weights): 0 {first.after:.1%} ({first.weights:.1%})"
    assert history(found.model)[-1].notes[-1].endswith(told)
    alone = calibrate(net, small, x, memory="8KiB")
    (last,) = [layer for layer in alone.layers if layer.after is not None and layer.path != "2"]
    assert last.path.startswith("0.")
    assert last.after is not None
    assert first.after < last.after < first.before


@pytest.mark.slow
def test_widths_that_change_before_and_after_are_followed() -> None:
    net, x = network().eval(), images()
    for passes in ((Width(0.5), SWAPS["bottleneck"]), (SWAPS["bottleneck"], Width(0.5))):
        small = net
        for one in passes:
            small = rewrite(small, one, inputs=x[0])
        found = calibrate(net, small, x)
        assert found.after < 0.9 * found.before
        assert {layer.path for layer in found.layers} == {"0", "2"}


@pytest.mark.slow
def test_the_mode_of_the_caller_changes_nothing() -> None:
    net, x = network().eval(), images()
    small = rewrite(net, SWAPS["separable"], inputs=x[0])
    plain = calibrate(net, small, x)
    with torch.inference_mode():
        found = calibrate(net, small, [one.clone() for one in x])
    assert found.after == plain.after
    assert not any(p.is_inference() for p in found.model.parameters())
    given = [one.requires_grad_() for one in images()]
    assert calibrate(net, small, given).after == plain.after
    assert not any(p.grad_fn for p in found.model.parameters())


@pytest.mark.slow
def test_a_block_with_norms_inside_is_left() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = images()
    small = rewrite(net, Bottleneck(inner_norm=True, **ANY), inputs=x[0])
    left = {each.path: each.why_not for each in calibrate(net, small, x).layers}
    assert set(left.values()) == {"", "another module stands there than before"}
    assert [path for path, why_not in left.items() if not why_not] == ["1"]


def test_what_is_no_chain() -> None:
    a, b = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 2, 3)
    assert find_chain(nn.Sequential(a, b)) is not None
    assert find_chain(nn.Sequential(nn.Conv2d(2, 3, 1), b)) is None  # a bias inside, and padding
    assert find_chain(nn.Sequential(a, nn.ReLU(), b)) is None
    assert find_chain(nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), b)) is None
    assert find_chain(nn.Sequential(nn.Conv2d(2, 3, 1, stride=2, bias=False), b)) is None
    assert find_chain(a) is None
    c = nn.Conv2d(2, 2, 1, bias=False)
    assert find_chain(nn.Sequential(c, c)) is None


@pytest.mark.parametrize("sign", [1, -1])
def test_a_chain_that_does_the_opposite_is_brought_near_too(sign: int) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(3, 8, 3)).double()
    chain = find_chain(block)
    assert chain is not None
    start = chain.composed(chain.weights())
    found = chain.composed(fit_chain(chain, torch.eye(54).double(), 2 * sign * start, 1e-6))
    assert float((found - 2 * sign * start).norm() / start.norm()) < 0.01
