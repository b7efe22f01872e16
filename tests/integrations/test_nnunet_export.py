"""Labels without resampled logits: equal to nnU-Net's own, in its own functions."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.integrations.test_nnunet import DATASET, PLANS

pytest.importorskip("nnunetv2")
pytest.importorskip("nnunetv2.utilities.find_objects", reason="needs nnunetv2 2.8 or newer")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}
LINEAR = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def smooth(channels: int, *sizes: int, seed: int = 0) -> Tensor:
    """Logits that change slowly, so that many voxels are near the border of two labels."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, *(max(2, n // 3) for n in sizes), generator=draw)
    return torch.nn.functional.interpolate(coarse, size=sizes, mode="trilinear")[0]


def managers(spacing: list[float], labels: Any, options: dict[str, Any], transpose: Any) -> Any:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    held = PLANS["configurations"]["3d_fullres"] | {
        "spacing": spacing,
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": options,
    }
    back = [transpose.index(axis) for axis in range(3)]
    plans = PlansManager(
        PLANS
        | {
            "configurations": {"3d_fullres": held},
            "transpose_forward": transpose,
            "transpose_backward": back,
        }
    )
    order = {"regions_class_order": [1, 2]} if labels is REGIONS else {}
    label_manager = plans.get_label_manager(DATASET | {"labels": labels} | order)
    return plans, plans.get_configuration("3d_fullres"), label_manager


SPACINGS = {
    "isotropic": ([1.0, 1.0, 1.0], [0.7, 0.8, 0.8]),
    "anisotropic plans": ([5.0, 1.0, 1.0], [5.0, 0.7, 0.7]),
    "anisotropic image": ([1.0, 1.0, 1.0], [1.0, 1.0, 4.0]),
    "two thick axes": ([4.0, 4.0, 1.0], [4.0, 4.0, 1.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("labels", [DATASET["labels"], REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_labels_are_those_of_nnunet(spacing: str, labels: Any, dtype: torch.dtype) -> None:
    from nnunetv2.inference import export_prediction

    from pocketize.integrations.nnunet import export

    current, image = SPACINGS[spacing]
    for shape, transpose in itertools.product(
        [(21, 15, 26), (12, 13, 9), (16, 16, 16)], [[0, 1, 2], [2, 0, 1]]
    ):
        plans, configuration, manager = managers(current, labels, LINEAR, transpose)
        properties = {
            "spacing": [image[transpose.index(axis)] for axis in range(3)],
            "shape_after_cropping_and_before_resampling": shape,
            "shape_before_cropping": [n + 5 for n in shape],
            "bbox_used_for_cropping": [[2, 2 + shape[0]], [0, shape[1]], [5, 5 + shape[2]]],
        }
        logits = smooth(manager.num_segmentation_heads, 12, 13, 16).to(dtype)
        given = logits, plans, configuration, manager, properties
        name = "convert_predicted_logits_to_segmentation_with_correct_shape"
        expected = getattr(export_prediction, name)(*given)
        found = export.convert_logits(*given)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(found, expected)


def test_resampled_logits_are_those_of_nnunet_to_the_last_bit() -> None:
    from nnunetv2.preprocessing.resampling import default_resampling

    from pocketize.integrations.nnunet.export import resample_labels

    logits = smooth(4, 24, 25, 16).half()
    blocks: list[Any] = []

    def labels(block: Any) -> Any:
        blocks.append(block)
        return block.argmax(0)

    for shape in ((40, 41, 40), (20, 50, 16)):
        resample_labels(logits, shape, labels)
        expected = default_resampling.resample_data_or_seg_to_shape(
            logits, shape, [1.0] * 3, [0.6] * 3, order=1, order_z=0
        )
        np.testing.assert_array_equal(blocks.pop(), expected)


def test_blocks_change_nothing_and_bound_what_is_resampled() -> None:
    from pocketize.integrations.nnunet.export import resample_labels

    logits, seen = smooth(3, 9, 10, 11), []

    def labels(block: Any) -> Any:
        seen.append(block.size * 8)
        return block.argmax(0)

    whole = resample_labels(logits, (20, 17, 13), labels)
    assert seen == [3 * 20 * 17 * 13 * 8]
    for limit in (8 * 3, 8 * 3 * 13 * 4, 8 * 3 * 13 * 17 * 6):
        seen.clear()
        found = resample_labels(logits, (20, 17, 13), labels, block=limit)
        assert max(seen) <= limit
        np.testing.assert_array_equal(found, whole)


def test_what_it_does_not_know_is_left_to_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketize.integrations.nnunet import export

    asked = []
    monkeypatch.setattr(export, "_THEIRS", lambda *given: asked.append(given[5]))
    labels = DATASET["labels"]
    for options, probabilities in ((LINEAR | {"order": 3}, False), (LINEAR, True)):
        plans, configuration, manager = managers([1.0] * 3, labels, options, [0, 1, 2])
        export.convert_logits(None, plans, configuration, manager, {}, probabilities)
    assert asked == [False, True]


def test_a_predictor_writes_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.inference import predict_from_raw_data

    from pocketize.integrations.nnunet import export, lean_export

    plans, configuration, _ = managers([1.0] * 3, DATASET["labels"], LINEAR, [0, 1, 2])
    written = []
    writer = SimpleNamespace(write_seg=lambda labels, *_: written.append(labels))
    monkeypatch.setattr(
        type(plans), "image_reader_writer_class", property(lambda _: lambda: writer)
    )
    shape = [21, 15, 26]
    properties = {
        "spacing": [0.7, 0.8, 0.8],
        "shape_after_cropping_and_before_resampling": shape,
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
    }
    given = smooth(3, 12, 13, 16), properties, configuration, plans, DATASET, str(tmp_path / "a")
    predict_from_raw_data.export_prediction_from_logits(*given)
    asked = []
    monkeypatch.setattr(
        export, "resample_labels", lambda *a, real=export.resample_labels, **k: (
            asked.append(1), real(*a, **k)
        )[1],
    )  # fmt: skip
    name = "convert_predicted_logits_to_segmentation_with_correct_shape"
    theirs = getattr(predict_from_raw_data, name)
    with lean_export():
        predict_from_raw_data.export_prediction_from_logits(*given)
        assert getattr(predict_from_raw_data, name) is export.convert_logits  # returned arrays
    assert getattr(predict_from_raw_data, name) is theirs
    predict_from_raw_data.export_prediction_from_logits(*given)
    assert len(asked) == 1  # within only
    np.testing.assert_array_equal(written[0], written[1])
