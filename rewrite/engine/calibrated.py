"""Apply a plan to a trained network, and calibrate what it makes."""

from __future__ import annotations

__all__ = ["apply_calibrated", "needs_calibration"]

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from pocketize.calibration.calibrate import calibrate, check_passes
from pocketize.calibration.choice import choose_channels
from pocketize.calibration.options import Calibration, evaluated
from pocketize.calibration.result import CalibratedNetwork
from pocketize.engine.surgery import apply_edits
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs
from pocketize.plugin.base import Guarantee

if TYPE_CHECKING:
    from pocketize.engine.pipeline import Plan


_BY_NORM = "channels were chosen by their weights: the pass resizes parts of groups"


def needs_calibration(planned: Plan) -> bool:
    """Whether a pass of a plan changes what the model computes."""
    return any(p.edits and p.guarantee is not Guarantee.EXACT for p in planned.passes)


@torch.inference_mode(False)
def apply_calibrated(
    planned: Plan,
    inputs: Inputs,
    calibration: Calibration,
    progress: Callable[[str], None] = lambda text: None,
) -> CalibratedNetwork:
    """Choose the channels that stay on images, apply a plan, and solve the layers.

    Args:
        planned: a plan with edits; the model is not changed.
        inputs: what it was planned with.
        calibration: images and options.
        progress: called with what is done next.

    Raises:
        InputError: there are no images, or they do not suit the model.
        OptionError: a pass draws weights anew.
        RewriteError: the model does not run layer by layer.
    """
    check_passes(each.rewrite for each in planned.passes)
    model = planned.model
    images = calibration.inputs_of(model)
    options: dict[str, Any] = {
        "samples": calibration.samples,
        "memory": calibration.bytes,
        "seed": calibration.seed,
    }
    if calibration.channels != "norm":
        progress("choosing channels")
        each = {**options, "samples": max(1, calibration.samples // len(images))}
        passes, current = [], model
        for number, one in enumerate(planned.passes):
            with evaluated(current, images):
                edits = choose_channels(
                    current,
                    one.edits,
                    inputs,
                    images,
                    by=calibration.channels,
                    variants=one.variants,
                    **each,
                )
            if edits is None:
                one = dataclasses.replace(one, notes=(*one.notes, _BY_NORM))
            else:
                one = dataclasses.replace(one, edits=edits)
            passes.append(one)
            if number + 1 < len(planned.passes):
                current = clone(current)
                apply_edits(current, one.edits)
        planned = dataclasses.replace(planned, passes=tuple(passes))
    after = planned.apply()
    return calibrate(model, after, images, ridge=calibration.ridge, progress=progress, **options)
