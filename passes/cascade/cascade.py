"""A network on the downscaled volume guides a network on the volume.

The first segments the downscaled volume. Its class maps, resized back, are concatenated to the
volume as further input channels of the second network, which may run patch-wise and still sees what
is elsewhere.

Source: Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023.
"""

from __future__ import annotations

__all__ = ["Cascade"]

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pocketize.engine.pipeline import rewrite
from pocketize.errors import CaptureError, CropWarning, InputError, OptionError
from pocketize.graph.capture import capture, find_tensors, settle_inputs
from pocketize.graph.inputs import Inputs, to_model
from pocketize.passes.cascade.extend_inputs import ExtendInputs
from pocketize.passes.cascade.guidance import (
    Crop,
    class_maps,
    crop_around,
    foreground,
    paste,
    prediction_of,
    resize,
    shrink_labels,
    shrunken,
    touched,
)
from pocketize.passes.shared.nests import map_tensors
from pocketize.plugin.base import Pass

_T = TypeVar("_T", int, float)
_Self = TypeVar("_Self", bound="Cascade")


class Cascade(nn.Module):
    """A network on the downscaled volume that guides a network on the volume.

    ::

        cascade = Cascade(UNet(4, 4), UNet(4, 4), scale=0.3)
        logits = cascade(volume)                                   # (N, 4, *spatial), as stage 2's

        # each stage is trained on its own
        loss(cascade.stage1(cascade.shrink(volume)), cascade.shrink_labels(labels))
        loss(cascade.refine(volume, cascade.guide_by_labels(labels)), labels)

    The second stage is a copy of the given network that reads the class maps as further input
    channels. Their weights start at zero: before training the cascade is the network it was given.
    ``cascade.train()`` is for stage 2: unless the stages are trained jointly, stage 1 goes into
    evaluation mode, and no gradients are kept for it. To train stage 1, say
    ``cascade.stage1.train()``.

    Attributes:
        stage1: the first network, the object that was given; returns logits (N, K, *spatial).
        stage2: the second one, with K more input channels.
        classes: K.
        dimensions: number of spatial axes.

    Source: Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023.
    """

    def __init__(
        self,
        stage1: nn.Module,
        stage2: nn.Module,
        *,
        scale: float | Sequence[float] = 0.3,
        guidance: Literal["argmax", "softmax"] = "argmax",
        classes: int | None = None,
        multiple: int | Sequence[int] = 1,
        crop: int | Sequence[int] | None = None,
        background: int = 0,
        outside: float | Sequence[float] = -100.0,
        joint: bool = False,
        widen: bool = True,
        passes: Sequence[Pass | str] = (),
        inputs: Any = None,
    ) -> None:
        """Combine two networks.

        Args:
            stage1: segments the downscaled volume. Returns logits: one tensor, or several of which
                the first at full resolution counts (deep supervision). A single class is the
                foreground, from a sigmoid.
            stage2: segments the volume; unchanged.
            scale: of stage 1's volume, in (0, 1]; one number for all spatial axes or one for each.
            guidance: "argmax" gives stage 2 the likeliest class as ones and zeros, "softmax"
                probabilities; both made at the small size and then resized linearly.
            classes: how many class maps stage 1 returns; None finds out by tracing it.
            multiple: what the sizes that stage 1 sees, and those of crops, are multiples of: 16 for
                networks with four poolings that pad nothing.
            crop: None runs stage 2 on the volume, a number of voxels (or one for each axis) on the
                box around stage 1's foreground with that margin; in a batch around that of all.
                Where there is no foreground, on the volume.
            background: the class that is no foreground.
            outside: what stage 2's classes get outside the crop: a value for each, or one for all
                but the background's, which then is 0. The default suits logits.
            joint: let gradients reach stage 1 through the guidance, which then must be "softmax".
            widen: False for a stage 2 that has the K input channels already.
            passes: applied to the second stage once it is widened, such as ``Patchwise(...)``.
            inputs: an example volume, as :func:`pocketize.rewrite` takes it; None guesses.

        Raises:
            OptionError: an option is out of range, or options contradict each other.
            InputError: inputs or the number of classes cannot be found out.
            RewriteError: stage 2 cannot read more channels; the text names the layer that cannot.
        """
        super().__init__()
        if guidance not in ("argmax", "softmax"):
            raise OptionError(f"cascade: guidance must be 'argmax' or 'softmax', not {guidance!r}")
        if joint and guidance == "argmax":
            raise OptionError(
                "cascade: no gradient passes through an argmax; joint=True needs guidance='softmax'"
            )
        if classes is not None and classes < 1:
            raise OptionError(f"cascade: classes must be at least 1, not {classes}")
        for factor in _several(scale, "scale"):
            if not 0 < factor <= 1:
                raise OptionError(f"cascade: scale must be above 0 and at most 1, got {factor}")
        for step in _several(multiple, "multiple"):
            if step < 1:
                raise OptionError(f"cascade: multiple must be at least 1, got {step}")
        for margin in () if crop is None else _several(crop, "crop"):
            if margin < 0:
                raise OptionError(f"cascade: a margin cannot be negative, got crop={margin}")

        volume = _volume(stage2, inputs)
        self.dimensions = volume.ndim - 2
        self.scale = _for_axes(scale, self.dimensions, "scale")
        self.multiple = _for_axes(multiple, self.dimensions, "multiple")
        self.crop = None if crop is None else _for_axes(crop, self.dimensions, "crop")
        self.guidance, self.background, self.joint = guidance, background, joint
        self.outside = outside if isinstance(outside, int | float) else tuple(outside)
        seen = None
        if classes is None:
            classes, seen = self._count(stage1, None if inputs is None else volume)
        if not widen and inputs is None:  # what was guessed is what stage 2 reads
            volume = volume[:, classes:]
        _check_channels(seen, volume)
        self.classes = classes
        if not 0 <= background < max(2, classes):
            raise OptionError(
                f"cascade: background must be one of {classes} classes, counted from 0; "
                f"got {background}"
            )
        if widen:
            stage2 = rewrite(stage2, ExtendInputs(classes), inputs=volume)
        if passes or not widen:
            volume = torch.cat([volume, volume.new_zeros(_with_channels(volume, classes))], 1)
        if not widen:
            _check_runs(stage2, volume)
        if passes:
            stage2 = rewrite(stage2, *passes, inputs=volume, inplace=widen)
        self.stage1, self.stage2 = stage1, stage2

    def forward(self, volume: Tensor) -> Any:
        """Return the output of stage 2 for a volume, guided by stage 1.

        Args:
            volume: (N, C, *spatial), what both networks were made for.

        Raises:
            InputError: the volume has another number of axes, or stage 1 returned other classes.
        """
        logits = self._first_stage(volume)
        if self.crop is None:
            return self.stage2(self._joined(volume, logits, None))
        mask = foreground(logits, self.background)
        box = crop_around(mask, volume.shape[2:], self.crop, self.multiple)
        output = self.stage2(self._joined(volume, logits, box))
        if box.whole:
            return output
        if not self.training:
            self._warn(output, box)
        spatial = self.dimensions
        return map_tensors(
            output,
            lambda t: t.ndim >= spatial + 2,
            lambda t: paste(t, box, self.background, self.outside),
        )

    def shrink(self, volume: Tensor) -> Tensor:
        """Return the input of stage 1 for a volume: (N, C, *small), linearly resized."""
        return resize(volume, self._small(volume))

    def guide(self, volume: Tensor) -> Tensor:
        """Return stage 1's own guidance, (N, K, *spatial).

        Without gradients, unless the stages are trained jointly. Stage 1 runs in the mode it is in.
        """
        maps = class_maps(self._first_stage(volume), self.guidance)
        return resize(maps, volume.shape[2:]).to(volume.dtype)

    def guide_by_labels(self, labels: Tensor) -> Tensor:
        """Return the guidance of a perfect stage 1, (N, K, *spatial), to train stage 2 with.

        The ground truth is resized down and up again, like stage 1's prediction, and loses what is
        too small for stage 1.

        Args:
            labels: classes as whole numbers, (N, *spatial) or (N, 1, *spatial).
        """
        sizes = labels.shape[-self.dimensions :]
        shares = self._shares(labels)
        if self.guidance == "argmax":
            # of a single class, the share of which 0.5 decides
            shares = class_maps(shares if self.classes > 1 else shares - 0.5, "argmax")
        return resize(shares, sizes)

    def shrink_labels(self, labels: Tensor) -> Tensor:
        """Return the labels to train stage 1 with: the class that fills most of each small voxel.

        Args:
            labels: classes as whole numbers, (N, *spatial) or (N, 1, *spatial).

        Returns:
            (N, *small), int64.
        """
        shares = self._shares(labels)
        if self.classes == 1:
            return (shares[:, 0] > 0.5).long()
        return shares.argmax(1)

    def refine(self, volume: Tensor, guidance: Tensor) -> Any:
        """Return the output of stage 2 for a volume and any guidance, (N, K, *spatial).

        Raises:
            InputError: the guidance has other classes or sizes than the volume wants.
        """
        expected = _with_channels(volume, self.classes)
        if guidance.shape != expected:
            raise InputError(
                f"cascade: guidance of shape {tuple(guidance.shape)} for a volume of shape "
                f"{tuple(volume.shape)}; expected {tuple(expected)}"
            )
        return self.stage2(torch.cat([volume, guidance.to(volume.dtype)], 1))

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set stage 2's mode; stage 1 is trained on its own, by ``cascade.stage1.train()``.

        Where the stages are trained jointly, stage 1 has the same mode.
        """
        super().train(mode)
        if mode and not self.joint:
            self.stage1.eval()
        return self

    def extra_repr(self) -> str:
        """The options, for ``print(cascade)``."""
        text = f"scale={self.scale}, guidance={self.guidance!r}, classes={self.classes}"
        return text if self.crop is None else f"{text}, crop={self.crop}"

    def _first_stage(self, volume: Tensor) -> Tensor:
        """Return stage 1's logits at the small size."""
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            small = self.shrink(volume)
            logits = prediction_of(self.stage1(small), small.shape[2:])
        if logits.shape[1] != self.classes:
            raise InputError(
                f"cascade: stage 1 returned {logits.shape[1]} classes, expected {self.classes}; "
                "make the cascade with the right number of classes"
            )
        return logits

    def _joined(self, volume: Tensor, logits: Tensor, box: Crop | None) -> Tensor:
        """Return the input of stage 2; the maps at full size are freed before it runs."""
        maps = resize(class_maps(logits, self.guidance), volume.shape[2:]).to(volume.dtype)
        if box is not None:
            volume, maps = box.cut(volume), box.cut(maps)
        return torch.cat([volume, maps], 1)

    def _shares(self, labels: Tensor) -> Tensor:
        small = shrunken(labels.shape[-self.dimensions :], self.scale, self.multiple)
        like = next(self.stage2.parameters(), torch.empty(0))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return shrink_labels(labels, self.classes, small, dtype)

    def _small(self, volume: Tensor) -> tuple[int, ...]:
        if volume.ndim != self.dimensions + 2 or not volume.is_floating_point():
            raise InputError(
                f"cascade: expected a floating-point volume (N, C, *spatial) with "
                f"{self.dimensions} spatial axes, got {volume.dtype} of shape "
                f"{tuple(volume.shape)}"
            )
        return shrunken(volume.shape[2:], self.scale, self.multiple)

    def _warn(self, output: Any, box: Crop) -> None:
        found = [t for t in find_tensors(output) if tuple(t.shape[2:]) == box.extent]
        axes = touched(found[0], box, self.background) if found else ()
        if axes:
            warnings.warn(
                f"stage 2's foreground reaches the border of the crop {box.low} to {box.high} "
                f"along axis {', '.join(map(str, axes))}: stage 1 may have missed a part. Choose a "
                f"margin above crop={self.crop}",
                CropWarning,
                stacklevel=3,
            )

    def _count(self, stage1: nn.Module, volume: Tensor | None) -> tuple[int, Tensor]:
        """Find out how many classes stage 1 returns, by tracing it without memory.

        Args:
            stage1: the network.
            volume: an example; None guesses what stage 1 takes.

        Returns:
            The number, and the traced input.
        """
        try:
            if volume is not None:
                shape = (*volume.shape[:2], *self._small(volume))
                given = to_model(Inputs((torch.zeros(shape),)), stage1)
            else:
                given = settle_inputs(stage1, None)
            traced = capture(stage1, given)
        except (CaptureError, InputError) as error:
            raise InputError(
                f"cascade: cannot find out how many classes stage 1 ({type(stage1).__name__}) "
                f"returns; pass classes=..., inputs=..., or multiple=... for its sizes. {error}"
            ) from error
        seen = given.tensors()[0]
        outputs = [node.meta["val"] for node in traced.outputs()]
        return prediction_of(outputs, seen.shape[2:]).shape[1], seen


