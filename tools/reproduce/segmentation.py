"""Four public data sets as 2D images with masks, and a short training of a 2D network on them.

The folders are laid out as their publishers lay them out:

* ``DRIVE/training``: retinal vessels, ``images/*.tif``, ``1st_manual/*.gif``, ``mask/*.gif``;
* ``CHASEDB1``: retinal vessels, ``Image_NN[LR].jpg``, ``*_1stHO.png``;
* ``ISBI2012``: membranes in electron microscopy, ``image/N.png``, ``label/N.png``;
* ``Task04_Hippocampus``: slices of ``imagesTr/*.nii.gz`` with ``labelsTr/*.nii.gz``.
"""

from __future__ import annotations

__all__ = ["NAMES", "Dataset", "Sample", "read_dataset", "train"]

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from volumes import read_scans

CROP = 64
BATCH = 8


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        name: file, and slice where there are several.
        raw: the grey values as they were stored, 2D.
        image: ``[H, W]``, float32, zero mean and unit variance within ``valid``.
        mask: ``[H, W]``, what is to be found.
        valid: ``[H, W]``, where it counts.
    """

    name: str
    raw: NDArray[np.generic]
    image: Tensor
    mask: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Dataset:
    """Samples to train on, and others, of other patients, to test on."""

    name: str
    training: tuple[Sample, ...]
    testing: tuple[Sample, ...]


def _sample(
    name: str, raw: NDArray[np.generic], mask: NDArray[np.bool_], valid: NDArray[np.bool_]
) -> Sample:
    values = torch.from_numpy(raw.astype(np.float32))
    inside = values[torch.from_numpy(valid)]
    image = (values - inside.mean()) / inside.std().clamp_min(1e-6)
    return Sample(name, raw, image, torch.from_numpy(mask), torch.from_numpy(valid))


def _grey(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("L"))


def _green(path: Path) -> NDArray[np.uint8]:
    """The green channel, in which retinal vessels stand out."""
    return np.ascontiguousarray(np.asarray(Image.open(path).convert("RGB"))[..., 1])


def _drive(root: Path) -> list[Sample]:
    folder = root / "DRIVE" / "training"
    samples = []
    for path in sorted((folder / "images").glob("*.tif")):
        number = path.name.split("_")[0]
        mask = _grey(folder / "1st_manual" / f"{number}_manual1.gif") > 127
        valid = _grey(folder / "mask" / f"{number}_training_mask.gif") > 127
        samples.append(_sample(path.name, _green(path), mask, valid))
    return samples


def _chase(root: Path) -> list[Sample]:
    samples = []
    for path in sorted((root / "CHASEDB1").glob("*.jpg")):
        raw = _green(path)
        mask = _grey(path.with_name(f"{path.stem}_1stHO.png")) > 127
        samples.append(_sample(path.name, raw, mask, np.ones(raw.shape, dtype=bool)))
    return samples


def _isbi(root: Path) -> list[Sample]:
    folder = root / "ISBI2012"
    samples = []
    for path in sorted((folder / "image").glob("*.png"), key=lambda path: int(path.stem)):
        raw = _grey(path)
        membrane = _grey(folder / "label" / path.name) < 128
        samples.append(_sample(path.name, raw, membrane, np.ones(raw.shape, dtype=bool)))
    return samples


def _hippocampus(root: Path, cases: int = 60) -> list[Sample]:
    """Three slices, a quarter, a half and three quarters up, of each of the first cases."""
    samples = []
    for file, volume, labels in read_scans(root / "Task04_Hippocampus", cases):
        # one range a volume: intensities of these scans have no unit
        top = max(1.0, float(np.percentile(volume, 99.9)))
        grey = np.clip(volume / top * 255.0, 0, 255).round().astype(np.uint8)
        for quarter in (1, 2, 3):
            index = volume.shape[2] * quarter // 4
            raw = np.ascontiguousarray(grey[..., index])
            mask = np.ascontiguousarray(labels[..., index] > 0)
            name = f"{file}[{index}]"
            samples.append(_sample(name, raw, mask, np.ones(raw.shape, dtype=bool)))
    return samples


_READERS: dict[str, tuple[Callable[[Path], list[Sample]], int]] = {
    # with the number of samples that are tested on: the last ones, so no patient is on both sides
    "DRIVE": (_drive, 6),
    "CHASE_DB1": (_chase, 6),
    "ISBI2012": (_isbi, 8),
    "Hippocampus": (_hippocampus, 60),
}
NAMES = tuple(_READERS)


def read_dataset(name: str, root: Path) -> Dataset:
    """Read one data set.

    Args:
        name: one of :data:`NAMES`.
        root: the folder that holds the publishers' folders.

    Raises:
        FileNotFoundError: there are not enough images.
    """
    reader, testing = _READERS[name]
    samples = reader(root)
    if len(samples) <= testing:
        raise FileNotFoundError(f"{name}: {len(samples)} images below {root}, more are needed")
    return Dataset(name, tuple(samples[:-testing]), tuple(samples[-testing:]))


def _padded(tensor: Tensor, size: int) -> Tensor:
    missing = [max(0, size - n) for n in tensor.shape]
    return F.pad(tensor, (0, missing[1], 0, missing[0]))


def _batch(samples: tuple[Sample, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return image, mask and valid, each ``[BATCH, 1, CROP, CROP]``, flipped and turned at will."""
    crops = []
    for _ in range(BATCH):
        sample = samples[int(torch.randint(len(samples), (), generator=generator))]
        planes = [sample.image, sample.mask.float(), sample.valid.float()]
        planes = [_padded(plane, CROP) for plane in planes]
        rows, columns = planes[0].shape
        top = int(torch.randint(rows - CROP + 1, (), generator=generator))
        left = int(torch.randint(columns - CROP + 1, (), generator=generator))
        stack = torch.stack(planes)[:, top : top + CROP, left : left + CROP]
        turns, flip = torch.randint(4, (2,), generator=generator).tolist()
        stack = stack.rot90(turns, (1, 2))
        crops.append(stack.flip(2) if flip % 2 else stack)
    stacked = torch.stack(crops)[:, :, None]
    return stacked[:, 0], stacked[:, 1], stacked[:, 2]


