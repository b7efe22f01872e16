"""What people do around a step: differentiate twice, write weights, transform, compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from pocketize import rewrite
from pocketize.errors import ExecutionError, PocketizeWarning
from pocketize.passes import Recompute
from pocketize.passes.shared import compiled as compiled_regions
from pocketize.passes.shared import forwards
from tests.passes.recompute.nets import Net, gradients, reference, same

KEEP = ["conv", "block", "level"]
NORMS: list[Callable[[int], nn.Module]] = [
    lambda c: nn.InstanceNorm2d(c, affine=True),
    nn.BatchNorm2d,
    lambda c: nn.GroupNorm(2, c),
]


LEAKY = nn.LeakyReLU(0.1)


def made(keep: str = "level", norm: int = 0, act: Any = LEAKY, dropout: float = 0.0) -> nn.Module:
    return copy.deepcopy(_rewritten(keep, norm, act, dropout))


@functools.cache
def _rewritten(keep: str, norm: int, act: Any, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    net = Net(NORMS[norm], act, dropout=dropout).double()
    return rewrite(net, Recompute(keep=keep, min_bytes=0), inputs=batch())


def batch(count: int = 2) -> Tensor:
    return torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[
        :count
    ]


def both(keep: str, of: Callable[[nn.Module], Any], **told: Any) -> None:
    """Fail unless the network does what it does without the pass."""
    net = made(keep, **told)
    torch.manual_seed(2)
    expected = of(reference(net))
    torch.manual_seed(2)
    found = of(net)
    same({"it": expected}, {"it": found})


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def second(net: nn.Module) -> Tensor:
    given = [batch().requires_grad_(), *net.parameters()]
    first = torch.autograd.grad(net(given[0]).sin().sum(), given, create_graph=True)
    penalty = sum(t.square().sum() for t in first)
    return flat((*first, *torch.autograd.grad(penalty, given, materialize_grads=True)))


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("act", [nn.LeakyReLU(0.1, inplace=True), nn.SiLU(), nn.PReLU()])
@pytest.mark.parametrize("norm", range(3))
@pytest.mark.parametrize("keep", KEEP)
def test_second_derivatives(keep: str, norm: int, act: nn.Module) -> None:
    both(keep, second, norm=norm, act=act)


@pytest.mark.slow
def test_second_derivatives_of_a_norm_and_a_convolution_whose_weights_made_their_input() -> None:
    class Woven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
            self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.norm(self.first(x)))
            for _ in range(2):
                y = self.act(self.norm(self.conv(torch.cat((y, y.sin()), 1))))
            return y

    net = rewrite(Woven().double(), Recompute(keep="level", min_bytes=0), inputs=batch())
    same({"it": second(reference(net))}, {"it": second(net)})


def _written(net: nn.Module, name: str) -> None:
    with torch.no_grad():
        net.get_parameter(name).add_(0.5)


def _exchanged(net: nn.Module, name: str) -> None:
    net.get_parameter(name).data = net.get_parameter(name) + 0.5


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("change", [_written, _exchanged])
@pytest.mark.parametrize("name", ["a2.weight", "c1.bias", "m2.weight", "n1.bias"])
def test_a_weight_that_is_changed_between_the_passes_is_refused(
    name: str, change: Callable[[nn.Module, str], None]
) -> None:
    net = made()
    loss = net(batch()).square().sum()
    change(net, name)
    with pytest.raises(ExecutionError, match=r"^recompute: "):
        loss.backward()


def test_a_weight_that_only_moved_is_no_error() -> None:
    def moved(net: nn.Module) -> Tensor:
        loss = net(batch()).square().sum()
        for parameter in net.parameters():
            parameter.data = parameter.data.clone()
        return flat(torch.autograd.grad(loss, list(net.parameters())))

    both("level", moved)


@pytest.mark.slow
def test_running_statistics_written_between_the_passes_change_nothing() -> None:
    def gradient(net: nn.Module, between: bool) -> Tensor:
        loss = net.eval()(batch()).square().sum()
        if between:
            net.train()(batch() * 2)
        return flat(torch.autograd.grad(loss, list(net.parameters())))

    net = made(norm=1)
    same({"it": gradient(reference(net), False)}, {"it": gradient(net, True)})


def test_an_input_written_between_the_passes_is_refused() -> None:
    net, x = made(), batch()
    loss = net(x).square().sum()
    x.mul_(2)
    with pytest.raises(ExecutionError, match=r"^recompute: "):
        loss.backward()


@pytest.mark.each_value
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("which", ["a1", "a2", "b1", "up", "c1", "head"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_what_a_hook_keeps_can_be_written_to_or_is_refused(
    keep: str, which: str, side: str
) -> None:
    """Also what autograd does not save but recomputation needs."""
    net, seen = made(keep), list[Tensor]()
    parameters = list(net.parameters())
    plain = reference(net)
    expected = flat(torch.autograd.grad(plain(batch()).square().sum(), list(plain.parameters())))
    net.get_submodule(which).register_forward_hook(
        lambda module, args, out: seen.append(args[0] if side == "input" else out)
    )
    loss = net(batch()).square().sum()
    with torch.no_grad():
        seen[0].mul_(2)
    try:
        found = flat(torch.autograd.grad(loss, parameters))
    except RuntimeError as error:
        if not str(error).startswith("recompute: ") and "inplace operation" not in str(error):
            raise
    else:
        same({"it": expected}, {"it": found})


@pytest.mark.slow
def test_memory_that_somebody_points_to_is_not_taken_away() -> None:
    class Pointing(Net):
        peek = False

        def forward(self, x: Tensor) -> Tensor:
            first = self.act(self.n1(self.a1(x)))
            if self.peek:
                self.seen = first.detach().numpy()
                self.before = self.seen.copy()
            return self.head(self.act(self.n2(self.a2(first))))

    net = Pointing(NORMS[0], nn.ReLU()).double()
    net = rewrite(net, Recompute(min_bytes=0), inputs=batch())
    net.peek = True
    net(batch()).sum().backward()
    assert (net.seen == net.before).all()


def _functional(net: nn.Module) -> Tensor:
    given = {n: (p.detach() * 1.1).requires_grad_() for n, p in net.named_parameters()}
    functional_call(net, given, (batch(),)).square().sum().backward()
    return flat(p.grad for p in given.values())


def _per_sample(net: nn.Module) -> Tensor:
    weights = {n: p.detach() for n, p in net.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        made: Tensor = functional_call(net, weights, (sample[None],)).square().mean()
        return made

    return flat(vmap(grad(loss), (None, 0))(weights, batch()).values())


def _forward_mode(net: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        out = net(forward_ad.make_dual(batch(), batch().cos()))
        tangent: Tensor = forward_ad.unpack_dual(out).tangent
        return tangent.detach()


def _many_gradients(net: nn.Module) -> Tensor:
    x = batch().requires_grad_()
    out = net(x).mean((2, 3)).flatten()
    many = torch.eye(out.numel(), dtype=out.dtype)
    return flat(torch.autograd.grad(out, x, many, is_grads_batched=True))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own use of it
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")  # torch's own use of it
@pytest.mark.parametrize(
    "of",
    [
        _functional,
        _per_sample,
        _forward_mode,
        _many_gradients,
        lambda net: jvp(net, (batch(),), (batch().cos(),))[1].detach(),
        lambda net: jacrev(lambda x: net(x).mean((2, 3)))(batch()).detach(),
        lambda net: vmap(lambda x: net(x[None]))(batch()).detach(),
    ],
)
def test_function_transforms_find_the_model_as_it_is(of: Callable[[nn.Module], Tensor]) -> None:
    both("level", of)


@pytest.mark.slow
def test_a_model_that_transforms_functions_itself_says_what_to_do() -> None:
    class Inner(Net):
        def forward(self, x: Tensor) -> Tensor:
            slope = grad(lambda y: self.act(self.n1(self.a1(y))).sum())(x)
            return self.head(self.act(self.n2(self.a2(self.a1(x + slope)))))

    net = Inner(NORMS[0], nn.SiLU()).double()
    with pytest.raises(Exception, match=r"recompute: .*torch.func"):
        rewrite(net, Recompute(min_bytes=0), inputs=batch())(batch()).sum().backward()


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 1, 0, 8)])
@pytest.mark.parametrize("norm", range(3))
@pytest.mark.parametrize("dropout", [0.0, 0.3])  # with it, norm and activation are not fused
def test_a_batch_of_none(norm: int, dropout: float, shape: tuple[int, ...]) -> None:
    net, x = made(norm=norm, dropout=dropout), torch.randn(shape, dtype=torch.float64)
    twin = reference(net)
    found = []
    for model in (twin, net):
        torch.manual_seed(0)
        try:
            model(x).sum().backward()
        except Exception as error:  # instance norms refuse what has no elements
            found.append(str(error))
        else:
            found.append(flat(p.grad for p in model.parameters() if p.grad is not None))
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        assert torch.allclose(*found, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_called_in_a_checkpoint_it_leaves_the_memory_to_that(reentrant: bool) -> None:
    def step(net: nn.Module) -> Tensor:
        x = batch().requires_grad_()
        checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
        return flat([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])

    both("level", step, norm=1)


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    net = made()
    expected = gradients(reference(net), batch())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = net.get_submodule("c1").register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(batch())
    hook.remove()
    same(expected, gradients(net, batch()))


def test_several_forwards_backwards_and_modes_in_between() -> None:
    def steps(net: nn.Module) -> Tensor:
        parameters = list(net.parameters())
        first, other = net(batch()), net(batch() * 2)  # two forwards, then their backwards
        found = [*torch.autograd.grad(first.sin().sum() + other.sin().sum(), parameters)]
        net.eval()
        loss = net(batch()).sin().sum()
        net.requires_grad_(False)
        net.get_submodule("a1").requires_grad_(True)
        partial = [net.get_parameter("a1.weight")]
        found += torch.autograd.grad(loss, partial, retain_graph=True)
        found += torch.autograd.grad(loss, partial)
        net.train()
        net(batch()).sum()  # one that never sees a backward
        net(batch()).sin().sum().backward()
        return flat([*found, net.get_parameter("a1.weight").grad, *net.buffers()])

    both("level", steps, norm=1)


def test_a_training_forward_before_the_backward_pass_of_evaluation_changes_nothing() -> None:
    """It writes to the running statistics, which are too small to be rebuilt."""
    net = Net(nn.BatchNorm2d, nn.LeakyReLU()).double()
    net = rewrite(net, Recompute(keep="level", min_bytes=1000), inputs=batch())
    net(batch())
    net.eval()
    expected = gradients(reference(net), batch())
    net.zero_grad(set_to_none=True)
    outputs = net(batch())
    net.train()
    net(3 * batch())
    (outputs * outputs.detach().cos()).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_subclasses_come_out_as_they_go_in() -> None:
    net = made()
    x = MetaTensor(batch(), meta={"name": "scan"}, affine=2 * torch.eye(4))
    out = net(x)
    assert type(out) is MetaTensor
    assert out.meta["name"] == "scan"
    out.square().sum().backward()
    found = flat(torch.Tensor(p.grad) for p in net.parameters())
    twin = reference(net)
    twin.zero_grad()
    twin(batch()).square().sum().backward()
    same({"it": flat(p.grad for p in twin.parameters())}, {"it": found})


@pytest.mark.slow
@pytest.mark.skipif(compiled_regions.HAS_REGIONS, reason="the compiler is told what to store")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at inputs
def test_compiled_it_says_once_that_it_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "_compiled", set())
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(made()), backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(batch())  # where there is nothing to save there is nothing to say
    with pytest.warns(PocketizeWarning, match=r"^recompute: torch.compile traces") as caught:
        (compiled(batch()).sum() + compiled(batch(1)).sum()).backward()  # compiled once more
    assert len(caught) == 1
