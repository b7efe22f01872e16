"""Volumes in files, opened to be read and written part by part: NIfTI, ``.npy`` and zarr."""

from __future__ import annotations

__all__ = ["FORMATS", "VolumeFiles", "create_volume", "open_volumes", "suffix_of"]

import contextlib
import gzip
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from pocketize.artifact.files import atomic_folder, atomic_write
from pocketize.errors import InputError, PocketizeWarning
from pocketize.passes.tiling.ome import OmeLevel, read_level
from pocketize.passes.tiling.plan_text import times
from pocketize.passes.tiling.storage import reserve

FORMATS = (".nii", ".nii.gz", ".npy", ".zarr")
#: Bytes that are copied at once.
_BLOCK = 1 << 24
_MISSING = "{} needs the package {}: pip install 'pocketize[volumes]'"
#: What a zarr array or group has, of format 2 or 3.
_ZARR = (".zarray", ".zgroup", "zarr.json")


@dataclass(frozen=True)
class VolumeFiles:
    """Opened files.

    Attributes:
        source: for :func:`pocketize.run_volume`; spatial axes in the order of the network.
        header: of the first file where it is NIfTI; None elsewhere.
        spatial: the spatial sizes of the first file where it is NIfTI, in its own order.
        level: of the first file where it is OME-Zarr.
    """

    source: Any
    header: Any = None
    spatial: tuple[int, ...] = ()
    level: OmeLevel | None = None


def suffix_of(path: str) -> str:
    """Return the format of a path, one of ``FORMATS``; "" for none of them.

    A path within a zarr group, such as ``brain.zarr/0``, is zarr.
    """
    name = path.lower().rstrip("/")
    if any(part.endswith(".zarr") for part in Path(name).parts):
        return ".zarr"
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), "")


class _Permuted:
    """A view of an array with its axes in another order, which is read and written by slices."""

    def __init__(self, array: Any, order: Sequence[int]) -> None:
        self.array, self.order = array, tuple(order)
        self.shape = tuple(array.shape[axis] for axis in order)
        self.dtype = array.dtype

    def _index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        rows = sorted(zip(self.order, index, strict=True), key=lambda row: row[0])
        return tuple(part for _, part in rows)

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        return np.asarray(self.array[self._index(index)]).transpose(self.order)

    def __setitem__(self, index: tuple[slice, ...], values: Any) -> None:
        self.array[self._index(index)] = np.transpose(values, np.argsort(self.order))


def _permuted(array: Any, order: Sequence[int]) -> Any:
    return array if tuple(order) == tuple(range(len(order))) else _Permuted(array, order)


# -- reading ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_volumes(
    paths: Sequence[str], *, axes: Sequence[int] | None = None, folder: str | None = None
) -> Iterator[VolumeFiles]:
    """Open one file, or several of one shape with a channel each; warn where these lie elsewhere.

    NIfTI files are (x, y, z), or (x, y, z, C); others are (*spatial) or (C, *spatial). A compressed
    one is unpacked into a temporary file in ``folder``, as nothing can be read from its middle.

    Args:
        paths: the files.
        axes: the order in which the network has the spatial axes of the file.
        folder: for temporary files.

    Raises:
        InputError: a file cannot be read, or its package is not installed.
    """
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_opened(path, folder)) for path in paths]
        pairs = zip(paths, opened, strict=True)
        sources = [_ordered(path, source, axes) for path, (source, _, _) in pairs]
        _check_places(paths, opened)
        _, header, level = opened[0]
        spatial = tuple(opened[0][0].shape[-3:]) if header is not None else ()
        yield VolumeFiles(sources if len(sources) > 1 else sources[0], header, spatial, level)


def _check_places(paths: Sequence[str], opened: Sequence[tuple[Any, Any, Any]]) -> None:
    """Warn where the voxels of NIfTI files are not those of the first one, in space."""
    (source, first, _), *others = opened
    for path, (_, header, _) in zip(paths[1:], others, strict=True):
        if first is None or header is None:
            continue
        corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(source.shape[-3:]) - 1)
        matrix = header.get_best_affine() - first.get_best_affine()
        away = np.linalg.norm(corners @ matrix[:3, :3].T + matrix[:3, 3], axis=1).max()
        if away > 0.1 * min(first.get_zooms()[:3]):
            warnings.warn(
                f"{path} is up to {away:.3g} mm away from {paths[0]} (their affines differ), but "
                "is read as a channel of it, voxel by voxel; resample it if this is not meant",
                PocketizeWarning,
                stacklevel=5,
            )


def _ordered(path: str, source: Any, axes: Sequence[int] | None) -> Any:
    rank = len(source.shape)
    if axes is None:
        return source
    channels = rank - len(axes)
    if channels not in (0, 1) or sorted(axes) != list(range(len(axes))):
        raise InputError(
            f"{path} has {rank} axes, channels among them; axes {list(axes)} is no order of its "
            "spatial axes, such as 2,1,0"
        )
    return _permuted(source, [*range(channels), *(axis + channels for axis in axes)])


