"""Export predictions without ever holding resampled logits.

nnU-Net resamples logits (classes, x, y, z) to the spacing of the image and takes the label of each
voxel afterwards: 104 classes at 512x512x700 are 38 GB in float16, and more on the way. Labels need
no logits of other voxels, so here both happen block by block, with nnU-Net's coordinates, orders of
interpolation and rounding.

Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation", Nature Methods 2021; ``nnunetv2.preprocessing.resampling.default_resampling``.
"""

from __future__ import annotations

__all__ = [
    "convert_logits",
    "export_prediction_from_logits",
    "lean_export",
    "replaced",
    "resample_labels",
]

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference import export_prediction, predict_from_raw_data
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

_BLOCK = 32 << 20
"""Bytes of resampled logits, in float64, at once."""
_CONVERT = "convert_predicted_logits_to_segmentation_with_correct_shape"
_EXPORT = export_prediction.export_prediction_from_logits
_THEIRS = getattr(export_prediction, _CONVERT)


def resample_labels(
    logits: Tensor,
    shape: Sequence[int],
    labels: Callable[[npt.NDArray[Any]], Any],
    *,
    separate: int | None = None,
    dtype: npt.DTypeLike = np.uint8,
    block: int = _BLOCK,
) -> npt.NDArray[Any]:
    """Return the labels of linearly resampled logits, block by block.

    Args:
        logits: (C, *spatial), on the CPU, of any floating-point dtype; read box by box, so a memory
            map will do. Interpolated values are rounded to this dtype, as nnU-Net's are.
        shape: the spatial shape of the result.
        labels: of a block of logits (C, *block); returns (*block).
        separate: the spatial axis along which the nearest slice is taken instead, as nnU-Net does
            where spacings are anisotropic.
        dtype: of the labels.
        block: bytes of logits, in float64, that exist at once.

    Returns:
        The labels, (*shape).
    """
    made, kind = np.empty(tuple(shape), dtype), logits.numpy().dtype
    axes = [
        _positions(old, new, nearest=axis == separate)
        for axis, (old, new) in enumerate(zip(logits.shape[1:], shape, strict=True))
    ]
    shrinks = max(1.0, math.prod(logits.shape[1:]) / math.prod(shape))  # then more is read
    for box in _boxes(shape, int(block / (8 * logits.shape[0] * shrinks))):
        cut = [each.part(where) for each, where in zip(axes, box, strict=True)]
        read = slice(None), *(each.read() for each in cut)
        found = _interpolated(logits[read].double(), cut)
        # by numpy: torch rounds to 16 bits by way of 32, and so sometimes to another number
        made[box] = np.asarray(labels(found.numpy().astype(kind)))
    return made


class _Axis(NamedTuple):
    """For each new place of an axis the two old ones it lies between, and the second's weight."""

    low: Tensor
    high: Tensor
    weight: Tensor | None

    def part(self, where: slice) -> _Axis:
        """Return some of the places."""
        weight = None if self.weight is None else self.weight[where]
        return _Axis(self.low[where], self.high[where], weight)

    def read(self) -> slice:
        """Return which old places are needed."""
        return slice(int(self.low.min()), int(self.high.max()) + 1)


