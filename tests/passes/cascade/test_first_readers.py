"""Which weights read the input's channels, and the networks that cannot be given more of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pocketize.engine.surgery import apply_edits
from pocketize.errors import RewriteError
from pocketize.graph.capture import capture
from pocketize.passes.cascade.extend_inputs import extend_inputs
from pocketize.passes.cascade.first_readers import find_first_readers
from pocketize.plugin.edits import Extend


class Reads(nn.Module):
    """Layers, and a function that calls them."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def patches_last(m: nn.Module, x: Tensor) -> Tensor:
    """Channels fastest within a patch, as in MONAI's perceptron embedding."""
    n, c, h, w = x.shape
    cut = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
    return m.linear(cut.reshape(n, (h // 4) * (w // 4), 16 * c))


def patches_first(m: nn.Module, x: Tensor) -> Tensor:
    """Channels slowest within a patch, as in an unfold."""
    n, c, h, w = x.shape
    cut = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5)
    return m.linear(cut.reshape(n, (h // 4) * (w // 4), 16 * c))


def joined_late(m: nn.Module, x: Tensor) -> Tensor:
    features = m.first(F.pad(x * 0.5, (1, 1, 1, 1))).relu()
    return m.second(torch.cat([features[:, :3], x, features[:, 3:]], 1))


def conv(i: int, o: int = 2, **options: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, **{"kernel_size": 3, "padding": 1, **options})


def late(c: int) -> Reads:
    return Reads(joined_late, first=nn.Conv2d(c, 8, 3), second=conv(c + 8))


READERS: dict[str, tuple[Callable[[int], nn.Module], list[tuple[str, int]]]] = {
    "a convolution": (lambda c: nn.Sequential(conv(c, 4), nn.ReLU(), conv(4)), [("0.weight", 1)]),
    "a transposed convolution": (lambda c: nn.ConvTranspose2d(c, 3, 2), [("weight", 0)]),
    "a shortcut beside it": (
        lambda c: Reads(lambda m, x: m.a(x) + m.b(F.avg_pool2d(x, 1)), a=conv(c), b=conv(c)),
        [("a.weight", 1), ("b.weight", 1)],
    ),
    "a later layer": (late, [("first.weight", 1), ("second.weight", 1)]),
    "pooled and unscaled": (
        lambda c: Reads(
            lambda m, x: m.a(F.interpolate(F.max_pool2d(x, 2), scale_factor=2) + x.tanh()),
            a=conv(c),
        ),
        [("a.weight", 1)],
    ),
    "an instance norm without parameters": (
        lambda c: Reads(lambda m, x: m.a(F.instance_norm(x)), a=conv(c)),
        [("a.weight", 1)],
    ),
    "a space to depth": (
        lambda c: nn.Sequential(nn.PixelUnshuffle(2), conv(4 * c)),
        [("1.weight", 1)],
    ),
    "patches, channels last": (
        lambda c: Reads(patches_last, linear=nn.Linear(16 * c, 3)),
        [("linear.weight", 1)],
    ),
    "patches, channels first": (
        lambda c: Reads(patches_first, linear=nn.Linear(16 * c, 3)),
        [("linear.weight", 1)],
    ),
}


class Autocast(nn.Module):
    """Its weights are cast before they are read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.conv(x)
        return y


def test_a_weight_that_is_cast_is_found() -> None:
    (edit,) = extended(Autocast(3), torch.randn(2, 3, 8, 8), 2)
    assert edit == Extend("conv.weight", 1, (3, 4), 3)


def extended(model: nn.Module, x: Tensor, extra: int) -> tuple[Extend, ...]:
    edits = extend_inputs(model, [capture(model, x, train=t) for t in (False, True)], extra)
    apply_edits(model, edits)
    return edits


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", READERS)
def test_what_reads_the_input_reads_more_and_computes_the_same(kind: str, channels: int) -> None:
    build, expected = READERS[kind]
    torch.manual_seed(0)
    model, x = build(channels).double().eval(), torch.randn(2, channels, 8, 8).double()
    before = model(x)
    edits = extended(model, x, 2)
    assert [(edit.tensor, edit.axis) for edit in edits] == expected
    after = model(torch.cat([x, torch.randn(2, 2, 8, 8).double()], 1))
    if kind == "patches, channels last":  # zeros among the others change the order of summation
        assert torch.allclose(before, after, rtol=1e-13, atol=1e-14)
    else:
        assert torch.equal(before, after)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", READERS)
def test_the_new_weights_meet_the_new_channels_and_no_others(kind: str, channels: int) -> None:
    build, _ = READERS[kind]
    torch.manual_seed(0)
    model, x = build(channels).double().eval(), torch.randn(2, channels, 8, 8).double()
    edits = extended(model, x, 2)
    with torch.no_grad():
        for edit in edits:
            model.get_parameter(edit.tensor).index_fill_(edit.axis, torch.tensor(edit.old), 0.0)
            new = torch.tensor(edit.new)
            model.get_parameter(edit.tensor).index_fill_(edit.axis, new, 1.0)
    more = torch.randn(2, 2, 8, 8).double()
    one, other = (model(torch.cat([y, more], 1)) for y in (x, torch.randn_like(x)))
    assert torch.equal(one, other)
    assert not torch.allclose(one, model(torch.cat([x, torch.randn_like(more)], 1)))


class Shared(nn.Module):
    """One weight reads the input and its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.conv(x))
        return y


class Counts(nn.Module):
    """Its code counts the input's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y: Tensor = self.conv(x.reshape(n, 3, h, w))
        return y


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "a norm": (
        nn.Sequential(nn.BatchNorm2d(3), conv(3)),
        "aten.batch_norm in 0 has a weight for every channel",
    ),
    "a scale": (
        nn.Sequential(nn.InstanceNorm2d(3, affine=True), conv(3)),
        "in 0 has a weight for every channel",
    ),
    "groups": (nn.Conv2d(3, 6, 3, groups=3), "is a grouped convolution"),
    "a sum with features": (
        Reads(lambda m, x: m.b(x + m.a(x)), a=conv(3, 3), b=conv(3)),
        "aten.add at test_first_readers.py:.* joins the input's channels with others one by one",
    ),
    "a sum over channels": (
        Reads(lambda m, x: m.a(x + x.mean(1, keepdim=True)), a=conv(3)),
        "aten.mean at test_first_readers.py",
    ),
    "the output": (
        Reads(lambda m, x: torch.cat([m.a(x), x], 1), a=conv(3)),
        "the model returns channels of its input",
    ),
    "one channel twice": (
        Reads(lambda m, x: m.a(torch.cat([x, x[:, :1]], 1)), a=conv(4)),
        "reads some channels of the input 2 times and some 1 times",
    ),
    "channels among themselves": (
        Reads(lambda m, x: m.a(x * x.flip(1)), a=conv(3)),
        "lets channels of the input meet one another",
    ),
    "a computed weight": (
        nn.utils.parametrizations.weight_norm(conv(3)),
        "remove the parametrization first",
    ),
    "one weight in two places": (Shared(), "reads conv.weight, which would be larger"),
    "a size in the code": (Counts(), "Counts does not run on 2 more input channels"),
    "a number of channels in the code": (
        Reads(lambda m, x: m.a(x) / x.shape[1] ** 0.5, a=conv(3)),
        "aten.div at test_first_readers.py:.* computes with numbers that differ",
    ),
    "that number before the weights": (
        Reads(lambda m, x: m.a(x * (1 / x.shape[1])), a=conv(3)),
        "aten.mul at test_first_readers.py:.* computes with numbers that differ",
    ),
    "as many features": (
        Reads(lambda m, x: m.a(x)[:, : x.shape[1]].mean(1, keepdim=True), a=conv(3, 8)),
        "aten.slice at test_first_readers.py:.* computes with numbers that differ",
    ),
    "a mean of the weight": (
        Reads(lambda m, x: m.a(x) - m.a.weight.double().mean(), a=conv(3)),
        "aten.mean at test_first_readers.py:.* reads a.weight, which would be larger",
    ),
    "nobody": (Reads(lambda m, x: m.a(torch.ones(2, 3, 8, 8)), a=conv(3)), "no convolution"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_compute_something_else_is_refused_by_name(kind: str) -> None:
    model, says = REFUSED[kind]
    with pytest.raises(RewriteError, match=says):
        extended(model, torch.randn(2, 3, 8, 8), 2)


def test_large_inputs_cost_no_memory() -> None:
    model = nn.Sequential(nn.Conv3d(4, 2, 3, padding=1), nn.ReLU())
    with FakeTensorMode():
        volume = torch.empty(1, 4, 2048, 2048, 2048)
    traced = capture(model, volume[:, :4])
    (inlet,) = find_first_readers(traced).values()
    assert inlet.channels == (1, 2, 3, 4)
