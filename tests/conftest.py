"""Settings of the whole suite."""

from __future__ import annotations

import os

import pytest
import torch

_WHOLE = "--whole-contract"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the whole contract be asked for, which takes about an hour."""
    parser.addoption(_WHOLE, action="store_true", help="try every pass in full on every test net")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each of several processes (``pytest -n 2``), or they wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def whole_contract(config: pytest.Config) -> bool:
    """Whether every pass is to be tried in full on every net, not only on a sample."""
    return bool(config.getoption(_WHOLE))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slow tests last, so that a broken fast one is known within minutes."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if not whole_contract(config):
        rare = {item for item in items if item.get_closest_marker("whole_contract") is not None}
        config.hook.pytest_deselected(items=list(rare))
        items[:] = [item for item in items if item not in rare]
