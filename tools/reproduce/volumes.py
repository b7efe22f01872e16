"""The hippocampus volumes of the Medical Segmentation Decathlon, and short trainings on them.

The folder, ``Task04_Hippocampus`` (Simpson et al., arXiv:1902.09063), is laid out as its publishers
lay it out: ``imagesTr/*.nii.gz`` with ``labelsTr/*.nii.gz``.
"""

from __future__ import annotations

__all__ = [
    "CLASSES",
    "Case",
    "amp_step",
    "dice_loss",
    "dice_scores",
    "read_scans",
    "read_volumes",
    "train_volumes",
    "whole_step",
]

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from pocketize.artifact.files import atomic_write

#: Background, anterior and posterior part.
CLASSES = 3
#: Volumes that train together.
BATCH = 2


@dataclass(frozen=True)
class Case:
    """One volume.

    Attributes:
        image: [1, D, H, W], zero mean and unit variance before it was padded.
        label: [D, H, W], classes; what was padded is background.
    """

    image: Tensor
    label: Tensor


def read_scans(
    folder: Path, limit: int | None = None
) -> Iterator[tuple[str, NDArray[np.generic], NDArray[np.generic]]]:
    """Read file name, grey values and labels, 3D, of each scan of a folder, or of the first."""
    import nibabel

    for path in sorted((folder / "imagesTr").glob("[!.]*.nii.gz"))[:limit]:
        volume = np.asarray(nibabel.load(path).dataobj)
        labels = np.asarray(nibabel.load(folder / "labelsTr" / path.name).dataobj)
        yield path.name, volume, labels


def read_volumes(folder: Path, size: tuple[int, ...], limit: int | None = None) -> list[Case]:
    """Read whole volumes of a folder in the layout of the Medical Segmentation Decathlon.

    Args:
        folder: such as ``Task04_Hippocampus``.
        size: what they are cut or padded to, about their middle.
        limit: how many; None reads all.

    Raises:
        FileNotFoundError: there is none.
    """
    cases = []
    for _, volume, labels in tqdm(read_scans(folder, limit), "reading", disable=None):
        image = volume.astype(np.float32)
        image = _fitted((image - image.mean()) / (image.std() + 1e-6), size)
        label = _fitted(labels, size).astype(np.int64)
        cases.append(Case(torch.from_numpy(image)[None], torch.from_numpy(label)))
    if not cases:
        raise FileNotFoundError(f"{folder} holds no imagesTr/*.nii.gz")
    return cases


def _fitted(volume: NDArray[np.generic], size: tuple[int, ...]) -> NDArray[np.generic]:
    """Cut or pad an array with zeros to a size, about its middle."""
    for axis, (have, want) in enumerate(zip(volume.shape, size, strict=True)):
        start = max(0, (have - want) // 2)
        volume = np.take(volume, range(start, min(have, start + want)), axis)
        missing = max(0, want - have)
        pads = [(0, 0)] * len(size)
        pads[axis] = (missing // 2, missing - missing // 2)
        volume = np.pad(volume, pads)
    return volume


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy plus one minus the soft Dice score of the foreground."""
    soft = logits.softmax(1)[:, 1:]
    hard = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].to(soft.dtype)
    axes = (0, 2, 3, 4)
    dice = (2 * (soft * hard).sum(axes) + 1) / (soft.sum(axes) + hard.sum(axes) + 1)
    return F.cross_entropy(logits, labels) + 1 - dice.mean()


def whole_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Take the loss of whole volumes and go back from it."""
    loss = dice_loss(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def amp_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Take the loss as `whole_step` does, with the network under autocast to bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    loss = dice_loss(logits.float(), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _orders(count: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def train_volumes(
    model: nn.Module,
    cases: Sequence[Case],
    *,
    steps: int,
    seed: int,
    what: str,
    rate: float = 1e-3,
    step: Callable[[nn.Module, Tensor, Tensor], Tensor] = whole_step,
    kept: Path | None = None,
) -> list[float]:
    """Train with Adam on batches in an order that the seed fixes, the rate falling to zero.

    Args:
        model: trained in place; its mode is left alone.
        cases: what to train on.
        steps: optimiser steps.
        seed: of the order.
        what: for the progress bar.
        rate: of Adam at the first step.
        step: from the model, images and labels to the loss, the gradients of which it adds up.
        kept: a file for the state, every fifty steps, so that an interrupted training goes on.

    Returns:
        The loss of each step.
    """
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    parts: tuple[Any, ...] = (model, optimizer, schedule)
    if kept is not None and kept.exists():
        states, losses = torch.load(kept, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    order = itertools.islice(_orders(len(cases), seed), len(losses), steps)
    for chosen in tqdm(order, what, steps, disable=None, leave=False, initial=len(losses)):
        images = torch.stack([cases[index].image for index in chosen])
        labels = torch.stack([cases[index].label for index in chosen])
        optimizer.zero_grad()
        losses.append(float(step(model, images, labels)))
        optimizer.step()
        schedule.step()
        if kept is not None and len(losses) % 50 == 0:
            state = [part.state_dict() for part in parts], losses
            with atomic_write(kept, overwrite=True) as new:
                torch.save(state, new)
    return losses


@torch.inference_mode()
def dice_scores(run: Callable[[Tensor], Tensor], cases: Sequence[Case]) -> Tensor:
    """Return the Dice scores of the foreground classes, [cases, classes - 1], in percent.

    Args:
        run: from an image [1, 1, D, H, W] to logits of the classes.
        cases: what to segment.
    """
    scores = []
    for case in cases:
        logits = run(case.image[None])
        found = logits.argmax(1)[0]
        for label in range(1, logits.shape[1]):
            a, b = found == label, case.label == label
            both = int(a.sum() + b.sum())
            scores.append(200 * int((a & b).sum()) / both if both else 100.0)
    return torch.tensor(scores).reshape(len(cases), -1)
