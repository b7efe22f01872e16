"""Per layer, redrawn weights have the mean and deviation of a net built by hand at that width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init

from pocketize.initial import infer_laws

from .builds import CONSTANT_SCALE, FULL, INITS, POCKET, Net, build, disagreements, shrink, values

DRAWS = 12


def by_hand(name: str, dims: int = 2) -> list[dict[str, Tensor]]:
    return [values(build(POCKET, INITS[name], dims, seed=100 + seed)) for seed in range(DRAWS)]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", INITS)
def test_redrawn_layers_match_the_same_layers_built_by_hand(name: str, dims: int) -> None:
    full = build(FULL, INITS[name], dims)
    laws = infer_laws(full)
    small = shrink(full, Net(POCKET, dims))
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(DRAWS):
        laws.redraw(small, generator=generator)
        drawn.append(values(small))
    wrong = disagreements(drawn, by_hand(name, dims))
    assert wrong == [], {key: laws.explain(key) for key in wrong}


@pytest.mark.parametrize("name", sorted(set(INITS) - CONSTANT_SCALE))
def test_the_comparison_rejects_sliced_weights_and_kept_deviations(name: str) -> None:
    truth = by_hand(name)
    resized = {"body.2.weight", "body.5.weight", "body.9.weight"}
    fulls = [build(FULL, INITS[name], seed=seed) for seed in range(DRAWS)]
    sliced = [values(shrink(full, Net(POCKET))) for full in fulls]
    assert resized <= set(disagreements(sliced, truth))
    torch.manual_seed(0)
    kept = [
        {
            key: torch.randn_like(part) * values(full)[key].std(correction=0)
            for key, part in draw.items()
        }
        for full, draw in zip(fulls, truth, strict=True)
    ]
    assert resized <= set(disagreements(kept, truth))


def test_the_comparison_rejects_a_wrong_fan() -> None:
    """Kaiming by fan_out instead of fan_in: equal where a layer is square, off where it is not."""
    ours = [
        values(build(POCKET, INITS["kaiming_normal_fan_out"], seed=seed)) for seed in range(DRAWS)
    ]
    wrong = disagreements(ours, by_hand("kaiming_normal_fan_in"))
    assert "body.9.weight" in wrong
    assert "body.5.weight" not in wrong


def test_the_original_alone_decides_when_many_originals_are_pooled() -> None:
    """Small layers tell little about their law; over seeds, none is drawn with a bias."""
    truth = by_hand("torch_default")
    drawn = []
    for seed in range(DRAWS):
        full = build(FULL, INITS["torch_default"], seed=seed)
        small = shrink(full, Net(POCKET))
        infer_laws(full).redraw(small, generator=torch.Generator().manual_seed(seed))
        drawn.append(values(small))
    assert disagreements(drawn, truth) == []


@pytest.mark.parametrize(
    ("name", "parameter", "expected"),
    [
        ("torch_default", "body.5.weight", "kaiming_uniform(fan_in, gain 0.5774), from 8 tensors"),
        ("kaiming_normal_fan_in", "body.5.weight", "kaiming_normal(fan_in, gain 1.414), from"),
        ("kaiming_normal_fan_out", "body.9.weight", "kaiming_normal(fan_out, gain 1.414), from"),
        ("xavier_uniform", "body.9.weight", "xavier_uniform(gain 1), from"),
        ("trunc_normal_0.02", "head.0.weight", "normal(mean 0, std 0.02), from"),
        ("uniform_0.07", "head.0.weight", "uniform(-0.07, 0.07), from 2 tensors"),
        ("orthogonal", "body.5.weight", "orthogonal(gain 1.3)"),
        ("xavier_normal_odd_gain", "body.2.bias", "constant(0.1)"),
        ("dcgan", "body.1.weight", "normal(mean 1, std 0.02), from 3 tensors"),
        ("lecun_truncated", "body.9.weight", "kaiming_trunc_normal(fan_in, gain 1), from"),
        ("scaled_kaiming", "body.5.weight", "kaiming_normal(fan_in, gain 0.40"),
    ],
)
def test_the_law_found_is_explained_with_its_scale(
    name: str, parameter: str, expected: str
) -> None:
    assert infer_laws(build(FULL, INITS[name])).explain(parameter).startswith(expected)


def test_laws_of_encoder_and_decoder_are_told_apart() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(8 * i, 24 + 4 * i, 3) for i in range(1, 9)])
    for layer in net[:4]:
        init.kaiming_normal_(layer.weight, mode="fan_out")
    laws = infer_laws(net)
    assert laws.explain("0.weight").startswith("kaiming_normal(fan_out, gain 1.414), from 4")
    assert laws.explain("7.weight").startswith("kaiming_uniform(fan_in, gain 0.5774), from 4")


def test_one_layer_alone_is_read_as_the_nearest_usual_law() -> None:
    torch.manual_seed(0)
    alone = nn.Linear(300, 200)
    init.kaiming_normal_(alone.weight)
    assert infer_laws(alone).explain("weight").startswith("kaiming_normal(fan_in, gain 1.414)")
    init.normal_(alone.weight, 0, 0.01234)
    text = infer_laws(alone).explain("weight")
    assert text.startswith("normal(mean 0, std 0.012")
    assert text.endswith("from this tensor alone")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounded_values_give_the_same_laws(dtype: torch.dtype) -> None:
    for name in ("torch_default", "kaiming_normal_fan_in", "orthogonal"):
        exact = build(FULL, INITS[name])
        laws, rounded = infer_laws(exact), infer_laws(build(FULL, INITS[name]).to(dtype))
        for key in ("body.5.weight", "head.0.weight", "body.9.weight"):
            assert rounded.explain(key)[:28] == laws.explain(key)[:28]


def test_a_fan_in_squared_law_of_complex_weights_is_found() -> None:
    """Fourier neural operators: scale / (in * out), uniform between 0 and that, both parts."""

    class Spectral(nn.Module):
        def __init__(self, inner: int, outer: int) -> None:
            super().__init__()
            scale = 1 / (inner * outer)
            self.weight = nn.Parameter(scale * torch.rand(inner, outer, 6, 6, dtype=torch.cfloat))

    torch.manual_seed(0)
    laws = infer_laws(nn.Sequential(*[Spectral(8 * i, 8 + 4 * i) for i in range(1, 6)]))
    small = nn.Sequential(*[Spectral(6, 7) for _ in range(5)])
    laws.redraw(small, generator=torch.Generator().manual_seed(0))
    drawn = torch.view_as_real(small[3].weight.detach())
    assert drawn.min() >= 0
    assert float(drawn.max()) == pytest.approx(1 / 42, rel=0.02)
    assert math.isclose(float(drawn.mean()), 0.5 / 42, rel_tol=0.05)


class Others(nn.Module):
    """Layer types that each have a default of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, add_bias_kv=True)
        self.lstm = nn.LSTM(2 * width, width)
        self.cell = nn.GRUCell(3, width)
        self.bilinear = nn.Bilinear(width, 6, width)
        self.embedding = nn.Embedding(30, width)
        self.slope = nn.PReLU(width, init=0.1)
        self.table = nn.Parameter(init.trunc_normal_(torch.empty(1, 50, width), std=0.02))
        self.query = nn.Parameter(torch.randn(4, 10, width) * width**-0.5)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))


def test_other_layer_types_and_raw_parameters_match_those_built_by_hand() -> None:
    torch.manual_seed(1)
    full = Others(40)
    laws = infer_laws(full)
    truth = [values(Others(8)) for _ in range(DRAWS)]
    small = shrink(full, Others(8))
    small.lstm.hidden_size = small.cell.hidden_size = 8
    drawn = []
    for seed in range(DRAWS):
        laws.redraw(small, generator=torch.Generator().manual_seed(seed))
        drawn.append(values(small))
    wrong = disagreements(drawn, truth)
    assert wrong == [], {key: laws.explain(key) for key in wrong}
