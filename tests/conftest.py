"""Settings of the whole suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from torch.utils import _python_dispatch

import tests.examples  # noqa: F401  (the profile is loaded before any test is made)

_WHOLE = "--whole-contract"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the whole contract be asked for, which takes about an hour."""
    parser.addoption(_WHOLE, action="store_true", help="try every pass in full on every test net")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each of several processes (``pytest -n 2``), or they wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at what the collected modules hold.

    A measurement of memory collects garbage several times, and each time took a third of a second
    for the objects of torch, MONAI and all tests.
    """
    gc.collect()
    gc.freeze()


def whole_contract(config: pytest.Config) -> bool:
    """Whether every pass is to be tried in full on every net, not only on a sample."""
    return bool(config.getoption(_WHOLE))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slow tests last, so that a broken fast one is known within minutes."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def _dispatch_modes_end() -> Iterator[None]:
    """No test leaves a dispatch mode on.

    Torch also keeps a flag for all threads. Where modes of two threads overlap it stays set, and
    torch 2.6 compiles nothing afterwards, without a word: the tests of ``torch.compile`` that
    follow in the same process would fail.
    """
    yield
    assert torch._C._len_torch_dispatch_stack() == 0
    for flag in "_is_in_torch_dispatch_mode", "_is_in_non_infra_torch_dispatch_mode":
        if hasattr(_python_dispatch, flag):
            setattr(_python_dispatch, flag, False)
