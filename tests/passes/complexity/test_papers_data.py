"""The paper's own data sets, where the environment variable ``POCKETIZE_DATA`` names their folder.

It holds ``CHASEDB1/`` (``Image_NN[LR].jpg``) and ``DRIVE/training/images/`` (``NN_training.tif``),
as their publishers lay them out.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pocketize.passes.complexity import complexity_of, measure_dataset

#: Mishra, Chen, Hu, JETC 2021: J of CHASE_DB1 at the scales 1, 1/2, 1/4, 1/8, 1/16.
CHASE = (0.2826, 0.2204, 0.1971, 0.1789, 0.1636)


def _images(*parts: str) -> Path:
    root = os.environ.get("POCKETIZE_DATA")
    folder = Path(root or ".", *parts)
    if root is None or not folder.is_dir():
        pytest.skip(f"POCKETIZE_DATA does not name a folder with {'/'.join(parts)}")
    return folder


@pytest.mark.slow
def test_chase_db1_has_the_papers_jpeg_complexity_within_6_percent() -> None:
    result = measure_dataset(_images("CHASEDB1"), size="file", pattern="*.jpg")
    assert len(result.names) == 20
    np.testing.assert_allclose(result.mean, CHASE, rtol=0.06)


@pytest.mark.slow
def test_drive_decays_with_the_scale() -> None:
    folder = _images("DRIVE", "training", "images")
    for size in ("file", "raw"):
        values = complexity_of(folder, size=size)  # type: ignore[arg-type]
        assert (np.diff(values) < 0).all(), values
