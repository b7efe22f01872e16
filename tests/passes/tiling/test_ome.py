"""OME-Zarr in, OME-Zarr out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketize.cli import main
from pocketize.passes.tiling.ome import read_level

zarr = pytest.importorskip("zarr")
NET = "tests.passes.tiling.test_run_command:build"
AXES = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
CHANNEL = {"name": "c", "type": "channel"}
LEVEL = [
    {"type": "scale", "scale": [1.0, 2.0, 0.5, 0.25]},
    {"type": "translation", "translation": [0.0, 7.0, 8.0, 9.0]},
]
IMAGE = [{"type": "scale", "scale": [1.0, 10.0, 10.0, 10.0]}]


def attributes(version: str) -> dict[str, Any]:
    image: dict[str, Any] = {
        "axes": [CHANNEL, *AXES],
        "datasets": [
            {"path": "s0", "coordinateTransformations": LEVEL},
            {"path": "s1", "coordinateTransformations": []},
        ],
        "coordinateTransformations": IMAGE,
    }
    if version == "0.4":
        return {"multiscales": [{"version": version, **image}]}
    return {"ome": {"version": version, "multiscales": [image]}}


@pytest.mark.slow
@pytest.mark.parametrize(("version", "reduce"), [("0.4", "--argmax"), ("0.5", "--softmax")])
def test_what_was_read_from_ome_zarr_is_written_as_ome_zarr(
    version: str, reduce: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = {"zarr_format": 2 if version == "0.4" else 3}
    if int(zarr.__version__.split(".")[0]) < 3:
        kind = {}
    group = zarr.open_group("ct.zarr", mode="w", **kind)
    group.attrs.update(attributes(version))
    given = {"shape": (1, 8, 12, 16), "chunks": (1, 4, 4, 4), "dtype": "f4", **kind}
    values = np.random.default_rng(0).normal(size=given["shape"])
    zarr.open_array(store="ct.zarr/s0", mode="w", **given)[:] = values
    command = [
        "run",
        NET,
        "ct.zarr",
        "-o",
        "out.zarr",
        "--size",
        "8x8x8",
        "--axes",
        "0,2,1",
        reduce,
    ]
    assert main([*command, "--pad-to", "4"]) == 0
    made = zarr.open("out.zarr", mode="r")
    told = dict(made.attrs).get("ome", dict(made.attrs))
    (image,) = told["multiscales"]
    channels = 0 if reduce == "--argmax" else 1
    assert image["axes"] == [CHANNEL] * channels + [AXES[0], AXES[2], AXES[1]]
    (level,) = image["datasets"]
    steps = {step["type"]: step[step["type"]] for step in level["coordinateTransformations"]}
    assert steps["scale"] == [1.0] * channels + [20.0, 2.5, 5.0]
    assert steps["translation"] == [0.0] * channels + [70.0, 90.0, 80.0]
    assert made["0"].shape == (3,) * channels + (8, 16, 12)
    assert read_level(made.attrs, made["0"].shape) is not None
    assert (told if version == "0.5" else image)["version"] == version
    main([*command[:-1], "-o", "again.npy", reduce, "--pad-to", "4"])
    np.testing.assert_array_equal(np.load("again.npy"), made["0"][:])


def test_metadata_that_is_not_complete_is_not_carried() -> None:
    shape = (1, 8, 12, 16)
    assert read_level(attributes("0.5"), shape) is not None
    assert read_level(attributes("0.3"), shape) is None
    assert read_level(attributes("0.5"), shape[1:]) is None
    short = attributes("0.4")
    short["multiscales"][0]["datasets"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [1.0]}
    ]
    assert read_level(short, shape) is None
