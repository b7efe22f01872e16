"""A repository with a small package of networks, and a change to it for each verdict."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

NET = """\
from torch import nn


def build(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 1))
"""
WIDE = NET.replace("=4", "=8")
_MODEL = """
[[tool.pocketize.models]]
name = "{0}"
model = "watched_nets.{0}:build"
input = "1x1x8x8"
limits = ["peak 2%", "parameters 0%"]
"""


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ("git", *identity, *words), cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(folder: Path, tag: str, **nets: str) -> None:
    """Commit networks, by their source, and a configuration of all."""
    package = folder / "watched_nets"
    if not package.exists():
        git(folder, "init", "--quiet", "--initial-branch", "main")
        package.mkdir()
    for file in package.iterdir():
        file.unlink()
    (package / "__init__.py").touch()
    for name, source in nets.items():
        (package / f"{name}.py").write_text(source)
    listed = "".join(_MODEL.format(name) for name in nets)
    (folder / "pyproject.toml").write_text(f'[project]\nname = "nets"\n{listed}')
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", tag)
    git(folder, "tag", tag)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commits ``before`` and ``after``; the latter is checked out as ``main``."""
    folder = tmp_path_factory.mktemp("repository")
    commit(folder, "before", same=NET, wide=NET, gone=NET, mended="import missing\n", broken=NET)
    broken = f"{NET}\nraise KeyError('no such setting')\n"
    commit(folder, "after", same=NET, wide=WIDE, new=NET, mended=NET, broken=broken)
    return folder
