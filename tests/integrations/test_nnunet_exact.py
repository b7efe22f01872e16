"""Whole volumes by exact tiles, in nnU-Net's own predictor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pocketize.errors import ExecutionError, InputError
from tests.integrations.test_nnunet import DATASET, folders, predictor, recipe, trained, trainer

pytest.importorskip("nnunetv2")
pytest.importorskip("nnunetv2.utilities.find_objects", reason="needs nnunetv2 2.8 or newer")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
__all__ = ["folders", "recipe"]  # fixtures


def test_it_predicts_what_the_network_does_with_the_whole_volume(recipe: Any) -> None:
    from pocketize.integrations.nnunet import exact_prediction

    recipe('name = "recompute"\nmin_bytes = 0\n')
    given = trainer()
    trained(given)
    made = predictor(given)
    made.use_mirroring, made.allowed_mirroring_axes = True, (0, 2)
    volume = torch.randn(1, 21, 32, 30)
    padded = torch.nn.functional.pad(volume, (1, 1, 0, 0, 1, 2))  # nnU-Net pads at both ends
    windows = made.predict_logits_from_preprocessed_data(volume)
    with exact_prediction(16):
        exact = made.predict_logits_from_preprocessed_data(volume)
    with torch.inference_mode():
        flips = [[], [2], [4], [2, 4]]
        expected = sum(made.network(padded[None].flip(f)).flip(f) for f in flips)[0] / 4
    torch.testing.assert_close(exact, expected[:, 1:-2, :, 1:-1].half(), rtol=2e-3, atol=2e-3)
    assert (windows - exact).abs().max() > 0.01  # windows have statistics of their own
    assert torch.equal(windows, made.predict_logits_from_preprocessed_data(volume))


def test_what_it_cannot_predict_it_refuses(monkeypatch: pytest.MonkeyPatch, recipe: Any) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from pocketize.integrations.nnunet import exact_prediction

    recipe('name = "recompute"\nmin_bytes = 0\n')
    given = trainer()
    given.initialize()
    volume = torch.randn(1, 16, 16, 16)
    made = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    made.manual_initialization(
        given.network, given.plans_manager, given.configuration_manager, None, DATASET, "x", None
    )
    with exact_prediction((16, 16)), pytest.raises(InputError, match="size has 2 numbers, and the"):
        made.predict_sliding_window_return_logits(volume)
    held = given.configuration_manager.configuration
    monkeypatch.setitem(held, "previous_stage", "3d_lowres")
    with exact_prediction(), pytest.raises(ExecutionError, match="second stage of a cascade"):
        made.predict_sliding_window_return_logits(volume)


def test_slices_of_two_dimensional_networks() -> None:
    from pocketize.integrations.nnunet.exact import _logits

    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1))
    arguments = {"strides": [[1, 1], [2, 2]]}
    held: Any = SimpleNamespace(
        previous_stage_name=None, patch_size=[8, 8], network_arch_init_kwargs=arguments
    )
    made: Any = SimpleNamespace(
        configuration_manager=held,
        network=network.eval(),
        device=torch.device("cpu"),
        use_mirroring=False,
        allowed_mirroring_axes=None,
    )
    volume = torch.randn(1, 3, 20, 15)
    found = _logits(made, volume, None, "host", None)
    padded = torch.nn.functional.pad(volume, (0, 1))
    with torch.inference_mode():
        expected = torch.stack([network(padded[:, d][None])[0] for d in range(3)], 1)[..., :-1]
    torch.testing.assert_close(found, expected.half(), rtol=2e-3, atol=2e-3)
