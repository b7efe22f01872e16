"""A rewrite that holds in several settings of a model's attributes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from pocketize import (
    analyse,
    apply_recipe,
    history,
    load,
    plan,
    pocketize,
    recipe,
    rewrite,
    save,
)
from pocketize.cli import main
from pocketize.errors import CaptureError, OptionError, RecipeError, UnreadWarning
from pocketize.graph.inputs import Inputs
from pocketize.graph.settings import settings_on
from pocketize.plugin.recipe import dump_recipe, load_recipe, load_variants

X = torch.randn(2, 1, 8, 8)
BOTH: list[dict[str, Any]] = [{"decoder.deep": True}, {"decoder.deep": False}]


class Decoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep = True
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(width, 2, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        out = []
        for stage, norm, head in zip(self.stages, self.norms, self.heads, strict=True):
            x = nn.functional.leaky_relu(norm(stage(x)))
            if self.deep or head is self.heads[-1]:
                out.append(head(x))
        return out[::-1] if self.deep else out[-1]


class Net(nn.Module):
    """Like nnU-Net's: what the forward returns and reads depends on an attribute."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.enter = nn.Conv2d(4, width, 3, stride=2, padding=1)
        self.decoder = Decoder(width)

    def forward(self, x: Tensor) -> Any:
        return self.decoder(torch.relu(self.enter(torch.relu(self.stem(x)))))


