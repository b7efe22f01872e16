"""nnU-Net's own trainer and predictor, with a rewritten network."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import history
from pocketize.errors import RecipeError
from pocketize.passes.shared.compiled import HAS_REGIONS

pytest.importorskip("nnunetv2")
pytest.importorskip("nnunetv2.utilities.find_objects", reason="needs nnunetv2 2.8 or newer")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # others' deprecations
    pytest.mark.slow,  # nnU-Net is imported
]

ARCHITECTURES = "dynamic_network_architectures.architectures"
PLANS: dict[str, Any] = {
    "dataset_name": "Dataset001_Toy",
    "plans_name": "nnUNetPlans",
    "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {},
    "configurations": {
        "3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [16, 16, 16],
            "spacing": [1.0, 1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "batch_dice": False,
            "architecture": {
                "network_class_name": f"{ARCHITECTURES}.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 4,
                    "features_per_stage": [4, 8, 8, 8],
                    "conv_op": "torch.nn.modules.conv.Conv3d",
                    "kernel_sizes": [[3, 3, 3]] * 4,
                    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
                    "n_conv_per_stage": [1, 1, 1, 1],
                    "n_conv_per_stage_decoder": [1, 1, 1],
                    "conv_bias": True,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    },
}
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "anterior": 1, "posterior": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
HEAD = "decoder.seg_layers.1.weight"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketize.integrations.nnunet import trainer_folder

    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", trainer_folder())
    data = tmp_path / "preprocessed" / "Dataset001_Toy" / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()  # its name tells nnU-Net how the cases are stored


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def write(*tables: str) -> None:
        path = tmp_path / "recipe.toml"
        path.write_text("\n".join(f"[[pass]]\n{table}" for table in tables), encoding="utf-8")
        monkeypatch.setenv("POCKETIZE_RECIPE", str(path))

    return write


POCKET = 'name = "pocket"\nweights = "reset"\n'
RECIPES = {
    "pocket": [POCKET],
    "recompute": ['name = "recompute"\nmin_bytes = 0\n'],
    "in-place-norm, amp": ['name = "in-place-norm"\n', 'name = "amp"\n'],
    "bottleneck": ['name = "bottleneck"\nmin_channels = 2\nactivations = "any"\n'],
}


def trainer(fold: int = 0, entry: Any = None) -> Any:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    plans = copy.deepcopy(PLANS)
    plans["continue_training"] = False
    if entry is not None:
        plans["configurations"]["3d_fullres"]["pocketize"] = entry
    found = recursive_find_trainer_class_by_name("nnUNetTrainerPocketize")
    torch.manual_seed(fold)
    return found(
        plans=plans,
        configuration="3d_fullres",
        fold=fold,
        dataset_json=DATASET,
        device=torch.device("cpu"),
    )


def trained(given: Any) -> None:
    """One step, and the files that nnU-Net writes."""
    given.initialize()
    given.network.train()
    given.set_deep_supervision_enabled(True)
    targets = [torch.randint(0, 3, (2, 1, n, n, n)).float() for n in (16, 8, 4)]
    first = next(given.network.parameters())
    before = first.detach().clone()
    result = given.train_step({"data": torch.randn(2, 1, 16, 16, 16), "target": targets})
    assert torch.isfinite(torch.tensor(result["loss"]))
    assert not torch.equal(first, before)
    assert given.network.get_parameter(HEAD).grad is not None
    base = Path(given.output_folder_base)
    for name, content in (("plans", given.plans_manager.plans), ("dataset", DATASET)):
        (base / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    given.save_checkpoint(str(base / f"fold_{given.fold}" / "checkpoint_final.pth"))


def predictor(given: Any, folds: tuple[int, ...] = (0,)) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    made = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    made.initialize_from_trained_model_folder(given.output_folder_base, folds)
    return made


def logits(network: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return network.eval()(x)


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains_and_predicts_with_the_same_network(
    name: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(*RECIPES[name])
    given = trainer()
    trained(given)
    assert [record.name for record in history(given.network)] == name.split(", ")
    monkeypatch.delenv("POCKETIZE_RECIPE")  # another day, another shell
    made = predictor(given)
    assert [r.to_json() for r in history(made.network)] == [
        r.to_json() for r in history(given.network)
    ]
    x = torch.randn(1, 1, 16, 16, 16)
    given.set_deep_supervision_enabled(False)
    assert torch.equal(logits(made.network, x), logits(given.network, x))
    assert made.predict_sliding_window_return_logits(torch.randn(1, 20, 16, 18)).shape == (
        3, 20, 16, 18,
    )  # fmt: skip
    if name == "pocket":
        assert given.network.state_dict()[HEAD].shape[1] == 4  # read in training only


def test_the_plans_may_hold_the_recipe() -> None:
    given = trainer(entry={"passes": ["pocket:width=4", "recompute:min_bytes=0"]})
    trained(given)
    assert [record.name for record in history(given.network)] == ["pocket", "recompute"]
    assert len(history(predictor(given).network)) == 2


def test_folds_share_a_recipe(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(POCKET)
    first = trainer()
    trained(first)
    monkeypatch.delenv("POCKETIZE_RECIPE")
    second = trainer(fold=1)
    trained(second)  # by the recipe in the results
    made = predictor(second, (0, 1))
    assert len(made.list_of_parameters) == 2
    for weights in made.list_of_parameters:
        made.network.load_state_dict(weights)
    # drawn anew for its widths, as the first fold's
    weight = second.network.encoder.stages[2][0].convs[0].conv.weight
    assert weight.std().item() == pytest.approx((2 / (4 * 27)) ** 0.5, rel=0.25)
    recipe('name = "recompute"\n')
    with pytest.raises(
        RecipeError, match=r"(?s)trained with this recipe:.*pocket.*now it is:.*recompute"
    ):
        trainer(fold=2).initialize()


def test_without_a_recipe_or_with_two_it_refuses(recipe: Any) -> None:
    with pytest.raises(RecipeError, match="set POCKETIZE_RECIPE to a TOML file, or write"):
        trainer().initialize()
    with pytest.raises(RecipeError, match=r'expected "pocketize": \{"passes"'):
        trainer(entry={"passes": "pocket"}).initialize()
    recipe(POCKET)
    with pytest.raises(RecipeError, match="there are two recipes"):
        trainer(entry={"passes": ["pocket"]}).initialize()


def test_a_class_that_would_not_rewrite_is_refused(recipe: Any) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from pocketize.integrations.nnunet import PocketizeTrainer, nnUNetTrainerPocketize

    with pytest.raises(TypeError, match=r"Mine: write PocketizeTrainer before nnUNetTrainer"):
        type("Mine", (nnUNetTrainer, PocketizeTrainer), {})
    assert type("Mine", (PocketizeTrainer, nnUNetTrainer), {"initialize": None})
    recipe(POCKET)
    given = trainer()
    build = nnUNetTrainer.build_network_architecture
    given.__class__ = type(
        "Own", (nnUNetTrainerPocketize,), {"build_network_architecture": staticmethod(build)}
    )
    with pytest.raises(RecipeError, match="Own: the network was not rewritten, as a class before"):
        given.initialize()


def test_a_recipe_that_changes_nothing_is_told(recipe: Any) -> None:
    recipe('name = "bottleneck"\nmin_channels = 1000\n')
    given, told = trainer(), []
    given.print_to_log_file = lambda *text, **_: told.append(" ".join(map(str, text)))
    given.initialize()
    assert history(given.network) == ()
    assert any("the recipe found nothing to change in this network" in line for line in told)


def test_wrong_environment_variables_are_told(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETIZE_RECEIPE", "recipe.toml")
    with pytest.raises(RecipeError, match="It does not read POCKETIZE_RECEIPE, which is set"):
        trainer().initialize()
    monkeypatch.setenv("POCKETIZE_RECIPE", "missing.toml")
    with pytest.raises(RecipeError, match=r"POCKETIZE_RECIPE names no file: missing.toml \(seen"):
        trainer().initialize()
    recipe(POCKET)
    monkeypatch.setenv("POCKETIZE_WEIGHTS", "missing.pth")
    with pytest.raises(RecipeError, match="POCKETIZE_WEIGHTS names no file"):
        trainer().initialize()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["predict", "--exact", "96y96"], "expected voxels, such as 96x96x96, got '96y96'"),
        (["predict", "--help"], "predict whole volumes by exact tiles"),
        (["--help"], "nnUNet_extTrainer"),
        (["predikt"], "unknown: 'predikt'"),
    ],
)
def test_the_command_says_what_it_takes(given: list[str], told: str) -> None:
    command = [sys.executable, "-m", "pocketize.integrations.nnunet", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told in " ".join((done.stdout + done.stderr).split())


def test_pretrained_weights(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    recipe('name = "pocket"\n')
    first, second = trainer(), trainer(fold=1)
    first.initialize()
    second.initialize()
    path = tmp_path / "pretrained.pth"
    torch.save({"network_weights": first.network.state_dict()}, path)
    load_pretrained_weights(second.network, str(path))
    key = "encoder.stages.1.0.convs.0.conv.weight"
    assert torch.equal(second.network.state_dict()[key], first.network.state_dict()[key])
    # of the network as it was before: loaded first, then cut
    manager = first.configuration_manager
    whole = nnUNetTrainer.build_network_architecture(first.plans_manager, manager, 1, 3, True)
    torch.save({"network_weights": whole.state_dict()}, path)
    monkeypatch.setenv("POCKETIZE_WEIGHTS", str(path))
    third = trainer(fold=2)
    third.initialize()
    (record,) = history(third.network)
    (edit,) = [e for e in record.edits if e.get("tensor") == key and e["axis"] == 0]
    kept = whole.state_dict()[key][list(edit["keep"])]
    assert torch.equal(third.network.state_dict()[key], kept)


@pytest.mark.parametrize(
    ("name", "compiles"),
    [("pocket", True), ("recompute", HAS_REGIONS), ("in-place-norm, amp", False)],
)
def test_what_the_compiler_would_undo_is_not_compiled(
    name: str, compiles: bool, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    recipe(*RECIPES[name])
    given = trainer()
    given.initialize()
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)  # as on a GPU
    assert given._do_i_compile() is compiles
    monkeypatch.setenv("nnUNet_compile", "true")
    assert given._do_i_compile() is True


def test_what_fit_finds_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from pocketize import fit, measure

    plans = PlansManager(copy.deepcopy(PLANS))
    configuration = plans.get_configuration("3d_fullres")
    network = nnUNetTrainer.build_network_architecture(plans, configuration, 1, 3, True)
    x = torch.zeros(2, 1, 16, 16, 16)
    budget = int(0.9 * measure(network, x, "train", "sgd", estimate=True).peak)
    found = fit(network, x, memory=budget, optimizer="sgd", prove=False)
    path = tmp_path / "recipe.toml"
    path.write_text(found.recipe, encoding="utf-8")
    monkeypatch.setenv("POCKETIZE_RECIPE", str(path))
    given = trainer()
    trained(given)
    assert [r.name for r in history(given.network)] == [each.name for each in found.passes] != []
