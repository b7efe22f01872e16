"""What a recording tells: inputs, outputs, operators, modules, names, and why it failed."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from pocketize.errors import CaptureError, InputError
from pocketize.graph.capture import TracedGraph, capture, find_tensors, settle_inputs
from pocketize.graph.inputs import Inputs

IMAGE = (2, 3, 8, 8)


class Call(nn.Module):
    """A convolution, and a function of it and of whatever else is given."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.conv, *args, **kwargs)


def names(traced: TracedGraph) -> list[str]:
    return [str(node.target) for node in traced.operators()]


def image() -> Tensor:
    return torch.rand(IMAGE)


# -- inputs and outputs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "inputs", "placeholders"),
    [
        (lambda conv, x: conv(x), image(), 1),
        (lambda conv, x, y: conv(x + y), (image(), image()), 2),
        (lambda conv, image, scale: conv(image * scale), {"image": image(), "scale": 2.0}, 1),
        (lambda conv, a, k: conv(a + k), Inputs((image(),), {"k": image()}), 2),
        (lambda conv, images, n: conv(images[n]["x"]), ([{"x": image()}], 0), 1),
        (lambda conv, x: conv(x), "2x3x8x8", 1),
    ],
    ids=["tensor", "tuple", "keywords", "both", "nested", "text"],
)
def test_every_input_tensor_is_a_placeholder(
    function: Callable[..., Any], inputs: Any, placeholders: int
) -> None:
    traced = capture(Call(function), inputs)
    found = list(traced.graph.find_nodes(op="placeholder"))
    assert len(found) == placeholders
    assert all(tuple(node.meta["val"].shape) == IMAGE for node in found)
    assert "aten.conv2d.default" in names(traced)


def test_a_tensor_given_twice_is_one_placeholder() -> None:
    x = image()
    traced = capture(Call(lambda conv, a, b: conv(a) + conv(b)), (x, x))
    assert len(list(traced.graph.find_nodes(op="placeholder"))) == 1


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@dataclasses.dataclass
class Prediction:
    logits: Tensor
    name: str
    more: dict[str, Any]


class Plain:
    def __init__(self, y: Tensor) -> None:
        self.y = y
        self.me = self  # outputs may refer to themselves


@pytest.mark.parametrize(
    ("wrap", "count"),
    [
        (lambda y: y, 1),
        (lambda y: (y, y * 2), 2),
        (lambda y: [y, [y * 2, y * 3]], 3),
        (lambda y: {"out": y, "aux": [y * 2]}, 2),
        (lambda y: OrderedDict(out=y), 1),
        (lambda y: Pair(y, y * 2), 2),
        (lambda y: Prediction(y, "a", {"aux": y * 2}), 2),
        (lambda y: Plain(y), 1),
        (lambda y: (y, None, 3, "text"), 1),
        (lambda y: None, 0),
        (lambda y: (y, y), 2),
    ],
    ids=[
        *("tensor", "tuple", "nested", "dict", "ordered", "namedtuple", "dataclass", "object"),
        *("mixed", "none", "twice"),
    ],
)
def test_every_output_tensor_is_an_output(wrap: Callable[[Tensor], Any], count: int) -> None:
    traced = capture(Call(lambda conv, x: wrap(conv(x))), image())
    assert [tuple(node.meta["val"].shape) for node in traced.outputs()] == [(2, 4, 8, 8)] * count


def test_the_structure_compares_nesting_and_shapes() -> None:
    def structure(wrap: Callable[[Tensor], Any], size: int = 8) -> Any:
        return capture(Call(lambda conv, x: wrap(conv(x))), torch.rand(2, 3, size, size)).structure

    assert structure(lambda y: {"a": y}) == structure(lambda y: {"a": y + 1})
    assert structure(lambda y: {"a": y}) != structure(lambda y: {"b": y})
    assert structure(lambda y: (y, y)) != structure(lambda y: (y,))
    assert structure(lambda y: y) != structure(lambda y: y, size=9)
    assert structure(lambda y: y) != structure(lambda y: y.double())
    assert structure(Plain) != structure(Plain, size=9)


def test_an_input_or_a_parameter_may_be_an_output() -> None:
    traced = capture(Call(lambda conv, x: (x, conv.weight)), image())
    assert [node.op for node in traced.outputs()] == ["placeholder", "get_attr"]


def test_tensors_are_found_in_objects_but_not_in_modules_and_classes() -> None:
    x = torch.ones(1)
    assert find_tensors([{"a": Plain(x)}, 3, "x", nn.Linear(2, 2), Plain]) == [x]


# -- what nodes know -----------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.head = nn.Conv2d(3, 2, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x))
        y = self.head(x * self.scale + self.shift)
        return y.relu()


