"""What recording a forward pass leaves alone: the model's code, hooks, errors, other readers."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn

from pocketize import load, rewrite, save
from pocketize.passes import Recompute
from pocketize.passes.recompute.forward import recomputing_forward
from pocketize.passes.recompute.norms import NormCall
from pocketize.passes.recompute.storage_table import StorageTable
from tests.passes.recompute.nets import Net, gradients, reference, same


def small() -> Net:
    return Net(nn.BatchNorm2d, nn.ReLU(inplace=True))


def recomputed(model: nn.Module, x: Tensor) -> nn.Module:
    return rewrite(model, Recompute(keep="level", min_bytes=0), inputs=x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 8, 8, dtype=torch.float64)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shapes of the tensors whose memory was taken away."""
    shapes: list[Any] = []
    take = StorageTable.take

    def counted(self: StorageTable, value: Any) -> None:
        storage = value.home and value.home[0]()
        before = storage.nbytes() if storage is not None else 0
        take(self, value)
        if before and not storage.nbytes():
            shapes.append(value.home[1][1])

    monkeypatch.setattr(StorageTable, "take", counted)
    return shapes


@pytest.mark.slow
def test_memory_that_nobody_reads_again_is_taken_away(x: Tensor, taken: list[Any]) -> None:
    made = recomputed(small().double(), x)
    taken.clear()
    made(x)
    assert (2, 8, 8, 8) in taken  # the concatenation, once the convolution has read it
    assert taken.count((2, 4, 8, 8)) >= 3  # its parts, and the activations before convolutions


@pytest.mark.slow
def test_what_a_hook_takes_with_it_has_its_content(x: Tensor, taken: list[Any]) -> None:
    model, kept = small().double(), []
    model.c1.register_forward_hook(lambda module, args, out: kept.append(args[0]))
    made = recomputed(model, x)
    kept.clear()
    expected = gradients(reference(made), x)
    (wanted,) = kept
    kept.clear()
    taken.clear()
    same(expected, gradients(made, x))
    assert taken
    assert torch.allclose(kept[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.detach().numpy().sum(),
        lambda t: np.asarray(t.detach()).sum(),
        lambda t: t.sum().item(),
        lambda t: copy.deepcopy(t.detach()).sum().item(),
        lambda t: t.view(-1)[0].item(),
        lambda t: float(torch.from_dlpack(t.detach()).sum()),
    ],
)
def test_code_that_reads_against_the_plan_finds_the_content(
    read: Any, x: Tensor, taken: list[Any]
) -> None:
    class Peeking(Net):
        peek = False

        def forward(self, x: Tensor) -> Tensor:
            first = self.act(self.n1(self.a1(x)))
            second = self.a2(first)  # the last to read it when the plan is made
            if self.peek:
                self.seen = read(first)
            return self.head(self.act(self.n2(second)))

    made = recomputed(Peeking(nn.BatchNorm2d, nn.ReLU()).double().eval(), x).eval()
    twin = reference(made)
    taken.clear()
    made(x)
    assert taken
    made.peek = twin.peek = True
    same(gradients(twin, x), gradients(made, x))
    assert made.seen == pytest.approx(twin.seen)


@pytest.mark.slow
def test_a_tensor_written_to_after_it_was_read_keeps_its_old_value_for_the_backward(
    x: Tensor,
) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
            self.head = nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            one = self.a(x)
            joined = self.b(torch.cat((one, one.tanh()), 1))
            with torch.no_grad():
                one.add_(1)  # nobody saved it: a convolution needs its input, not its result
            return self.head(joined) + one.mean().detach()

    made = recomputed(Writing().double(), x)
    made.a.weight.requires_grad_(False)
    made.a.bias.requires_grad_(False)
    same(gradients(reference(made), x), gradients(made, x))


@pytest.mark.slow
def test_weights_that_change_before_the_backward_are_an_error_as_ever(x: Tensor) -> None:
    made = recomputed(small().double(), x)
    loss = made(x).sum()
    with torch.no_grad():
        made.c1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        loss.backward()