def _volume(stage2: nn.Module, inputs: Any) -> Tensor:
    """Return an example input of stage 2."""
    settled = settle_inputs(stage2, inputs)
    tensors = settled.tensors()
    if len(tensors) != 1 or tensors[0].ndim not in (3, 4, 5):
        raise InputError(
            "cascade: both stages take one volume (N, C, *spatial) of one to three spatial axes; "
            f"got {settled.describe()}"
        )
    return tensors[0]


def _check_channels(seen: Tensor | None, volume: Tensor) -> None:
    """Check that both stages read the same volume, where the input of stage 1 is known."""
    if not volume.shape[1]:
        raise InputError("cascade: stage 2 reads class maps only, expected a volume before them")
    if seen is not None and (seen.ndim != volume.ndim or seen.shape[1] != volume.shape[1]):
        raise InputError(
            f"cascade: stage 1 reads {seen.shape[1]} channels and {seen.ndim - 2} spatial axes, "
            f"stage 2 {volume.shape[1]} channels of the volume and {volume.ndim - 2} axes; both "
            "see the same volume"
        )


def _check_runs(stage2: nn.Module, joined: Tensor) -> None:
    try:
        capture(stage2, joined)
    except CaptureError as error:
        raise InputError(
            f"cascade: with widen=False stage 2 must read {joined.shape[1]} channels, those of the "
            f"volume and the class maps; {error}"
        ) from error


def _with_channels(volume: Tensor, channels: int) -> torch.Size:
    return torch.Size((volume.shape[0], channels, *volume.shape[2:]))


def _several(value: _T | Sequence[_T], name: str) -> tuple[_T, ...]:
    values = (value,) if isinstance(value, int | float) else tuple(value)
    whole = name != "scale"
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int if whole else int | float):
            kind = "whole numbers" if whole else "numbers"
            raise OptionError(
                f"cascade: {name} must be one or several {kind}, one for each axis; got {value!r}"
            )
    return values


def _for_axes(value: _T | Sequence[_T], axes: int, name: str) -> tuple[_T, ...]:
    values = _several(value, name)
    if len(values) == 1:
        values *= axes
    if len(values) != axes:
        raise OptionError(
            f"cascade: {name} has {len(values)} values for {axes} spatial axes; give one for each, "
            "or a single one"
        )
    return values
