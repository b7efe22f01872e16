"""Records of operators: each says something of every facet, and its arguments are torch's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import pocketize.channels.rules  # noqa: F401  (registers channel rules)
from pocketize._torch import schema_of
from pocketize.errors import RewriteError
from pocketize.ops import UNKNOWN, Kind, all_operators, operator_of, record, register

aten = torch.ops.aten
RECORDS = [
    known
    for known in all_operators()
    if known.name.startswith("aten.") and (known.kind, known.heavy) != (Kind.POINTWISE, UNKNOWN)
]


@pytest.fixture(autouse=True)
def own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(record, "_FACETS", dict(record._FACETS))
    monkeypatch.setattr(record, "_OPERATORS", dict(record._OPERATORS))


def _overloads(known: record.Operator) -> list[torch._ops.OpOverload]:
    packet = getattr(aten, known.short, None) or getattr(aten, f"{known.short}_")
    return [getattr(packet, overload) for overload in packet.overloads()]


def test_every_record_is_of_an_operator_of_torch_and_names_arguments_that_it_has() -> None:
    for known in RECORDS:
        names = {a.name for func in _overloads(known) for a in schema_of(func).arguments}
        for argument in (known.data, known.weight):
            assert not argument or argument in names, f"{known.name} has no {argument}"


#: Operators of which nobody has said how channels flow: what reaches them keeps its channels.
WITHOUT_RULE = {
    "_cdist_forward",
    "_fft_c2c",
    "_fft_c2r",
    "_fft_r2c",
    "addbmm",
    "gru",
    "logcumsumexp",
    "lstm",
    "native_group_norm",
    "resize",
    "set",
}


def test_every_facet_of_a_record_is_stated_and_a_missing_rule_is_meant() -> None:
    """``define`` asks for every facet; what a rule is registered for needs a record first."""
    for known in RECORDS:
        assert isinstance(known.heavy, bool), f"{known.name} has no record of its own"
    without = {known.short for known in RECORDS if known.facet("channel rule") is UNKNOWN}
    below_autograd = {name for name in without if re.match("_scaled|_cudnn|_thnn|mkldnn", name)}
    assert without - below_autograd == WITHOUT_RULE


def test_variants_are_found_by_the_plain_name() -> None:
    for func in (aten.relu.default, aten.relu_.default, aten.relu.out):
        assert operator_of(func) is operator_of(aten.relu.default)
    assert operator_of(aten.conv3d.padding).kind is Kind.CONVOLUTION


def test_nothing_is_known_of_an_unknown_operator_but_what_torch_tags() -> None:
    assert operator_of(aten.erf.default).kind is Kind.POINTWISE
    unknown = operator_of(aten.histc.default)
    assert (unknown.kind, unknown.keeps, unknown.facet("anything")) == (UNKNOWN,) * 3


def test_the_rank_is_the_one_that_a_name_states() -> None:
    assert operator_of(aten.conv3d.default).rank == 3
    assert operator_of(aten.max_pool2d_with_indices.default).rank == 2
    assert operator_of(aten.grid_sampler_3d.default).rank == 3
    assert operator_of(aten.atleast_3d.default).rank is None
    assert operator_of(aten.constant_pad_nd.default).rank is None


def test_what_is_said_of_an_operator_goes_before_what_is_said_of_its_kind() -> None:
    register("colour", Kind.POOLING)("red")
    assert operator_of(aten.avg_pool2d.default).facet("colour") == "red"
    register("colour", "aten.avg_pool2d", replace=True)("blue")
    assert operator_of(aten.avg_pool2d.default).facet("colour") == "blue"
    assert operator_of(aten.max_pool2d.default).facet("colour") == "red"
    register("colour", "mylib.pool")("green")
    assert operator_of(aten.relu.default).facet("colour") is UNKNOWN


def test_a_second_registration_names_the_first() -> None:
    def first() -> None: ...

    register("colour", "mylib.pool")(first)
    with pytest.raises(RewriteError, match=r"already has the colour .*first; pass replace=True"):
        register("colour", "mylib.pool")(first)


X = (2, 4, 8, 8)
#: One call of each operator whose record says what autograd keeps of its data and its result.
CALLS = {
    "conv2d": lambda x: aten.conv2d(x, torch.ones(3, 4, 3, 3, requires_grad=True)),
    "conv_transpose2d": lambda x: aten.conv_transpose2d(x, torch.ones(4, 3, 2, 2).requires_grad_()),
    "linear": lambda x: aten.linear(x, torch.ones(3, 8, requires_grad=True)),
    "batch_norm": lambda x: aten.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    "instance_norm": lambda x: aten.instance_norm(
        x, None, None, None, None, True, 0.1, 1e-5, False
    ),
    "group_norm": lambda x: aten.group_norm(x, 2),
    "layer_norm": lambda x: aten.layer_norm(x, [8]),
    "mul": lambda x: aten.mul(x, torch.ones(X, requires_grad=True)),
    "prelu": lambda x: aten.prelu(x, torch.ones(4, requires_grad=True)),
    "softmax": lambda x: aten.softmax(x, 1),
    "log_softmax": lambda x: aten.log_softmax(x, 1),
    "glu": lambda x: aten.glu(x, 1),
    "dropout": lambda x: aten.dropout(x, 0.5, True),
    "avg_pool2d": lambda x: aten.avg_pool2d(x, 2),
    "max_pool2d": lambda x: aten.max_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: aten.adaptive_avg_pool2d(x, (2, 2)),
    "adaptive_max_pool2d": lambda x: aten.adaptive_max_pool2d(x, (2, 2))[0],
    "upsample_nearest2d": lambda x: aten.upsample_nearest2d(x, (16, 16)),
    "upsample_bilinear2d": lambda x: aten.upsample_bilinear2d(x, (16, 16), False),
    "constant_pad_nd": lambda x: aten.constant_pad_nd(x, (1, 1)),
    "reflection_pad2d": lambda x: aten.reflection_pad2d(x, (1, 1, 1, 1)),
    "cat": lambda x: aten.cat([x, x], 1),
    "view": lambda x: aten.view(x, (-1,)),
    "permute": lambda x: aten.permute(x, (0, 2, 3, 1)),
    "pixel_shuffle": lambda x: aten.pixel_shuffle(x, 2),
    "clone": lambda x: aten.clone(x),
    **{
        known.short: getattr(aten, known.short)
        for known in RECORDS
        if known.kind is Kind.ACTIVATION and known.short not in ("rrelu_with_noise", "threshold")
    },
}


@pytest.mark.parametrize("short", CALLS)
def test_what_a_record_says_that_autograd_keeps_is_what_it_keeps(short: str) -> None:
    x = torch.randn(X, requires_grad=True) * 1
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        out = CALLS[short](x)
    packet = getattr(aten, short)
    said = operator_of(getattr(packet, packet.overloads()[0])).keeps
    assert said is not UNKNOWN
    found = {t.data_ptr() for t in saved}
    views = out.data_ptr() == x.data_ptr()
    assert (x.data_ptr() in found) == ("input" in said)
    assert views or (out.data_ptr() in found) == ("output" in said)
    large = [t for t in saved if t.data_ptr() not in (x.data_ptr(), out.data_ptr())]
    assert any(t.numel() * 4 >= x.numel() for t in large) == ("mask" in said) or "input" in said
