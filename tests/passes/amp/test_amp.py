"""Mixed precision as a pass: what runs in 16 bits, what stays float32, and when it steps aside."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pocketize import Guarantee, history, load, plan, rewrite, save
from pocketize.errors import NoEffectWarning, OptionError, OrderError
from pocketize.passes import Amp, Pocket
from pocketize.passes.amp.amp import grad_scaler

X = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )


class Watching(nn.Module):
    """Notes the dtype that arrives and the state of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.seen: list[tuple[bool, torch.dtype]] = []

    def forward(self, x: Tensor, fail: str = "", depth: int = 0) -> Tensor:
        y = self.conv(x)
        self.seen.append((torch.is_autocast_enabled("cpu"), y.dtype))
        if depth:
            return self(x, fail, depth - 1) + y
        if fail == "error":
            raise ValueError("on purpose")
        if fail == "interrupt":
            raise KeyboardInterrupt
        return y


def watching() -> Any:
    return rewrite(Watching(), Amp(), inputs=X)


def test_computes_in_sixteen_bits_and_returns_float32_close_to_the_original():
    model = net().eval()
    made = rewrite(model, Amp(), inputs=X)
    expected, found = model(X), made(X)
    assert found.dtype is torch.float32
    assert 0 < (found - expected).abs().max() < 2e-2 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(found, model(X).float())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_gradients_and_running_statistics_stay_float32(dtype: Any):
    made = rewrite(net(), Amp(dtype=dtype), inputs=X)
    made.train()
    optimizer = torch.optim.Adam(made.parameters())
    made(X).square().mean().backward()
    optimizer.step()
    for tensor in [*made.parameters(), *(p.grad for p in made.parameters()), *made.buffers()]:
        assert tensor.dtype in (torch.float32, torch.int64)


def test_what_is_kept_for_backward_is_in_sixteen_bits():
    def kept(model: nn.Module) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(4, 1, 32, 32))
        return total

    assert kept(rewrite(net(), Amp(), inputs=X)) < 0.6 * kept(net())


def test_only_the_model_itself_changes_and_the_plan_says_how():
    planned = plan(net(), Amp(dtype="fp16"), inputs=X)
    (row,) = planned.passes[0].changes
    assert (row.path, row.what) == ("", "runs under float16 autocast")
    assert planned.passes[0].guarantee is Guarantee.APPROXIMATE
    assert any("grad_scaler" in note for note in planned.passes[0].notes)
    made = planned.apply()
    assert list(made.state_dict()) == list(net().state_dict())
    assert [type(m) for m in made.modules()] == [type(m) for m in net().modules()]


@pytest.mark.parametrize("slow", [True, False])
def test_the_plan_tells_that_16_bits_are_slow_on_this_cpu(monkeypatch, slow):
    support = "_is_mkldnn_bf16_supported"
    monkeypatch.setattr(torch.ops.mkldnn, support, lambda: not slow, raising=False)

    def told(given):
        return any("kernels" in note for note in plan(net(), given, inputs=X).passes[0].notes)

    assert told(Amp()) is slow
    assert not told(Amp(device="cuda"))


def test_autocast_is_left_after_an_error_and_after_an_interrupt():
    made = watching()
    with pytest.raises(ValueError, match="on purpose"):
        made(X, fail="error")
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(KeyboardInterrupt):
        made(X, fail="interrupt")
    assert not torch.is_autocast_enabled("cpu")
    assert made(X).dtype is torch.float32


def test_a_model_that_calls_itself_stays_under_autocast_to_the_end():
    made = watching()
    made.seen.clear()
    assert made(X, depth=2).dtype is torch.float32
    assert made.seen == [(True, torch.bfloat16)] * 3
    assert not torch.is_autocast_enabled("cpu")


def test_threads_do_not_disturb_each_other():
    made = watching()
    outputs: dict[int, Tensor] = {}
    enabled: dict[int, bool] = {}

    def work(index: int) -> None:
        for _ in range(5):
            outputs[index] = made(X)
            enabled[index] = torch.is_autocast_enabled("cpu")

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(outputs[0], output) for output in outputs.values())
    assert len(outputs) == 4
    assert not any(enabled.values())


def test_a_region_that_the_model_excludes_itself_is_respected():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = Watching(), Watching()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                first = self.inner(x)
            return self.outer(x) + first

    made: Any = rewrite(Careful(), Amp(), inputs=X)
    made.inner.seen.clear()
    made.outer.seen.clear()
    assert made(X).dtype is torch.float32
    assert made.inner.seen == [(False, torch.float32)]
    assert made.outer.seen == [(True, torch.bfloat16)]


