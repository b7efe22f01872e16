"""Checkpointing: the same numbers, everything that a forward updates updated once, less memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pocketize import Guarantee, history, load, measure, plan, rewrite, save
from pocketize.errors import NoEffectWarning, OptionError, OrderError, PatternError, RewriteError
from pocketize.passes import Amp, Checkpoint, InPlaceNorm, Pocket, Recompute
from pocketize.passes.checkpoint.checkpoint import CheckpointedForward
from pocketize.passes.shared.forwards import wrapping


def inputs(size: int = 16) -> Tensor:
    return torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))


def block(
    before: int, after: int, norm: type[nn.Module] = nn.BatchNorm2d, drop: float = 0.0
) -> Any:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        norm(after),
        nn.ReLU(inplace=True),
        nn.Dropout(drop),
        nn.Conv2d(after, after, 3, padding=1),
        norm(after),
        nn.ReLU(inplace=True),
    )


class Net(nn.Module):
    """Two resolutions and a skip connection."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, drop: float = 0.0) -> None:
        super().__init__()
        self.encoder = block(1, 8, norm, drop)
        self.bottom = block(8, 16, norm, drop)
        self.decoder = block(24, 8, norm, drop)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.encoder(x)
        coarse = self.bottom(nn.functional.max_pool2d(fine, 2))
        coarse = nn.functional.interpolate(coarse, scale_factor=2)
        return self.head(self.decoder(torch.cat([fine, coarse], 1)))


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


BLOCKS = ("encoder", "bottom", "decoder")
ALL = Checkpoint(only=BLOCKS)


def checkpointed(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if wrapping(m, CheckpointedForward)]