def test_nodes_know_their_module_and_how_often_it_was_called() -> None:
    traced = capture(Shared(), image())
    told = [(n.meta["module"], n.meta["call"]) for n in traced.operators()]
    root = [("", 0)]
    blocks = [("block.0", 0), ("block.1", 0), ("block.0", 1), ("block.1", 1)]
    assert told == blocks + root + root + [("head", 0)] + root


def test_parameters_and_buffers_know_their_names() -> None:
    traced = capture(Shared(), image())
    nodes = traced.graph.find_nodes(op="get_attr")
    assert {node.meta["tensor"] for node in nodes} == {
        *("block.0.weight", "block.0.bias", "head.weight", "head.bias", "scale", "shift")
    }
    assert all(node.target == node.meta["tensor"] for node in nodes)


def test_a_tied_tensor_has_the_first_of_its_names_and_a_constant_has_none() -> None:
    model = Call(lambda conv, x: conv(x) + torch.tensor([0.5]))
    model.again = nn.Conv2d(3, 4, 3)
    model.again.weight = model.conv.weight
    nodes = capture(model, image()).graph.find_nodes(op="get_attr")
    assert [node.meta["tensor"] for node in nodes] == ["conv.weight", "conv.bias", None]


def test_nodes_know_the_line_that_called_them() -> None:
    traced = capture(Shared(), image())
    _, start = inspect.getsourcelines(Shared.forward)
    last = traced.operators()[-1]
    assert str(last.target) == "aten.relu.default"
    assert last.meta["source"] == f"test_capture.py:{start + 3}"
    assert traced.operators()[0].meta["source"] == f"test_capture.py:{start + 1}"


def test_values_are_fake_and_have_the_shapes_of_the_run() -> None:
    model = Shared()
    traced = capture(model, image())
    for node in traced.operators():
        assert isinstance(node.meta["val"], FakeTensor)
    assert [tuple(n.meta["val"].shape) for n in traced.outputs()] == [tuple(model(image()).shape)]
    assert not traced.real


def test_composite_operators_stay_whole() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.Dropout()]
    whole = [
        f"aten.{name}.default" for name in ("conv2d", "batch_norm", "instance_norm", "dropout")
    ]
    assert names(capture(nn.Sequential(*layers), image())) == whole
    counted = [whole[0], "aten.add_.Tensor", *whole[1:]]  # num_batches_tracked
    assert names(capture(nn.Sequential(*layers), image(), train=True)) == counted


def test_the_mode_asked_for_is_the_mode_recorded() -> None:
    model = Call(lambda conv, x: conv(x) if conv.training else conv(x).relu())
    assert names(capture(model, image())) == ["aten.conv2d.default", "aten.relu.default"]
    assert names(capture(model, image(), train=True)) == ["aten.conv2d.default"]


def test_parts_of_several_results_are_picked_by_getitem() -> None:
    traced = capture(Call(lambda conv, x: conv(x).chunk(2, 1)[1]), image())
    assert [n.target for n in traced.operators()][-1].__name__ == "getitem"
    assert traced.outputs()[0].meta["val"].shape == (2, 2, 8, 8)


class Attempt(nn.Module):
    """Tries one way, catches the exception, goes another: as optional kernels are used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.wrong = nn.Sequential(nn.Linear(99, 9))
        self.right = nn.Sequential(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        try:
            x = self.wrong(x)
        except RuntimeError:
            x = self.right(x)
        return x * 2


def test_what_fails_and_is_caught_leaves_no_trace() -> None:
    traced = capture(Attempt(), image())
    assert [(str(n.target), n.meta["module"]) for n in traced.operators()] == [
        ("aten.conv2d.default", "conv"),
        ("aten.batch_norm.default", "right.0"),
        ("aten.mul.Tensor", ""),
    ]
    read = {n.meta["tensor"] for n in traced.graph.find_nodes(op="get_attr")}
    assert not any(name.startswith("wrong") for name in read)


def test_a_parameter_that_is_only_asked_for_its_device_is_not_read() -> None:
    model = Call(lambda conv, x: conv(x.to(model.marker.device)))
    model.marker = nn.Parameter(torch.ones(4))
    read = {n.meta["tensor"] for n in capture(model, image()).graph.find_nodes(op="get_attr")}
    assert read == {"conv.weight", "conv.bias"}


# -- torch.fx's own tools ------------------------------------------------------------------------


def runnable(model: nn.Module, traced: TracedGraph) -> fx.GraphModule:
    """A module of the recorded graph, with the model's tensors where the graph asks for them."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    named = {
        str(node.target): tensors.get(node.meta["tensor"], node.meta["val"])
        for node in traced.graph.find_nodes(op="get_attr")
    }
    return fx.GraphModule(named, traced.graph)


def split_and_join(conv: nn.Module, x: Tensor) -> Tensor:
    a, b = conv(x).chunk(2, 1)
    return torch.cat([a * torch.tensor([1.0, 2.0]).view(2, 1, 1), b.relu_()], 1).max(1)[0]


