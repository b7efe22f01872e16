"""Surgery: what it changes, what it leaves, and that an error comes before any change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from pocketize.engine.surgery import apply_edits
from pocketize.errors import RewriteError
from pocketize.graph.clone import clone, fake_clone
from pocketize.plugin.edits import Edit, Redraw, Resize, SetArgument, SetAttribute
from tests.contract.snapshot import Snapshot
from tests.models.reuse import legacy_weight_norm


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def keep(*indices: int, size: int = 8) -> dict[str, Any]:
    return {"keep": indices, "size": size}


def cut_chain(*indices: int) -> list[Edit]:
    kept = keep(*indices)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    return [Resize("3.weight", 1, **kept), *(Resize(name, 0, **kept) for name in names)]


IMAGE = torch.rand(2, 3, 8, 8)

# -- tensors -------------------------------------------------------------------------------------


def test_exactly_the_kept_indices_stay_in_parameters_and_buffers() -> None:
    model = chain()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_edits(model, cut_chain(1, 4, 6))
    kept = [1, 4, 6]
    for name, tensor in model.state_dict().items():
        if name in ("3.bias", "1.num_batches_tracked"):
            assert torch.equal(tensor, old[name])
        elif name == "3.weight":
            assert torch.equal(tensor, old[name][:, kept])
        else:
            assert torch.equal(tensor, old[name][kept])


def test_several_axes_of_one_tensor_are_cut_together() -> None:
    model = nn.Linear(6, 8)
    old = model.weight.detach().clone()
    edits = [Resize("weight", 0, **keep(0, 7)), Resize("weight", 1, **keep(2, 3, size=6))]
    apply_edits(model, [*edits, Resize("bias", 0, **keep(0, 7))])
    assert torch.equal(model.weight, old[[0, 7]][:, [2, 3]])
    assert (model.in_features, model.out_features) == (2, 2)


def test_gradients_are_cut_alike_and_missing_ones_stay_missing() -> None:
    model = chain()
    model[0].bias.requires_grad_(False)
    model(IMAGE).sum().backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    apply_edits(model, cut_chain(1, 4))
    assert gradients["0.bias"] is None
    assert model[0].bias.grad is None
    assert torch.equal(model[0].weight.grad, gradients["0.weight"][[1, 4]])
    assert torch.equal(model[3].weight.grad, gradients["3.weight"][:, [1, 4]])
    assert torch.equal(model[3].bias.grad, gradients["3.bias"])


def test_parameters_stay_the_objects_they_were_with_flags_hooks_and_marks() -> None:
    model = chain()
    model[1].weight.requires_grad_(False)
    weight = model[0].weight
    weight.no_weight_decay = True
    seen: list[tuple[int, ...]] = []
    weight.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    identities = [id(p) for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    apply_edits(model, cut_chain(0, 3))
    assert [id(p) for p in model.parameters()] == identities
    assert [p.requires_grad for p in model.parameters()] == flags
    assert isinstance(model[0].weight, nn.Parameter)
    assert weight.no_weight_decay
    model(IMAGE).sum().backward()
    assert seen == [(2, 3, 3, 3), (2, 3, 3, 3)]


def test_a_model_whose_last_graph_is_still_alive_can_be_trained_on() -> None:
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = model(IMAGE).square().mean()
    loss.backward()
    optimizer.step()
    apply_edits(model, cut_chain(0, 3))
    optimizer.zero_grad()
    again = model(IMAGE).square().mean()
    again.backward()
    optimizer.step()
    assert model(IMAGE).square().mean() < again
    assert loss.grad_fn is not None  # alive until here


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    edits = [Resize("0.weight", axis, **keep(0, 5)) for axis in (0, 1)]
    apply_edits(model, [*edits, Resize("0.bias", 0, **keep(0, 5))])
    assert model[1].weight is model[0].weight
    assert all((m.in_channels, m.out_channels) == (2, 2) for m in model)


@pytest.mark.parametrize(
    ("conv", "layout"),
    [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)],
)
def test_channels_last_stays(conv: Any, layout: torch.memory_format) -> None:
    model = conv(4, 8, 3).to(memory_format=layout)
    model(torch.rand(1, 4, *[5] * (model.weight.ndim - 2))).sum().backward()
    assert model.weight.is_contiguous(memory_format=layout)
    apply_edits(model, [Resize("weight", 0, **keep(0, 1, 5)), Resize("bias", 0, **keep(0, 1, 5))])
    for tensor in (model.weight, model.weight.grad):
        assert tensor.is_contiguous(memory_format=layout)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 8, bias=False, dtype=dtype)
    old = model.weight.detach().clone()
    apply_edits(model, [Resize("weight", 0, **keep(2, 3))])
    assert model.weight.dtype == dtype
    assert torch.equal(model.weight, old[2:4])


@pytest.mark.parametrize("training", [True, False])
def test_modes_hooks_and_classes_stay(training: bool) -> None:
    model = chain().train(training)
    model[1].train(not training)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    classes = [type(m) for m in model.modules()]
    apply_edits(model, cut_chain(0, 3))
    assert [type(m) for m in model.modules()] == classes
    assert (model.training, model[1].training) == (training, not training)
    model(IMAGE)
    assert calls == [1]


def test_surgery_works_without_memory() -> None:
    with torch.device("meta"):
        meta = chain()
    for model in (meta, fake_clone(chain(), FakeTensorMode(allow_non_fake_inputs=True))):
        apply_edits(model, cut_chain(0, 3))
        assert model[0].weight.shape == (2, 3, 3, 3)
        assert model[0].out_channels == 2


def test_surgery_under_inference_mode_gives_parameters_that_train() -> None:
    model = chain()
    with torch.inference_mode():
        apply_edits(model, cut_chain(0, 3))
    model(IMAGE).sum().backward()


# -- attributes of torch's layers ----------------------------------------------------------------

TWO = keep(0, 1)
WIDE = {"keep": (0, 1, 2), "size": 6}
LAYERS: dict[str, tuple[nn.Module, list[Edit], dict[str, Any]]] = {
    "conv1d": (nn.Conv1d(6, 8, 3), [Resize("weight", 0, **TWO), Resize("weight", 1, **WIDE)],
               {"in_channels": 3, "out_channels": 2}),
    "conv3d": (nn.Conv3d(6, 8, 3), [Resize("weight", 0, **TWO)],
               {"in_channels": 6, "out_channels": 2}),
    "grouped": (nn.Conv2d(8, 8, 3, groups=2), [Resize("weight", 0, keep=(0, 4), size=8),
                Resize("weight", 1, keep=(1, 2), size=4)],
                {"in_channels": 4, "out_channels": 2, "groups": 2}),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), [Resize("weight", 0, **TWO),
                  SetAttribute("", "groups", 8, 2)],
                  {"in_channels": 2, "out_channels": 2, "groups": 2}),
    "transposed": (nn.ConvTranspose2d(6, 8, 2), [Resize("weight", 0, **WIDE),
                   Resize("weight", 1, **TWO)], {"in_channels": 3, "out_channels": 2}),
    "transposed grouped": (nn.ConvTranspose1d(8, 8, 2, groups=4), [Resize("weight", 1, keep=(1,),
                           size=2)], {"in_channels": 8, "out_channels": 4}),
    "linear": (nn.Linear(6, 8), [Resize("weight", 0, **TWO), Resize("weight", 1, **WIDE)],
               {"in_features": 3, "out_features": 2}),
    "embedding": (nn.Embedding(9, 8), [Resize("weight", 1, **TWO)],
                  {"num_embeddings": 9, "embedding_dim": 2}),
    "batch norm": (nn.BatchNorm3d(8), [Resize(n, 0, **TWO) for n in ("weight", "running_mean")],
                   {"num_features": 2}),
    "norm of statistics": (nn.BatchNorm2d(8, affine=False), [Resize("running_var", 0, **TWO)],
                           {"num_features": 2}),
    "instance norm": (nn.InstanceNorm2d(8, affine=True), [Resize("weight", 0, **TWO)],
                      {"num_features": 2}),
    "group norm": (nn.GroupNorm(2, 8), [Resize("weight", 0, **TWO)],
                   {"num_channels": 2, "num_groups": 2}),
    "layer norm": (nn.LayerNorm(8), [Resize("weight", 0, **TWO)], {"normalized_shape": (2,)}),
    "layer norm of two": (nn.LayerNorm((8, 5)), [Resize("weight", 0, **TWO)],
                          {"normalized_shape": (2, 5)}),
    "rms norm": (nn.RMSNorm(8), [Resize("weight", 0, **TWO)], {"normalized_shape": (2,)}),
    "prelu": (nn.PReLU(8), [Resize("weight", 0, **TWO)], {"num_parameters": 2}),
    "attention": (nn.MultiheadAttention(8, 2), [Resize("in_proj_weight", 0, keep=(0, 4, 8, 12, 16,
                  20), size=24), Resize("in_proj_weight", 1, keep=(0, 4), size=8),
                  Resize("out_proj.weight", 0, keep=(0, 4), size=8)],
                  {"embed_dim": 2, "kdim": 2, "vdim": 2, "head_dim": 1, "num_heads": 2}),
    "attention of three": (nn.MultiheadAttention(8, 2, kdim=6, vdim=5), [Resize("k_proj_weight", 1,
                           **WIDE), Resize("out_proj.weight", 0, keep=(0, 1, 4, 5), size=8)],
                           {"embed_dim": 4, "kdim": 3, "vdim": 5, "head_dim": 2}),
    "weight norm": (parametrizations.weight_norm(nn.Conv2d(6, 8, 3)),
                    [Resize("parametrizations.weight.original0", 0, **TWO),
                     Resize("parametrizations.weight.original1", 0, **TWO)],
                    {"in_channels": 6, "out_channels": 2}),
    "spectral norm": (parametrizations.spectral_norm(nn.Linear(6, 8)),
                      [Resize("parametrizations.weight.original", 0, **TWO),
                       Resize("parametrizations.weight.0._u", 0, **TWO)],
                      {"in_features": 6, "out_features": 2}),
    "weight norm of old": (legacy_weight_norm(nn.Conv2d(6, 8, 3)),
                           [Resize("weight_v", 0, **TWO), Resize("weight_g", 0, **TWO)],
                           {"in_channels": 6, "out_channels": 2}),
    "spectral norm of old": (nn.utils.spectral_norm(nn.Conv2d(6, 8, 3)),
                             [Resize("weight_orig", 0, **TWO), Resize("weight_u", 0, **TWO)],
                             {"in_channels": 6, "out_channels": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_attributes_of_the_layer_follow(name: str) -> None:
    layer, edits, expected = LAYERS[name]
    layer = clone(layer)
    apply_edits(layer, edits)
    assert {key: getattr(layer, key) for key in expected} == expected


def test_what_was_not_cut_keeps_its_attributes() -> None:
    """A layer whose owner has given it odd ones on purpose, for instance."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4))
    model[1].in_features = 17
    apply_edits(model, [Resize("0.weight", 0, **TWO), Resize("0.bias", 0, **TWO)])
    assert model[1].in_features == 17


