"""The complexity of a set of images: what a plan of widths is made from."""

from __future__ import annotations

__all__ = ["Complexity", "compare_measures", "complexity_of", "measure_dataset"]

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tabulate import tabulate
from tqdm import tqdm

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity.foreground import foreground_density, jb, jb_weight
from pocketize.passes.complexity.measures import QUALITY, over_size
from pocketize.passes.complexity.planes import Plane, Range, check_count, check_image, scale_names
from pocketize.passes.complexity.registry import (
    MEASURES,
    Measure,
    by_scale,
    check_options,
    get_measure,
)
from pocketize.reading import Picture, list_images, pair_masks, read_image

Where: TypeAlias = str | os.PathLike[str]
Images: TypeAlias = Where | npt.NDArray[Any] | Sequence[Where | npt.NDArray[Any]]
_Item: TypeAlias = Where | npt.NDArray[Any]


def complexity_of(
    images: Images,
    measure: str | Callable[[Plane], float] = "jpeg",
    scales: int = 5,
    size: Literal["raw", "file"] = "raw",
    **options: Any,
) -> npt.NDArray[np.float64]:
    """Return the complexity of a set of images per scale: the mean of :func:`measure_dataset`.

    Args:
        images: a folder, or images; see :func:`measure_dataset`.
        measure: a name of ``MEASURES``, or a function of planes.
        scales: how many; one for each level of the network.
        size: ``"raw"``, or ``"file"`` for the paper's convention; JPEG complexity only.
        **options: those of :func:`measure_dataset`, and the measure's own.

    Returns:
        ``[scales]``, the finest scale first.
    """
    return measure_dataset(images, measure, scales=scales, size=size, **options).mean


