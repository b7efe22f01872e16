"""Every format of one fixed comparison, character by character.

After a change that is meant, write the files anew with ``POCKETIZE_WRITE_GOLDEN=1 pytest
tests/report/test_golden.py`` and read the difference before committing it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketize.report import Comparison
from tests.report.fixed import MEASURED, estimated

GOLDEN = Path(__file__).parent / "golden"
FORMATS: dict[str, Callable[[Comparison], str]] = {
    "txt": lambda comparison: f"{comparison}\n",
    "md": Comparison.to_markdown,
    "html": Comparison.to_html,
    "json": Comparison.to_json,
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["measured", "estimated"])
def test_the_rendering_is_the_golden_file(name: str, suffix: str) -> None:
    comparison = MEASURED if name == "measured" else estimated()
    rendered = FORMATS[suffix](comparison)
    file = GOLDEN / f"{name}.{suffix}"
    if os.environ.get("POCKETIZE_WRITE_GOLDEN"):
        file.write_text(rendered, encoding="utf-8")
    assert rendered == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_was_read_back_from_json_renders_the_same(suffix: str) -> None:
    read = Comparison.from_json((GOLDEN / "measured.json").read_text(encoding="utf-8"))
    assert FORMATS[suffix](read) == FORMATS[suffix](MEASURED)