# -- attributes of owners ------------------------------------------------------------------------


class Sizes(NamedTuple):
    first: int
    second: int


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.width = 8
        self.sizes = [8, 16]
        self.pair = (8, 4)
        self.named = Sizes(8, 4)
        self.torch_size = torch.Size([8, 2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("width", 5),
        ("sizes.0", [5, 16]),
        ("pair.0", (5, 4)),
        ("named.0", Sizes(5, 4)),
        ("torch_size.0", torch.Size([5, 2])),
    ],
)
def test_an_attribute_changes_and_keeps_its_type(name: str, expected: Any) -> None:
    model = nn.Sequential(Owner())
    apply_edits(model, [SetAttribute("0", name, 8, 5)])
    found = getattr(model[0], name.partition(".")[0])
    assert found == expected
    assert type(found) is type(expected)


def test_a_list_that_the_caller_holds_is_not_written_to() -> None:
    model = Owner()
    held = model.sizes
    apply_edits(model, [SetAttribute("", "sizes.0", 8, 5)])
    assert held == [8, 16]


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([Resize("conv.wait", 0, **TWO)], r"no such parameter or buffer.*'conv.weight'"),
        ([Resize("conv.weight", 0, **keep(0, size=9))], "expected size 9, got shape .8, 3, 1, 1"),
        ([Resize("conv.weight", 4, **TWO)], "axis 4 of conv.weight"),
        ([Resize("conv.weight", -1, **keep(0, size=1))], "axis -1 of conv.weight"),
        ([Resize("conv.weight", 0, **keep())], "ascending, at least one, and below 8"),
        ([Resize("conv.weight", 0, **keep(1, 0))], "ascending"),
        ([Resize("conv.weight", 0, **keep(0, 0))], "ascending"),
        ([Resize("conv.weight", 0, **keep(-1, 0))], "below 8"),
        ([Resize("conv.weight", 0, **keep(0, 8))], "below 8"),
        ([Resize("conv.bias", 0, **TWO), Resize("conv.bias", 0, **TWO)], "resized twice"),
        ([SetAttribute("cunv", "stride", 1, 2)], "cannot change 'cunv'.*no attribute"),
        ([SetAttribute("", "width", 9, 2)], "width of the model to 2: expected 9, found 8"),
        ([SetAttribute("", "missing", 9, 2)], "expected 9, found None"),
        ([SetAttribute("", "width.0", 8, 2)], "expected 8, found None"),
        ([SetAttribute("", "pair.7", 8, 2)], "expected 8, found None"),
        ([SetArgument("", "view", "size", (8,), (2,))], "it is a Owner, not a GraphModule"),
        ([Edit()], "no surgery for an edit of kind Edit"),
    ],
)
def test_an_error_comes_before_any_change(wrong: Sequence[Edit], says: str) -> None:
    model = Owner()
    model.conv(IMAGE).sum().backward()
    before = Snapshot(model)
    good = [Resize("conv.weight", 0, **TWO)] if "weight" not in str(wrong) else []
    good += [SetAttribute("", "named.0", 8, 2)]
    with pytest.raises(RewriteError, match=says):
        apply_edits(model, [*good, *wrong])
    assert list(before.differences(Snapshot(model))) == []
    assert model.named == Sizes(8, 4)


def test_a_literal_of_a_graph_module_changes_and_the_code_follows() -> None:
    class Viewed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.view.default(x, [2, 8, -1])

    model = fx.symbolic_trace(Viewed())
    apply_edits(model, [SetArgument("", "view_default", "size", (2, 8, -1), (2, 4, -1))])
    assert model(torch.rand(2, 4, 3, 3)).shape == (2, 4, 9)
    with pytest.raises(RewriteError, match=r"expected \(2, 8, -1\), found \[2, 4, -1\]"):
        apply_edits(model, [SetArgument("", "view_default", "size", (2, 8, -1), (2, 4, -1))])


def test_weights_are_drawn_anew_after_the_cut_with_the_generator_given() -> None:
    models = [chain() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        generator = torch.Generator().manual_seed(seed)
        apply_edits(model, [*cut_chain(0, 3), Redraw()], generator=generator)
        assert model[0].weight.shape == (2, 3, 3, 3)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert not torch.equal(models[0][0].weight, models[2][0].weight)
