"""Predict whole volumes exactly, by tiles without seams, where nnU-Net averages sliding windows.

nnU-Net cuts a case into overlapping patches, and weights their logits with a Gaussian. Here the
logits are those of one call of the network with the whole (padded) volume, to rounding, computed
tile by tile (:func:`pocketize.run_volume`). Norms that take statistics of their input, such as
nnU-Net's instance norms, take them of the volume and not of a patch.
"""

from __future__ import annotations

__all__ = ["exact_prediction"]

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, pad_nd_image
from torch import Tensor, nn

from pocketize.errors import ExecutionError, InputError
from pocketize.integrations.nnunet.export import replaced
from pocketize.passes.tiling.volumes import run_volume

_METHOD = "predict_sliding_window_return_logits"


@contextlib.contextmanager
def exact_prediction(
    size: int | Sequence[int] | None = None,
    *,
    keep: Literal["device", "host", "disk"] = "host",
    folder: str | None = None,
) -> Iterator[None]:
    """Let the predictors of nnU-Net predict whole volumes within, instead of sliding windows.

    Folds, mirroring, autocast and export stay nnU-Net's. Cascades are refused, and so are networks
    that cannot be computed by tiles.

    Args:
        size: voxels of a tile for each axis of the network, or one number for all; None is the
            patch of the plans.
        keep: where results wait between loops over the tiles, see :func:`pocketize.run_volume`.
        folder: for files; None is where the system keeps temporary ones.
    """

    def predict(predictor: Any, input_image: Tensor) -> Tensor:
        return _logits(predictor, input_image, size, keep, folder)

    with replaced(nnUNetPredictor, _METHOD, predict):
        yield


@torch.inference_mode()
def _logits(predictor: Any, image: Tensor, size: Any, keep: Any, folder: str | None) -> Tensor:
    """Return logits (K, *spatial) in float16, of an image (C, *spatial).

    Raises:
        ExecutionError: the configuration is a stage of a cascade.
        InputError: the tile has another number of axes than the network.
    """
    configuration = predictor.configuration_manager
    if configuration.previous_stage_name is not None:
        raise ExecutionError(
            "exact_prediction: the configuration is the second stage of a cascade, whose input has "
            f"labels of {configuration.previous_stage_name!r}; predict it with nnUNetv2_predict"
        )
    network = getattr(predictor.network, "_orig_mod", predictor.network)  # of torch.compile
    network = network.to(predictor.device).eval()
    patch = tuple(configuration.patch_size)
    tile = tuple(patch) if size is None else (size,) * len(patch) if isinstance(size, int) else size
    if len(tile) != len(patch):
        raise InputError(
            f"exact_prediction: size has {len(tile)} numbers, and the network of the plans has "
            f"{len(patch)} axes"
        )
    data, cut = pad_nd_image(
        image, patch, "constant", {"value": 0}, True, _multiples(configuration)
    )
    axes = predictor.allowed_mirroring_axes if predictor.use_mirroring else None
    slices = [data] if len(patch) == data.ndim - 1 else list(data.unbind(1))  # 2d: slice by slice
    found = [_mirrored(network, each, tile, axes or (), keep, folder) for each in slices]
    made = found[0] if len(patch) == data.ndim - 1 else torch.stack(found, 1)
    inside: tuple[slice, ...] = (slice(None), *cut[1:])
    logits: Tensor = made[inside]
    if not logits.isfinite().all():
        raise ExecutionError(
            "exact_prediction: a logit is beyond float16, in which nnU-Net exports"
        )
    return logits


def _mirrored(
    network: nn.Module, data: Tensor, tile: Any, axes: Sequence[int], keep: Any, folder: str | None
) -> Tensor:
    """Return the mean of the logits over all mirrorings, as nnU-Net does for each patch."""
    mirrorings = [
        [axis + 1 for axis in chosen]
        for count in range(len(axes) + 1)
        for chosen in itertools.combinations(axes, count)
    ]
    device = next(network.parameters()).device.type
    total: Tensor | None = None
    for flipped in mirrorings:
        with torch.autocast(device) if device == "cuda" else contextlib.nullcontext():
            made = run_volume(
                network, data.flip(flipped), size=tile, keep=keep, folder=folder, progress=False
            )
        logits = torch.as_tensor(made).float().flip(flipped)
        total = logits if total is None else total.add_(logits)
    assert total is not None
    return total.div_(len(mirrorings)).half()


def _multiples(configuration: Any) -> list[int]:
    """Return of what the network needs its sizes to be multiples: the product of its strides."""
    arguments = configuration.network_arch_init_kwargs
    strides = arguments.get("strides") or [[1] * len(configuration.patch_size)]
    return [int(torch.tensor(each).prod()) for each in zip(*strides, strict=True)]