def train(
    model: nn.Module,
    dataset: Dataset,
    *,
    steps: int,
    seed: int,
    distil: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> float:
    """Train a network from its present weights and return its F1 on the test images.

    Cross-entropy plus soft Dice, Adam at 1e-3 falling to zero along a half cosine, batches of eight
    crops of 64x64. F1 is over all test pixels together, at a probability of one half.

    Args:
        model: takes ``[N, 1, H, W]`` to logits ``[N, 1, H, W]``; trained in place.
        dataset: what to train and test on.
        steps: optimiser steps.
        seed: of the crops.
        distil: from images to the model's logits and a loss, which then counts half.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        image, mask, valid = _batch(dataset.training, generator)
        logits, apart = (model(image), None) if distil is None else distil(image)
        crossed = F.binary_cross_entropy_with_logits(logits, mask, weight=valid)
        found = logits.sigmoid() * valid
        dice = 1 - (2 * (found * mask).sum() + 1) / (found.sum() + (mask * valid).sum() + 1)
        loss = crossed + dice
        optimizer.zero_grad()
        (loss if apart is None else 0.5 * loss + 0.5 * apart).backward()
        optimizer.step()
        schedule.step()
    return f1(model, dataset.testing)


@torch.inference_mode()
def f1(model: nn.Module, samples: tuple[Sample, ...]) -> float:
    """Return 2 TP / (2 TP + FP + FN) over all pixels of the samples."""
    model.eval()
    hit = miss = 0
    for sample in samples:
        image = _padded(sample.image, CROP)[None, None]
        rows, columns = sample.image.shape
        found = (model(image)[0, 0, :rows, :columns] > 0) & sample.valid
        truth = sample.mask & sample.valid
        hit += int((found & truth).sum())
        miss += int((found ^ truth).sum())
    return 2 * hit / max(1, 2 * hit + miss)
