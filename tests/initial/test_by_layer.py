"""Per layer, redrawn weights have the mean and deviation of a net built by hand at that width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init

from pocketize.initial import infer_schemes
from pocketize.initial.schemes import Constant, Orthogonal, Random

from .builds import CONSTANT_SCALE, FULL, INITS, POCKET, Net, build, disagreements, shrink, values

DRAWS = 12


def by_hand(name: str, dims: int = 2) -> list[dict[str, Tensor]]:
    return [values(build(POCKET, INITS[name], dims, seed=100 + seed)) for seed in range(DRAWS)]


@pytest.mark.each_value
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", INITS)
def test_redrawn_layers_match_the_same_layers_built_by_hand(name: str, dims: int) -> None:
    full = build(FULL, INITS[name], dims)
    schemes = infer_schemes(full)
    small = shrink(full, Net(POCKET, dims))
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(DRAWS):
        schemes.redraw(small, generator)
        drawn.append(values(small))
    wrong = disagreements(drawn, by_hand(name, dims))
    assert wrong == [], {key: schemes.by_name[key] for key in wrong}


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


@pytest.mark.slow
def test_the_original_alone_decides_when_many_originals_are_pooled() -> None:
    """Small layers tell little about their scheme; over seeds, none is drawn with a bias."""
    truth = by_hand("torch_default")
    drawn = []
    for seed in range(DRAWS):
        full = build(FULL, INITS["torch_default"], seed=seed)
        small = shrink(full, Net(POCKET))
        infer_schemes(full).redraw(small, torch.Generator().manual_seed(seed))
        drawn.append(values(small))
    assert disagreements(drawn, truth) == []


@pytest.mark.parametrize(
    ("name", "parameter", "distribution", "fan", "gain"),
    [
        ("torch_default", "body.5.weight", "uniform", "fan_in", 3**-0.5),
        ("kaiming_normal_fan_in", "body.5.weight", "normal", "fan_in", 2**0.5),
        ("kaiming_normal_fan_out", "body.9.weight", "normal", "fan_out", 2**0.5),
        ("xavier_uniform", "body.9.weight", "uniform", "fan_avg", 1),
        ("trunc_normal_0.02", "head.0.weight", "normal", "constant", 0.02),
        ("uniform_0.07", "head.0.weight", "uniform", "constant", 0.07 / 3**0.5),
        ("dcgan", "body.1.weight", "normal", "constant", 0.02),
        ("lecun_truncated", "body.9.weight", "resampled", "fan_in", 1),
        ("scaled_kaiming", "body.5.weight", "normal", "fan_in", 0.289 * 2**0.5),
    ],
)
def test_distribution_fan_and_gain_are_found(
    name: str, parameter: str, distribution: str, fan: str, gain: float
) -> None:
    scheme = infer_schemes(build(FULL, INITS[name])).by_name[parameter]
    assert isinstance(scheme, Random)
    assert (scheme.distribution, scheme.fan) == (distribution, fan)
    assert scheme.gain == pytest.approx(gain, rel=0.02)


def test_constants_and_orthogonal_matrices_are_found() -> None:
    found = infer_schemes(build(FULL, INITS["xavier_normal_odd_gain"])).by_name
    assert found["body.2.bias"] == Constant(pytest.approx(0.1))
    found = infer_schemes(build(FULL, INITS["orthogonal"])).by_name
    assert found["body.5.weight"] == Orthogonal(pytest.approx(1.3))


def test_schemes_of_encoder_and_decoder_are_told_apart() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(8 * i, 24 + 4 * i, 3) for i in range(1, 9)])
    for layer in net[:4]:
        init.kaiming_normal_(layer.weight, mode="fan_out")
    found = infer_schemes(net).by_name
    assert [found[f"{i}.weight"].fan for i in range(8)] == ["fan_out"] * 4 + ["fan_in"] * 4
    assert found["0.weight"].source == "from 4 tensors"


def test_one_layer_alone_is_read_as_the_nearest_usual_scheme() -> None:
    torch.manual_seed(0)
    alone = nn.Linear(300, 200)
    init.kaiming_normal_(alone.weight)
    scheme = infer_schemes(alone).by_name["weight"]
    assert (scheme.fan, scheme.gain) == ("fan_in", 2**0.5)
    init.normal_(alone.weight, 0, 0.01234)
    scheme = infer_schemes(alone).by_name["weight"]
    assert (scheme.fan, scheme.gain) == ("constant", pytest.approx(0.01234, rel=0.02))
    assert scheme.source == "from this tensor alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounded_values_give_the_same_schemes(dtype: torch.dtype) -> None:
    for name in ("torch_default", "kaiming_normal_fan_in", "orthogonal"):
        exact = infer_schemes(build(FULL, INITS[name])).by_name
        rounded = infer_schemes(build(FULL, INITS[name]).to(dtype)).by_name
        for key in ("body.5.weight", "head.0.weight", "body.9.weight"):
            assert type(rounded[key]) is type(exact[key])
            assert rounded[key].gain == pytest.approx(exact[key].gain, rel=1e-3)
            assert name == "orthogonal" or rounded[key].fan == exact[key].fan


def test_a_scheme_of_complex_weights_by_the_product_of_channels_is_found() -> None:
    """Fourier neural operators: scale / (in * out), uniform between 0 and that, both parts."""

    class Spectral(nn.Module):
        def __init__(self, inner: int, outer: int) -> None:
            super().__init__()
            scale = 1 / (inner * outer)
            self.weight = nn.Parameter(scale * torch.rand(inner, outer, 6, 6, dtype=torch.cfloat))

    torch.manual_seed(0)
    schemes = infer_schemes(nn.Sequential(*[Spectral(8 * i, 8 + 4 * i) for i in range(1, 6)]))
    small = nn.Sequential(*[Spectral(6, 7) for _ in range(5)])
    schemes.redraw(small, torch.Generator().manual_seed(0))
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
    schemes = infer_schemes(full)
    truth = [values(Others(8)) for _ in range(DRAWS)]
    small = shrink(full, Others(8))
    small.lstm.hidden_size = small.cell.hidden_size = 8
    drawn = []
    for seed in range(DRAWS):
        schemes.redraw(small, torch.Generator().manual_seed(seed))
        drawn.append(values(small))
    wrong = disagreements(drawn, truth)
    assert wrong == [], {key: schemes.by_name[key] for key in wrong}
