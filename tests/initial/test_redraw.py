"""What redrawing keeps: identity, dtype, layout, ties, random state; and what it resets."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import init
from torch.nn.utils import parametrizations

from pocketize.initial import infer_schemes
from pocketize.initial.estimate import SAMPLE, sample
from pocketize.initial.schemes import Reset

from .builds import FULL, INITS, POCKET, Net, build, values


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_inferring_changes_neither_the_model_nor_the_random_state() -> None:
    net = build(FULL, INITS["kaiming_normal_fan_in"])
    before = copy.deepcopy(net.state_dict())
    versions = [p._version for p in net.parameters()]
    state = torch.get_rng_state()
    infer_schemes(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p._version for p in net.parameters()] == versions
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_redrawing_keeps_identity_dtype_layout_and_requires_grad() -> None:
    net = build(FULL, INITS["torch_default"]).to(memory_format=torch.channels_last).bfloat16()
    net.body[2].weight.requires_grad_(False)
    before = {
        name: (id(p), p.dtype, p.stride(), p.requires_grad) for name, p in net.named_parameters()
    }
    old = values(net)
    infer_schemes(net).redraw(net, generator(7))
    after = {
        name: (id(p), p.dtype, p.stride(), p.requires_grad) for name, p in net.named_parameters()
    }
    assert after == before
    assert not torch.equal(values(net)["body.2.weight"], old["body.2.weight"])


def test_a_generator_is_the_only_source_of_randomness() -> None:
    net = nn.Sequential(build(FULL, INITS["torch_default"]), OwnReset(4))
    net[1].weight.data[0] = math.nan
    schemes = infer_schemes(net)
    state = torch.get_rng_state()
    schemes.redraw(net, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    first = values(net)
    schemes.redraw(net, generator(5))
    assert all(torch.equal(part, first[name]) for name, part in values(net).items())
    schemes.redraw(net, generator(6))
    assert not torch.equal(values(net)["0.body.2.weight"], first["0.body.2.weight"])


def test_without_a_generator_the_global_seed_decides() -> None:
    net = build(FULL, INITS["torch_default"])
    schemes = infer_schemes(net)
    torch.manual_seed(3)
    schemes.redraw(net)
    first = values(net)
    torch.manual_seed(3)
    schemes.redraw(net)
    assert torch.equal(values(net)["body.2.weight"], first["body.2.weight"])


def test_running_statistics_start_anew_and_other_buffers_stay() -> None:
    net = nn.Sequential(nn.BatchNorm1d(6), nn.InstanceNorm1d(6, track_running_stats=True))
    net.register_buffer("filters", torch.arange(6.0))
    for module in net:
        module.running_mean.fill_(3)
        module.running_var.fill_(5)
        module.num_batches_tracked.fill_(7)
    infer_schemes(net).redraw(net, generator())
    for module in net:
        assert module.running_mean.eq(0).all()
        assert module.running_var.eq(1).all()
        assert module.num_batches_tracked == 0
    assert torch.equal(net.filters, torch.arange(6.0))


def test_tied_weights_stay_tied_and_are_drawn_by_one_scheme() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"embed": nn.Embedding(50, 32), "out": nn.Linear(32, 50, bias=False)})
    init.normal_(net["embed"].weight, 0, 0.02)
    net["out"].weight = net["embed"].weight
    schemes = infer_schemes(net)
    assert schemes.by_name["out.weight"] is schemes.by_name["embed.weight"]
    schemes.redraw(net, generator())
    assert net["out"].weight is net["embed"].weight
    assert float(net["embed"].weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("legacy", [False, True])
def test_weight_norm_magnitudes_are_norms_of_the_new_directions(legacy: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(8 * i, 16 + 8 * i, 3) for i in range(1, 5)]
    for layer in layers:
        if legacy:
            with pytest.warns(FutureWarning):
                nn.utils.weight_norm(layer)
        else:
            parametrizations.weight_norm(layer)
    net = nn.Sequential(*layers)
    g, v = (
        ("weight_g", "weight_v")
        if legacy
        else ("parametrizations.weight.original0", "parametrizations.weight.original1")
    )
    schemes = infer_schemes(net)
    assert schemes.by_name[f"2.{v}"].source == "from 4 tensors"
    tensors = dict(net.named_parameters())
    tensors[f"2.{v}"].data = tensors[f"2.{v}"].data[:5, :6]
    tensors[f"2.{g}"].data = tensors[f"2.{g}"].data[:5]
    schemes.redraw(net, generator())
    direction = tensors[f"2.{v}"].detach()
    assert torch.allclose(tensors[f"2.{g}"].flatten(), direction.flatten(1).norm(dim=1))
    assert float(direction.abs().max()) <= 1 / math.sqrt(54)
    if not legacy:  # there the weight is only computed in forward
        assert torch.allclose(net[2].weight, direction)


@pytest.mark.parametrize("legacy", [False, True])
def test_spectral_norm_vectors_belong_to_the_new_weight(legacy: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3)
    (nn.utils.spectral_norm if legacy else parametrizations.spectral_norm)(layer)
    schemes = infer_schemes(layer.eval())
    schemes.redraw(layer, generator=generator())
    buffers = dict(layer.named_buffers())
    u, v = (next(b for name, b in buffers.items() if name.endswith(end)) for end in ("_u", "_v"))
    original = layer.weight_orig if legacy else layer.parametrizations.weight.original
    matrix = original.detach().flatten(1)
    assert float(u.norm()) == pytest.approx(1)
    assert float(v.norm()) == pytest.approx(1)
    assert float(u @ matrix @ v) == pytest.approx(
        float(torch.linalg.matrix_norm(matrix, 2)), rel=0.02
    )


def test_structured_values_are_built_at_the_new_size() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "dirac": nn.Conv2d(16, 16, 3, bias=False),
            "grouped_dirac": nn.Conv2d(16, 16, 3, groups=4, bias=False),
            "eye": nn.Linear(16, 16),
            "upsample": nn.ConvTranspose2d(16, 16, 4, bias=False),
            "shuffle": nn.Conv2d(8, 64, 3, bias=False),
            "blur": nn.Conv2d(16, 16, 3, groups=16, bias=False),
            "embed": nn.Embedding(9, 16, padding_idx=2),
            "orthogonal": nn.Conv2d(16, 16, 1, bias=False),
        }
    )
    net.register_parameter("scale", nn.Parameter(torch.full((16,), 1e-6)))
    init.dirac_(net["dirac"].weight)
    init.dirac_(net["grouped_dirac"].weight, groups=4)
    init.eye_(net["eye"].weight)
    kernel = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 16
    net["upsample"].weight.data.zero_()[range(16), range(16)] = kernel
    net["shuffle"].weight.data = init.kaiming_normal_(torch.empty(16, 8, 3, 3)).repeat_interleave(
        4, 0
    )
    net["blur"].weight.data[:] = kernel[:3, :3]
    init.orthogonal_(net["orthogonal"].weight, 0.7)
    schemes = infer_schemes(net)
    small = {
        "dirac": (6, 6),
        "grouped_dirac": (8, 2),
        "eye": (6, 6),
        "upsample": (6, 6),
        "shuffle": (24, 8),
        "blur": (6, 1),
        "embed": (9, 6),
        "orthogonal": (6, 6),
    }
    for name, (a, b) in small.items():
        net[name].weight.data = net[name].weight.data[:a, :b]
    net.scale.data = net.scale.data[:6]
    schemes.redraw(net, generator())
    expected = torch.zeros(6, 6, 3, 3)
    assert torch.equal(net["dirac"].weight, init.dirac_(expected))
    assert torch.equal(net["grouped_dirac"].weight, init.dirac_(torch.zeros(8, 2, 3, 3), groups=4))
    assert torch.equal(net["eye"].weight, torch.eye(6))
    assert torch.equal(net["upsample"].weight.sum(1), kernel.expand(6, 4, 4))
    assert torch.equal(net["shuffle"].weight[0::4], net["shuffle"].weight[3::4])
    assert not torch.equal(net["shuffle"].weight[0], net["shuffle"].weight[4])
    assert float(net["shuffle"].weight.detach().std()) == pytest.approx(math.sqrt(2 / 72), rel=0.2)
    assert torch.equal(net["blur"].weight, kernel[:3, :3].expand(6, 1, 3, 3))
    assert net["embed"].weight[2].eq(0).all()
    assert float(net["embed"].weight.detach().std()) == pytest.approx(math.sqrt(8 / 9), rel=0.3)
    assert torch.equal(net.scale, torch.full((6,), 1e-6))
    matrix = net["orthogonal"].weight.detach().flatten(1)
    assert torch.allclose(matrix @ matrix.T, 0.49 * torch.eye(6), atol=1e-5)


def test_a_mean_other_than_zero_is_kept() -> None:
    torch.manual_seed(0)
    net = nn.ParameterList([nn.Parameter(torch.rand(60, 20) + 0.5) for _ in range(3)])
    schemes = infer_schemes(net)
    for part in net:
        part.data = part.data[:, :10]
    schemes.redraw(net, generator())
    drawn = torch.cat([part.detach() for part in net])
    assert 0.49 < float(drawn.min()) < 0.52
    assert 1.48 < float(drawn.max()) < 1.51


class OwnReset(nn.Module):
    """A stranger's layer that knows how to initialise itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 3, 100))
        self.scale = nn.Parameter(torch.empty(width))
        self.inner = nn.Linear(3, 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.uniform_(self.weight, -7, 7)
        init.constant_(self.scale, 2.0)
        init.constant_(self.inner.weight, 9.0)


def test_a_layer_with_unreadable_values_resets_itself_and_nothing_else() -> None:
    net = OwnReset(4)
    net.inner.weight.data.fill_(1)
    net.weight.data[0] = math.nan
    weight = net.weight
    infer_schemes(net).redraw(net, generator())
    assert net.weight is weight
    assert float(weight.detach().abs().max()) == pytest.approx(7, rel=0.01)
    assert net.inner.weight.eq(1).all()


def test_a_reset_that_fails_leaves_the_values_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(OwnReset):
        def reset_parameters(self) -> None:
            self.weight.data.fill_(5)
            if self.weight.shape[0] < 4:
                raise RuntimeError("4 channels are hard-coded")

    net = Broken(4)
    net.weight.data.fill_(math.nan)
    schemes = infer_schemes(net)
    net.weight.data = torch.ones(3, 3, 100)
    with caplog.at_level(logging.WARNING, logger="pocketize"):
        schemes.redraw(net, generator())
    assert net.weight.eq(1).all()
    assert "4 channels are hard-coded" in caplog.text


def test_init_has_the_last_word_and_draws_from_the_generator() -> None:
    def init_fn(model: nn.Module) -> None:
        for name, part in model.named_parameters():
            if name.startswith("body.2"):
                init.normal_(part, 5, 0.1)

    net = build(FULL, INITS["torch_default"])
    schemes = infer_schemes(net)
    state = torch.get_rng_state()
    schemes.redraw(net, generator(5), init_fn)
    assert torch.equal(torch.get_rng_state(), state)
    first = values(net)
    assert float(first["body.2.weight"].mean()) == pytest.approx(5, rel=0.01)
    assert float(first["body.5.weight"].abs().max()) < 0.1
    schemes.redraw(net, generator(5), init_fn)
    assert torch.equal(values(net)["body.2.weight"], first["body.2.weight"])


def test_trained_layers_get_the_default_of_their_type() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.PReLU(),
        nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 1, 3),
    )
    net.apply(INITS["kaiming_normal_fan_in"])
    assert not infer_schemes(net).trained
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(20):
        image = torch.rand(2, 1, 16, 16)
        loss = (net(image) - image[..., 3:-3, 3:-3].square()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schemes = infer_schemes(net)
    assert schemes.trained
    schemes.redraw(net, generator())
    for layer in (net[0], net[3], net[6]):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)
        assert layer.bias.abs().max() <= bound
    assert net[1].weight.eq(1).all()
    assert net[1].bias.eq(0).all()
    assert net[2].weight.eq(0.25).all()
    assert schemes.by_name["3.weight"] == Reset("its values match no scheme")


