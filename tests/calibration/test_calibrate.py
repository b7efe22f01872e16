"""Calibration brings a rewritten network's outputs near to the large one's, and says how near."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pocketize import Calibration, history, load, rewrite, save
from pocketize.calibration import calibrate
from pocketize.calibration.result import CalibratedNetwork
from pocketize.errors import InputError, NoEffectWarning, OptionError, RewriteError
from pocketize.passes import Amp, Bottleneck, Patchwise, Recompute, Width

HALF = Width(0.5)


class Net(nn.Module):
    """A U-Net of two levels: strided, transposed, depthwise, with every kind of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.group = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.down, self.norm = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.deep, self.instance = nn.Conv2d(16, 16, 1), nn.InstanceNorm2d(16, affine=True)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.group(self.first(x)), 0.1)
        y = F.leaky_relu(self.norm(self.down(x)), 0.1)
        y = F.leaky_relu(self.instance(self.deep(y)), 0.1)
        return self.last(torch.cat((self.up(y), x), 1))


def images(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, 16, 20, generator=draw).cumsum(-1) for _ in range(count)]


def trained() -> nn.Module:
    torch.manual_seed(0)
    net = Net().train()
    for x in images():
        net(x)  # running statistics
    return net.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_one_channel_of_many_that_are_alike_is_enough() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 3, 3))
    small = rewrite(net, HALF, inputs=images()[0])
    found = calibrate(net, small, images())
    assert found.before > 0.1
    assert found.after < 1e-3
    again = calibrate(net, small, images(), memory=1000)  # one channel at a time
    assert again.after < 1e-3
    assert found.summary.startswith("calibrated on 3 images: outputs differ by 0.1% (was ")


@pytest.mark.slow
def test_every_layer_is_solved_and_neither_network_changes() -> None:
    net = trained()
    small = rewrite(net, HALF, inputs=images()[0]).train()
    before, after = state(net), state(small)
    told: list[str] = []
    found = calibrate(net, small, iter(images()), progress=told.append)
    assert found.after < 0.8 * found.before
    assert {layer.path for layer in found.layers} == {name for name, _ in net.named_children()}
    for layer in found.layers:
        assert layer.before is not None
        assert layer.after is not None
        assert layer.after <= layer.before * 1.01
    assert told[0] == "first (layer 1 of 8)"
    assert "first" in str(found)
    for model, was in ((net, before), (small, after)):
        assert all(torch.equal(was[name], tensor) for name, tensor in model.state_dict().items())
    assert small.training
    assert found.model.training
    assert not net.training
    assert all(not module._forward_hooks for module in net.modules())
    again = calibrate(net, small, images())
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.slow
def test_statistics_of_batch_norms_are_those_of_the_images() -> None:
    net = trained()
    small = rewrite(net, HALF, inputs=images()[0])
    made: Any = calibrate(net, small, images()).model
    seen: list[Tensor] = []
    made.down.register_forward_hook(lambda *given: seen.append(given[2]))
    for x in images():
        made(x)
    values = torch.cat([y.movedim(1, -1).flatten(0, -2) for y in seen])
    assert torch.allclose(made.norm.running_mean, values.mean(0), atol=1e-4)
    assert torch.allclose(made.norm.running_var, values.var(0), rtol=1e-4)


@pytest.mark.slow
def test_a_saved_network_is_calibrated_by_what_it_remembers(tmp_path: Path) -> None:
    net = trained()
    small = rewrite(net, HALF, inputs=images()[0])
    save(small, tmp_path / "small.safetensors")
    found = calibrate(net, load(tmp_path / "small.safetensors", trained), images())
    assert found.after == pytest.approx(calibrate(net, small, images()).after)


