"""MONAI's engines, bundles, MetaTensors and inferers, with rewritten networks."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
import torch

with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore")  # of what is optional in MONAI
    import ignite.handlers  # noqa: F401

from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    Spacingd,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pocketize import history, rewrite
from pocketize.errors import ExecutionError, InputError, OptionError, RewriteError
from pocketize.integrations.monai import ExactInferer
from pocketize.passes.tiling.exact import ExactForward

pytestmark = pytest.mark.slow  # others' machinery

AFFINE = torch.diag(torch.tensor([2.0, 1.0, 1.5, 1.0], dtype=torch.float64))


def unet(norm: str = "instance") -> UNet:
    torch.manual_seed(0)
    return UNet(3, 1, 2, (4, 8, 8), (2, 2), num_res_units=1, norm=norm)


def meta(*shape: int) -> MetaTensor:
    return MetaTensor(torch.randn(1, 1, *shape), affine=AFFINE, meta={"name": "case"})


PASSES = [
    ["pocket"],
    ["bottleneck:activations=any,min_channels=2"],
    ["recompute:min_bytes=0,keep=level"],
    ["in-place-norm:activation=leaky_relu:0.2"],
    ["checkpoint:only=model.1"],
    ["patchwise:size=8"],
    ["patchwise:size=8,train=true"],
    ["patchwise:size=8,mode=window"],
    ["amp"],
]


@pytest.mark.parametrize("passes", PASSES, ids="+".join)
@pytest.mark.filterwarnings("ignore::pocketize.errors.NoEffectWarning")
def test_meta_tensors_keep_their_class_and_what_they_hold(passes: list[str]) -> None:
    model = rewrite(unet(), passes=passes, inputs="1x1x16x16x16")
    x = meta(16, 16, 16)
    made = model.train()(x)
    made.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        inferred = model.eval()(x)
    for output in (made, inferred):
        assert isinstance(output, MetaTensor)
        assert torch.equal(output.affine, AFFINE)
        assert output.meta["name"] == "case"
    plain = model(x.as_tensor())
    assert type(plain) is Tensor
    torch.testing.assert_close(inferred.as_tensor(), plain.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("ignite") is None, reason="needs pytorch-ignite")
@pytest.mark.filterwarnings("ignore")  # of optional readers, and deprecations
@pytest.mark.parametrize(
    "passes", [["pocket"], ["recompute:min_bytes=0"], ["in-place-norm", "amp"]]
)
def test_the_engines_train_evaluate_and_save_in_the_same_place(
    passes: list[str], tmp_path: Path
) -> None:
    from monai.engines import SupervisedEvaluator, SupervisedTrainer
    from monai.handlers import CheckpointSaver

    image = nibabel.Nifti1Image(
        np.random.default_rng(0).normal(size=(12, 17, 10)).astype(np.float32),
        np.diag([-2.0, 1.0, 1.5, 1.0]),
    )
    nibabel.save(image, tmp_path / "case.nii.gz")
    load = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=(1.5, 1.5, 1.5)),
        ]
    )
    data = Dataset([{"image": str(tmp_path / "case.nii.gz")}], load)

    def run(model: nn.Module, inferer: Any, folder: Path) -> nibabel.Nifti1Image:
        def batch(given: Any, *_: Any, **__: Any) -> Any:
            return given["image"], given["image"]

        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        trainer = SupervisedTrainer(
            torch.device("cpu"), 1, DataLoader(data, 1), model, optimizer,
            loss_function=lambda p, y: p.square().mean(), prepare_batch=batch,
            inferer=SlidingWindowInferer(16, overlap=0.0),
            train_handlers=[
                CheckpointSaver(folder, {"model": model}, save_final=True, final_filename="m.pt")
            ],
        )  # fmt: skip
        trainer.run()
        assert trainer.state.iteration == 1
        weights = torch.load(folder / "m.pt")
        weights = weights.get("model", weights)
        assert weights.keys() == model.state_dict().keys()
        after = Compose(
            [
                Invertd("pred", load, orig_keys="image", nearest_interp=False),
                SaveImaged("pred", output_dir=folder, separate_folder=False, print_log=False),
            ]
        )
        evaluator = SupervisedEvaluator(
            torch.device("cpu"), DataLoader(data, 1), model, prepare_batch=batch, inferer=inferer
        )
        evaluator.run()
        assert isinstance(evaluator.state.output[0]["pred"], MetaTensor)
        model.eval()
        for given in DataLoader(data, 1):
            with torch.no_grad():
                given["pred"] = inferer(given["image"], model)
            for one in decollate_batch(given):
                after(one)
        (path,) = folder.glob("*.nii.gz")
        assert path.name == "case_trans.nii.gz"
        saved: nibabel.Nifti1Image = nibabel.load(path)
        return saved

    untouched = run(unet(), SlidingWindowInferer(16), tmp_path / "a")
    model = rewrite(unet(), passes=passes, inputs="1x1x16x16x16")
    rewritten = run(model, ExactInferer(8), tmp_path / "b")
    assert rewritten.shape == untouched.shape == (12, 17, 10, 2)
    np.testing.assert_allclose(rewritten.affine, untouched.affine)
    np.testing.assert_allclose(rewritten.affine, image.affine)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_inferer_gives_what_the_whole_volume_gives(norm: str) -> None:
    model, x = unet(norm).eval(), meta(16, 24, 12)
    names = set(vars(model))
    with torch.no_grad():
        expected = model(x)
        for inferer in (ExactInferer(8), ExactInferer((8, 8, 4)), ExactInferer(max_peak="1MiB")):
            made = inferer(x, network=model)
            assert isinstance(made, MetaTensor)
            assert torch.equal(made.affine, AFFINE)
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
            assert set(vars(model)) == names  # nothing stays
        assert history(model) == ()
        model.model[0].conv.unit0.conv.weight.mul_(2)  # weights are read at each call
        torch.testing.assert_close(inferer(x, model), model(x), rtol=1e-4, atol=1e-5)


def test_it_runs_by_tiles_and_plans_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketize.integrations import monai

    ran: list[Any] = []
    run, plan = ExactForward._run, monai.plan
    monkeypatch.setattr(ExactForward, "_run", lambda *args: ran.append("run") or run(*args))
    monkeypatch.setattr(monai, "plan", lambda *a, **k: ran.append("plan") or plan(*a, **k))
    inferer, model = ExactInferer(8), unet().eval()
    with torch.no_grad():
        for size in (16, 16, 24):
            inferer(torch.randn(1, 1, size, 16, 16), model)
        assert ran.count("plan") == 1
        assert ran[-3:] == ["run", "run", "run"]
        other = unet().eval()
        inferer(torch.randn(1, 1, 16, 16, 16), other)
    assert ran.count("plan") == 2
    assert ran[-1] == "run"


def test_a_volume_of_any_size_is_padded_and_cut() -> None:
    model, x = unet("batch").eval(), meta(13, 18, 9)
    padded = nn.functional.pad(x, (0, 3, 0, 2, 0, 3))
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            model(x)
        made = ExactInferer(8)(x, model)
        expected = model(padded)[..., :13, :18, :9]
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
        assert isinstance(made, MetaTensor)
        torch.testing.assert_close(
            ExactInferer(8, pad_to=8)(x, model),
            model(nn.functional.pad(x, (0, 7, 0, 6, 0, 3)))[..., :13, :18, :9],
            rtol=1e-4,
            atol=1e-5,
        )


class Two(NamedTuple):
    fine: Any
    other: Any


@pytest.mark.parametrize(
    "returned",
    [
        lambda y: Two(y, [y + 1, {"aux": y * 2}]),
        lambda y: OrderedDict(out=y, aux=None, classes=3),
        lambda y: {"labels": y.argmax(1), "nested": (y, (y[:, :1],))},
    ],
    ids=["named tuple", "ordered", "nested"],
)
def test_what_was_padded_is_cut_in_any_container(returned: Callable[[Tensor], Any]) -> None:
    class Returns(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return returned(super().forward(x))

    torch.manual_seed(0)
    model = Returns(nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(4, 2, 2, 2)).double().eval()
    x = torch.randn(1, 1, 11, 14, dtype=torch.float64)
    with torch.no_grad():
        made = ExactInferer(4, pad_to=4)(x, model)
        whole = model(nn.functional.pad(x, (0, 2, 0, 1)))
    expected = pytree.tree_map_only(Tensor, lambda y: y[..., :11, :14], whole)
    assert type(made) is type(whole)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-10)


def test_a_rewritten_network_can_be_inferred_too() -> None:
    model = rewrite(unet(), "pocket", "recompute:min_bytes=0", inputs="1x1x16x16x16").eval()
    forward, x = vars(model)["forward"], torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ExactInferer(8)(x, model), model(x), rtol=1e-4, atol=1e-5)
    assert vars(model)["forward"] is forward


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
def test_what_it_cannot_do_is_refused_and_the_network_is_as_it_was() -> None:
    model, x = unet(), torch.randn(1, 1, 16, 16, 16)
    inferer = ExactInferer(8)
    with pytest.raises(ExecutionError, match=r"call network\.eval\(\)"), torch.no_grad():
        inferer(x, model)
    with pytest.raises(ExecutionError, match=r"in torch\.no_grad\(\)"):
        inferer(x, model.eval())
    with torch.no_grad():
        with pytest.raises(InputError, match=r"a torch\.nn\.Module, got <function"):
            inferer(x, lambda x: x)
        with pytest.raises(InputError, match=r"from before torch\.compile"):
            inferer(x, torch.compile(model))
        with pytest.raises(RewriteError, match="GraphModule"):
            inferer(x, torch.fx.symbolic_trace(nn.Sequential(nn.Conv3d(1, 2, 3)).eval()))
    assert "forward" not in vars(model)
    with pytest.raises(InputError, match="infers by exact tiles"):
        ExactInferer(8, mode="window")
    with pytest.raises(OptionError, match="unknown option 'roi_size'"):
        ExactInferer(roi_size=8)


def test_a_bundle_names_it_and_the_rewrite() -> None:
    parser = ConfigParser(
        {
            "network_def": {
                "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2,
                "channels": [4, 8, 8], "strides": [2, 2],
            },
            "network": {
                "_target_": "pocketize.rewrite", "model": "@network_def",
                "passes": ["pocket:width=2", "recompute:min_bytes=0"], "inputs": "1x1x16x16x16",
            },
            "inferer": {"_target_": "pocketize.integrations.monai.ExactInferer", "size": [8, 8, 8]},
        }
    )  # fmt: skip
    network = parser.get_parsed_content("network")
    assert [record.name for record in history(network)] == ["pocket", "recompute"]
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        made = parser.get_parsed_content("inferer")(x, network.eval())
        torch.testing.assert_close(made, network(x), rtol=1e-4, atol=1e-5)