def train(model: nn.Module, x: Tensor, steps: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, and all parameters and buffers after some steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [*model.parameters(), *model.buffers()]


def same(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    (losses, state), (other_losses, other_state) = train(first, x), train(second, x)
    for a, b in zip([*losses, *state], [*other_losses, *other_state], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_training_gives_the_same_numbers_to_the_bit(norm: Any, drop: float):
    model = net(norm=norm, drop=drop).double()
    made = rewrite(model, ALL, inputs=inputs())
    assert checkpointed(made) == list(BLOCKS)
    same(model, made, inputs().double())


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_and_their_counters_are_updated_once(momentum: float | None):
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum  # type: ignore[assignment]
    made = rewrite(model, ALL, inputs=inputs())
    same(model, made, inputs())
    counters = [b for name, b in made.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {3}


def test_power_iterations_of_spectral_norms_are_not_repeated():
    torch.manual_seed(0)
    inner = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)), nn.GELU())
    model = nn.Sequential(inner, nn.Conv2d(4, 1, 1)).double()
    made = rewrite(model, Checkpoint(only=("0",)), inputs=inputs())
    assert checkpointed(made) == ["0"]
    same(model, made, inputs().double())


class Counting(nn.Module):
    """A norm of one's own that replaces its buffer, and scales by it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = self.scale * 0.5
        return torch.nn.functional.gelu(self.conv(x)) * self.scale


def test_a_buffer_that_is_replaced_in_the_forward_is_replaced_once():
    torch.manual_seed(0)
    model = nn.Sequential(Counting(), nn.Conv2d(4, 1, 1))
    made = rewrite(model, Checkpoint(only=("0",)), inputs=inputs())
    same(model, made, inputs())
    assert float(made[0].scale) == 0.125


def test_two_forwards_before_one_backward_each_get_their_own_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(Counting(), nn.Conv2d(4, 1, 1))
    made = rewrite(model, Checkpoint(only=("0",)), inputs=inputs())
    for m in (model, made):
        (m(inputs()).square().mean() + m(inputs() * 2).square().mean()).backward()
    for a, b in zip(model.parameters(), made.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.slow
def test_backward_twice_through_a_kept_graph_works():
    made = rewrite(net(), ALL, inputs=inputs())
    loss = made(inputs()).square().mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in made.parameters()]
    loss.backward()
    for gradient, parameter in zip(first, made.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


@pytest.mark.slow
def test_an_error_in_the_second_run_leaves_the_buffers_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
):
    made: Any = rewrite(net(), ALL, inputs=inputs())
    loss = made(inputs()).square().mean()
    before = [b.clone() for b in made.buffers()]
    identities = [id(b) for b in made.buffers()]

    def fail(*args: Any) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(nn.BatchNorm2d, "forward", fail)
    with pytest.raises(ValueError, match="on purpose"):
        loss.backward()
    assert [id(b) for b in made.buffers()] == identities
    assert all(torch.equal(a, b) for a, b in zip(before, made.buffers(), strict=True))


@pytest.mark.slow
def test_keeps_less_and_the_plan_says_how_much_it_is_estimated_to():
    model = net()
    planned = plan(model, Checkpoint(), inputs=inputs(64))
    made = planned.apply()
    before = measure(model, inputs(64), estimate=True).peak
    after = measure(made, inputs(64), estimate=True).peak
    assert after < 0.75 * before
    assert measure(made, inputs(64)).peak == after
    (note,) = planned.passes[0].notes
    assert "estimated training peak" in note
    assert "% of a forward more" in note
    assert planned.passes[0].guarantee is Guarantee.EXACT
    assert [row.path for row in planned.passes[0].changes] == checkpointed(made)
    assert type(made) is Net
    assert list(made.state_dict()) == list(model.state_dict())


@pytest.mark.slow
def test_a_target_is_met_with_no_more_work_than_it_takes():
    model = net()
    peak = measure(model, inputs(64), estimate=True).peak
    everything = rewrite(model, Checkpoint(), inputs=inputs(64))
    some = rewrite(model, Checkpoint(target="85%", optimizer="adamw"), inputs=inputs(64))
    assert measure(some, inputs(64), estimate=True).peak <= 0.85 * peak
    assert 0 < len(checkpointed(some)) < len(checkpointed(everything))
    size = rewrite(model, Checkpoint(target=f"{int(0.85 * peak)}B"), inputs=inputs(64))
    assert checkpointed(size) == checkpointed(some)


@pytest.mark.slow
def test_a_target_out_of_reach_is_an_error_that_tells_the_smallest():
    with pytest.raises(RewriteError, match=r"to 1% .*the smallest found is \d+\.\d [KM]iB"):
        plan(net(), Checkpoint(target="1%"), inputs=inputs(64))


@pytest.mark.slow
def test_a_target_that_is_met_already_changes_nothing():
    with pytest.warns(NoEffectWarning, match="checkpoint changed nothing"):
        made = rewrite(net(), Checkpoint(target="1GiB"), inputs=inputs())
    assert checkpointed(made) == []


@pytest.mark.parametrize("target", ["", "0%", "110%", "-4GiB", "4", "4 apples", "0MiB"])
def test_targets_that_are_none_are_explained(target: str):
    with pytest.raises(OptionError, match="expected a size such as '4GiB'"):
        Checkpoint(target=target)


@pytest.mark.slow
def test_kept_modules_are_not_run_twice():
    planned = plan(net(), Checkpoint(only=BLOCKS, keep=("bottom.0",)), inputs=inputs())
    (row,) = planned.passes[0].refused
    assert (row.path, row.why) == ("bottom", "keep names bottom.0")
    assert checkpointed(planned.apply()) == ["encoder", "decoder"]
    with pytest.raises(PatternError, match=r"keep='botom' matches no module.*Did you mean"):
        plan(net(), Checkpoint(keep=("botom",)), inputs=inputs())


@pytest.mark.slow
def test_of_nested_matches_the_outer_one_is_taken():
    assert checkpointed(rewrite(net(), Checkpoint(only=("*",)), inputs=inputs())) == list(BLOCKS)


@pytest.mark.slow
def test_hooks_of_a_checkpointed_module_itself_run_once():
    model = net()
    calls: list[str] = []
    model.bottom.register_forward_hook(lambda *_: calls.append("forward"))
    model.bottom.register_full_backward_hook(lambda *_: calls.append("backward"))
    made = rewrite(model, ALL, inputs=inputs())
    calls.clear()
    made(inputs()).sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.slow
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_module_itself(context: Any):
    model = net().eval()
    made = rewrite(model, ALL, inputs=inputs())
    with context():
        assert torch.equal(made(inputs()), model(inputs()))


@pytest.mark.slow
def test_copies_and_pickles_train_on_their_own():
    model = net()
    made = rewrite(model, ALL, inputs=inputs())
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert checkpointed(twin) == list(BLOCKS)
        same(copy.deepcopy(model), twin, inputs())
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), model.buffers(), strict=True))


@pytest.mark.slow
def test_saved_and_loaded_it_is_checkpointed_again(tmp_path: Any):
    made = rewrite(net(), ALL, inputs=inputs())
    save(made, tmp_path / "checkpointed.safetensors")
    loaded = load(tmp_path / "checkpointed.safetensors", Net)
    assert checkpointed(loaded) == list(BLOCKS)
    assert history(loaded) == history(made)
    same(loaded, made, inputs())


# The compiler looks at .grad of whatever tensor goes into a frame, and warns itself.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_compiled_it_trains_to_the_same_numbers(norm: Any):
    model = net(norm=norm).double()
    made = rewrite(model, ALL, inputs=inputs())
    # Without buffers the regions are part of one graph; with buffers they run outside of it.
    whole = norm is nn.InstanceNorm2d
    compiled: Any = torch.compile(made, backend="aot_eager", fullgraph=whole)
    x = inputs().double()
    for m, call in ((model, model), (made, compiled)):
        m.zero_grad()
        call(x).square().mean().backward()
    for a, b in zip(model.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for c, d in zip(model.buffers(), made.buffers(), strict=True):
        torch.testing.assert_close(c, d)


@pytest.mark.slow
def test_under_mixed_precision_the_second_run_is_under_autocast_too():
    once = rewrite(net(), Amp(), inputs=inputs())
    made = rewrite(once, ALL, inputs=inputs())
    same(once, made, inputs())


@pytest.mark.slow
def test_it_comes_after_the_pass_that_changes_widths_and_not_together_with_recompute():
    with pytest.raises(OrderError, match="give them as pocket, checkpoint"):
        plan(net(), Checkpoint(), Pocket(width=4), inputs=inputs())
    with pytest.raises(OrderError, match="cannot be applied together"):
        plan(net(), Recompute(), Checkpoint(), inputs=inputs())
    with pytest.warns(NoEffectWarning, match="already keeps less"):
        rewrite(
            rewrite(net(), Recompute(min_bytes=0), inputs=inputs()), Checkpoint(), inputs=inputs()
        )


def leaky(model: Net) -> Net:
    for block in (model.encoder, model.bottom, model.decoder):
        block[2], block[3], block[6] = nn.LeakyReLU(0.1), nn.Identity(), nn.LeakyReLU(0.1)
    return model


@pytest.mark.slow
def test_in_place_norms_go_where_no_checkpoint_is_and_both_together_keep_least():
    model, x = leaky(net()).double(), inputs(64).double()
    first = Checkpoint(only=("encoder",))
    planned = plan(model, first, InPlaceNorm(), inputs=x)
    refused = {row.path for row in planned.passes[1].refused if "checkpointed region" in row.why}
    assert refused == {"encoder.1", "encoder.5"}
    both = planned.apply()
    for a, b in zip(train(model, x)[1], train(both, x)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    peaks = [
        measure(m, x, optimizer=None, estimate=True).peak
        for m in (both, rewrite(model, first, inputs=x), rewrite(model, InPlaceNorm(), inputs=x))
    ]
    assert peaks[0] < min(peaks[1:])


@pytest.mark.slow
def test_blocks_that_hold_in_place_norms_are_not_run_twice():
    model = leaky(net())
    model.encoder[1] = nn.Identity()
    model.encoder[5] = nn.Identity()
    planned = plan(model, InPlaceNorm(), ALL, inputs=inputs())
    assert [row.path for row in planned.passes[1].changes] == ["encoder"]
    assert {row.path for row in planned.passes[1].refused} == {"bottom", "decoder"}
    assert all("saves memory in its own way" in row.why for row in planned.passes[1].refused)
