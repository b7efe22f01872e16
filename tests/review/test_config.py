from __future__ import annotations

from pathlib import Path

import pytest

from pocketize.cli.common import UsageError
from pocketize.review.config import EXAMPLE, Configuration, WatchedModel, read_configuration

MODEL = '[[models]]\nname = "net"\nmodel = "nets:build"\ninput = "1x1x8x8"\n'


def test_all_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "nets"\n')
    assert read_configuration(tmp_path) is None
    rest = """\
kwargs = { widths = [8, 16] }
modes = ["train"]
passes = ["recompute:keep=block"]
optimizer = "sgd"
limits = ["peak 2% 16MiB"]
"""
    (tmp_path / "pocketize.toml").write_text(f'path = ["lib"]\n{MODEL}{rest}')
    model = WatchedModel(
        name="net",
        model="nets:build",
        input="1x1x8x8",
        kwargs={"widths": [8, 16]},
        modes=("train",),
        passes=("recompute:keep=block",),
        optimizer="sgd",
        limits=("peak 2% 16MiB",),
    )
    assert read_configuration(tmp_path) == Configuration((model,), ("lib",))


def test_the_example_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(EXAMPLE)
    found = read_configuration(tmp_path)
    assert found is not None
    assert [model.name for model in found.models] == ["unet"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = 1", "write [[models]], in double brackets"),
        ("modles = []", "unknown key 'modles'. Did you mean 'models'?"),
        (f"{MODEL}limit = []", "models 1: unknown key 'limit'. Did you mean 'limits'?"),
        ('[[models]]\nname = "net"\nmodel = "nets:build"', "models[0]: lacks input"),
        (MODEL + MODEL, "two models are called 'net'"),
        (f'{MODEL}modes = ["training"]', "modes of 'net': expected of train, infer"),
        (f"{MODEL}modes = []", "modes of 'net'"),
        (f'{MODEL}optimizer = "lion"', "optimizer of 'net'"),
        (f'{MODEL}limits = ["peek 2%"]', "Did you mean 'peak'?"),
        (f'{MODEL}limits = "peak 2%"', "models[0].limits: expected list"),
        (f'{MODEL}passes = ["pockett"]', "Did you mean 'pocket'?"),
        (f"{MODEL}kwargs = {{ day = 2024-01-01 }}", "kwargs of 'net'"),
        ("[[models", "cannot be read"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pocketize.toml").write_text(text)
    with pytest.raises(UsageError) as error:
        read_configuration(tmp_path)
    assert str(error.value).startswith("pocketize.toml")
    assert message in str(error.value)


def test_there_is_one_file_of_settings(tmp_path: Path) -> None:
    (tmp_path / "pocketize.toml").write_text(MODEL)
    (tmp_path / "pyproject.toml").write_text(EXAMPLE)
    with pytest.raises(UsageError, match="keep one"):
        read_configuration(tmp_path)
