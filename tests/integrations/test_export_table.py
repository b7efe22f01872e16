"""The table of docs/export.md is what ``tools/export_table.py`` finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_of_passes_and_exporters_is_what_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tools" / "export_table.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 12
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in page.splitlines()] == []
