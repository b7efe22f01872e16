"""Settings of the whole suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from torch.utils import _python_dispatch

import tests.examples  # noqa: F401  (the profile is loaded before any test is made)

_WHOLE = "--whole"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let every case be asked for, which takes hours."""
    parser.addoption(_WHOLE, action="store_true", help="try every case of every test")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each of several processes (``pytest -n 2``), or they wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> None:
    """Keep the garbage collector from looking at what is there before the first test of a file.

    A measurement of memory collects garbage several times, and each time would take a third of a
    second for the objects of torch, MONAI and all tests, and later for those of the compiler.
    """
    gc.collect()
    gc.freeze()


def is_whole(config: pytest.Config) -> bool:
    """Whether every case of every test is to be tried, not only a sample."""
    return bool(config.getoption(_WHOLE))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slow tests last, so that a broken fast one is known within minutes.

    Of a test with the marker ``each_value`` only as many cases run as it takes to try every value
    of every parameter, not all values of one with all of another; what has the marker ``whole``
    does not run.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if is_whole(config):
        return
    left_out = {item for item in items if item.get_closest_marker("whole")}
    cases: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("each_value"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    left_out.update(item for each in cases.values() for item in set(each) - set(_each_value(each)))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _each_value(cases: list[pytest.Function]) -> Iterator[pytest.Function]:
    """Choose greedily: always a case with most of the values that no chosen one has."""
    values = {case: set(enumerate(case.callspec._idlist)) for case in cases}
    left = set().union(*values.values())
    while left:
        best = max(cases, key=lambda case: len(values[case] & left))
        left -= values[best]
        yield best


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
