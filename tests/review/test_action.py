"""The steps of the GitHub Action, run as a runner does, with a GitHub that is a file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import NET, WIDE, commit, git

ROOT = Path(__file__).parent.parent.parent
_STEP = re.compile(
    r"^    - name: (?P<name>\w+)\n(?P<rest>.*?)^      run: (?P<run>.*?)(?=^    - |\Z)",
    flags=re.MULTILINE | re.DOTALL,
)
_PYTHON = """\
#!/bin/sh
if [ "$2" = pip ]; then shift 2; printf '[%s]' "$@" >>"$RUNNER_TEMP/pip"; exit; fi
exec {python} "$@"
"""
# keeps one body a file, by its number, and answers the three calls that the action makes
_GH = """\
#!/bin/bash -eu
cd "$RUNNER_TEMP/comments"
case "$*" in
  "api --paginate repos/o/r/issues/7/comments --jq "*)
    for each in *; do jq -Rs "{id: $each, body: .}" "$each"; done | jq -s . | jq -r "$5" ;;
  "api repos/o/r/issues/7/comments -F body=@"*" --silent") cp "${4#body=@}" "$(ls | wc -l)" ;;
  "api -X PATCH repos/o/r/issues/comments/"*) cp "${6#body=@}" "${4##*/}" ;;
  *) echo "unknown: $*" >&2; exit 1 ;;
esac
"""


class Runner:
    """Runs the steps that have a script, each with its own environment."""

    def __init__(self, temporary: Path, values: dict[str, str]) -> None:
        self.temporary, self.values = temporary, values
        for name, text in (("python", _PYTHON.format(python=sys.executable)), ("gh", _GH)):
            (temporary / "bin").mkdir(exist_ok=True)
            (temporary / "bin" / name).write_text(text)
            (temporary / "bin" / name).chmod(0o755)
        (temporary / "comments").mkdir()
        (temporary / "comments" / "0").write_text("somebody else's")

    def run(self, step: str, folder: Path) -> subprocess.CompletedProcess[str]:
        source = (ROOT / "action.yml").read_text()
        (found,) = [match for match in _STEP.finditer(source) if match["name"] == step]
        given = re.findall(r"^        ([A-Z_]+): (.*)$", found["rest"], flags=re.MULTILINE)
        environment = {
            **os.environ,
            "PATH": f"{self.temporary / 'bin'}:{os.environ['PATH']}",
            "RUNNER_TEMP": str(self.temporary),
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(self.temporary / "summary"),
            **{name: self._filled(text.strip('"')) for name, text in given},
        }
        script = re.sub(r"\A\|\n", "", found["run"])
        assert "${{" not in script  # text of others would become a part of the script
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    def _filled(self, text: str) -> str:
        return re.sub(r"\$\{\{ (.+?) \}\}", lambda match: self.values[match[1]], text)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    (tmp_path / "runner").mkdir()
    values = {
        "inputs.base": "origin/main...",
        "inputs.args": "--fail-over 'inference-peak 5%'",
        "inputs.install": "-r 'my requirements.txt'",
        "inputs.comment": "memory",
        "inputs.token": "",
        "github.repository": "o/r",
        "github.event.pull_request.number": "7",
    }
    return Runner(tmp_path / "runner", values)


@pytest.mark.slow
def test_the_report_is_the_summary_and_the_exit_code_is_kept(
    runner: Runner, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    commit(folder, "old", net=NET)
    git(folder, "update-ref", "refs/remotes/origin/main", "HEAD")
    commit(folder, "wide", net=WIDE)
    assert runner.run("install", folder).returncode == 0
    installed = (runner.temporary / "pip").read_text()
    assert installed == f"[install][{ROOT}][-r][my requirements.txt]"
    done = runner.run("diff", folder)
    assert done.returncode == 1, done.stderr
    assert "net: Over the limit: peak 2% allows" in done.stderr
    summary = (runner.temporary / "summary").read_text()
    assert summary.startswith("# pocketize diff: origin/main")
    assert "inference-peak 5% allows" in summary
    assert (runner.temporary / "pocketize-diff.md").read_text() == summary
    assert git(folder, "status", "--porcelain") == ""


@pytest.mark.skipif(not shutil.which("jq"), reason="the fake gh needs jq")
def test_one_comment_is_updated_in_place(runner: Runner, tmp_path: Path) -> None:
    comments, report = runner.temporary / "comments", runner.temporary / "pocketize-diff.md"
    assert runner.run("comment", tmp_path).returncode == 0  # there is no report: diff failed
    assert len(list(comments.iterdir())) == 1
    for text in ("# first\n", "# second\n"):
        report.write_text(text)
        done = runner.run("comment", tmp_path)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert (comments / "1").read_text() == f"<!-- pocketize diff: memory -->\n{text}"
    assert len(list(comments.iterdir())) == 2
    runner.values["github.repository"] = "o/fork"
    done = runner.run("comment", tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("::warning::")