class Odd(nn.Module):
    """A layer called twice, some with a shared weight or bias, one with a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1)
        self.computed = weight_norm(nn.Conv2d(8, 8, 1))
        self.one, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other.weight = self.one.weight
        self.third, self.fourth = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fourth.bias = self.third.bias
        self.last = nn.Conv2d(8, 8, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)))
        return self.last(self.fourth(self.third(self.other(self.one(self.computed(x))))))


@pytest.mark.slow
def test_what_cannot_be_solved_is_listed_with_the_reason() -> None:
    net = Odd()
    swap = Bottleneck(activations="any", min_channels=1)
    small = rewrite(net, HALF, swap, inputs=images()[0])
    found = {each.path: each.why_not for each in calibrate(net, small, images()).layers}
    assert found["first"] == ""
    assert found["twice"] == "it is called 2 times"
    assert found["computed"] == "its weight is computed"
    for path in ("one", "other", "third", "fourth"):
        assert found[path] == "its weight or bias is shared with another module"
    assert found["last"] == ""


class Supervised(nn.Module):
    """Has a second head, which it calls in one setting only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 2, 1)
        self.deep, self.deeply = nn.Conv2d(8, 2, 1), False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.leaky_relu(self.first(x))
        return (self.last(x), self.deep(x)) if self.deeply else self.last(x)


@pytest.mark.slow
def test_a_layer_that_the_forward_does_not_call_is_listed() -> None:
    torch.manual_seed(0)
    net, x = Supervised().eval(), images()
    small = rewrite(net, HALF, inputs=x[0], variants=[{"deeply": True}], calibration=x)
    assert small.get_submodule("deep").weight.shape[1] == 4
    assert "not calibrated: deep (the forward does not call it" in history(small)[-1].notes[-1]
    net.deeply = small.deeply = True  # type: ignore[assignment]
    left = [layer for layer in calibrate(net, small, x).layers if layer.why_not]
    assert not left


@pytest.mark.slow
def test_images_of_zeros_and_of_what_is_no_number() -> None:
    net, x = trained(), images()
    small = rewrite(net, HALF, inputs=x[0])
    zeros = torch.zeros_like(x[0])
    made = calibrate(net, small, [zeros, 1e-20 * x[0]]).model
    assert all(bool(tensor.isfinite().all()) for tensor in made.state_dict().values())
    rewrite(net, HALF, inputs=x[0], calibration=[zeros, 1e-20 * x[0]])
    with pytest.raises(InputError, match="one value everywhere"):
        calibrate(net, small, [zeros, zeros + 1])
    for given in ({"calibration": [x[0] * torch.nan]}, {"calibration": [x[0], x[0] / 0]}):
        with pytest.raises(InputError, match="not all finite"):
            rewrite(net, HALF, inputs=x[0], **given)


@pytest.mark.slow
def test_wrong_arguments() -> None:
    net, x = trained(), images()
    small = rewrite(net, HALF, inputs=x[0])
    rows: list[tuple[Any, dict[str, Any], Any, str]] = [
        ((net, small, []), {}, InputError, "at least one image"),
        ((net, small, ["much"]), {}, InputError, "not only their shapes"),
        ((net, small, x), {"samples": 0}, OptionError, "must be positive"),
        ((net, small, x), {"ridge": 0}, OptionError, "must be positive"),
        ((net, small, x), {"memory": "much"}, OptionError, "1GiB"),
        ((net, small, x), {"memory": 0}, OptionError, "must be positive"),
        ((net, copy.deepcopy(net), x), {}, RewriteError, "has no rewrites beyond those of Net"),
        ((small, net, x), {}, RewriteError, r"what rewrite\(\) made of the first"),
        ((net, rewrite(net, Recompute(), inputs=x[0]), x), {}, RewriteError, "nothing to repair"),
    ]
    for arguments, options, error, text in rows:
        with pytest.raises(error, match=text):
            calibrate(*arguments, **options)
    tiled = rewrite(small, Patchwise(size=8, progress=False), inputs=x[0])
    with pytest.raises(RewriteError, match=r"by tiles \(passes: patchwise\)"):
        calibrate(net, tiled, x)
    low = rewrite(small, Amp(dtype="bf16"), inputs=x[0])
    with pytest.raises(RewriteError, match=r"first makes bfloat16 .* \(passes: amp\)"):
        calibrate(net, low, x)