def measure_dataset(
    images: Images,
    measure: str | Callable[[Plane], float] = "jpeg",
    *,
    scales: int = 5,
    size: Literal["raw", "file"] = "raw",
    masks: Images | None = None,
    pattern: str = "*",
    mask_pattern: str = "*",
    axis: int | None = None,
    value_range: Range | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Complexity:
    """Measure every image of a set, layer-wise; the set's complexity is the mean.

    Args:
        images: a folder, a file, an array, or a sequence of files and arrays.
        measure: a name of ``MEASURES``, or a function of planes.
        scales: how many scales 1, 1/2, 1/4, ...; 1 is the plain measure only.
        size: over what a JPEG's size is taken; see
            :func:`~pocketize.passes.complexity.measures.jpeg_complexity`; for ``"jpeg"``, ``"jb"``.
        masks: what is foreground, for ``"foreground"`` and ``"jb"``: a folder, whose masks are
            paired by name or else by order, or one mask per image, in order.
        pattern: of the paths in the folder of images, such as ``"*.png"`` or ``"**/*"``.
        mask_pattern: of the paths in the folder of masks.
        axis: the axis along which volumes are cut; by default the last one.
        value_range: the values that become 0 and 255; by default by the type of the image.
        progress: whether to show a bar on stderr; by default on a terminal only.
        **options: the measure's own, such as ``quality`` of ``"jpeg"`` or ``w`` of ``"jb"``.

    Raises:
        InputError: there are no images, or one cannot be read or measured (named in the message),
            or a mask is missing or has another size than its image.
        OptionError: an unknown measure or option, or a package that is not installed.
    """
    chosen = get_measure(measure)
    check_count("scales", scales)
    check_options(chosen, options)
    if size not in ("raw", "file"):
        raise OptionError(f"size: expected 'raw' or 'file', got {size!r}")
    if size == "file" and chosen.name not in ("jpeg", "jb"):
        raise OptionError(f"size='file' is for jpeg and jb; {chosen.name} is not over a size")
    if chosen.needs_masks and masks is None:
        raise OptionError(f"{chosen.name} needs masks: give masks=, a folder or one per image")
    if chosen.name == "jb":
        options["w"] = jb_weight(options.get("w", "unet"))
    settings: dict[str, Any] = dict(options)
    if chosen.name in ("jpeg", "jb"):
        settings = {"quality": QUALITY} | settings | {"over": f"{size} size"}
    if axis is not None:
        settings["axis"] = axis
    if value_range is not None:
        settings["value range"] = list(value_range)

    items = _items(images, pattern)
    paired: Sequence[_Item | None] = [None] * len(items)
    if masks is not None and chosen.needs_masks:
        paired, how = _masks(items, masks, mask_pattern)
        settings["masks paired by"] = how
    task = _Task(chosen, scales, size, axis, value_range, options)
    bar = tqdm(
        zip(items, paired, strict=True),
        total=len(items),
        desc=chosen.name,
        unit="image",
        leave=False,
        file=sys.stderr,
        disable=None if progress is None else not progress,
    )
    names, rows = [], []
    for number, (item, mask) in enumerate(bar):
        picture = _load(item, f"image {number}", axis)
        names.append(picture.name)
        with _named(picture.name):
            rows.append(task.row(picture, mask))
    values = np.stack(rows)
    values.flags.writeable = False
    return Complexity(chosen.name, tuple(names), values, settings)


@dataclass(frozen=True, eq=False)
class _Task:
    """What is measured of every image."""

    measure: Measure
    scales: int
    size: str
    axis: int | None
    value_range: Range | None
    options: dict[str, Any]

    def row(self, picture: Picture, mask: _Item | None) -> npt.NDArray[np.float64]:
        if mask is None:
            return self._by_scale(picture, self.measure, self.options)
        options = dict(self.options)
        density = self._density(picture, mask, options.pop("foreground", None))
        if self.measure.name == "foreground":
            return np.full(self.scales, density)
        weight = options.pop("w")
        return jb(self._by_scale(picture, MEASURES["jpeg"], options), density, weight)

    def _by_scale(
        self, picture: Picture, measure: Measure, options: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        settings: dict[str, Any] = {"axis": picture.axis, "value_range": self.value_range}
        values = by_scale(measure, picture.image, self.scales, **settings, **options)
        if measure.name == "jpeg":
            values = values * over_size(self.size, picture.image.size, picture.file_bytes)
        return values

    def _density(self, picture: Picture, item: _Item, foreground: float | None) -> float:
        mask = _load(item, f"the mask of {picture.name}", self.axis)
        pixels = mask.image
        size = _size(picture)
        if pixels.shape == (*size, 3):
            if foreground is not None:
                raise InputError(f"its mask {mask.name} is in colour, where no value is foreground")
            pixels = np.any(pixels, axis=-1, keepdims=True)[..., 0]
        if pixels.shape != size:
            raise InputError(
                f"its mask {mask.name} has the size {' x '.join(map(str, pixels.shape))}, the "
                f"image {' x '.join(map(str, size))}; they must be the same"
            )
        return foreground_density(pixels, foreground=foreground)


def _size(picture: Picture) -> tuple[int, ...]:
    shape = picture.image.shape
    in_colour = picture.axis is None and len(shape) == 3 and shape[2] == 3
    return shape[: 2 if in_colour else 3]


def _items(images: Images, pattern: str) -> Sequence[_Item]:
    if isinstance(images, str | os.PathLike):
        return list_images(images, pattern)
    items = [images] if isinstance(images, np.ndarray) else list(images)
    if not items:
        raise InputError("there are no images: the sequence is empty")
    return items


def _masks(items: Sequence[_Item], masks: Images, pattern: str) -> tuple[Sequence[_Item], str]:
    if isinstance(masks, str | os.PathLike):
        paths = [Path(item) for item in items if isinstance(item, str | os.PathLike)]
        if len(paths) == len(items):
            return pair_masks(paths, masks, pattern)
    found = _items(masks, pattern)
    if len(found) != len(items):
        raise InputError(f"expected one mask per image: {len(items)} images, {len(found)} masks")
    return found, "order"


def _load(item: _Item, name: str, axis: int | None) -> Picture:
    if isinstance(item, str | os.PathLike):
        return read_image(item, axis=axis)
    with _named(name):
        check_image(item)
    return Picture(name, item, axis)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


@dataclass(frozen=True, eq=False, repr=False)
class Complexity:
    """The complexity of a set of images; its repr is a table.

    Attributes:
        measure: the name of the measure.
        names: the images.
        values: ``[images, scales]``, the finest scale first.
        settings: how it was measured: the options that were in force.
    """

    measure: str
    names: tuple[str, ...]
    values: npt.NDArray[np.float64]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """The mean over the images, ``[scales]``: the complexity of the set."""
        mean: npt.NDArray[np.float64] = self.values.mean(axis=0)
        return mean

    def __repr__(self) -> str:
        return f"{self.title()}\n\n{tabulate(self._rows(), **_LAYOUT)}"

    def title(self) -> str:
        """Say in one line what was measured."""
        count = len(self.names)
        how = ", ".join(f"{name} {_plain(value)}" for name, value in self.settings.items())
        return f"{self.measure} of {count} image{'s' * (count != 1)}" + (f", {how}" if how else "")

    def to_markdown(self) -> str:
        """Return the table as GitHub's Markdown."""
        return f"{self.title()}\n\n{tabulate(self._rows(), **_LAYOUT | {'tablefmt': 'github'})}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can say, values per image included."""
        return {
            "measure": self.measure,
            "settings": dict(self.settings),
            "scales": scale_names(self.values.shape[1]),
            "mean": self.mean.tolist(),
            "images": [
                {"name": name, "values": row}
                for name, row in zip(self.names, self.values.tolist(), strict=True)
            ],
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def _rows(self) -> list[list[str]]:
        spread = (self.values.std(axis=0), self.values.min(axis=0), self.values.max(axis=0))
        columns = [[figure(value) for value in column] for column in (self.mean, *spread)]
        return [list(row) for row in zip(scale_names(self.values.shape[1]), *columns, strict=True)]


def compare_measures(results: Sequence[Complexity], *, markdown: bool = False) -> str:
    """Return one table of the means of several measures of the same images."""
    names = scale_names(max(result.values.shape[1] for result in results))
    rows = [[result.measure, *map(figure, result.mean)] for result in results]
    table = tabulate(
        rows,
        headers=("measure", *names),
        colalign=("left", *["right"] * len(names)),
        disable_numparse=True,
        tablefmt="github" if markdown else "simple",
    )
    return "\n".join([*(result.title() for result in results), "", table])


def figure(value: float) -> str:
    """Write a number with four digits that matter."""
    if value == 0:
        return "0"
    return f"{value:#.4g}".rstrip(".") if 1e-4 <= abs(value) < 1e4 else f"{value:.3e}"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_LAYOUT: dict[str, Any] = {
    "headers": ("scale", "mean", "deviation", "min", "max"),
    "colalign": ("left", "right", "right", "right", "right"),
    "disable_numparse": True,
}
