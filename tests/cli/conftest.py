"""Networks of a user's own, in the folder that the command is run in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pocketize.cli import main

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """Narrow, wide, narrow."""

    def __init__(self, width=16, channels=1):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.wide(self.stem(x)))))


def small():
    return Net(width=4)


def broken():
    raise KeyError("no such setting")


class Nested(Net):
    """Nests its state, and takes it back."""

    def state_dict(self):
        return {"net": super().state_dict(), "version": 1}

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state["net"], strict=strict)


class Untold(Net):
    def state_dict(self, *args, **kwargs):
        raise NotImplementedError("use export()")


class Two(Net):
    def forward(self, image, mask):
        return super().forward(image * mask)


def two():
    return Two()


class UNet(Net):
    def forward(self, x):
        half = nn.functional.max_pool2d(x, 2)
        return super().forward(x + nn.functional.interpolate(half, scale_factor=2.0))


def normed(width: int, norm: type[nn.Module]):
    net = Net(width)
    net.norm = norm(width)
    return net


class Crash(Net):
    def forward(self, x):
        raise RuntimeError("the forward has a mistake")
'''


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_nets", None)


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in a folder with ``my_nets.py``, away from the test's random state."""

    def run(*arguments: str) -> Ran:
        with torch.random.fork_rng(devices=[]):
            code = main(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