@contextlib.contextmanager
def _opened(path: str, folder: str | None) -> Iterator[tuple[Any, Any, OmeLevel | None]]:
    """Yield a source (*spatial) or (C, *spatial), its NIfTI header or None, its OME-Zarr level."""
    suffix = suffix_of(path)
    if not suffix:
        raise InputError(f"cannot tell the format of {path}: expected {', '.join(FORMATS)}")
    if not os.path.exists(path if suffix != ".zarr" else _zarr_root(path)):
        raise InputError(f"there is no file {path}")
    if suffix == ".zarr":
        source, level = _open_zarr(path)
        yield source, None, level
    elif suffix == ".npy":
        try:
            yield np.load(path, mmap_mode="r", allow_pickle=False), None, None
        except ValueError as error:
            raise InputError(f"cannot read {path}: {error}") from error
    elif suffix == ".nii":
        yield *_open_nifti(path, path), None
    else:
        with _unpacked(path, folder) as raw:
            yield *_open_nifti(raw, path), None


@contextlib.contextmanager
def _scratch(folder: str | None) -> Iterator[Path]:
    """Yield a temporary file for NIfTI."""
    with tempfile.NamedTemporaryFile(prefix="pocketize-", suffix=".nii", dir=folder) as file:
        yield Path(file.name)


@contextlib.contextmanager
def _unpacked(path: str, folder: str | None) -> Iterator[str]:
    with _scratch(folder) as raw:
        try:
            with gzip.open(path) as packed, raw.open("wb") as file:
                shutil.copyfileobj(packed, file, _BLOCK)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        except OSError as error:
            raise InputError(f"cannot unpack {path} to {raw.parent}: {error.strerror}") from error
        yield str(raw)


def _open_nifti(path: str, name: str) -> tuple[Any, Any]:
    nibabel = _nibabel(name)
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, OSError, ValueError) as error:
        raise InputError(f"cannot read {name}: {error}") from error
    array = image.dataobj
    if len(array.shape) not in (3, 4):
        raise InputError(f"{name} has {len(array.shape)} axes; expected (x, y, z) or (x, y, z, C)")
    source = array if len(array.shape) == 3 else _Permuted(array, (3, 0, 1, 2))
    return source, image.header


def _zarr_root(path: str) -> Path:
    parts = Path(path).parts
    last = next(n for n, part in enumerate(parts) if part.lower().endswith(".zarr"))
    return Path(*parts[: last + 1])


def _open_zarr(path: str) -> tuple[Any, OmeLevel | None]:
    zarr, level = _zarr(path), None
    try:
        found = zarr.open(path, mode="r")
        if not hasattr(found, "shape"):  # a group; of OME-Zarr the largest level
            told = found.attrs.get("ome", found.attrs)
            group, found = found, found[told["multiscales"][0]["datasets"][0]["path"]]
            level = read_level(group.attrs, found.shape)
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path} is a zarr group; name one of its arrays: {path}/NAME") from error
    except Exception as error:  # of zarr's, which differ from version to version
        raise InputError(f"cannot read {path}: {error}") from error
    return found, level


def _nibabel(path: str) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise InputError(_MISSING.format(path, "nibabel")) from error
    return nibabel


def _zarr(path: str) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise InputError(_MISSING.format(path, "zarr")) from error
    return zarr


