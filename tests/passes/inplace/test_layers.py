"""A converted layer is the layer it was: state, copies, hooks, modes, and under torch's tools."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from pocketize import _torch, rewrite
from pocketize.errors import RewriteError
from pocketize.passes.inplace.activations import is_tagged
from pocketize.passes.inplace.in_place_norm import ACTIVATION, CALL, NORM
from pocketize.plugin.conversions import convert
from tests.passes.inplace.pairs import NORMS, Made, batch, in_place, pair, run, worst


def _name(output: Tensor) -> str:
    return output.grad_fn.name() if output.grad_fn is not None else ""


def _fused(output: Tensor) -> bool:
    return _name(output) == "NormActivationBackward"


class Scaled(nn.BatchNorm2d):
    """A subclass with torch's forward and an attribute of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.note = "mine"


class Doubling(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("norm", NORMS)
def test_class_keys_and_checkpoints_stay_in_both_directions(norm: str) -> None:
    plain, net = pair(norm)
    assert isinstance(net.get_submodule("0"), type(plain.get_submodule("0")))
    assert list(plain.state_dict()) == list(net.state_dict())
    assert plain.state_dict()._metadata == net.state_dict()._metadata  # type: ignore[attr-defined]
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("norm", ["batch-2d", "sync", "instance-3d", "group-1d"])
def test_copies_and_pickles_are_in_place_too(norm: str, how: str) -> None:
    _, net = pair(norm)
    x = batch(norm)
    run(net, x, torch.ones_like(x))
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin[0]) is type(net.get_submodule("0"))
    assert _fused(copy.deepcopy(twin)(x))
    assert repr(twin) == repr(net)
    for module in (net, twin):
        module.eval()
    assert torch.equal(twin(x), net(x))


def test_a_subclass_with_torchs_forward_is_converted_and_stays_itself() -> None:
    net = nn.Sequential(Scaled(4), nn.LeakyReLU())
    made = pickle.loads(pickle.dumps(in_place(net)))
    assert isinstance(made[0], Scaled)
    assert made[0].note == "mine"
    assert _fused(made(torch.randn(2, 4, 3, 3)))