def test_an_autocast_region_of_the_caller_is_overridden_within_the_model_and_restored():
    made = watching()
    with torch.autocast("cpu", dtype=torch.float16):
        assert made(X).dtype is torch.float32
        assert made.seen[-1] == (True, torch.bfloat16)
        assert torch.get_autocast_dtype("cpu") is torch.float16


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradients_and_trains_afterwards(context: Any):
    made = rewrite(net(), Amp(), inputs=X)
    with context():
        assert made.eval()(X).dtype is torch.float32
    made.train()(X).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize(
    ("convert", "why"),
    [
        (lambda m: m.double(), "float64"),
        (lambda m: m.bfloat16(), "bfloat16"),
        (lambda m: m.half(), "float16"),
        (lambda m: fx.symbolic_trace(m), "GraphModule"),
        (lambda m: torch.jit.script(m), "TorchScript"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_models_that_it_cannot_help_are_refused_with_the_reason(convert: Any, why: str):
    model = convert(net().eval())
    with pytest.warns(NoEffectWarning, match=f"amp changed nothing.*{why}"):
        made = rewrite(model, Amp(), inputs=X)
    assert history(made) == ()


def test_a_model_without_floating_point_tensors_is_refused():
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.warns(NoEffectWarning, match="no floating-point parameter"):
        rewrite(Doubling(), Amp(), inputs=X)


def test_a_model_that_does_not_run_under_autocast_is_refused_with_what_it_raised():
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.top = nn.Conv2d(1, 4, 1), nn.Bilinear(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).mean((2, 3))
            return self.top(y, y)

    with pytest.warns(
        NoEffectWarning, match="under bfloat16 autocast, .* must have the same dtype"
    ):
        rewrite(TwoInputs(), Amp(), inputs=X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_part_that_is_torchscript_runs_under_autocast_too():
    model = net().eval()
    model[0] = torch.jit.script(model[0])
    assert rewrite(model, Amp(), inputs=X)(X).dtype is torch.float32


def test_a_second_application_is_refused():
    once = rewrite(net(), Amp(), inputs=X)
    with pytest.warns(NoEffectWarning, match="already runs under bfloat16 autocast"):
        rewrite(once, Amp(dtype="fp16"), inputs=X)


def test_steps_aside_when_the_model_is_converted_later():
    made = rewrite(net().eval(), Amp(), inputs=X)
    double = copy.deepcopy(made).double()
    assert torch.equal(double(X.double()), net().eval().double()(X.double()))
    low = copy.deepcopy(made).bfloat16()
    assert low(X.bfloat16()).dtype is torch.bfloat16


def test_with_a_device_it_steps_aside_on_others():
    made = rewrite(net().eval(), Amp(device="cuda"), inputs=X)
    assert torch.equal(made(X), net().eval()(X))
    with pytest.raises(OptionError, match="'toaster' is no type of device"):
        Amp(device="toaster")


def test_copies_and_pickles_run_their_own_weights_under_autocast():
    made = rewrite(net().eval(), Amp(), inputs=X)
    expected = made(X)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    twins.append(torch.load(buffer, weights_only=False))
    for twin in twins:
        assert torch.equal(twin(X), expected)
        with torch.no_grad():
            twin[3].bias.add_(1)
        assert not torch.equal(twin(X), expected)
    assert torch.equal(made(X), expected)


def test_saved_and_loaded_it_runs_under_autocast(tmp_path: Any):
    made = rewrite(net().eval(), Amp(), inputs=X)
    save(made, tmp_path / "amp.safetensors")
    loaded = load(tmp_path / "amp.safetensors", net).eval()
    assert torch.equal(loaded(X), made(X))
    assert history(loaded) == history(made)


def test_the_signature_of_forward_is_still_to_be_read():
    import inspect

    made = watching()
    assert list(inspect.signature(made.forward).parameters) == ["x", "fail", "depth"]
    assert inspect.signature(made.forward) == inspect.signature(Watching().forward)


def test_a_forward_that_was_set_on_the_instance_still_runs():
    model = net()
    plain = model.forward
    model.forward = lambda x: plain(x) + 1000  # type: ignore[method-assign]
    made = rewrite(model.eval(), Amp(), inputs=X)
    assert made(X).mean() > 900
    assert made(X).dtype is torch.float32


def test_forward_hooks_of_the_user_see_float32_outside_of_autocast():
    model = net()
    seen: list[tuple[torch.dtype, bool]] = []
    model.register_forward_hook(
        lambda module, args, output: seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
    )
    rewrite(model, Amp(), inputs=X)(X)
    assert seen[-1] == (torch.float32, False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False])
def test_compiled_in_one_graph_it_computes_the_same(mode: bool):
    made = rewrite(net(), Amp(), inputs=X).train(mode)
    twin = copy.deepcopy(made)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    expected, found = made(X), compiled(X)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for a, b in zip(made.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_trains_as_far_as_float32_does(dtype: Any):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 1, 16, 16, generator=generator)
    target = torch.nn.functional.avg_pool2d(x, 3, 1, 1).repeat(1, 2, 1, 1)

    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scaler = grad_scaler(model, init_scale=256.0)
        assert scaler.is_enabled() == (model is not plain and dtype == "fp16")
        done = []
        for _ in range(15):
            optimizer.zero_grad(set_to_none=True)
            loss = (model(x) - target).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            done.append(loss.item())
        return done

    plain = net()
    expected = losses(plain)
    found = losses(rewrite(net(), Amp(dtype=dtype), inputs=X))
    assert expected[-1] < 0.5 * expected[0]
    assert found == pytest.approx(expected, rel=5e-2)


def test_the_scaler_finds_the_model_inside_a_wrapper():
    made = rewrite(net(), Amp(dtype="fp16"), inputs=X)
    assert grad_scaler(nn.ModuleList([made])).is_enabled()
    assert not grad_scaler(rewrite(net(), Amp(dtype="fp16", device="cuda"), inputs=X)).is_enabled()


def test_it_comes_after_the_passes_that_read_the_graph():
    with pytest.raises(OrderError, match="give them as pocket, amp"):
        plan(net(), Amp(), Pocket(width=4), inputs=X)
    made = rewrite(net(), Pocket(width=4), Amp(), inputs=X)
    assert made[0].out_channels == 4
    assert made(X).dtype is torch.float32
