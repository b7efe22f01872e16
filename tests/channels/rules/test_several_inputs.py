"""Operators that take several tensors keep channels together, in random nets of them.

Every operand comes from a convolution of its own, so that a rule that does not tie two of them
lets each keep other channels. Only convolutions read across channels: with the outgoing weights of
the dropped channels set to zero, the original must compute what the sliced net does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocketize.engine.pipeline import plan
from pocketize.plugin.base import Proposal, Target
from pocketize.plugin.edits import Resize
from tests.contract.rounds import whole
from tests.examples import examples
from tests.toys import Halve

_CHANNELS = 6


def _folded(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Channels as a part of the batch, (batch * channels, height, width)."""
    return lambda a, b, c: function(a.flatten(0, 1), b.flatten(0, 1), c.flatten(0, 1)).view_as(a)


def _unpooled(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    _, at = F.max_pool2d(a, 2, return_indices=True)
    return F.max_unpool2d(F.avg_pool2d(b, 2), at, 2)


def _unpooled_rows(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    _, at = F.max_pool1d(a.mean(2), 2, return_indices=True)
    return c * F.max_unpool1d(F.avg_pool1d(b.mean(2), 2), at, 2)[:, :, None]


def _scattered(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a.scatter(3, b.argsort(3), c)


def _sampled(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    grid = torch.stack([b, c], -1).flatten(0, 1).tanh()
    return F.grid_sample(a.flatten(0, 1)[:, None], grid, align_corners=False).view_as(a)


def _turned(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    theta = torch.stack([b.mean((2, 3)), c.mean((2, 3))], -1)[..., None].expand(-1, -1, -1, 3)
    grid = F.affine_grid(theta.flatten(0, 1), [a.shape[0] * a.shape[1], 1, *a.shape[2:]], False)
    return F.grid_sample(a.flatten(0, 1)[:, None], grid, align_corners=False).view_as(a)


def _filtered(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A kernel for each channel, computed from another tensor."""
    kernel = b.mean(0)[:, None, :3, :3]
    return F.conv2d(a, kernel, c.mean((0, 2, 3)), padding=1, groups=a.shape[1])


def _normalised(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b, c: norm(a, weight=b.mean((0, 2, 3)), bias=c.mean((0, 2, 3)))


def _attended(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Attention of rows, one head for each channel."""
    return F.scaled_dot_product_attention(a, b, c)


def _recurrent(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A recurrence over rows, whose state and gates belong to the channels."""
    state, steps = c[:, :, 0], []
    for row in range(a.shape[2]):
        state = torch.lerp(state, a[:, :, row], b[:, :, row].sigmoid())
        steps.append(state)
    return torch.stack(steps, 2)


def _strongest(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    values, at = a.topk(3, dim=3)
    return b * F.pad(values + c.gather(3, at), (0, a.shape[3] - 3))


def _put(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    out = a.clone()
    out[:, :, 1] = b[:, :, 2]
    out[..., torch.tensor([0, 2])] = c[..., 1:3]
    return out


def _counted(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The cell of every number among boundaries that are their own for each channel."""
    edges = b.flatten(2)[..., :8].sort(-1).values
    return c * torch.searchsorted(edges.contiguous(), a.flatten(2)).view_as(a)


def _coded(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    rows = torch.stack([b.mean((2, 3)), c.mean((2, 3))], -1)  # (batch, channels, 2)
    return (F.one_hot((a > 0).long(), 2) * rows[:, :, None, None]).sum(-1)


OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add": lambda a, b, c: a + b * c,
    "addcmul": lambda a, b, c: torch.addcmul(a, b, c, value=0.5),
    "addcdiv": lambda a, b, c: torch.addcdiv(a, b, c.abs() + 1),
    "lerp": lambda a, b, c: torch.lerp(a, b, c.sigmoid()),
    "where": lambda a, b, c: torch.where(a > 0, b, c),
    "masked_fill": lambda a, b, c: a.masked_fill(b > 0, 0.3) + c,
    "clamp": lambda a, b, c: a.clamp(b - 1, b + c.abs()),
    "maximum": lambda a, b, c: torch.max(torch.minimum(a, b), c),
    "copy": lambda a, b, c: torch.zeros_like(a).copy_(b).add_(c),
    "in place": lambda a, b, c: a.clone().addcmul_(b, c),
    "cat": lambda a, b, c: torch.cat([c, a, b], 1),
    "stack": lambda a, b, c: torch.stack([a, b, c], 2).amax(2),
    "unpool": _unpooled,
    "unpool of rows": _unpooled_rows,
    "gather": lambda a, b, c: a.gather(3, b.argsort(3)) + c,
    "take_along_dim": lambda a, b, c: a.take_along_dim(b.argmax(3, keepdim=True), 3) * c,
    "scatter": _scattered,
    "put": _put,
    "topk": _strongest,
    "searchsorted": _counted,
    "bucketize": lambda a, b, c: c + torch.bucketize(a, torch.linspace(-1, 1, 5).to(a)) * b,
    "one_hot": _coded,
    "grid_sample": _sampled,
    "affine_grid": _turned,
    "conv": _filtered,
    "batch_norm": _normalised(lambda x, **how: F.batch_norm(x, None, None, training=True, **how)),
    "instance_norm": _normalised(F.instance_norm),
    "group_norm": _normalised(lambda x, **how: F.group_norm(x, x.shape[1], **how)),
    "layer_norm of rows": lambda a, b, c: F.layer_norm(a, a.shape[-1:], b[0, 0, 0]) + c,
    "prelu": lambda a, b, c: F.prelu(a, b.mean((0, 2, 3))) * c,
    "dynamic shift": lambda a, b, c: (
        a + b.mean((2, 3), keepdim=True) * c.amax((2, 3), keepdim=True)
    ),
    "bmm": _folded(lambda a, b, c: torch.baddbmm(a, b, c)),
    "matmul": lambda a, b, c: a @ b + c,
    "einsum": lambda a, b, c: torch.einsum("bchw,bcwv,bcv->bchv", a, b, c[:, :, 0]),
    "attention": _attended,
    "recurrence": _recurrent,
    "polar": lambda a, b, c: torch.view_as_real(torch.polar(a.abs(), b)).sum(-1) * c,
    "distance": lambda a, b, c: a * F.huber_loss(b, c, reduction="none"),
    "broadcast": lambda a, b, c: sum(torch.broadcast_tensors(a, b[:1], c[..., :1])),
    "flipped": lambda a, b, c: a + b.flip(1) * c,
    "shuffled": lambda a, b, c: F.channel_shuffle(torch.cat([a, b], 1), 2) * torch.cat([c, c], 1),
}


class Chain(nn.Module):
    """Each operator takes what the one before gave, and two more maps of the stem's."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.stem = nn.Conv2d(1, _CHANNELS, 3, padding=1)
        self.sides = nn.ModuleList(
            nn.Conv2d(_CHANNELS, _CHANNELS, 1) for _ in range(3 * len(names))
        )
        self.joins = nn.ModuleList(nn.LazyConv2d(_CHANNELS, 1) for _ in self.names)
        self.head = nn.Conv2d(_CHANNELS, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, name in enumerate(self.names):
            operands = (side(x) for side in self.sides[3 * index : 3 * index + 3])
            x = x + self.joins[index](OPERATORS[name](*operands))
        return self.head(x)


@dataclass(frozen=True, kw_only=True)
class Thin(Halve):
    """Drop half of the channels of every group at random."""

    seed: int = 0

    def propose(self, target: Target) -> Proposal:
        channels, rng = target.channels(), np.random.default_rng(self.seed)
        free = [g for g in channels.groups if not g.frozen and g.units > 1]
        chosen = {g: np.sort(rng.choice(g.units, g.units // 2, replace=False)) for g in free}
        return Proposal(channels.resize(chosen))


def error_of(names: Sequence[str], seed: int) -> tuple[float, int]:
    """Return how far the sliced net is off, and how many channels it has lost."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model, x = Chain(names).double().eval(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
        model(x)
        planned = plan(model, Thin(seed=seed), inputs=x)
        narrow = planned.apply()
        lost = 0
        for edit in whole(planned).edits:
            if isinstance(edit, Resize) and edit.axis == 1:
                dropped = sorted({*range(edit.size)} - {*edit.keep})
                model.get_parameter(edit.tensor)[:, dropped] = 0
                lost += len(dropped)
        expected = model(x)
        return float((narrow(x) - expected).abs().max() / expected.abs().max()), lost


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_reads_the_channels_that_belong_together(name: str) -> None:
    error, lost = error_of([name], seed=7)
    assert error < 1e-9
    assert lost, "nothing was sliced, not even what has nothing to do with the operator"


@pytest.mark.slow
@given(st.lists(st.sampled_from(sorted(OPERATORS)), min_size=2, max_size=3), st.integers(0, 999))
@settings(max_examples=examples(8), deadline=None, phases=[Phase.explicit, Phase.generate])
def test_chains_of_operators_do_too(names: list[str], seed: int) -> None:
    error, _ = error_of(names, seed)
    assert error < 1e-9
