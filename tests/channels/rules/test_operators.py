"""What each rule says of the axes of its operands, on operators alone.

An axis is written ``"a1"``: the second of the operand ``a``. A case lists what the first result has
on each of its axes, which axes are united, and which are frozen; all others must stay free and
apart. So a rule that unites or freezes too much fails as one that does too little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pocketize.channels.labels import axes_of
from tests.board import Board


@dataclass(frozen=True)
class Case:
    """An operator on operands.

    Attributes:
        name: test id.
        function: the operator.
        shapes: operands.
        out: axes of the first result, ``"-"`` for one without label.
        united: axes that are the same channels, ``"a1=b0 a0=c0"``.
        frozen: axes that must not change, with a fragment of the reason.
    """

    name: str
    function: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    out: str
    united: str = ""
    frozen: dict[str, str] = field(default_factory=dict)


_WHOLE = "needs the axis whole"
_MAT = {"a": (4, 6), "b": (6, 5)}
_BATCHED = {"a": (3, 4, 6), "b": (3, 6, 5)}

CASES = [
    # products of matrices
    Case("matmul", lambda a, b: a @ b, _MAT, "a0 b1", "a1=b0"),
    Case("mm", torch.mm, _MAT, "a0 b1", "a1=b0"),
    Case("bmm", torch.bmm, _BATCHED, "a0 a1 b2", "a0=b0 a2=b1"),
    Case("matmul broadcast", torch.matmul, {"a": (2, 3, 4, 6), "b": (6, 5)},
         "a0 a1 a2 b1", "a3=b0"),
    Case("matmul vector", torch.matmul, {"a": (4, 6), "b": (6,)}, "a0", "a1=b0"),
    Case("vector matmul", torch.matmul, {"a": (6,), "b": (6, 5)}, "b1", "a0=b0"),
    Case("dot", torch.dot, {"a": (6,), "b": (6,)}, "", "a0=b0"),
    Case("addmm", torch.addmm, {"c": (5,), **_MAT}, "a0 b1", "a1=b0 c0=b1"),
    Case("baddbmm", torch.baddbmm, {"c": (3, 4, 5), **_BATCHED}, "a0 a1 b2",
         "a0=b0=c0 a2=b1 a1=c1 b2=c2"),
    Case("linear", F.linear, {"a": (3, 6), "w": (5, 6), "b": (5,)}, "a0 w0", "a1=w1 w0=b0"),
    Case("einsum", lambda a, b: torch.einsum("bij,bjk->kbi", a, b), _BATCHED, "b2 a0 a1",
         "a0=b0 a2=b1"),
    Case("einsum implicit", lambda a, b: torch.einsum("ji,kj", a, b), {"a": (6, 4), "b": (5, 6)},
         "a1 b0", "a0=b1"),
    Case("einsum ellipsis", lambda a, b: torch.einsum("...i,ij->...j", a, b),
         {"a": (2, 3, 6), "b": (6, 5)}, "a0 a1 b1", "a2=b0"),
    Case("einsum outer", lambda a, b: torch.einsum("i,j->ij", a, b), {"a": (4,), "b": (5,)},
         "a0 b0"),
    Case("einsum diagonal", lambda a: torch.einsum("ii->i", a), {"a": (4, 4)}, "-",
         frozen={"a0": "diagonal", "a1": "diagonal"}),
    Case("attention", F.scaled_dot_product_attention,
         {"q": (2, 3, 4, 5), "k": (2, 3, 6, 5), "v": (2, 3, 6, 7)}, "q0 q1 q2 v3",
         "q0=k0=v0 q1=k1=v1 q3=k3 k2=v2"),
    # element by element
    Case("add", torch.add, {"a": (3, 4), "b": (3, 4)}, "a0 a1", "a0=b0 a1=b1"),
    Case("add broadcast", torch.add, {"a": (3, 4), "b": (4,)}, "a0 a1", "a1=b0"),
    Case("gate", torch.mul, {"a": (3, 4, 5), "b": (3, 4, 1)}, "a0 a1 a2", "a0=b0 a1=b1"),
    Case("outer sum", torch.add, {"a": (3, 1), "b": (1, 4)}, "a0 b1"),
    Case("where", lambda c, a, b: torch.where(c > 0, a, b), {"c": (3, 4), "a": (3, 4), "b": (4,)},
         "a0 a1", "a0=c0 a1=c1=b0"),
    Case("softmax", lambda a: a.softmax(1), {"a": (3, 4)}, "a0 a1"),
    Case("in place", lambda a, b: a.clone().add_(b).relu_(), {"a": (3, 4), "b": (3, 4)}, "a0 a1",
         "a0=b0 a1=b1"),
    Case("max of two", torch.maximum, {"a": (3, 4), "b": (3, 4)}, "a0 a1", "a0=b0 a1=b1"),
    Case("max of two, by max", torch.max, {"a": (3, 4), "b": (4,)}, "a0 a1", "a1=b0"),
    Case("dtype of another", lambda a, b: a.to(b), {"a": (3, 4), "b": (3, 4)}, "a0 a1"),
    Case("type of another", lambda a, b: a.type_as(b), {"a": (3, 4), "b": (5,)}, "a0 a1"),
    Case("lerp", torch.lerp, {"a": (3, 4), "b": (3, 4), "w": (4,)}, "a0 a1", "a0=b0 a1=b1=w0"),
    Case("addcmul", torch.addcmul, {"a": (3, 4), "b": (3, 4), "c": (4,)},
         "a0 a1", "a0=b0 a1=b1=c0"),
    Case("eye", lambda a: torch.eye(4) @ a, {"a": (4, 3)}, "a0 a1"),
    Case("constant", lambda a: a + torch.ones(4).cumsum(0), {"a": (3, 4)}, "a0 a1"),
    # reductions
    Case("mean", lambda a: a.mean((0, 2)), {"a": (3, 4, 5)}, "a1"),
    Case("mean keepdim", lambda a: a.mean(1, keepdim=True), {"a": (3, 4, 5)}, "a0 - a2"),
    Case("sum of all", torch.sum, {"a": (3, 4)}, ""),
    Case("var_mean", lambda a: torch.var_mean(a, -1), {"a": (3, 4)}, "a0"),
    Case("max along", lambda a: a.max(1).values, {"a": (3, 4)}, "a0"),
    Case("max and where", lambda a: a.max(1), {"a": (3, 4)}, "a0", frozen={"a1": _WHOLE}),
    Case("max of all", lambda a: a.max() + 1, {"a": (3, 4)}, ""),
    Case("norm", lambda a: torch.linalg.vector_norm(a, dim=1), {"a": (3, 4)}, "a0"),
    Case("argmax", lambda a: a.argmax(0), {"a": (3, 4)}, "a1", frozen={"a0": _WHOLE}),
    Case("argmax of all", torch.argmax, {"a": (3, 4)}, "", frozen={"a0": _WHOLE, "a1": _WHOLE}),
    Case("topk", lambda a: a.topk(2, dim=1), {"a": (3, 4)}, "a0 -", frozen={"a1": _WHOLE}),
    Case("sort", lambda a: a.sort(0).values, {"a": (3, 4)}, "- a1", frozen={"a0": _WHOLE}),
    # layers
    Case("conv1d", F.conv1d, {"a": (2, 4, 9), "w": (5, 4, 3), "b": (5,)}, "a0 w0 -", "a1=w1 w0=b0",
         frozen={"a2": _WHOLE}),
    Case("conv3d unbatched", lambda a, w: F.conv3d(a, w), {"a": (4, 5, 5, 5), "w": (6, 4, 3, 3, 3)},
         "w0 - - -", "a0=w1", frozen={"a1": _WHOLE, "a2": _WHOLE, "a3": _WHOLE}),
    Case("conv_transpose2d", F.conv_transpose2d, {"a": (2, 4, 1, 1), "w": (4, 5, 2, 2), "b": (5,)},
         "a0 w1 - -", "a1=w0 w1=b0"),
    Case("depthwise", lambda a, w: F.conv2d(a, w, groups=4), {"a": (2, 4, 1, 1), "w": (4, 1, 1, 1)},
         "a0 a1 - -", "a1=w0"),
    Case("batch_norm", lambda a, m, v, w, b: F.batch_norm(a, m, v, w, b),
         {"a": (2, 4, 1), "m": (4,), "v": (4,), "w": (4,), "b": (4,)}, "a0 a1 -", "a1=m0=v0=w0=b0"),
    Case("instance_norm", lambda a, w, b: F.instance_norm(a, weight=w, bias=b),
         {"a": (2, 4, 3), "w": (4,), "b": (4,)}, "a0 a1 a2", "a1=w0=b0"),
    Case("layer_norm", lambda a, w, b: F.layer_norm(a, (4,), w, b),
         {"a": (3, 4), "w": (4,), "b": (4,)}, "a0 a1", "a1=w0=b0"),
    Case("group_norm of one", lambda a, w, b: F.group_norm(a, 1, w, b),
         {"a": (2, 4, 1), "w": (4,), "b": (4,)}, "a0 a1 -", "a1=w0=b0"),
    Case("group_norm of each", lambda a, w, b: F.group_norm(a, 4, w, b),
         {"a": (2, 4, 1), "w": (4,), "b": (4,)}, "a0 a1 -", "a1=w0=b0"),
    Case("prelu", F.prelu, {"a": (2, 4, 3), "w": (4,)}, "a0 a1 a2", "a1=w0"),
    Case("prelu of one", F.prelu, {"a": (2, 4, 3), "w": (1,)}, "a0 a1 a2"),
    Case("max_pool2d", lambda a: F.max_pool2d(a, 2), {"a": (2, 4, 6, 6)},
         "a0 a1 - -", frozen={"a2": _WHOLE, "a3": _WHOLE}),
    Case("max_unpool2d", lambda a, i: F.max_unpool2d(a, i.long(), 2),
         {"a": (2, 4, 1, 1), "i": (2, 4, 1, 1)}, "a0 a1 - -", "a0=i0 a1=i1"),
    Case("max_unpool1d", lambda a, i: F.max_unpool1d(a, i.long(), 2),
         {"a": (2, 4, 1), "i": (2, 4, 1)}, "a0 a1 -", "a0=i0 a1=i1"),
    Case("max_unpool3d unbatched", lambda a, i: F.max_unpool3d(a, i.long(), 2),
         {"a": (4, 1, 1, 2), "i": (4, 1, 1, 2)}, "a0 - - -", "a0=i0",
         frozen={"a3": _WHOLE, "i3": _WHOLE}),
    Case("max_pool2d where", lambda a: F.max_pool2d(a, 1, return_indices=True)[1],
         {"a": (2, 4, 1, 1)}, "a0 a1 - -"),
    Case("fractional_max_pool2d",
         lambda a, s: F.fractional_max_pool2d(a, 1, output_size=1, _random_samples=s),
         {"a": (2, 4, 1, 1), "s": (2, 4, 2)}, "a0 a1 - -", "a0=s0 a1=s1"),
    Case("pool to one", lambda a: F.adaptive_avg_pool2d(a, 1), {"a": (2, 4, 1, 1)}, "a0 a1 - -"),
    Case("interpolate", lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"),
         {"a": (2, 4, 1, 1)}, "a0 a1 - -"),
    Case("grid_sample", lambda a, g: F.grid_sample(a, g, align_corners=False),
         {"a": (2, 4, 1, 1), "g": (2, 3, 3, 2)}, "a0 a1 - -", "a0=g0",
         frozen={"g1": "samples at it", "g2": "samples at it", "g3": "samples at it"}),
    Case("embedding", lambda w: F.embedding(torch.tensor([[1, 0, 2]]), w), {"w": (7, 4)}, "- - w1",
         frozen={"w0": _WHOLE}),
    Case("embedding at", lambda w, i: F.embedding(i.long(), w), {"w": (7, 4), "i": (2, 3)},
         "i0 i1 w1", frozen={"w0": _WHOLE}),
    Case("weight_norm", lambda v, g: torch._weight_norm(v, g, 0), {"v": (4, 3), "g": (4, 1)},
         "v0 v1", "v0=g0"),
    # joining and cutting
    Case("stack", lambda a, b: torch.stack([a, b], 1), {"a": (3, 4), "b": (3, 4)}, "a0 - a1",
         "a0=b0 a1=b1"),
    Case("select", lambda a: a[:, 2], {"a": (3, 4, 5)}, "a0 a2", frozen={"a1": _WHOLE}),
    Case("unbind", lambda a: a.unbind(0), {"a": (3, 4)}, "a1", frozen={"a0": _WHOLE}),
    Case("index", lambda a: a[torch.tensor([2, 0])], {"a": (3, 4)}, "- a1", frozen={"a0": _WHOLE}),
    Case("index at", lambda a, i: a[:, i.long()], {"a": (3, 4, 5), "i": (2, 6)}, "a0 i0 i1 a2",
         frozen={"a1": _WHOLE}),
    Case("index of two at", lambda a, i, j: a[i.long(), j.long()],
         {"a": (3, 4), "i": (5,), "j": (5,)}, "-",
         frozen=dict.fromkeys(("a0", "a1", "i0", "j0"), "indexes it with tensors")),
    Case("index_select at", lambda a, i: a.index_select(1, i.long()), {"a": (3, 4), "i": (5,)},
         "a0 i0", frozen={"a1": _WHOLE}),
    Case("index of two", lambda a: a[torch.tensor([2, 0]), torch.tensor([1, 1])],
         {"a": (3, 4)}, "-",
         frozen={"a0": "indexes it with tensors", "a1": "indexes it with tensors"}),
    Case("index_select", lambda a: a.index_select(1, torch.tensor([2, 0])), {"a": (3, 4)}, "a0 -",
         frozen={"a1": _WHOLE}),
    Case("gather", lambda a: a.gather(1, torch.zeros(3, 2).long()), {"a": (3, 4)}, "- -",
         frozen={"a0": "no channel rule", "a1": "no channel rule"}),
    Case("uneven split", lambda a: a.split([2, 3], 1)[1], {"a": (3, 5)}, "a0 a1[2:]"),
    Case("uneven slice", lambda a: a[:, 2:], {"a": (3, 5)}, "a0 a1[2:]"),
    Case("slice from the end", lambda a: a[:, -3:], {"a": (3, 5)}, "a0 a1[2:]"),
    Case("uneven steps", lambda a: a[:, ::2], {"a": (3, 5)}, "a0 a1[::2]",
         frozen={"a1": "takes every 2th of a part"}),
    Case("cat", lambda a, b: torch.cat([a, b], 1)[:, 3:], {"a": (3, 3), "b": (3, 4)}, "a0 b1",
         "a0=b0"),
    # movement
    Case("broadcast", lambda a, b: torch.broadcast_tensors(a, b)[1], {"a": (3, 4), "b": (1, 4)},
         "a0 a1", "a1=b1"),
    Case("distance", lambda a, b: a + F.mse_loss(a, b), {"a": (3, 4), "b": (3, 4)}, "a0 a1",
         "a0=b0 a1=b1"),
    Case("roll", lambda a: a.roll(1, 1), {"a": (3, 4)}, "a0 -", frozen={"a1": _WHOLE}),
    Case("flatten of two", lambda a: a.flatten(), {"a": (3, 4)}, "-",
         frozen={"a0": "merges two axes", "a1": "merges two axes"}),
    Case("movedim", lambda a: a.movedim((0, 1), (2, 0)), {"a": (3, 4, 5)}, "a1 a2 a0"),
    Case("expand", lambda a: a.expand(3, 4, 5), {"a": (4, 1)}, "* a0 *"),
    Case("unfold", lambda a: F.unfold(a, 1), {"a": (1, 4, 1, 1)}, "- a1 -"),
    Case("pad channels", lambda a: F.pad(a, (0, 0, 0, 2))[:, :], {"a": (2, 4, 1)}, "a0 * -"),
    Case("reflect", lambda a: F.pad(a, (1, 1), mode="reflect"), {"a": (2, 4)}, "a0 *",
         frozen={"a1": "pads it with its own values"}),
    Case("fft along", lambda a: torch.fft.fft(a, dim=1).abs(), {"a": (3, 4)}, "a0 -",
         frozen={"a1": _WHOLE}),
    Case("real view", lambda a: torch.view_as_real(torch.complex(a, a)), {"a": (3, 4)}, "a0 a1 -"),
    Case("polar", torch.polar, {"a": (3, 4), "b": (3, 4)}, "a0 a1", "a0=b0 a1=b1"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator(case: Case) -> None:
    board = Board(case.function, **case.shapes)
    axes = {f"{name}{axis}" for name, axis in board.axes}

    for axis in axes:
        assert board.frozen(axis) == (axis in case.frozen), board.reasons
    for axis, fragment in case.frozen.items():
        assert fragment in board.reason(axis)

    together = [set(group.split("=")) for group in case.united.split()]
    for a in axes:
        for b in axes:
            same = a == b or any({a, b} <= group for group in together)
            if same:
                assert board.unit(a) == board.unit(b), f"{a} and {b} are not united"
            elif a not in case.frozen and b not in case.frozen:
                assert not set(board.unit(a)) & set(board.unit(b)), f"{a} and {b} are united"
        assert a in case.frozen or len(set(board.unit(a))) == len(board.unit(a))

    value = board.outputs()[0]
    assert len(value.shape) == len(case.out.split())
    for place, expected in enumerate(case.out.split()):
        label = value.label_on(place)
        if expected == "*":
            continue
        if expected == "-":
            assert label is None, f"a label on axis {place}"
            continue
        assert label is not None, f"no label on axis {place}"
        assert axes_of(label) == [place]
        name, _, part = expected.partition("[")
        units = board.unit(name)
        if part:
            units = units[slice(*(int(x) if x else None for x in part[:-1].split(":")))]
        assert [int(u) for u in board.units[label.reshape(-1)]] == units
