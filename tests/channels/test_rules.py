"""The table of channel rules: third parties' rules, missing and broken ones; the work it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import analyse, channel_rule, pocketize
from pocketize.channels.analysis import Analysis
from pocketize.channels.labels import Value
from pocketize.channels.rules import apply_rule, has_rule
from pocketize.errors import RewriteError
from pocketize.graph.inputs import as_inputs
from pocketize.ops import record
from pocketize.ops.schema import operator_name

# -- operators of a third party ------------------------------------------------------------------


@torch.library.custom_op("pocketize_tests::smooth", mutates_args=())
def smooth(x: Tensor, strength: float) -> Tensor:
    """Works on every channel alone."""
    return x * torch.sigmoid(strength * x)


@smooth.register_fake
def _(x: Tensor, strength: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient * ctx.saved_tensors[0], None


smooth.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("pocketize_tests::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution."""
    return torch.einsum("oi,bi...->bo...", weight, x)


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


@torch.library.custom_op(
    "pocketize_tests::halves", mutates_args=(), schema="(Tensor x) -> Tensor[]"
)
def halves(x: Tensor) -> list[Tensor]:
    """Two copies, negative and positive."""
    return [-x, x.clone()]


@halves.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(x)]


@torch.library.custom_op("pocketize_tests::count", mutates_args=())
def count(x: Tensor) -> int:
    """A number."""
    return x.shape[1]


@count.register_fake
def _(x: Tensor) -> int:
    return x.shape[1]


class Around(nn.Module):
    """stem -> an operator -> head."""

    def __init__(self, operator: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.operator = operator
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.operator(self.stem(x))))


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.randn(16, 8))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(project(self.stem(x), self.weight))


INPUT = "2x3x4x4"


def free(model: nn.Module, path: str) -> bool:
    return all(group.frozen is None for group in analyse(model, INPUT).matching(path))


def reason(model: nn.Module, path: str) -> str:
    (group,) = analyse(model, INPUT).matching(path)
    assert group.frozen is not None
    return group.frozen


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(record, "_FACETS", dict(record._FACETS))


# -- rules of third parties ----------------------------------------------------------------------


def test_without_a_rule_the_channels_freeze_with_the_operator_and_its_line_as_the_reason() -> None:
    model = Around(lambda x: smooth(x, 2.0))
    assert not has_rule(torch.ops.pocketize_tests.smooth.default)
    assert reason(model, "stem").startswith("pocketize_tests.smooth at test_rules.py:")
    assert reason(model, "stem").endswith("has no channel rule")
    small = pocketize(model, 4, inputs=INPUT)
    assert (small.stem.out_channels, small.tail.out_channels) == (8, 4)


def test_with_a_rule_they_move() -> None:
    @channel_rule("pocketize_tests.smooth")
    def rule(call: Any) -> Any:
        assert call["strength"] == 2.0
        assert call.get("missing", 3) == 3
        assert call.module == ""
        return call.like("x")

    model = Around(lambda x: smooth(x, 2.0))
    assert has_rule(torch.ops.pocketize_tests.smooth.default)
    assert free(model, "stem")
    small = pocketize(model, 4, inputs=INPUT)
    assert (small.stem.out_channels, small.tail.in_channels, small.tail.out_channels) == (4, 4, 4)
    small(torch.rand(1, 3, 4, 4)).sum().backward()


def test_a_rule_can_unite_and_emit_channels_as_a_layer_does() -> None:
    @channel_rule("pocketize_tests.project")
    def rule(call: Any) -> Any:
        call.unite(call.vector_on(call["x"], 1), call.vector_on(call["weight"], 1))
        out = call.vector_on(call["weight"], 0)
        call.produce(out)
        return Value(call.shape, (*call["x"].off(1), out.reshape(1, -1, 1, 1)))

    model = Projected()
    layers = [group.layers for group in analyse(model, INPUT).groups if group.layers]
    assert layers == [("stem",), ("",), ("head",)]
    small = pocketize(model, 4, inputs=INPUT)
    assert small.weight.shape == (4, 4)
    assert (small.stem.out_channels, small.head.in_channels) == (4, 4)


def test_a_rule_for_several_results_returns_one_value_each() -> None:
    @channel_rule("pocketize_tests.halves")
    def rule(call: Any) -> Any:
        return [Value(shape, call["x"].labels) for shape in call.shapes]

    model = Around(lambda x: sum(halves(x)))
    assert free(model, "stem")
    assert pocketize(model, 4, inputs=INPUT).stem.out_channels == 4


def test_an_operator_without_rule_may_have_several_results_or_a_number() -> None:
    assert "pocketize_tests.halves" in reason(Around(lambda x: halves(x)[0] + x), "stem")
    assert "pocketize_tests.count" in reason(Around(lambda x: x * count(x)), "stem")


def test_a_second_rule_for_an_operator_is_an_error_that_names_the_first() -> None:
    with pytest.raises(
        RewriteError, match=r"aten\.conv2d already has .*layers\.convolution.*replace=True"
    ):
        channel_rule("aten.conv2d")(lambda call: call.like("input"))