def net(deep: bool, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net()
    made.decoder.deep = deep
    return made


def step(model: nn.Module, deep: bool) -> list[Tensor]:
    """Outputs and gradients of a training step in double precision."""
    model = copy.deepcopy(model).double().train()
    model.decoder.deep = deep
    outputs = model(X.double())
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(o.square().sum() for o in outputs).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [o.detach() for o in outputs] + grads


@pytest.mark.parametrize("deep", [False, True])
def test_heads_that_one_variant_reads_are_resized_in_the_other(deep: bool) -> None:
    model = net(deep)
    small: Any = pocketize(model, inputs=X, variants=BOTH)
    other = pocketize(net(not deep), inputs=X, variants=BOTH)
    for a, b in zip(small.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [head.in_channels for head in small.decoder.heads] == [4, 4]
    assert small.decoder.deep is model.decoder.deep is deep
    for setting, kind in ((True, list), (False, Tensor)):
        small.decoder.deep = setting
        assert isinstance(small(X), kind)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "passes", [["recompute:min_bytes=0,keep=level"], ["in-place-norm"], ["checkpoint:only=decoder"]]
)
def test_exact_passes_are_exact_in_both_variants(passes: Sequence[str], deep: bool) -> None:
    model = net(deep)
    lean = rewrite(model, passes=passes, inputs=X, variants=BOTH)
    assert history(lean)
    for setting in (False, True):
        for ours, theirs in zip(step(lean, setting), step(model, setting), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_without_variants_the_unread_heads_are_warned_of() -> None:
    model = net(False)
    with pytest.warns(UnreadWarning, match=r"reads decoder\.heads\.0\.weight, which may read"):
        small: Any = pocketize(model, inputs=X)
    assert small.decoder.heads[0].in_channels == 8  # as it was
    (record,) = history(small)
    assert "variants=[{'decoder.deep': True}]" in record.notes[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pocketize(model, inputs=X, variants=BOTH)
        pocketize(net(True), inputs=X)
        rewrite(model, "recompute:min_bytes=0", inputs=X)  # resizes nothing


def test_what_only_a_variant_couples_moves_together() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = False
            self.a, self.b = nn.Conv2d(1, 8, 1), nn.Conv2d(1, 8, 1)
            self.head = nn.Conv2d(16, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.head(torch.cat([a, a + b if self.add else b], 1))

    model = Skip()
    alone, united = analyse(model, X), analyse(model, X, variants=[{"add": True}])
    layers = [group.layers for group in alone.groups if group.frozen is None]
    assert layers == [("a",), ("b",)]
    layers = [group.layers for group in united.groups if group.frozen is None]
    assert layers == [("a", "b")]
    assert model.add is False


def test_a_channel_that_only_a_variant_returns_is_not_dropped() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = False
            self.body, self.head = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.body(x)
            return (self.head(x), x) if self.features else self.head(x)

    (group,) = (
        g
        for g in analyse(Features(), X, variants=[{"features": True}]).groups
        if g.layers[0] == "body"
    )
    assert group.frozen == "it reaches the model's output"


def test_a_variant_that_a_pass_breaks_is_refused_with_its_name() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = False
            self.conv, self.norm = nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x))
            return nn.functional.leaky_relu(x, 0.2 if self.linear else 0.01)

    planned = plan(Norms(), "in-place-norm", inputs=X, variants=[{"linear": True}])
    assert planned.passes[0].edits == ()
    (refusal,) = planned.passes[0].refused
    assert (
        refusal.why
        == "other code follows it in evaluation mode with linear=True than in training mode"
    )


def test_a_variant_that_does_not_run_says_which() -> None:
    class Broken(nn.Sequential):
        deep = False

        def forward(self, x: Tensor) -> Tensor:
            if self.deep:
                raise ValueError("no heads")
            return super().forward(x)

    model = Broken(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1, 1))
    with pytest.raises(CaptureError, match=r"with deep=True: ValueError in the model.*no heads"):
        pocketize(model, inputs=X, variants=[{"deep": True}])
    assert "deep" not in vars(model)


@pytest.mark.parametrize(
    ("variants", "text"),
    [
        ([{"decoder.depe": True}], r"has no attribute 'depe'.*deep"),
        ([{"decodr.deep": True}], r"has no module 'decodr'.*decoder"),
        ([{"decoder.deep": "false"}], r"decoder.deep=True there, a bool"),
        ([{"decoder.stages": None}], r"holds a ModuleList"),
        ([{"stem.weight": None}], r"holds a Parameter"),
        ({"decoder.deep": True}, "takes a list of mappings"),
        ("decoder.deep", "takes a list of mappings"),
        (["decoder.deep"], "takes a list of mappings"),
    ],
)
def test_what_is_no_variant_is_a_clear_error(variants: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        rewrite(net(True), "pocket", inputs=X, variants=variants)


def test_attributes_are_put_back_whatever_happens() -> None:
    class Odd(nn.Module):
        shared = 1

        @property
        def doubled(self) -> int:
            return self.half * 2

        @doubled.setter
        def doubled(self, value: int) -> None:
            self.half = value // 2

    model = Odd()
    model.own, model.half = True, 2
    before = dict(vars(model))
    try:
        with settings_on(model, {"own": False, "shared": 2, "doubled": 8}):
            assert (model.own, model.shared, model.doubled) == (False, 2, 8)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert vars(model) == before
    with pytest.raises(AttributeError), settings_on(model, {"own": False, "none": 1}):
        pass
    assert vars(model) == before


def test_a_call_of_a_variant_says_so() -> None:
    call = Inputs((X,), settings={"decoder.deep": False})
    assert call.describe() == "2x1x8x8 float32 with decoder.deep=False"
    model = net(True)
    assert isinstance(call.map(lambda t: t + 1).call(model), Tensor)
    assert model.decoder.deep


def test_recipes_keep_variants(tmp_path: Path) -> None:
    model = net(True)
    planned = plan(model, "pocket", inputs=X, variants=BOTH)
    path = tmp_path / "recipe.toml"
    path.write_text(dump_recipe([planned.passes[0].rewrite], BOTH), encoding="utf-8")
    passes, variants = load_variants(path)
    assert variants == tuple(BOTH)
    small = rewrite(model, passes=passes, variants=variants, inputs=X)
    (record,) = history(small)
    assert record.variants == ({"decoder.deep": False},)  # and as it is
    save(small, tmp_path / "small.safetensors")
    assert history(load(tmp_path / "small.safetensors", lambda: net(False))) == history(small)
    data = recipe(small)
    again = apply_recipe(net(False, seed=1), data, weights=small.state_dict())
    assert history(again) == history(small)
    again.decoder.deep = True
    assert all(map(torch.equal, again(X), small(X)))
    with pytest.raises(RecipeError, match="has variants, and only its passes were asked for"):
        load_recipe(path)


def test_a_recipe_may_say_paths_without_quotes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    variants = "[{ decoder.deep = true }, { decoder.deep = false }]"
    path.write_text(f'variants = {variants}\n[[pass]]\nname = "pocket"\n', encoding="utf-8")
    assert load_variants(path)[1] == tuple(BOTH)
    path.write_text('variants = { decoder.deep = true }\n[[pass]]\nname = "pocket"\n')
    with pytest.raises(RecipeError, match="write variants as a list"):
        load_variants(path)


def nnunet(deep: bool) -> nn.Module:
    torch.manual_seed(0)
    return PlainConvUNet(
        input_channels=1,
        n_stages=3,
        features_per_stage=[4, 8, 16],
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=[1, 2, 2],
        n_conv_per_stage=1,
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep,
    )


@pytest.mark.slow  # two plans of a real network
@pytest.mark.parametrize("deep", [False, True])
def test_nnunet_trains_with_deep_supervision_and_predicts_without(deep: bool) -> None:
    x, name = torch.randn(2, 1, 16, 16), "decoder.deep_supervision"
    variants = [{name: True}, {name: False}]
    small: Any = pocketize(nnunet(deep), inputs=x, variants=variants)
    assert [head.in_channels for head in small.decoder.seg_layers] == [4, 4]
    assert small.decoder.deep_supervision is deep
    small.decoder.deep_supervision = True
    outputs = small(x)
    assert [tuple(o.shape) for o in outputs] == [(2, 2, 16, 16), (2, 2, 8, 8)]
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None for p in small.decoder.seg_layers.parameters())
    # what is built for prediction takes the recipe and the weights of what was trained
    again: Any = apply_recipe(nnunet(not deep), recipe(small), weights=small.state_dict())
    again.decoder.deep_supervision = False
    small.decoder.deep_supervision = False
    assert torch.equal(again.eval()(x), small.eval()(x))


@pytest.mark.slow  # a command
def test_the_command_line_warns_and_takes_a_recipe_with_variants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "dynamic_network_architectures.architectures.unet:PlainConvUNet"
    kwargs = tmp_path / "net.toml"
    kwargs.write_text(
        "input_channels = 1\nn_stages = 2\nfeatures_per_stage = [4, 8]\nkernel_sizes = 3\n"
        "strides = [1, 2]\nn_conv_per_stage = 1\nnum_classes = 2\nn_conv_per_stage_decoder = 1\n"
        'conv_op = "torch.nn.Conv2d"\nnonlin = "torch.nn.ReLU"\ndeep_supervision = true\n',
        encoding="utf-8",
    )
    words = ["plan", name, "--kwargs", str(kwargs), "--input", "1x1x16x16"]
    path = tmp_path / "recipe.toml"
    path.write_text(
        'variants = [{ decoder.deep_supervision = false }]\n[[pass]]\nname = "pocket"\n',
        encoding="utf-8",
    )
    assert main([*words, "--recipe", str(path)]) == 0
    assert "warning" not in capsys.readouterr().err
    path.write_text('variants = [{ decoder.deep = false }]\n[[pass]]\nname = "pocket"\n')
    assert main([*words, "--recipe", str(path)]) == 2
    assert "has no attribute 'deep'" in capsys.readouterr().err


def test_the_command_line_shows_a_warning_without_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: Any) -> int:
        warnings.simplefilter("always")
        warnings.warn("no recorded forward reads x", UnreadWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("pocketize.cli.listing.run_passes", warn)
    assert main(["passes"]) == 0
    shown = capsys.readouterr().err
    assert "warning: no recorded forward reads x" in shown
    assert "UnreadWarning" not in shown
