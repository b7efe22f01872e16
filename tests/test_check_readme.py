"""The checker of the README's examples: what it runs, what it leaves out, what it reports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "check_readme.py"

PAGE = """\
# A page

```python
from pathlib import Path

Path("made").write_text("by the first block")
```

<!-- not run: it would delete the internet -->
```bash
exit 1
```

```console
$ cat made
by the first block
$ test -f \\
    made
```

```json
{}
```
"""


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_readme", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_blocks_are_found_with_their_lines_and_the_reason_for_leaving_one_out(
    checker: ModuleType,
) -> None:
    found = checker.examples(PAGE)
    assert [(e.language, e.line, e.why_not) for e in found] == [
        ("python", 3, None),
        ("bash", 10, "it would delete the internet"),
        ("console", 14, None),
    ]


def test_blocks_share_a_folder_and_of_a_console_only_the_commands_run(
    checker: ModuleType, tmp_path: Path
) -> None:
    python, _, console = checker.examples(PAGE)
    assert checker.run(python, str(tmp_path), limit=60.0) is None
    assert checker.run(console, str(tmp_path), limit=60.0) is None


def test_a_failing_block_is_reported_with_its_output(checker: ModuleType, tmp_path: Path) -> None:
    (failing,) = checker.examples("```bash\necho before; false; echo after\n```\n")
    wrong = checker.run(failing, str(tmp_path), limit=60.0)
    assert "exit code 1" in wrong
    assert "before" in wrong
    assert "after" not in wrong


@pytest.mark.slow
def test_a_block_that_does_not_end_is_reported(checker: ModuleType, tmp_path: Path) -> None:
    (endless,) = checker.examples("```bash\nsleep 60\n```\n")
    assert "did not end" in checker.run(endless, str(tmp_path), limit=0.5)


def test_a_page_without_examples_fails(
    checker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\nno language\n```\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["check_readme.py", str(page)])
    assert checker.main() == 1


@pytest.mark.slow
def test_two_pages_at_a_time_are_told_in_order_and_one_failure_fails_all(
    checker: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = [tmp_path / "slow.md", tmp_path / "wrong.md"]
    for page, body in zip(pages, ("sleep 0.5", "exit 3"), strict=True):
        page.write_text(f"```bash\n{body}\n```\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["check_readme.py", "--jobs", "2", *map(str, pages)])
    assert checker.main() == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{pages[0]}:1 bash: ok")
    assert second == f"{pages[1]}:1 bash: FAILED, exit code 3"


def test_the_readme_leaves_out_nothing_but_installing_and_testing(checker: ModuleType) -> None:
    found = checker.examples((SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8"))
    left_out = "".join(example.body for example in found if example.why_not)
    commands = [line.split() for line in left_out.splitlines() if line.startswith("$ ")]
    assert {words[1] for words in commands} <= {"pip", "pocketize", "export", "nnUNetv2_train"}
    assert "pip install -e '.[test]' && pytest" in left_out


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_of_one_process_share_names_only_in_tutorials(
    checker: ModuleType, tmp_path: Path, shared: bool
) -> None:
    page = "# A page\n\n```python\nx = 1\n```\n\nText.\n\n```python\nassert x == 1\n1 / 0\n```\n"
    (script,) = checker.joined(checker.examples(page), shared)
    wrong = checker.run(script, str(tmp_path), limit=60.0)
    what, line = ("ZeroDivisionError", 11) if shared else ("NameError: name 'x'", 10)
    assert what in wrong
    assert f"line {line}, in <module>" in wrong
    assert page.splitlines()[10] == "1 / 0"


def test_every_page_with_an_example_is_run(checker: ModuleType) -> None:
    pages = [page.relative_to(checker.ROOT).as_posix() for page in checker.all_pages()]
    assert {"README.md", "docs/fit.md", "docs/results/image-complexity.md"} <= set(pages)
    assert "docs/architecture.md" not in pages


def test_a_page_that_needs_what_is_not_installed_is_not_run_and_says_so(
    checker: ModuleType, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    for module, told in (("json", "bash: FAILED"), ("no_such.module", "not run (needs it 2 or")):
        text = f"<!-- needs {module}: it 2 or newer -->\n\n```bash\nexit 1\n```\n"
        page.write_text(text, encoding="utf-8")
        wrong, line = checker.check(page, limit=60.0)
        assert wrong == (module == "json")
        assert told in line