@pytest.mark.parametrize("make", [Shared, lambda: Call(split_and_join)])
@pytest.mark.parametrize("train", [False, True])
def test_the_graph_is_sound_and_runs_as_a_graph_module_and_in_the_interpreter(
    make: Callable[[], nn.Module], train: bool
) -> None:
    model = make()
    traced = capture(model, image(), train=train)
    traced.graph.lint()
    assert "conv2d" in str(traced.graph)
    module = runnable(model, traced)
    x = image()
    with torch.no_grad():
        (by_module,), (interpreted,) = module(x), fx.Interpreter(module).run(x)
        expected = model(x)
    assert torch.equal(by_module, expected)
    assert torch.equal(interpreted, expected)


def test_without_constants_the_graph_runs_on_the_model_itself_and_can_be_trained() -> None:
    model = Shared()
    module = fx.GraphModule(model, capture(model, image(), train=True).graph)
    module(image())[0].sum().backward()
    assert model.head.weight.grad is not None


def test_a_graph_module_of_a_recording_can_be_pickled() -> None:
    model = Call(split_and_join)
    module = runnable(model, capture(model, image()))
    again = pickle.loads(pickle.dumps(module))
    x = image()
    with torch.no_grad():
        assert torch.equal(again(x)[0], model(x))


def test_graph_passes_find_nothing_to_remove_in_a_straight_net() -> None:
    traced = capture(Shared(), image())
    assert not traced.graph.eliminate_dead_code()


# -- failures ------------------------------------------------------------------------------------


def test_a_failing_forward_names_module_mode_and_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Linear(9, 9)))
    with pytest.raises(
        CaptureError,
        match=r"Sequential did not run in evaluation mode on 2x3x8x8 float32: "
        r"RuntimeError in 1\.1: .*9, 9",
    ) as caught:
        capture(model, image())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_name_that_is_no_argument_is_told_where_the_forward_fails() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(
        CaptureError,
        match=r"on 1x3x8x8 float32 \(in one dict of img, as forward takes input\): TypeError in 0",
    ):
        capture(model, "img=1x3x8x8")


def raise_after_a_caught_error(conv: nn.Module, x: Tensor) -> Tensor:
    try:
        return conv(x[:, :2])
    except RuntimeError:
        raise KeyError("its own") from None


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (lambda conv, x: conv(x).view(7), "RuntimeError in the model itself: shape"),
        (lambda conv, x: conv(x[:, :2]), "RuntimeError in conv: "),
        (raise_after_a_caught_error, "KeyError in the model itself: 'its own'"),
        (lambda conv, x: {}["missing"], "KeyError in the model itself: 'missing'"),
    ],
    ids=["root", "layer", "another", "no tensor"],
)
def test_the_module_named_is_the_one_that_raised(function: Callable[..., Any], where: str) -> None:
    with pytest.raises(CaptureError, match=where):
        capture(Call(function), image(), train=True)


def test_a_long_error_is_cut() -> None:
    def shout(conv: nn.Module, x: Tensor) -> Tensor:
        raise ValueError("so long " * 200)

    with pytest.raises(CaptureError) as caught:
        capture(Call(shout), image())
    assert len(str(caught.value)) < 450
    assert str(caught.value).endswith("...")


def test_guessing_lists_what_it_tried() -> None:
    model = nn.Sequential(nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(InputError, match=r"no guessed input runs through Sequential") as caught:
        capture(model)
    text = str(caught.value)
    for size in (32, 64, 96, 128, 224, 256):
        assert f"\n  2x5x{size}x{size} float32: Sequential did not run" in text
    assert "RuntimeError in 2: " in text


def test_guessing_goes_on_until_both_modes_run() -> None:
    def needs(conv: nn.Module, x: Tensor) -> Tensor:
        if conv.training and x.shape[-1] < 100:
            raise ValueError("too small to train on")
        return conv(x).relu()

    inputs = settle_inputs(Call(needs), None)
    assert inputs.describe() == "2x3x128x128 float32"
    assert capture(Call(needs)).inputs.describe() == "2x3x128x128 float32"


def test_guessing_uses_dtype_and_device_of_the_model() -> None:
    model = nn.Conv2d(3, 4, 1).to(torch.bfloat16)
    assert settle_inputs(model, None).describe() == "2x3x32x32 bfloat16"


@pytest.mark.parametrize("inputs", [None, image()])
def test_a_lazy_module_is_told_once_and_at_once(inputs: Any) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU())
    with pytest.raises(CaptureError, match=r"^0\.weight of Sequential is not initialised yet"):
        capture(model, inputs)


def test_a_lazy_module_that_has_run_is_like_any_other() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())
    model(image())
    assert len(capture(model, image()).operators()) == 2