def test_outputs_that_differ_more_than_before_are_told() -> None:
    better = CalibratedNetwork(nn.Identity(), (), 2, before=0.5, after=0.1)
    assert better.notes == (better.summary,)
    worse = dataclasses.replace(better, after=0.6)
    assert "differ more than before: give more images" in worse.notes[1]
    assert worse.notes[1] in str(worse)


def test_exact_passes_leave_nothing_to_calibrate() -> None:
    net, x = Net(), images()
    with pytest.warns(NoEffectWarning, match="nothing was calibrated: the passes keep"):
        lean = rewrite(net, Recompute(), inputs=x[0], calibration=x)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, lean.state_dict()[name])


@pytest.mark.slow
def test_a_rewrite_calibrates_what_it_made() -> None:
    net, x = trained(), images()
    given = Calibration(x, channels="norm", seed=3)
    small = rewrite(net, HALF, inputs=x[0], calibration=given)
    found = calibrate(net, rewrite(net, HALF, inputs=x[0]), x, seed=3)
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name])
    assert history(small)[-1].notes[-1] == found.summary
    sliced = rewrite(net, HALF, inputs=x[0])
    with torch.autocast("cpu", torch.bfloat16):  # layers are solved in the weights' dtype
        again = calibrate(net, sliced, x, seed=3)
    assert again.after == found.after
    for options, text in (
        ({"inplace": True}, "which inplace=True changes"),
        ({"calibration": []}, "at least one image"),
        ({"calibration": [torch.randn(1, 2, 8, 8)]}, "Net does not run on 1x2x8x8"),
        ({"calibration": [(x[0], x[0])]}, r"without labels, such as \[batch\['image'\]"),
        ({"calibration": "imagesTr"}, "at least one image.*got 'imagesTr'"),
        ({"calibration": 3}, "at least one image"),
        ({"calibration": ["1x1x8x8"]}, "not only their shapes"),
        ({"calibration": [x[0].numpy()]}, "not ndarray"),
        ({"calibration": [x[0].to("meta")]}, "not only their shapes"),
    ):
        with pytest.raises((OptionError, InputError), match=text):
            rewrite(net, HALF, inputs=x[0], **{"calibration": x, **options})
    with pytest.raises(OptionError, match="weights='reset' draws weights anew"):
        rewrite(net, Width(0.5, weights="reset"), inputs=x[0], calibration=x)


@pytest.mark.slow
def test_a_tensor_is_one_call() -> None:
    net, x = trained(), torch.cat(images())
    outputs = [rewrite(net, HALF, inputs=x, calibration=each)(x) for each in (x, [x])]
    assert torch.equal(*outputs)


def test_a_network_without_a_layer_to_solve_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)).eval()
    for index in (0, 2):
        nn.utils.parametrizations.weight_norm(net[index])
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(RewriteError, match=r"no layer can be solved: 0 \(its weight is computed\)"):
        rewrite(net, HALF, inputs=x, calibration=x)


@pytest.mark.slow
def test_what_is_said_of_the_layers_is_so() -> None:
    net, x = trained(), images(1)
    cut = rewrite(net, HALF, inputs=x[0])
    found = calibrate(net, cut, x, samples=10**6)
    last = found.layers[-1]
    with torch.no_grad():
        outputs, wanted = found.model.eval()(x[0]), net(x[0])
    error = float((outputs - wanted).norm() / wanted.norm())
    assert last.path == "last"
    assert last.after == pytest.approx(error, rel=1e-3)
    assert found.after == pytest.approx(error, rel=1e-3)


