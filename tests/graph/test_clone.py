from __future__ import annotations

import collections
import functools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations

from pocketize.errors import CaptureError
from pocketize.graph.clone import clone, fake_clone, quiet_code


class Rich(nn.Module):
    """A bit of everything that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.tied = nn.Conv2d(3, 4, 3)
        self.tied.weight = self.conv.weight
        self.alias = self.norm
        self.note = {"sizes": [3, 4]}
        self.register_buffer("steps", torch.arange(3), persistent=False)
        self.plain = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.tied(x)


def rich() -> Rich:
    model = Rich()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    return model


def test_a_clone_shares_no_memory_and_has_equal_tensors() -> None:
    model = rich()
    copy = clone(model)
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    copied = dict(copy.named_parameters()) | dict(copy.named_buffers())
    assert ours.keys() == copied.keys()
    for name, tensor in copied.items():
        assert torch.equal(tensor, ours[name])
        assert tensor.data_ptr() != ours[name].data_ptr()
        assert tensor.requires_grad == ours[name].requires_grad


def test_a_clone_starts_without_gradients_and_leaves_those_of_the_original() -> None:
    model = rich()
    assert all(p.grad is None for p in clone(model).parameters())
    assert model.conv.weight.grad is not None


@pytest.mark.parametrize("make", [clone, lambda model: fake_clone(model, FakeTensorMode())])
def test_attributes_of_parameters_survive_as_copies(make: Any) -> None:
    model = rich()
    model.conv.weight.no_weight_decay = True
    model.norm.weight.groups = ["norms"]
    copy = make(model)
    assert copy.conv.weight.no_weight_decay is True
    assert copy.norm.weight.groups == ["norms"]
    copy.norm.weight.groups.append("more")
    assert model.norm.weight.groups == ["norms"]


def test_a_clone_keeps_class_modes_ties_aliases_buffers_and_attributes() -> None:
    copy = clone(rich())
    assert type(copy) is Rich
    assert copy.training
    assert not copy.norm.training
    assert copy.tied.weight is copy.conv.weight
    assert copy.alias is copy.norm
    assert copy.note == {"sizes": [3, 4]}
    assert "steps" not in copy.state_dict()
    assert torch.equal(copy.steps, torch.arange(3))


def test_a_clone_has_its_own_copy_of_attributes_and_the_same_hooks() -> None:
    model = rich()
    calls: list[str] = []
    model.conv.register_forward_hook(lambda *_: calls.append("hook"))
    copy = clone(model)
    copy.note["sizes"].append(9)
    assert model.note == {"sizes": [3, 4]}
    copy(torch.rand(1, 3, 8, 8))
    assert calls == ["hook"]


def legacy_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Conv2d(3, 4, 3))


def test_computed_tensors_kept_as_attributes_can_be_cloned() -> None:
    model = legacy_weight_norm()
    x = torch.rand(1, 3, 8, 8)
    model(x)  # leaves a tensor with history in model.weight
    copy = clone(model)
    assert torch.equal(copy(x), model(x))
    copy(x).sum().backward()
    assert copy.weight_v.grad is not None
    assert model.weight_v.grad is None


@pytest.mark.parametrize(
    "maker", [legacy_weight_norm, lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))]
)
def test_a_fake_clone_of_computed_weights_runs(maker: Any) -> None:
    mode = FakeTensorMode()
    copy = fake_clone(maker(), mode)
    with mode:
        assert copy(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 6, 6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_was_cloned_in_any_grad_mode_can_be_trained(context: Any) -> None:
    model = rich()
    with context():
        copy = clone(model)
    copy(torch.rand(2, 3, 8, 8)).sum().backward()
    assert not copy.conv.weight.is_inference()


def test_a_fake_clone_has_shapes_strides_and_dtypes_but_no_memory() -> None:
    model = rich().to(memory_format=torch.channels_last).bfloat16()
    copy = fake_clone(model, FakeTensorMode())
    assert type(copy) is Rich
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    fakes = dict(copy.named_parameters()) | dict(copy.named_buffers())
    assert tensors.keys() == fakes.keys()
    for name, fake in fakes.items():
        assert isinstance(fake, FakeTensor)
        assert fake.shape == tensors[name].shape
        assert fake.stride() == tensors[name].stride()
        assert fake.dtype == tensors[name].dtype
        assert fake.requires_grad == tensors[name].requires_grad
    assert copy.tied.weight is copy.conv.weight
    assert isinstance(copy.plain, FakeTensor)


def test_a_fake_clone_may_say_that_it_lies_elsewhere() -> None:
    copy = fake_clone(rich(), FakeTensorMode(), device=torch.device("cuda"))
    assert {t.device.type for t in copy.parameters()} == {"cuda"}
    assert {t.device.type for t in copy.buffers()} == {"cuda"}


def test_a_fake_clone_costs_no_memory_whatever_the_size() -> None:
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6)  # 4 TB
    copy = fake_clone(model, FakeTensorMode(), device=torch.device("cpu"))
    assert copy.weight.shape == (10**6, 10**6)


def test_a_lazy_module_is_named_with_what_to_do() -> None:
    model = nn.Sequential(nn.ReLU(), nn.LazyConv2d(4, 3))
    with pytest.raises(
        CaptureError, match=r"1\.weight of Sequential is not initialised.*run the model once"
    ):
        fake_clone(model, FakeTensorMode())


@pytest.mark.parametrize("make", [clone, lambda model: fake_clone(model, FakeTensorMode())])
def test_what_cannot_be_copied_is_told_with_what_to_do(make: Any) -> None:
    model = nn.Sequential(nn.ReLU())
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(
        CaptureError, match=r"Sequential cannot be copied: TypeError: .*lock.*remove"
    ):
        make(model)


def test_what_hooks_write_into_their_closures_is_undone() -> None:
    features: list[Tensor] = []
    by_name: dict[str, Tensor] = {"before": torch.ones(1)}
    seen: set[str] = set()

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        features.append(output)
        by_name["output"] = output
        by_name.pop("before", None)
        seen.add("output")

    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(hook)
    with quiet_code(model):
        model(torch.ones(1))
        assert features
        assert seen
    assert features == []
    assert list(by_name) == ["before"]
    assert seen == set()


class Store:
    """Keeps what its hook sees, as people write it."""

    def __init__(self) -> None:
        self.last: Any = None
        self.features: dict[str, list[Any]] = {"all": []}

    def hook(self) -> Any:
        def keep(*args: Any) -> None:
            self.last = args[-1]
            self.features["all"].append(args[-1])
            self.features["new"] = args[-1]

        return keep


GLOBAL: dict[str, Any] = {}


def into_global(*args: Any) -> None:
    GLOBAL["output"] = args[-1]


def into_default(module: Any, args: Any, output: Any, kept: Any = GLOBAL) -> None:
    kept["output"] = output


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_full_backward_hook", "register_forward_pre_hook"],
)
def test_what_hooks_write_elsewhere_is_undone(register: str) -> None:
    store, model = Store(), nn.Sequential(nn.Linear(3, 3))
    for hook in (store.hook(), into_global):
        getattr(model[0], register)(hook)
    if register == "register_forward_hook":
        model[0].register_forward_hook(into_default)
    with quiet_code(model):
        model(torch.ones(1, 3, requires_grad=True)).sum().backward()
        assert store.last is not None
        assert GLOBAL
    assert (store.last, store.features, GLOBAL) == (None, {"all": []}, {})


def test_what_hooks_reach_is_not_written_to_unless_it_has_changed() -> None:
    class Watched(dict[str, int]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("written to")

    watched, tasks = Watched(a=1), queue.Queue[int]()

    def hook(module: nn.Module, args: Any) -> None:
        assert watched
        tasks.put(1)

    model = nn.Sequential(nn.Linear(3, 3))
    model.register_forward_pre_hook(hook)
    with quiet_code(model):
        model(torch.ones(1, 3))
    assert (tasks.qsize(), tasks.unfinished_tasks) == (1, 1)


def test_closures_are_put_back_also_after_an_error() -> None:
    features: list[Tensor] = []

    def hook(module: nn.Module, args: Any) -> None:
        features.append(args[0])

    model = nn.Sequential(nn.Linear(3, 3))
    model.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError), quiet_code(model):
        model(torch.ones(1, 9))
    assert features == []


# -- functions that refer to the model ----------------------------------------------------------


def replace_forward(model: Rich) -> None:
    forward = model.conv.forward
    model.conv.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def read_layer(model: Rich) -> None:
    conv = model.conv
    model.forward = lambda x, norm=model.norm: norm(conv(x))  # type: ignore[method-assign]


def read_weight(model: Rich) -> None:
    weight = model.conv.weight
    model.conv.forward = lambda x: nn.functional.conv2d(x, weight)  # type: ignore[method-assign]


def decorate(model: Rich) -> None:
    def doubled(forward: Any) -> Any:
        return lambda *args: 2 * forward(*args)

    model.forward = doubled(lambda x: model.norm(model.conv(x)))  # type: ignore[method-assign]


def return_features(model: Rich) -> None:
    model.features = {}  # type: ignore[assignment]
    model.conv.register_forward_hook(lambda *args: model.features.update(conv=args[-1]))
    model.register_forward_hook(lambda *args: model.features["conv"])


@pytest.mark.parametrize(
    "change", [replace_forward, read_layer, read_weight, decorate, return_features]
)
def test_functions_of_a_clone_run_the_clone(change: Any) -> None:
    model, x = Rich().eval(), torch.rand(1, 3, 8, 8)
    change(model)
    expected = model(x).detach()
    copy = clone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(copy(x), expected)
    copy(x).sum().backward()
    assert copy.conv.weight.grad is not None
    assert model.conv.weight.grad is None
    mode = FakeTensorMode()
    faked = fake_clone(model, mode)
    with mode:
        assert isinstance(faked(torch.zeros(x.shape)), FakeTensor)


def test_a_function_that_reads_a_layer_as_a_global_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = rich()
    monkeypatch.setitem(globals(), "first_layer", model.conv)
    model.forward = lambda x: first_layer(x)  # type: ignore[name-defined, method-assign] # noqa: F821
    with pytest.raises(CaptureError, match=r"Rich\.forward .* the global 'first_layer'"):
        clone(model)


# -- models that have run ------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Record:
    value: Any = None


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any = None) -> None:
        self.value = value


class Supervised(nn.Module):
    """Leaves its inner result somewhere, as networks with deep supervision do."""

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.keep, self.kept = keep, None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).relu()
        self.kept = self.keep(y)
        return self.head(y)


def noted(y: Tensor) -> Tensor:
    made = torch.ones(1)
    made.cause = [y]  # type: ignore[attr-defined]
    return made


def circle(y: Tensor) -> Record:
    made = Record()
    made.value = [made, y]
    return made


PLACES: dict[str, Callable[[Tensor], Any]] = {
    "attribute": lambda y: y,
    "list": lambda y: [y],
    "tuple": lambda y: (1, y),
    "dict": lambda y: {"deep": {"deeper": [y, y]}},
    "ordered dict": lambda y: collections.OrderedDict(y=y),
    "default dict": lambda y: collections.defaultdict(list, y=[y]),
    "deque": lambda y: collections.deque([y], maxlen=2),
    "named tuple": lambda y: Pair([y], y),
    "dataclass": lambda y: Record([y]),
    "object": lambda y: Slots({"y": y}),
    "view": lambda y: [y[:1], y],
    "partial": lambda y: functools.partial(torch.add, y),
    "method": lambda y: Slots(y).__init__,  # type: ignore[misc]
    "attribute of a tensor": noted,
    "a circle": circle,
}
CONTEXTS: dict[str, Any] = {
    "with gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_has_run_and_keeps_what_it_computed_can_be_copied(
    place: str, context: Any
) -> None:
    model, x = Supervised(PLACES[place]), torch.rand(2, 1, 8, 8)
    with context():
        expected = model(x)
    kept = model.kept
    copy = clone(model)
    assert model.kept is kept
    assert copy.kept is not kept
    result = copy(x)
    assert torch.equal(result, expected)
    result.sum().backward()
    assert model.body.weight.grad is None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_clone(model, mode)
    with mode:
        assert fake(mode.from_tensor(x)).shape == expected.shape


def test_of_what_was_kept_the_copy_has_the_values_and_the_ties_but_no_graph() -> None:
    model = Supervised(lambda y: {"a": [y], "b": y})
    model(torch.rand(1, 1, 8, 8))
    kept = clone(model).kept
    assert kept["a"][0] is kept["b"]
    assert torch.equal(kept["b"], model.kept["b"])
    assert kept["b"].grad_fn is None
    assert model.kept["b"].grad_fn is not None


class Collector:
    """A hook that is an object, and keeps what it sees."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.setdefault("outputs", []).append(output)

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        self(module, args, output)


def collected(store: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    store.append(output)


@pytest.mark.parametrize(
    "make", [Collector, lambda: Collector().hook, lambda: functools.partial(collected, [])]
)
def test_hooks_that_hold_outputs_do_not_keep_a_model_from_being_copied(make: Any) -> None:
    model, x = Rich(), torch.rand(1, 3, 8, 8)
    model.conv.register_forward_hook(make())
    expected = model.eval()(x)
    assert torch.equal(clone(model)(x), expected)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        assert fake_clone(model, mode)(mode.from_tensor(x)).shape == expected.shape
