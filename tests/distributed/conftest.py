"""Everything that two processes do is done by one pair of them, as starting them takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.group import run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the results of all work lie."""
    from tests.distributed import test_ddp, test_fsdp, test_patchwise, test_sync_norms, test_volumes

    made = tmp_path_factory.mktemp("processes")
    parts = test_ddp, test_fsdp, test_patchwise, test_sync_norms, test_volumes
    run({name: piece for part in parts for name, piece in part.WORK.items()}, made)
    return made
