"""Small images whose order of complexity nobody would dispute."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Image = npt.NDArray[Any]


@pytest.fixture
def noise() -> Image:
    return np.random.default_rng(0).integers(0, 256, (64, 80), dtype=np.uint8)


@pytest.fixture
def smooth() -> Image:
    """A slope that ends softly: no edge anywhere."""
    x, y = np.meshgrid(np.linspace(0, np.pi, 80), np.linspace(0, np.pi, 64))
    return np.rint(127 + 60 * np.cos(x) * np.cos(y)).astype(np.uint8)


@pytest.fixture
def clouds() -> Image:
    """Noise whose amplitudes fall with the frequency, as those of photographs do."""
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])
    frequency[0, 0] = 1
    white = np.random.default_rng(0).standard_normal((128, 128))
    values = np.fft.ifft2(np.fft.fft2(white) / frequency**1.5).real
    return ((values - values.min()) / np.ptp(values) * 255).astype(np.uint8)


@pytest.fixture
def constant() -> Image:
    return np.full((64, 80), 77, dtype=np.uint8)


@pytest.fixture
def coloured(noise: Image, smooth: Image) -> Image:
    return np.stack([noise, smooth, noise[::-1]], axis=2)


@pytest.fixture
def scan(noise: Image, smooth: Image, constant: Image) -> Image:
    """A volume of three unlike slices along its first axis."""
    return np.stack([noise, smooth, constant]).astype(np.uint8)
