"""OME-Zarr's metadata: which axes an array has, and how large a voxel is.

Source: the OME-NGFF specification, versions 0.4 (zarr 2) and 0.5 (zarr 3), "multiscales".
"""

from __future__ import annotations

__all__ = ["OmeLevel", "read_level"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OmeLevel:
    """One level of a multiscale image, and its spatial axes.

    Attributes:
        version: of the specification, "0.4" or "0.5".
        axes: name, type and unit of each spatial axis.
        scale: size of a voxel along each.
        translation: position of the first voxel along each.
        sizes: voxels along each.
    """

    version: str
    axes: tuple[Mapping[str, Any], ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def zarr_format(self) -> int:
        """Of the arrays that this version of the specification is for."""
        return 2 if self.version == "0.4" else 3

    def names(self, order: Sequence[int], channels: int) -> list[str]:
        """Return the names of the axes of a result with its spatial axes in another order."""
        return ["c"] * channels + [str(self.axes[axis]["name"]) for axis in order]

    def attributes(self, order: Sequence[int], channels: int) -> dict[str, Any]:
        """Return the attributes of a group whose array ``0`` is a result of the same sizes."""
        axes = [{"name": "c", "type": "channel"}] * channels
        scale = [1.0] * channels + [self.scale[axis] for axis in order]
        moved = [0.0] * channels + [self.translation[axis] for axis in order]
        transformations = [
            {"type": "scale", "scale": scale},
            {"type": "translation", "translation": moved},
        ]
        image: dict[str, Any] = {
            "axes": [*axes, *(dict(self.axes[axis]) for axis in order)],
            "datasets": [{"path": "0", "coordinateTransformations": transformations}],
        }
        if self.version == "0.4":
            return {"multiscales": [{"version": "0.4", **image}]}
        return {"ome": {"version": self.version, "multiscales": [image]}}


def read_level(attributes: Any, shape: Sequence[int]) -> OmeLevel | None:
    """Return what a group says of its largest level; None where that is not complete.

    Args:
        attributes: of the group.
        shape: of the level's array.
    """
    told = attributes.get("ome", attributes)
    image = told["multiscales"][0]
    version = str(told.get("version", image.get("version")))
    axes = image.get("axes", ())
    named = all(isinstance(axis, Mapping) and "name" in axis for axis in axes)
    if version not in ("0.4", "0.5") or len(axes) != len(shape) or not named:
        return None
    scale, moved = [1.0] * len(axes), [0.0] * len(axes)
    for holder in (image["datasets"][0], image):  # the image's come after the level's
        for step in holder.get("coordinateTransformations", ()):
            values = step.get(step.get("type"))
            if not isinstance(values, Sequence) or len(values) != len(axes):
                return None
            if step["type"] == "scale":
                scale = [a * b for a, b in zip(scale, values, strict=True)]
                moved = [a * b for a, b in zip(moved, values, strict=True)]
            else:
                moved = [a + b for a, b in zip(moved, values, strict=True)]
    space = [index for index, axis in enumerate(axes) if axis.get("type") == "space"]
    if space != list(range(len(axes) - len(space), len(axes))):
        return None
    return OmeLevel(
        version,
        tuple(axes[i] for i in space),
        tuple(scale[i] for i in space),
        tuple(moved[i] for i in space),
        tuple(shape[i] for i in space),
    )