@pytest.mark.slow
def test_small_memory_gives_the_same_in_more_runs() -> None:
    net, x = trained(), images()
    small = rewrite(net, HALF, inputs=x[0])
    calls: list[int] = []
    net.last.register_forward_hook(lambda *_: calls.append(1))
    whole = calibrate(net, small, x)
    once = len(calls)
    parts = calibrate(net, small, x, memory="24KiB")
    assert len(calls) - once > once
    assert parts.after == pytest.approx(whole.after, rel=0.05)


class Pooled(nn.Module):
    """A batch norm behind a global pooling, as in ASPP: one position of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.point = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        pooled = self.norm(self.point(y.mean((2, 3), keepdim=True))).relu()
        return self.last(torch.cat((y, pooled.expand_as(y)), 1))


@pytest.mark.parametrize("count", [1, 2])
def test_few_positions_do_not_spoil_running_statistics(count: int) -> None:
    torch.manual_seed(0)
    net = Pooled().train()
    for _ in range(50):
        net(torch.randn(8, 1, 16, 20).cumsum(-1))
    net.eval()
    others = torch.randn(20, 1, 16, 20).cumsum(-1)
    sliced = rewrite(net, HALF, inputs=others)
    made = calibrate(net, sliced, images(count)).model.eval()
    with torch.no_grad():
        errors = [float((small(others) - net(others)).norm()) for small in (made, sliced.eval())]
    assert errors[0] < errors[1]


def test_a_norm_of_which_every_channel_is_constant_stays_finite() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Hardtanh(0, 1e-6), nn.BatchNorm2d(8)).eval()
    net.append(nn.Conv2d(8, 3, 1))
    with torch.no_grad():
        net[0].bias.fill_(-1e6)  # dead
        net[2].running_mean.fill_(1.0)
    small = rewrite(net, HALF, inputs=images()[0])
    with torch.no_grad():
        small[2].bias.fill_(1.0)  # else there is nothing to solve
    made = calibrate(net, small, images()).model
    assert all(bool(tensor.isfinite().all()) for tensor in made.state_dict().values())


class Sized(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self, *, keyword: bool) -> None:
        super().__init__()
        self.keyword = keyword
        self.first, self.down = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y, size = self.down(x).relu(), list(x.shape[2:])
        y = self.up(y, output_size=size) if self.keyword else self.up(y, size)
        return self.last(torch.cat((y.relu(), x), 1))


@pytest.mark.parametrize("keyword", [True, False])
def test_a_layer_with_more_arguments_than_its_input_is_left(keyword: bool) -> None:
    torch.manual_seed(0)
    net, x = Sized(keyword=keyword).eval(), images()
    small = rewrite(net, HALF, inputs=x[0], calibration=x)
    assert history(small)[-1].notes[-1].startswith("not calibrated: up (it is called with")
    found = calibrate(net, rewrite(net, HALF, inputs=x[0]), x)
    assert [layer.path for layer in found.layers if layer.why_not] == ["up"]
    assert found.after < 0.8 * found.before


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8, affine=True), nn.ReLU()])
def test_images_without_a_batch_axis_are_refused(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 1), norm, nn.Conv2d(8, 3, 1)).eval()
    x = images()
    small = rewrite(net, HALF, inputs=x[0])
    with pytest.raises(RewriteError, match="something else than a batch of inputs"):
        calibrate(net, small, [each[0] for each in x])


class Drawing(Net):
    """Draws random numbers in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1)


@pytest.mark.parametrize("swap", [(), (Bottleneck(activations="any", min_channels=1),)])
def test_random_numbers_are_neither_taken_nor_left(swap: Any) -> None:
    torch.manual_seed(0)
    net, x = Drawing().eval(), images()
    small = rewrite(net, HALF, *swap, inputs=x[0])
    states, found = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
        found.append(calibrate(net, small, x).after)
        rewrite(net, HALF, *swap, inputs=x[0], calibration=x)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2], states[3])
    assert found[0] == found[1]