def _positions(old: int, new: int, *, nearest: bool) -> _Axis:
    place = (torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5
    if nearest:
        place = (place + 0.5).floor()
    low = place.floor()
    weight = None if nearest or old == new else place - low  # also beyond the first and the last
    first, second = (each.long().clamp(0, old - 1) for each in (low, low + 1))
    return _Axis(first, first if weight is None else second, weight)


def _interpolated(part: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Interpolate (C, *box) linearly, in the order of ``scipy.ndimage.zoom``, to the last bit.

    Sums in another order differ in the last bit, which decides how a value in the middle of two
    numbers of 16 bits is rounded, and so now and then a label.
    """
    total: Tensor | None = None
    starts = [axis.read().start for axis in axes]
    for ends in itertools.product(*((0,) if axis.weight is None else (0, 1) for axis in axes)):
        term = part
        for number, (axis, end) in enumerate(zip(axes, ends, strict=True)):
            places = axis.high if end else axis.low
            term = term.index_select(number + 1, places - starts[number])
        for number, (axis, end) in enumerate(zip(axes, ends, strict=True)):
            if axis.weight is not None:
                weight = 1 - axis.weight
                weight = 1 - weight if end else weight
                term *= weight.view([-1, *(1 for _ in axes[number + 1 :])])
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def _boxes(shape: Sequence[int], voxels: int) -> Iterator[tuple[slice, ...]]:
    """Cut a shape into boxes of so many voxels at most, along the first axes only."""
    sizes = list(shape)
    for axis in range(len(sizes)):
        rest = math.prod(sizes[axis + 1 :])
        sizes[axis] = min(sizes[axis], max(1, voxels // rest))
        if sizes[axis] > 1:
            break
    ranges = [
        [slice(start, min(start + size, whole)) for start in range(0, whole, size)]
        for size, whole in zip(sizes, shape, strict=True)
    ]
    return itertools.product(*ranges)


def convert_logits(
    predicted_logits: Any,
    plans_manager: Any,
    configuration_manager: Any,
    label_manager: Any,
    properties_dict: dict[str, Any],
    return_probabilities: bool = False,
    num_threads_torch: int = 1,
) -> Any:
    """Return what ``convert_predicted_logits_to_segmentation_with_correct_shape`` returns.

    That function of nnU-Net is called for probabilities, and where the plans resample in another
    way than by linear interpolation.

    Args:
        predicted_logits: (C, *spatial), as the network predicts them.
        plans_manager: nnU-Net's, and so the others.
        configuration_manager: of the configuration that predicted.
        label_manager: of the data set.
        properties_dict: of the case.
        return_probabilities: return probabilities beside the labels.
        num_threads_torch: threads of torch meanwhile.

    Returns:
        The labels in the shape of the image.
    """
    resample = configuration_manager.resampling_fn_probabilities
    options = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    options |= resample.keywords
    known = resample.func is resample_data_or_seg_to_shape and not options["is_seg"]
    known = known and (options["order"], options["order_z"]) == (1, 0)
    if return_probabilities or not known:
        return _THEIRS(
            predicted_logits,
            plans_manager,
            configuration_manager,
            label_manager,
            properties_dict,
            return_probabilities,
            num_threads_torch,
        )
    spacing = [properties_dict["spacing"][axis] for axis in plans_manager.transpose_forward]
    shape = properties_dict["shape_after_cropping_and_before_resampling"]
    current = list(configuration_manager.spacing)
    if len(current) != len(shape):
        current = [spacing[0], *current]
    given = {k: v for k, v in options.items() if k == "separate_z_anisotropy_threshold"}
    separate, axis = determine_do_sep_z_and_axis(
        options["force_separate_z"], current, spacing, **given
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads_torch)
    try:
        found = resample_labels(
            torch.as_tensor(predicted_logits),
            shape,
            label_manager.convert_logits_to_segmentation,
            separate=int(axis) if separate else None,
            dtype=np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16,
        )
    finally:
        torch.set_num_threads(threads)
    made = np.zeros(properties_dict["shape_before_cropping"], found.dtype)
    made[tuple(slice(*each) for each in properties_dict["bbox_used_for_cropping"])] = found
    return made.transpose(plans_manager.transpose_backward)


def export_prediction_from_logits(*args: Any, **kwargs: Any) -> None:
    """Export as nnU-Net's function of this name does, with its signature and in less memory.

    Labels are equal to nnU-Net's; probabilities, and other ways to resample than its default, are
    left to it.
    """
    with replaced(export_prediction, _CONVERT, convert_logits):
        _EXPORT(*args, **kwargs)


@contextlib.contextmanager
def lean_export() -> Iterator[None]:
    """Let the predictors of nnU-Net export in less memory within, also in their processes.

    Files and returned arrays alike, and the validation at the end of a training.
    """
    with (
        replaced(nnUNetTrainer, _EXPORT.__name__, export_prediction_from_logits),
        replaced(predict_from_raw_data, _EXPORT.__name__, export_prediction_from_logits),
        replaced(predict_from_raw_data, _CONVERT, convert_logits),
    ):
        yield


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute of a module or class have another value within."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