def test_fresh_values_without_a_scheme_stay_unless_they_were_resized() -> None:
    """A positional table that somebody computed: as good as any while its size is the same."""
    net = nn.Sequential(nn.Conv2d(4, 300, 3), nn.Conv2d(300, 4, 3))
    table = torch.sin(torch.outer(torch.arange(40.0), torch.logspace(0, -2, 30)))
    net.register_parameter("table", nn.Parameter(table.clone()))
    schemes = infer_schemes(net)
    schemes.redraw(net, generator())
    assert torch.equal(net.table, table)
    net.table.data = net.table.data[:, :15]
    schemes.redraw(net, generator())
    assert not torch.equal(net.table, table[:, :15])
    assert "samples of its own values" in str(schemes.by_name["table"])


@pytest.mark.parametrize("fake", [False, True])
def test_tensors_without_values_have_schemes_and_are_left_alone(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.device("meta"):
        net = Net(POCKET)
    schemes = infer_schemes(net)
    assert schemes.by_name["body.2.weight"] == Reset("its values cannot be read")
    shapes = {name: p.shape for name, p in net.named_parameters()}
    schemes.redraw(net, generator())
    assert {name: p.shape for name, p in net.named_parameters()} == shapes


def test_values_that_are_not_finite_are_replaced() -> None:
    net = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    net[0].weight.data[3, 3] = math.nan
    schemes = infer_schemes(net)
    schemes.redraw(net, generator())
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert float(net[0].weight.detach().abs().max()) <= 1 / math.sqrt(30)


def test_parameters_that_a_rewrite_added_get_the_default_of_their_layer() -> None:
    net = nn.Sequential(nn.Linear(30, 40))
    schemes = infer_schemes(net)
    net.append(nn.Linear(100, 4))
    net[1].weight.data.fill_(9)
    schemes.redraw(net, generator())
    assert float(net[1].weight.detach().abs().max()) <= 0.1


def test_statistics_of_large_tensors_come_from_a_bounded_sample() -> None:
    taken = sample(torch.arange(5_000_000.0))
    assert SAMPLE / 2 < len(taken) <= SAMPLE
    assert taken[-1] > 4.9e6