def test_conversions_refuse_what_they_do_not_know() -> None:
    net = nn.Sequential(Doubling(4), nn.ReLU(), nn.LeakyReLU(0.2), nn.BatchNorm2d(4))
    told = {"kind": "leaky_relu", "slope": 0.1}
    with pytest.raises(RewriteError, match="norm layers, got Doubling"):
        convert(net, "0", NORM, told)
    with pytest.raises(RewriteError, match="activation layer, got ReLU"):
        convert(net, "1", ACTIVATION, told)
    with pytest.raises(RewriteError, match=r"expected leaky_relu\(0.1\), found leaky_relu\(0.2\)"):
        convert(net, "2", ACTIVATION, told)
    with pytest.raises(RewriteError, match="slope above 0"):
        convert(net, "3", NORM, {"kind": "leaky_relu", "slope": -0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        scripted = nn.Sequential(torch.jit.script(nn.LeakyReLU()))
    with pytest.raises(RewriteError, match="TorchScript"):
        convert(scripted, "0", CALL, {})
    convert(net, "3", NORM, told)
    with pytest.raises(RewriteError, match="got InPlaceBatchNorm2d"):
        convert(net, "3", NORM, told)


@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d", "group-2d"])
def test_without_gradients_the_ordinary_functions_run(norm: str) -> None:
    plain, net = pair(norm)
    x = batch(norm)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            between = net.get_submodule("0")(x)
            assert not is_tagged(between)
            assert torch.equal(between, plain.get_submodule("0")(x))
            assert torch.equal(net(x), plain(x))
    for p in net.parameters():
        p.requires_grad_(False)
    assert not net(x).requires_grad


def test_the_mark_is_taken_off_and_a_replaced_norm_loses_no_activation() -> None:
    plain, net = pair("batch-2d")
    x = batch("batch-2d")
    assert is_tagged(copy.deepcopy(net).get_submodule("0")(x))
    assert not is_tagged(copy.deepcopy(net)(x))
    made = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    again = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    assert type(made.get_submodule("0")) is nn.SyncBatchNorm
    for module in (made, again):
        module.eval()
    assert torch.equal(made(x), again(x))


def test_a_shared_activation_works_on_what_no_norm_has_activated() -> None:
    _, net = pair("batch-2d")
    activation = net.get_submodule("1")
    x = batch("batch-2d")
    y = net(x)
    expected = F.leaky_relu(y, 0.01)
    assert torch.equal(activation(y.clone()), expected)
    assert torch.equal(activation(y), expected)  # the mark was for one call


def test_a_slope_that_was_changed_afterwards_is_an_error() -> None:
    _, net = pair("batch-2d")
    cast(nn.LeakyReLU, net.get_submodule("1")).negative_slope = 0.5
    with pytest.raises(RuntimeError, match=r"applied leaky_relu\(0.01\)"):
        net(batch("batch-2d"))


def test_a_hook_registered_later_sees_what_it_always_saw() -> None:
    plain, net = pair("batch-2d")
    seen: list[Tensor] = []
    for module in (plain, net):
        module.get_submodule("0").register_forward_hook(
            lambda module, args, output: seen.append(output.detach().clone())
        )
    x = batch("batch-2d")
    assert not _fused(net(x))
    plain(x)
    assert torch.equal(*seen)


def test_full_backward_hooks_run_as_before() -> None:
    plain, net = pair("batch-2d")
    seen: list[Tensor] = []
    for module in (plain, net):
        module[1] = nn.LeakyReLU(0.01) if module is plain else module[1]  # type: ignore[operator, index]
        module.get_submodule("0").register_full_backward_hook(
            lambda module, grad_in, grad_out: seen.append(grad_out[0])
        )
    net.get_submodule("1").inplace = False
    x = batch("batch-2d")
    weight = torch.randn(x.shape, dtype=x.dtype)
    assert worst(run(plain, x, weight), run(net, x, weight)) < 1e-12
    assert torch.equal(*seen)


@pytest.mark.parametrize("old", [False, True], ids=["by-hooks", "by-stack"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d"])
def test_inside_a_checkpoint_the_gradients_are_those_of_the_pair(
    norm: str, reentrant: bool, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:  # torch before 2.8 has no way to ask for the hooks
        monkeypatch.setattr(_torch, "_saving_hooks", lambda **_: (False, None))
    old = not _torch._saving_hooks(ignore_tracing=True)[0]
    plain, net = pair(norm)
    seen: list[bool] = []
    net.get_submodule("1").register_forward_pre_hook(
        lambda module, args: seen.append(is_tagged(args[0]))
    )

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = checkpoint(self.inner, x * 1, use_reentrant=reentrant)
            return output

    x = batch(norm)
    weight = torch.randn(x.shape, dtype=x.dtype)
    assert worst(*(run(Checkpointed(m), x, weight) for m in (plain, net))) < 1e-12
    # A reentrant one runs without gradients first, and then as if it were no checkpoint.
    assert seen == ([False, not old] if reentrant else [False, False])
    net(x)
    assert seen[-1]


def test_saved_tensors_can_be_moved_by_other_hooks() -> None:
    plain, net = pair("instance-3d")
    x = batch("instance-3d")
    weight = torch.randn(x.shape, dtype=x.dtype)
    with torch.autograd.graph.save_on_cpu():
        found = run(net, x, weight)
    assert worst(run(plain, x, weight), found) < 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_the_output_is_nobodys_view_and_is_protected_from_being_overwritten(norm: str) -> None:
    _, net = pair(norm)
    output = net(batch(norm).requires_grad_())
    assert not output._is_view()
    output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_incoming_gradient_is_not_written_to() -> None:
    for name in ("batch-2d", "instance-3d", "group-1d"):
        for activation in ("leaky", "identity"):
            _, net = pair(name, activation)
            x = batch(name).requires_grad_()
            gradient = torch.randn(x.shape, dtype=x.dtype)
            before = gradient.clone()
            output = net(x)
            kept = output.detach().clone()
            output.backward(gradient, retain_graph=True)
            first = cast(Tensor, x.grad).clone()
            output.backward(gradient)
            assert torch.equal(gradient, before)
            assert torch.equal(output, kept)
            assert torch.allclose(cast(Tensor, x.grad), 2 * first)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_only_what_needs_a_gradient_gets_one(frozen: str) -> None:
    plain, net = pair("batch-2d")
    x = batch("batch-2d")
    gradients: list[list[Tensor | None]] = []
    for module in (plain, net):
        leaf = x.clone().requires_grad_(frozen != "input")
        for name, p in module.named_parameters():
            p.requires_grad_(not name.endswith(frozen))
        module(leaf * 1).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, cast(Tensor, b))


@pytest.mark.parametrize("norm", ["batch-2d", "batch-3d", "instance-2d", "group-2d", "group-3d"])
def test_the_memory_format_is_that_of_the_pair(norm: str) -> None:
    plain, net = pair(norm)
    x = batch(norm)
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    x = x.contiguous(memory_format=last)
    outputs = [module(x.clone().requires_grad_() * 1) for module in (plain, net)]
    assert _fused(outputs[1])
    assert outputs[0].stride() == outputs[1].stride()
    weight = torch.randn(x.shape, dtype=x.dtype).contiguous(memory_format=last)
    assert worst(run(plain, x, weight), run(net, x, weight)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm", ["batch-2d", "instance-2d", "group-2d"])
def test_autocast_gives_the_types_that_the_pair_has(
    norm: str, given: torch.dtype, dtype: torch.dtype
) -> None:
    plain, net = pair(norm, dtype=torch.float32)
    x = batch(norm, dtype=given)
    with torch.autocast("cpu", dtype):
        outputs = [module(x.clone().requires_grad_() * 1) for module in (plain, net)]
    assert _fused(outputs[1])
    assert outputs[0].dtype == outputs[1].dtype
    assert torch.allclose(*(o.float() for o in outputs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d", "group-1d"])
def test_a_net_of_sixteen_bits_keeps_its_types_and_counts_in_float32(norm: str) -> None:
    plain, net = pair(norm, dtype=torch.bfloat16)
    x = batch(norm, dtype=torch.bfloat16, n=8)
    weight = torch.randn(x.shape).bfloat16()
    expected, found = run(plain, x, weight), run(net, x, weight)
    assert [t.dtype for t in found.gradients] == [t.dtype for t in expected.gradients]
    assert worst(expected, found) < 0.1


@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d", "group-1d", "sync"])
def test_fake_tensors_run_in_place_too(norm: str) -> None:
    _, net = pair(norm)
    x = batch(norm)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        output = net(mode.from_tensor(x).requires_grad_())
        assert _fused(output)
        assert output.shape == x.shape
        output.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at inputs
@pytest.mark.filterwarnings("ignore:in-place-norm. torch.compile traces")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d", "group-1d", "sync"])
def test_compiled_whole_it_computes_what_the_pair_does(norm: str, backend: str) -> None:
    plain, net = pair(norm)
    x = batch(norm)
    weight = torch.randn(x.shape, dtype=x.dtype)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    expected, found = run(plain, x, weight), run(cast(nn.Module, compiled), x, weight)
    assert worst(expected, found) < 1e-12


def test_an_output_that_its_activation_has_not_seen_is_an_error_in_backward() -> None:
    _, net = pair("batch-2d")
    x = batch("batch-2d").requires_grad_()
    with pytest.raises(RuntimeError, match=r"leaky_relu\(0.01\) was not called on it"):
        net.get_submodule("0")(x).sum().backward()
    dropping = nn.Sequential(net.get_submodule("0"), nn.Dropout(0.5), net.get_submodule("1"))
    with pytest.raises(
        RuntimeError, match=r"BatchNorm2d\(4, .*another way, or what stands between"
    ):
        dropping(x).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_an_activation_compiled_alone_skips_what_the_norm_has_done() -> None:
    plain, net = pair("batch-2d")
    torch._dynamo.reset()
    net[1].compile(backend="eager", fullgraph=True)  # type: ignore[operator, index]
    x = batch("batch-2d").requires_grad_()
    assert torch.allclose(net(x), plain(x * 1))
    weight = torch.randn(x.shape, dtype=x.dtype)
    assert worst(run(plain, x, weight), run(net, x, weight)) < 1e-12


def test_function_transforms_and_tracing_use_the_ordinary_functions() -> None:
    plain, net = pair("instance-2d")
    x = batch("instance-2d")
    expected, found = (
        torch.func.grad(lambda x, m=m: m(x * 1).square().sum())(x) for m in (plain, net)
    )
    assert torch.allclose(expected, found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its tracer
        traced: Any = torch.jit.trace(net, x.requires_grad_(), check_trace=False)
    assert torch.allclose(traced(x), plain(x * 1))


def test_a_prelu_stays_its_own_layer_and_copies_belong_together() -> None:
    plain, net = pair("batch-2d", "prelu")
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [path for path, _ in net.named_modules()] == ["", "0", "1"]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[0].slopes_of is twin[1]
    assert net.float().get_parameter("1.weight").dtype == torch.float32
    assert _fused(net(batch("batch-2d", dtype=torch.float32)))


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_a_prelu_has_the_type_that_autocast_gives_it(given: torch.dtype) -> None:
    plain, net = pair("batch-2d", "prelu", dtype=torch.float32)
    x = batch("batch-2d", dtype=given)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [module(x.clone().requires_grad_() * 1) for module in (plain, net)]
    assert outputs[0].dtype == outputs[1].dtype
    assert torch.allclose(*(o.float() for o in outputs), rtol=2e-2, atol=2e-2)
    outputs[1].float().sum().backward()


def test_torch_fx_and_export_take_the_layers_as_they_took_the_originals() -> None:
    plain, net = pair("instance-2d")
    x = batch("instance-2d")
    traced = torch.fx.symbolic_trace(net)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    assert torch.allclose(traced(x.requires_grad_() * 1), plain(x * 1))
    exported = torch.export.export(net, (x.detach(),), strict=False)
    assert torch.allclose(exported.module()(x.detach()), plain(x.detach()))


def test_monais_tensors_with_metadata_go_through() -> None:
    from monai.data import MetaTensor

    plain, net = pair("instance-2d")
    x = batch("instance-2d")
    outputs = [
        module(MetaTensor(x.clone(), meta={"name": "scan"}).requires_grad_() * 1)
        for module in (plain, net)
    ]
    # What gives it its class is an alias.
    assert outputs[1].grad_fn.next_functions[0][0].name() == "NormActivationBackward"
    assert not is_tagged(outputs[1])
    assert outputs[1].meta["name"] == "scan"
    assert type(outputs[0]) is type(outputs[1])
    assert torch.allclose(*(o.as_tensor() for o in outputs))
    outputs[1].sum().backward()


def test_what_is_computed_of_an_activated_tensor_is_not_taken_for_it() -> None:
    from monai.data import MetaTensor  # copies attributes of a tensor to what is computed of it

    layers = nn.Sequential(nn.InstanceNorm2d(4), nn.Dropout(0.0), nn.LeakyReLU(0.2))
    net = rewrite(layers, "in-place-norm", inputs=(x := torch.randn(2, 4, 6, 6)))
    outputs = []
    for module in (layers, net):
        given = MetaTensor(x.clone()).requires_grad_()
        outputs.append(module(given * 1))
        outputs[-1].square().sum().backward()
        outputs.append(given.grad)
    assert torch.allclose(outputs[0], outputs[2])
    assert torch.allclose(outputs[1], outputs[3], atol=1e-6)
    between = net[0](MetaTensor(x).requires_grad_() * 1)
    assert is_tagged(between)
    assert not is_tagged(between + 1)
    assert not is_tagged(copy.deepcopy(between.detach()))


class _Functional(nn.Module):
    """Calls its activations as functions, on the norm's output and elsewhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "leaky":
            return F.leaky_relu(F.leaky_relu_(self.norm(x), 0.2) + 1, 0.2)
        if self.kind == "torch":
            between = self.norm(input=x)
            return torch.nn.functional.leaky_relu(input=between, negative_slope=0.2, inplace=True)
        return F.elu(F.elu(self.norm(x), inplace=True), 0.5)


@pytest.mark.filterwarnings("ignore:in-place-norm. torch.compile traces")
@pytest.mark.parametrize("kind", ["leaky", "torch", "elu"])
def test_functions_on_what_a_norm_has_activated_are_skipped_and_others_run(kind: str) -> None:
    plain = _Functional(kind).double()
    net = copy.deepcopy(plain)
    told = {"kind": "elu", "slope": 1.0} if kind == "elu" else {"kind": "leaky_relu", "slope": 0.2}
    convert(net, "norm", NORM, told)
    convert(net, "", CALL, {})
    convert(net, "", CALL, {})  # twice is once
    x = batch("batch-2d")
    weight = torch.randn(x.shape, dtype=x.dtype)
    twin = pickle.loads(pickle.dumps(net))
    expected: Made = run(plain, x, weight)
    assert worst(expected, run(net, x, weight)) < 1e-12
    assert worst(expected, run(twin, x, weight)) < 1e-12
    assert twin.forward.module is twin
    torch._dynamo.reset()
    compiled = cast(nn.Module, torch.compile(net, backend="aot_eager", fullgraph=True))
    plain.eval()
    net.eval()
    assert torch.allclose(compiled(x), plain(x))


@pytest.mark.parametrize("norm", ["batch-0d", "batch-2d", "instance-2d", "group-2d"])
def test_inputs_that_torch_refuses_are_refused_in_its_words(norm: str) -> None:
    plain, net = pair(norm)
    for shape in ((1, 4), (1, 5, 1, 1), (1, 4, 1, 1)):
        x = torch.randn(shape, dtype=torch.float64)
        assert _answer(plain, x) == _answer(net, x)


def _answer(module: nn.Module, x: Tensor) -> str:
    try:
        return str(tuple(module(x).shape))
    except (ValueError, RuntimeError, UserWarning) as error:
        return f"{type(error).__name__} {error}"


def test_an_image_without_batch_axis_and_an_empty_batch_run_as_in_torch() -> None:
    plain, net = pair("instance-2d")
    x = batch("instance-2d")[0]
    assert torch.equal(net(x.clone()), plain(x.clone()))
    plain, net = pair("group-2d")
    empty = batch("group-2d")[:0]
    assert net(empty).shape == plain(empty).shape
