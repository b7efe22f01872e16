"""Without the extra everything imports, and what needs a package says how to get it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketize.errors import OptionError
from pocketize.passes.complexity import (
    edge_information,
    feature_congestion,
    foreground_density,
    jpeg_complexity,
    keypoints,
    measure_dataset,
    signal_energy,
    subband_entropy,
)

IMAGE = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
HINT = "pip install 'pocketize[complexity]'"


@pytest.mark.parametrize(
    ("module", "package", "measure"),
    [
        ("PIL", "Pillow", jpeg_complexity),
        ("scipy", "scipy", signal_energy),
        ("scipy.ndimage", "scipy", edge_information),
        ("scipy.ndimage", "scipy", feature_congestion),
        ("skimage.color", "scikit-image", feature_congestion),
        ("skimage.color", "scikit-image", subband_entropy),
        ("pyrtools.pyramids", "pyrtools", subband_entropy),
        ("cv2", "opencv-python-headless", keypoints),
    ],
)
def test_a_measure_names_the_package_it_lacks(
    module: str, package: str, measure: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("skimage.color")  # which needs scipy, too
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptionError) as caught:
        measure(IMAGE)
    assert f" need {package}, which cannot be imported" in str(caught.value)
    assert str(caught.value).endswith(HINT)


@pytest.mark.parametrize(
    ("module", "package", "name"), [("PIL", "Pillow", "a.png"), ("nibabel", "nibabel", "a.nii")]
)
def test_a_file_names_the_package_it_lacks(
    module: str, package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptionError, match=rf"files need {package}, which cannot be imported"):
        measure_dataset(tmp_path)


def test_masks_and_arrays_need_no_package(tmp_path: Path) -> None:
    blocked = ["PIL", "scipy", "skimage", "cv2", "nibabel", "pyrtools", "matplotlib"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "import numpy as np\n"
        "from pocketize.passes.complexity import foreground_density, measure_dataset\n"
        "mask = np.eye(4, dtype=bool)\n"
        "result = measure_dataset([mask], 'foreground', masks=[mask], scales=2)\n"
        "print(foreground_density(mask), result.mean.tolist())\n"
        "from pocketize.cli import main\n"
        "main(['complexity', '--help'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("0.25 [0.25, 0.25]\nusage: pocketize complexity ")
    assert done.stderr == ""
    assert foreground_density(np.eye(4)) == 0.25
