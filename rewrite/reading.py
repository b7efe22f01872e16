"""Images from files: PNG, JPEG, TIFF, GIF, BMP, NIfTI and numpy arrays."""

from __future__ import annotations

__all__ = [
    "MOST_BYTES",
    "SUFFIXES",
    "Picture",
    "list_images",
    "needed_for",
    "pair_masks",
    "read_image",
]

import contextlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketize.errors import InputError, OptionError, nearest

MOST_BYTES = 8 << 30
"""A file that says it has more, once it is decoded, is not decoded: a few KiB may say anything."""

# a mask may be packed a thousandfold; a photograph is not
_SURELY_FINE, _MOST_TIMES = 256 << 20, 200

_PILLOW = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".bmp")
_NIFTI = (".nii", ".nii.gz")
SUFFIXES = (*_PILLOW, *_NIFTI, ".npy")
"""Endings of the files that are read, in small letters; capitals are read too."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that was read.

    Attributes:
        name: the file's name, for reports.
        image: ``[height, width]``, ``[height, width, 3]`` in colour, or a volume.
        axis: the axis along which a volume is cut; None where ``image`` says it by its shape.
        file_bytes: the size of the file; None for an array that came from none.
    """

    name: str
    image: npt.NDArray[Any]
    axis: int | None = None
    file_bytes: int | None = None


def list_images(folder: str | os.PathLike[str], pattern: str = "*") -> list[Path]:
    """Return the image files of a folder, sorted by path; or the one file that is named.

    Hidden files, and those whose ending is not that of an image, are skipped.

    Args:
        folder: a folder, or a file.
        pattern: of the paths within, such as ``"*.png"``; ``"**/*"`` looks into folders too.

    Raises:
        InputError: nothing is there, or nothing that can be read.
    """
    path = Path(folder)
    if path.is_file():
        if not is_image(path):
            raise InputError(f"{path} is no image that can be read; read are: {_known()}")
        return [path]
    if not path.is_dir():
        there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"there is no folder or file {path}.{nearest(path.name, there)}")
    try:
        matching = sorted(each for each in path.glob(pattern) if each.is_file())
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{pattern!r} is no pattern of paths within {path}: {error}") from error
    found = [each for each in matching if is_image(each)]
    if not found:
        where = path if pattern == "*" else path / pattern
        raise InputError(f"{where}: no image that can be read {_there(path, matching)}")
    return found


def is_image(path: Path) -> bool:
    """Tell by its name whether a file is an image that can be read."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def read_image(path: str | os.PathLike[str], *, axis: int | None = None) -> Picture:
    """Read an image or a volume.

    Colour tables are resolved, alpha channels are dropped. A TIFF or GIF of several pages is a
    volume ``[height, width, pages]``. NIfTI volumes are read as floats, in the scanner's units.

    Args:
        path: the file.
        axis: the axis along which a volume is cut; by default the last one.

    Raises:
        InputError: the file cannot be read; the message says why.
        OptionError: it needs a package that is not installed.
    """
    file = Path(path)
    name = file.name.lower()
    try:
        size = file.stat().st_size
        if name.endswith(_NIFTI):
            image, is_volume = _read_nifti(file), True
        elif name.endswith(".npy"):
            image, is_volume = _read_numpy(file, size), False
        else:
            image, is_volume = _read_picture(file)
        if not image.size:
            raise ValueError(f"it has no pixels, but the shape {image.shape}")
    except OptionError:  # a ValueError, too, but not about the file
        raise
    except Exception as error:
        # Pillow, nibabel and numpy raise anything of files that are cut short or not what they say
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{file} cannot be read: {why or type(error).__name__}") from error
    if axis is None and is_volume:
        axis = -1
    picture_is_flat = not is_volume and not name.endswith(".npy")
    return Picture(file.name, image, None if picture_is_flat else axis, size)


def _check_size(shape: Any, itemsize: int, *, file_bytes: int | None = None) -> None:
    """Check what a header says before memory is taken for it.

    Args:
        itemsize: bytes of a pixel, once it is decoded.
        file_bytes: of a file that is not compressed, and has no fewer.
    """
    nbytes = math.prod(int(size) for size in shape) * itemsize
    if nbytes > MOST_BYTES:
        raise ValueError(
            f"its header says {nbytes / 2**30:,.1f} GiB of pixels, more than {MOST_BYTES >> 30} "
            "GiB (pocketize.reading.MOST_BYTES sets the limit)"
        )
    if file_bytes is not None and nbytes > file_bytes:
        raise ValueError(f"its header says {nbytes:,} bytes, and the file has {file_bytes:,}")


def _read_numpy(file: Path, size: int) -> npt.NDArray[Any]:
    # mapped, the header is read and checked against the file, and nothing else
    mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(mapped, np.ndarray):
        raise ValueError("it is no array")
    _check_size(mapped.shape, mapped.itemsize, file_bytes=size)
    return np.array(mapped)


def _read_nifti(file: Path) -> npt.NDArray[Any]:
    with needed_for("NIfTI files", "nibabel"):
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    try:
        opened = nibabel.load(file)
        _check_size(opened.shape, np.dtype(np.float32).itemsize)
        if not file.name.lower().endswith(".gz"):
            stored = np.dtype(opened.get_data_dtype()).itemsize
            _check_size(opened.shape, stored, file_bytes=file.stat().st_size)
        volume: npt.NDArray[Any] = opened.get_fdata(dtype=np.float32)
    except (ImageFileError, HeaderDataError, TypeError) as error:
        raise ValueError(str(error)) from error
    return volume


def _read_picture(file: Path) -> tuple[npt.NDArray[Any], bool]:
    """Return the pixels, and whether they are a volume."""
    with needed_for("image files", "Pillow"):
        from PIL import Image, ImageSequence
    try:
        with warnings.catch_warnings():
            # an error below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file)
        with opened:
            pages = getattr(opened, "n_frames", 1) if opened.format in ("TIFF", "GIF") else 1
            # of one page Pillow warns, and refuses twice as much
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError(
                    f"its header says {opened.width} x {opened.height} pixels"
                )
            shape, itemsize = (opened.height, opened.width, pages), _bytes_of(opened.mode)
            _check_size(shape, itemsize)
            stored = math.prod(shape) * itemsize
            if stored > _SURELY_FINE and stored > _MOST_TIMES * file.stat().st_size:
                raise ValueError(
                    f"{file.stat().st_size:,} bytes become {stored:,}: it was made to fill memory"
                )
            if pages == 1:
                return _pixels(opened), False
            frames = [_pixels(frame) for frame in ImageSequence.Iterator(opened)]
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} (PIL.Image.MAX_IMAGE_PIXELS sets the limit)") from error
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1 or frames[0].ndim != 2:
        raise ValueError(
            f"it has {pages} pages of the shapes {sorted(shapes)}; a volume has grey pages of one "
            "size, so save each page as an image of its own"
        )
    return np.stack(frames, axis=-1), True


def _bytes_of(mode: str) -> int:
    """Bytes of a pixel of Pillow's, in its memory and as the array that becomes of it."""
    return {"1": 2, "L": 2, "I": 8, "F": 8}.get(mode, 4 if mode.startswith("I;16") else 7)