# -- writing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def create_volume(
    path: str,
    shape: Sequence[int],
    dtype: Any,
    block: Sequence[int],
    *,
    like: VolumeFiles,
    axes: Sequence[int] | None = None,
    force: bool = False,
    folder: str | None = None,
) -> Iterator[Any]:
    """Yield a sink, which is a file of that name after the block, and nothing if it raises.

    Args:
        path: the file; its suffix tells the format.
        shape: of the result, (*spatial) or (C, *spatial).
        dtype: of the result; NIfTI has no float16 and gets float32.
        block: sizes of the boxes that will be written; of the chunks of a zarr array.
        like: what was read; a NIfTI file gets its header.
        axes: as in :func:`open_volumes`; a NIfTI file is written in the order of the one read.
            Of OME-Zarr a result of the same sizes is a group with one level, with its metadata.
        force: replace a file.
        folder: for temporary files.

    Raises:
        ArtifactError: it cannot be written.
        InputError: the format does not hold the result.
    """
    suffix, channels = suffix_of(path), len(shape) - len(block)
    if suffix == ".zarr":
        order, level = tuple(axes or range(len(block))), like.level
        if level and tuple(shape[channels:]) != tuple(level.sizes[axis] for axis in order):
            level = None  # its voxels have other sizes
        told = None if level is None else (level, order)
        chunks = (1,) * channels + tuple(block)
        with _created_zarr(path, shape, dtype, chunks, force, told) as array:
            if like.header is not None:
                array.attrs["affine"] = like.header.get_best_affine().tolist()
            yield array
        return
    if _processes() > 1:
        raise InputError(f"several processes write one zarr array; name OUT.zarr instead of {path}")
    if suffix == ".npy":
        with atomic_write(path, overwrite=force) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=tuple(shape))
            with open(temporary, "rb+") as file:
                reserve(file.fileno(), os.path.getsize(temporary))
            yield array
            array.flush()
        return
    order = tuple(axes or range(len(block)))
    with contextlib.ExitStack() as stack:
        final = suffix == ".nii"
        raw = stack.enter_context(
            atomic_write(path, overwrite=force) if final else _scratch(folder)
        )
        array = _create_nifti(raw, path, shape, dtype, order, like)
        yield array
        del array
        if not final:
            packed = stack.enter_context(atomic_write(path, overwrite=force))
            with (
                raw.open("rb") as file,
                packed.open("wb") as out,
                # nibabel's own level; without the date, so that equal results are equal files
                gzip.GzipFile("", "wb", 1, out, mtime=0) as written,
            ):
                shutil.copyfileobj(file, written, _BLOCK)


def _create_nifti(
    raw: Path, path: str, shape: Sequence[int], dtype: Any, order: Sequence[int], like: VolumeFiles
) -> Any:
    """Write a header and room for the data; return the data, in the network's order of axes."""
    nibabel = _nibabel(path)
    channels = len(shape) - len(order)
    spatial = tuple(shape[channels + order.index(axis)] for axis in range(len(order)))
    if like.spatial and spatial != like.spatial:
        raise InputError(
            f"{path}: the network returns {times(spatial)} voxels for {times(like.spatial)}, to "
            "which the affine of the input does not belong; write .npy or .zarr"
        )
    dtype = np.dtype(np.float32 if np.dtype(dtype) == np.float16 else dtype)
    stored = (*spatial, *shape[:channels])
    try:
        if like.header is None:
            header = nibabel.Nifti1Image(np.zeros((1,) * len(order), np.uint8), np.eye(4)).header
        else:
            header = like.header.copy()
        header.set_data_dtype(dtype)
        header.set_data_shape(stored)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = header["vox_offset"] = 0
        with raw.open("wb") as file:
            header.write_to(file)
            offset = int(header["vox_offset"])
            file.write(bytes(offset - file.tell()))
            file.flush()
            reserve(file.fileno(), offset + int(np.prod(stored)) * dtype.itemsize)
    except nibabel.spatialimages.HeaderDataError as error:
        raise InputError(f"{path}: NIfTI does not hold {times(stored)} {dtype}: {error}") from error
    array = np.memmap(
        raw, header.get_data_dtype(), mode="r+", offset=offset, shape=stored, order="F"
    )
    rank = len(order)
    return _permuted(array, [*range(rank, rank + channels), *order])


@contextlib.contextmanager
def _created_zarr(
    path: str,
    shape: Sequence[int],
    dtype: Any,
    chunks: Sequence[int],
    force: bool,
    ome: tuple[OmeLevel, tuple[int, ...]] | None,
) -> Iterator[Any]:
    """Yield an array that all processes have opened; it is renamed at the end.

    With a level of OME-Zarr, and the order of its axes, it is the only level of a group.
    """
    zarr = _zarr(path)
    if _zarr_root(path) != Path(path):
        raise InputError(f"{path} is within a zarr group; name a folder of its own, such as x.zarr")
    if os.path.isdir(path) and not any((Path(path) / name).exists() for name in _ZARR):
        raise InputError(f"{path} is a folder and no zarr array; name another")
    first = _processes() == 1 or dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        where: list[Any] = [None]
        if first:
            where = [str(stack.enter_context(atomic_folder(path, overwrite=force)))]
            options: dict[str, Any] = {}
            if ome is not None:
                level, order = ome
                channels = len(shape) - len(order)
                kind = {} if zarr.__version__ < "3" else {"zarr_format": level.zarr_format}
                group = zarr.open_group(where[0], mode="w", **kind)
                group.attrs.update(level.attributes(order, channels))
                where = [os.path.join(where[0], "0")]
                if level.zarr_format == 2:
                    options = {"dimension_separator": "/", **kind}
                else:
                    options = {"dimension_names": level.names(order, channels), **kind}
            given = {"shape": tuple(shape), "chunks": tuple(chunks), "dtype": dtype, **options}
            zarr.open_array(store=where[0], mode="w", **given)
        if _processes() > 1:
            dist.broadcast_object_list(where)
        yield zarr.open_array(store=where[0], mode="r+")


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