class Hooked(nn.Module):
    """A layer whose input or output is doubled, by itself or by a hook of the user."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, bias=False)
        self.last, self.hook = nn.Conv2d(8, 3, 1), hook
        if hook == "before":
            self.middle.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        elif hook == "after":
            self.middle.register_forward_hook(lambda *given: 2 * given[2])

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).relu()).relu()
        return self.last(x if self.hook else 2 * x)


def test_hooks_of_the_user_run_once() -> None:
    x, found = images(), {}
    for hook in ("before", "after", ""):
        torch.manual_seed(0)
        net = Hooked(hook).eval()
        small = rewrite(net, HALF, inputs=x[0], calibration=x)
        cut = rewrite(net, HALF, inputs=x[0])
        found[hook] = kept_outputs(small), calibrate(net, cut, x).after
    assert found["before"][0] == found["after"][0] == found[""][0]
    assert found["before"][1] == pytest.approx(found[""][1], rel=1e-3)
    assert found["after"][1] == pytest.approx(found[""][1], rel=1e-3)


def kept_outputs(model: nn.Module) -> list[Any]:
    return [edit.get("keep") for record in history(model) for edit in record.edits]


class Remembering(nn.Module):
    """Keeps what it computed, and a weight that is computed before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 1)
        nn.utils.weight_norm(self.first)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.first(x)
        return self.last(self.seen.relu())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_that_keeps_computed_tensors_is_copied() -> None:
    net, x = Remembering(), images()
    small = rewrite(net, HALF, inputs=x[0])
    small(x[0])
    assert [layer.why_not for layer in calibrate(net, small, x).layers] == [
        "its weight is computed",
        "",
    ]


class Labels(Net):
    def forward(self, x: Tensor) -> Tensor:
        height, _ = x.shape[2:]  # AttributeError of a dict
        return super().forward(x).argmax(1)[:, :height]


def test_what_the_forward_cannot_take_or_compare_is_refused() -> None:
    net, x = Labels().eval(), images()
    small = rewrite(net, HALF, inputs=x[0])
    for given, text in (
        (x, "no floating-point tensor"),
        ([{"image": x[0], "label": x[0]}], "without labels"),
    ):
        with pytest.raises(InputError, match=text):
            calibrate(net, small, given)


@pytest.mark.parametrize(
    "options",
    [
        {"samples": "many"},
        {"samples": 1.5},
        {"samples": None},
        {"ridge": "little"},
        {"ridge": None},
        {"memory": 1.5},
        {"memory": None},
        {"seed": "a"},
        {"seed": None},
    ],
)
def test_an_option_of_a_wrong_type_is_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"calibrate: {name} must be"):
        Calibration(images(), **options)


def test_a_layer_that_is_to_give_zeros_does() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False)).eval()
    net.append(nn.Conv2d(8, 3, 1))
    with torch.no_grad():
        net[2].weight.zero_()
    small = rewrite(net, HALF, inputs=images()[0])
    with torch.no_grad():
        small[2].weight.normal_()  # as after training
    layer = calibrate(net, small, images()).layers[1]
    assert layer.before == 1.0
    assert layer.after is not None
    assert layer.after < 0.1


def test_images_that_are_too_much_alike_need_a_ridge() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    x = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    small = rewrite(net, HALF, inputs=x)
    with pytest.raises(InputError, match="too much alike for ridge=1e-30; give a larger one"):
        calibrate(net, small, x, ridge=1e-30)


def test_each_image_must_suit_the_networks() -> None:
    net, x = trained(), images()
    small = rewrite(net, HALF, inputs=x[0])
    with pytest.raises(InputError, match="Net does not run on 1x2x16x20"):
        calibrate(net, small, [x[0], torch.cat((x[1], x[2]), 1)])


def test_layers_that_need_more_images_are_told() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.extend([nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]).eval()
    small = rewrite(net, HALF, inputs=images()[0])
    text = "give more images, these layers have fewer output positions on them than inputs: 3, 5"
    for count, told in ((7, True), (8, False)):
        found = calibrate(net, small, images(count))
        assert (text in found.notes) is told
        assert (text in str(found)) is told