def _pixels(picture: Any) -> npt.NDArray[Any]:
    """Pixels of a Pillow image: bool, uint8, uint16, int32 or float32; grey or with 3 colours."""
    mode = picture.mode
    if mode in ("1", "L", "F"):
        return np.array(picture)
    if mode == "I" and picture.format == "PNG":
        # PNG has no more than 16 bits; older versions of Pillow read them into 32
        return np.array(picture).astype(np.uint16)
    if mode == "I":
        return np.array(picture)
    if mode.startswith("I;16"):
        return np.array(picture).astype(np.uint16)  # in this computer's order of bytes
    if mode in ("LA", "La"):
        return np.array(picture.convert("LA"))[..., 0]
    colours = np.array(picture.convert("RGB"))
    if mode in ("P", "PA") and (colours == colours[..., :1]).all():
        return colours[..., 0]  # a table of greys
    return colours


def pair_masks(
    images: list[Path], folder: str | os.PathLike[str], pattern: str = "*"
) -> tuple[list[Path], str]:
    """Find the mask of each image.

    By name, where each image has just one mask that is called as the image, or begins with the
    image's name and a character that is no letter and no digit (``Image_01L.jpg``,
    ``Image_01L_1stHO.png``); else in the order of the sorted names, where there are as many.

    Args:
        images: the images, sorted.
        folder: where the masks are.
        pattern: of the masks' paths within.

    Returns:
        The masks in the order of the images, and ``"name"`` or ``"order"``.

    Raises:
        InputError: they cannot be paired.
    """
    masks = [mask for mask in list_images(folder, pattern) if mask not in set(images)]
    pairs = [_by_name(image, masks) for image in images]
    found = [pair for pair in pairs if pair is not None]
    if len(set(found)) == len(images):
        return found, "name"
    if len(masks) == len(images):
        return masks, "order"
    lonely = next((image for image, mask in zip(images, pairs, strict=True) if mask is None), None)
    raise InputError(
        f"{len(images)} images and {len(masks)} masks in {folder} cannot be paired"
        + (f": no one mask is called like {lonely.name}" if lonely is not None else "")
        + ". Give masks the names of their images, or narrow both down with patterns"
    )


def _by_name(image: Path, masks: list[Path]) -> Path | None:
    stem = _stem(image)
    equal = [mask for mask in masks if _stem(mask) == stem]
    longer = [mask for mask in masks if re.match(rf"{re.escape(stem)}[^A-Za-z0-9]", _stem(mask))]
    found = equal or longer
    return found[0] if len(found) == 1 else None


def _stem(path: Path) -> str:
    ending = next(suffix for suffix in (".nii.gz", path.suffix) if path.name.endswith(suffix))
    return path.name[: -len(ending)]


def _known() -> str:
    return " ".join(SUFFIXES)


def _there(folder: Path, matching: list[Path]) -> str:
    files = matching or [each for each in folder.iterdir() if each.is_file()]
    if not files:
        folders = sum(each.is_dir() for each in folder.iterdir())
        inside = f"; its {folders} folders are searched with the pattern '**/*'" if folders else ""
        return f"(it holds no files{inside})"
    kinds = Counter(path.suffix.lower() or "without an ending" for path in files)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    what = "files that match" if matching else "files there, which do not match"
    return f"({what}: {told}; read are: {_known()})"


@contextlib.contextmanager
def needed_for(purpose: str, package: str) -> Iterator[None]:
    """Import an optional package inside, or fail with what to install.

    Args:
        purpose: what it is needed for, as the subject of a sentence in the plural.
        package: its name on PyPI.

    Raises:
        OptionError: the import inside failed.
    """
    try:
        yield
    except ImportError as error:
        raise OptionError(
            f"{purpose} need {package}, which cannot be imported ({error}): "
            "pip install 'pocketize[complexity]'"
        ) from error