def test_a_rule_can_be_replaced_on_purpose() -> None:
    @channel_rule("aten.relu", replace=True)
    def rule(call: Any) -> Any:
        call.freeze(call["self"], "is not to my liking")
        return call.like("self")

    assert reason(Around(torch.relu), "stem").endswith("is not to my liking")


def test_one_function_can_be_the_rule_of_several_operators() -> None:
    @channel_rule("pocketize_tests.smooth", "pocketize_tests.other")
    def rule(call: Any) -> Any:
        return call.like("x")

    assert record._FACETS["channel rule", "pocketize_tests.other"] is rule


# -- broken rules --------------------------------------------------------------------------------


def raises(call: Any) -> Any:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        (lambda x: smooth(x, 2.0), "smooth"),
        (lambda x: sum(halves(x)), "halves"),
        (lambda x: x * count(x), "count"),
    ],
    ids=["tensor", "several", "number"],
)
def test_a_rule_that_raises_freezes_and_is_logged(
    operator: Callable[[Tensor], Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    channel_rule(f"pocketize_tests.{name}")(raises)
    model = Around(operator)
    with caplog.at_level(logging.WARNING, "pocketize"):
        assert "has a channel rule that failed (KeyError('no such thing'))" in reason(model, "stem")
    assert f"channel rule of pocketize_tests.{name} at test_rules.py:" in caplog.text
    assert pocketize(model, 4, inputs=INPUT).stem.out_channels == 8


@pytest.mark.parametrize(
    "result",
    [
        None,
        "text",
        [],
        Value((2, 8, 4, 4), ("labels",)),  # type: ignore[arg-type]
        Value((2, 4, 4, 8)),
        Value((2, 8, 4)),
    ],
    ids=["nothing", "text", "no values", "no labels", "another shape", "another rank"],
)
def test_a_rule_that_returns_nonsense_freezes_and_is_logged(
    result: Any, caplog: pytest.LogCaptureFixture
) -> None:
    channel_rule("pocketize_tests.smooth")(lambda call: result)
    model = Around(lambda x: smooth(x, 2.0))
    with caplog.at_level(logging.WARNING, "pocketize"):
        assert "has a channel rule that failed" in reason(model, "stem")
    assert caplog.records
    small = pocketize(model, 4, inputs=INPUT)
    assert (small.stem.out_channels, small.tail.out_channels) == (8, 4)


def test_a_rule_that_lies_is_caught_by_the_check() -> None:
    @channel_rule("pocketize_tests.smooth")
    def rule(call: Any) -> Any:
        return Value(call.shape)  # says that no channel comes out, and freezes none

    small = pocketize(Around(lambda x: smooth(x, 2.0)), 4, inputs=INPUT)
    assert (small.stem.out_channels, small.tail.in_channels) == (8, 8)
    small(torch.rand(1, 3, 4, 4))


# -- names ---------------------------------------------------------------------------------------


def test_operators_are_named_without_overload_and_without_the_underscore_of_in_place() -> None:
    aten = torch.ops.aten
    assert operator_name(aten.conv2d.default) == "aten.conv2d"
    assert operator_name(aten.add_.Tensor) == "aten.add"
    assert operator_name(aten.__and__.Tensor) == "aten.__and__"
    assert operator_name(len) == "len"


def test_element_wise_operators_need_no_rule_of_their_own() -> None:
    assert ("channel rule", "aten.erf") not in record._FACETS
    assert has_rule(torch.ops.aten.erf.default)
    assert free(Around(torch.erf), "stem")


def test_apply_rule_is_what_the_analysis_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    where = "pocketize.channels.analysis.apply_rule"
    monkeypatch.setattr(where, lambda c: seen.append(c) or apply_rule(c))
    analyse(Around(torch.relu), INPUT)
    assert {call.operator for call in seen} == {"aten.conv2d", "aten.relu"}


# -- work ----------------------------------------------------------------------------------------


class Work:
    """What the label algebra does for a model, in numbers that do not depend on the machine."""

    def __init__(self, model: nn.Module) -> None:
        analysis = Analysis(model, as_inputs("1x3x8x8"))
        unions = analysis.unions
        self.indices = unions.count
        self.unions = sum(left.size for left, _ in unions._edges)
        self.labels = sum(
            label.size for values in analysis.values for label in labels_in(values.values())
        )
        self.nodes = sum(len(values) for values in analysis.values)


def labels_in(values: Any) -> Iterator[Any]:
    for value in values:
        yield from value.labels if isinstance(value, Value) else labels_in(value)


def plain_chain(depth: int) -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 2, 1))


class Residual(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return x


@pytest.mark.parametrize("make", [plain_chain, Residual])
def test_the_work_grows_with_the_depth_and_not_faster(make: Callable[[int], nn.Module]) -> None:
    small, large = Work(make(10)), Work(make(40))
    for kind in ("indices", "unions", "labels", "nodes"):
        ratio = getattr(large, kind) / getattr(small, kind)
        assert 3 < ratio < 4.2, kind


def test_labels_do_not_grow_with_the_image() -> None:
    def size(image: str) -> int:
        analysis = Analysis(plain_chain(3), as_inputs(image))
        return sum(label.size for label in labels_in(analysis.values[0].values()))

    assert size("1x3x8x8") == size("1x3x512x512")