class Coordinates(nn.Module):
    """Scales its input by maps whose dtype is the default one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        scale = torch.linspace(-1, 1, size) * (torch.arange(size) / 7) + torch.full((size,), 0.3)
        made: Tensor = self.conv(x * scale.exp()) * torch.arange(size).sqrt()
        return made


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_results_are_built_again_in_the_default_dtype_of_the_forward(
    dtype: torch.dtype, x: Tensor
) -> None:
    model = Coordinates().double()
    found = []
    for net in (model, rewrite(model, Recompute(keep=(), min_bytes=0), inputs=x)):
        torch.set_default_dtype(dtype)
        try:
            loss = net(x).square().sum()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.slow
def test_an_error_in_the_forward_ends_the_recording(x: Tensor) -> None:
    made = recomputed(small().double(), x)
    with pytest.raises(RuntimeError, match=r"size|channels"):
        made(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        torch.zeros((), requires_grad=True).exp()
    assert len(saved) == 1  # nobody else's hooks are in between
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0
    same(gradients(reference(made), x), gradients(made, x))


@pytest.mark.slow
def test_without_gradients_nothing_is_recorded(x: Tensor, taken: list[Any]) -> None:
    made = recomputed(small().double(), x).eval()
    taken.clear()
    with torch.no_grad():
        assert torch.equal(made(x), reference(made)(x))
    with torch.inference_mode():
        made(x)
    assert not taken


@pytest.mark.slow
def test_hooks_of_the_user_run_as_before(x: Tensor) -> None:
    model, calls = Net(nn.BatchNorm2d, nn.ReLU()).double(), []
    for module in model.modules():
        module.register_forward_hook(lambda m, a, o: calls.append(type(m).__name__))
        module.register_full_backward_hook(lambda m, a, o: calls.append(f"{type(m).__name__} back"))
    made = recomputed(model, x)
    calls.clear()
    expected = gradients(reference(made), x)
    before = list(calls)
    calls.clear()
    same(expected, gradients(made, x))
    assert calls == before


@pytest.mark.slow
def test_a_tensor_hook_on_a_normed_tensor_sees_its_gradient(x: Tensor) -> None:
    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.n1(self.a1(x))
            if normed.requires_grad:
                normed.register_hook(self.seen.append)
            return self.head(self.act(normed))

    model = Watched(nn.BatchNorm2d, nn.ReLU()).double()
    model.seen = []
    made = recomputed(model, x)
    made.seen = []
    gradients(made, x)
    assert len(made.seen) == 1


@pytest.mark.slow
def test_two_threads_record_for_themselves(x: Tensor) -> None:
    made = recomputed(small().double(), x).eval()
    expected = gradients(reference(made), x)
    models = [copy.deepcopy(made) for _ in range(3)]
    found: list[Any] = [None] * 3

    def run(index: int) -> None:
        points = x.clone().requires_grad_()
        out = models[index](points)
        (out * out.detach().cos()).sum().backward()
        found[index] = {
            n: p.grad for n, p in models[index].named_parameters() if p.grad is not None
        }

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grads in found:
        same({n: expected[n] for n in grads}, grads)


@pytest.mark.slow
def test_copies_pickles_and_saved_models_recompute_too(x: Tensor, tmp_path: Any) -> None:
    made = recomputed(small().double(), x)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    save(made, tmp_path / "made.safetensors")
    twins = [
        copy.deepcopy(made),
        torch.load(buffer, weights_only=False),
        load(tmp_path / "made.safetensors", lambda: small().double()),
    ]
    expected = gradients(reference(made), x)
    for twin in twins:
        assert recomputing_forward(twin).rebuilt == recomputing_forward(made).rebuilt
        twin.load_state_dict(made.state_dict())
        for module in twin.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        same(expected, gradients(twin, x))


@pytest.mark.slow
def test_the_model_keeps_its_class_keys_and_modules(x: Tensor) -> None:
    model = small()
    made = recomputed(model, x.float())
    assert type(made) is Net
    assert list(made.state_dict()) == list(model.state_dict())
    assert [type(m) for m in made.modules()] == [type(m) for m in model.modules()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:recompute. torch.compile traces")
@pytest.mark.parametrize(("backend", "whole"), [("eager", True), ("aot_eager", False)])
def test_torch_compile_runs_the_model_as_it_is(backend: str, whole: bool, x: Tensor) -> None:
    made = recomputed(small().double(), x)
    expected = gradients(reference(made), x)
    compiled = torch.compile(copy.deepcopy(made), backend=backend, fullgraph=whole)
    found = gradients(compiled, x)
    same(
        expected, {name.removeprefix("_orig_mod."): value for name, value in _plain(found).items()}
    )


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("buffer _orig_mod.", "buffer "): value for name, value in found.items()}


@pytest.mark.slow
def test_a_norm_read_twice_gives_both_gradients(x: Tensor) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.n1(self.a1(x))
            return self.head(F.relu(normed) + normed * 2)

    made = recomputed(Twice(nn.BatchNorm2d, nn.ReLU()).double(), x)
    same(gradients(reference(made), x), gradients(made, x))


@pytest.mark.slow
def test_a_view_taken_before_an_in_place_activation_sees_it(x: Tensor) -> None:
    class Viewed(Net):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.n1(self.a1(x))
            flat = normed.flatten(2)
            F.relu_(normed)
            return self.head(normed) + flat.mean()

    made = recomputed(Viewed(nn.BatchNorm2d, nn.ReLU()).double(), x)
    same(gradients(reference(made), x), gradients(made, x))


@pytest.mark.slow
def test_an_in_place_activation_whose_result_is_dropped(x: Tensor) -> None:
    class Dropped(Net):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.n1(self.a1(x))
            F.leaky_relu_(normed, 0.2)
            return self.head(normed)

    made = recomputed(Dropped(nn.BatchNorm2d, nn.ReLU()).double(), x)
    same(gradients(reference(made), x), gradients(made, x))


@pytest.mark.slow
def test_an_in_place_activation_of_a_tensor_that_somebody_watches(x: Tensor) -> None:
    class Watching(Net):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.n1(self.a1(x))
            watch = weakref.ref(normed)  # such a tensor cannot change places with another
            F.leaky_relu_(normed, 0.2)
            return self.head(watch())

    made = recomputed(Watching(nn.BatchNorm2d, nn.ReLU()).double(), x)
    same(gradients(reference(made), x), gradients(made, x))


@pytest.mark.slow
def test_a_subclass_that_hands_attributes_on_is_not_taken_for_what_was_normed() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.n1(self.a1(x)) * 3 - 1
            return self.head(self.act(x))

    point = MetaTensor(torch.randn(2, 1, 8, 8, dtype=torch.float64))
    for make in (Scaled, Net):
        made = recomputed(make(nn.BatchNorm2d, nn.ReLU(inplace=True)).double(), point.as_tensor())
        found = []
        for model in (reference(made), made):
            torch.manual_seed(0)
            out = model(point).as_tensor()
            (out * out.detach().cos()).sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        same(*found)


@pytest.mark.slow
def test_an_alias_without_history_stays_without(x: Tensor) -> None:
    class Detaching(Net):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.n1(self.a1(x))
            return self.head(F.relu(normed.detach()) + F.silu(normed.view_as(normed)))

    made = recomputed(Detaching(nn.BatchNorm2d, nn.ReLU()).double(), x)
    same(gradients(reference(made), x), gradients(made, x))


@pytest.mark.slow
def test_outputs_hold_no_more_than_they_are(x: Tensor) -> None:
    class Normed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.n1(self.a1(x)))
            return self.n2(self.a2(x)), torch.cat((x, x), 1)

    made = recomputed(Normed(nn.BatchNorm2d, nn.ReLU()).double(), x)
    gc.collect()
    before = sum(type(o) is NormCall for o in gc.get_objects())
    outputs = made(x)
    gc.collect()
    assert sum(type(o) is NormCall and o.x is not None for o in gc.get_objects()) <= before
    assert not any(vars(output) for output in outputs)
