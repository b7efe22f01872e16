from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketize.cli import main, rewriting
from pocketize.errors import MeasureError
from pocketize.version import VERSION

from .conftest import Ran

Run = Callable[..., Ran]


def test_the_version_is_told(run: Run) -> None:
    assert run("--version") == (0, f"pocketize {VERSION}\n", "")


def test_help_names_every_command_and_the_exit_codes(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for command in ("demo", "passes", "zoo", "plan", "explain", "apply", "report"):
        assert f"\n    {command} " in out
    assert "exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 the rewrite failed" in out


@pytest.mark.parametrize("command", ["demo", "passes", "zoo", "plan", "explain", "apply", "report"])
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: pocketize {command} ")


def test_words_and_options_may_come_in_any_order(run: Run) -> None:
    assert run("zoo", "--verbose", "*encoder2d").out == run("zoo", "*encoder2d", "--verbose").out
    assert run("passes", "--debug", "pocket").out == run("passes", "pocket").out
    code, _, err = run("report", "no_such:A", "--estimate", "no_such:B")
    assert (code, "there is no module 'no_such'" in err) == (2, True)
    code, _, err = run("report", "my_nets:Net", "--estimate", "my_nets:small", "my_nets:Net")
    assert (code, "unrecognized arguments: my_nets:small my_nets:Net" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("shrink",), "invalid choice: 'shrink'"),
        (("plan", "my_nets:Net"), "say what to do: --pass pocket, for instance; see `pocketize pa"),
        (("plan", "my_nets:Net", "--pass", "pcket"), "no pass is called 'pcket'. Did you mean 'po"),
        (
            ("plan", "my_nets:Net", "--pass", "pocket:wdith=4"),
            "pocket: unknown option 'wdith'. Did you mean 'width'? Options of pocket: width, keep, "
            "weights (in 'pocket:wdith=4')",
        ),
        (
            ("plan", "my_nets:Net", "--pass", "pocket:keep=stm*"),
            "pattern 'stm*' matches no module of Net",
        ),
        (
            ("plan", "my_nets:Nets", "--pass", "pocket"),
            "my_nets has no 'Nets'. Did you mean 'Net'?",
        ),
        (
            ("plan", "my_nets:broken", "--pass", "pocket"),
            "my_nets:broken could not be built with no arguments: KeyError: 'no such setting'; "
            "it takes ()",
        ),
        (
            ("plan", "my_nets:Net", "--pass", "pocket", "--kwargs", "{width: 3}"),
            "--kwargs '{width: 3}' is not JSON: ",
        ),
        (
            ("plan", "my_nets:Net", "--pass", "pocket", "--kwargs", "[3]"),
            "--kwargs '[3]' must be a JSON object such as {\"in_channels\": 1}, not list",
        ),
        (("plan", "my_nets:Net", "--pass", "pocket", "--input", "1x1y8"), "'1x1y8'"),
        (("plan", "my_nets:Net", "--recipe", "no.toml"), "cannot read the recipe no.toml: No such"),
        (("explain", "my_nets:Net", "wide.conv"), "'wide.conv' names no layer with channels in"),
        (("report", "my_nets:Net"), "give AFTER, or --pass, and not both"),
        (("report", "my_nets:Net", "my_nets:small", "--pass", "pocket"), "and not both"),
        (
            ("report", "my_nets:Net", "--pass", "pocket", "--fail-over", "paek 2%"),
            "Did you mean 'peak'?",
        ),
        (("zoo", "*unet4d*"), "no network matches '*unet4d*'."),
        (
            ("plan", "my_nets:Net", "--pass", "pocket,recompute:keep=level"),
            "names several passes; give each by itself, as --pass pocket --pass recompute",
        ),
        (("plan", "my_nets:Net", "pocket"), "pocket; passes are given as --pass pocket"),
        (
            ("report", "my_nets:Net", "pocket:width=8", "--input", "1x1x8x8"),
            "--pass pocket:width=8",
        ),
        (
            ("report", "my_nets:Net", "--pass", "pocket", "--fail-over", "peak 2%"),
            "--fail-over needs --input",
        ),
        (("plan", "my_nets:Net", "--pass", "pocket", "--weights", "no.pt"), "cannot read no.pt"),
        (("plan", "my_nets:Net", "--pass", "pocket", "--kwargs", "no.toml"), "cannot read no.toml"),
        (
            ("plan", "my_nets:two", "--pass", "pocket"),
            "forward needs 2 arguments (image, mask); gi",
        ),
        (
            ("plan", "my_nets:UNet", "--pass", "pocket", "--input", "1x1x9x9"),
            "It runs on 1x1x8x8 float32 and on 1x1x10x10 float32",
        ),
        (
            ("report", "my_nets:UNet", "my_nets:UNet", "--estimate", "--input", "1x1x9x9"),
            "It runs on 1x1x8x8 float32 and on 1x1x10x10 float32",
        ),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_failing_model_exits_with_3(run: Run) -> None:
    code, out, err = run("plan", "my_nets:Crash", "--pass", "pocket", "--input", "1x1x8x8")
    assert (code, out) == (3, "")
    assert err.startswith("pocketize: error: ")
    assert "the forward has a mistake" in err
    assert "Traceback" not in err


def test_help_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from pocketize.cli import main; main(['--help']); "
        "sys.exit(len({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_a_guessed_input_is_told_and_stages_are_told_on_request(run: Run) -> None:
    code, _, err = run("plan", "my_nets:Net", "--pass", "pocket", "-v")
    assert code == 0
    assert err == (
        "pocketize: building my_nets:Net\n"
        "pocketize: planning\n"
        "pocketize: without --input, 2x1x32x32 float32 was guessed\n"
    )


def test_inputs_may_have_names(run: Run) -> None:
    command = ("plan", "my_nets:two", "--pass", "pocket")
    code, _, err = run(*command, "--input", "mask=1x1x8x8,image=1x1x8x8")
    assert (code, err) == (0, "")


def test_keyword_arguments_come_from_a_file_and_may_name_classes(run: Run, folder: Path) -> None:
    (folder / "net.toml").write_text('width = 8\nnorm = "torch.nn.InstanceNorm2d"\n')
    (folder / "net.json").write_text('{"width": 8, "norm": "!torch.nn.GroupNorm"}')
    command = ("plan", "my_nets:normed", "--pass", "pocket", "--input", "1x1x8x8")
    assert run(*command, "--kwargs", "net.toml").code == 0
    code, _, err = run(*command, "--kwargs", "net.json")
    assert (code, "norm=<class 'torch.nn.modules.normalization.GroupNorm'>" in err) == (2, True)


def test_errors_speak_of_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise MeasureError("not enough memory; estimate=True needs none; pass inputs=... .")

    monkeypatch.setattr(rewriting, "plan", failing)
    code, _, err = run("plan", "my_nets:Net", "--pass", "pocket", "--input", "1x1x8x8")
    assert code == 3
    assert err == "pocketize: error: not enough memory; --estimate needs none; give --input .\n"


def test_debug_shows_the_traceback(run: Run) -> None:
    code, _, err = run("plan", "my_nets:broken", "--pass", "pocket", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "KeyError: 'no such setting'" in err


def test_a_mistake_of_ours_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rewriting, "plan", mistaken)
    with pytest.raises(ZeroDivisionError):
        run("plan", "my_nets:Net", "--pass", "pocket")


def test_an_interrupt_is_told_without_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rewriting, "plan", interrupted)
    command = ("plan", "my_nets:Net", "--pass", "pocket", "--input", "1x1x8x8")
    assert run(*command) == (130, "", "pocketize: interrupted\n")


def test_the_process_is_left_as_it_was(run: Run, folder: Path) -> None:
    path, level = list(sys.path), logging.getLogger("pocketize").level
    handlers = list(logging.getLogger("pocketize").handlers)
    run("plan", "my_nets:Net", "--pass", "pocket", "--input", "1x1x8x8", "--verbose")
    assert sys.path == path
    assert logging.getLogger("pocketize").level == level
    assert logging.getLogger("pocketize").handlers == handlers


@pytest.mark.slow
def test_python_m_pocketize_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pocketize", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"pocketize {VERSION}\n"


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)  # the reader is gone before the first line
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "pocketize", "zoo"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_arguments_of_the_process_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pocketize", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"pocketize {VERSION}\n"


PLANTED = (
    "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nraise ImportError\n"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "pocketize", "zoo"),
        (
            *("-m", "pocketize", "report", "own:Net", "--pass", "pocket"),
            *("--input", "1x1x8x8", "--time-steps", "1"),
        ),
        ("-m", "pocketize", "plan", "torch.nn:Identity", "--pass", "pocket"),
    ],
)
def test_no_file_of_the_current_folder_stands_for_an_installed_package(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    for name in ("PIL", "json", "numpy", "tqdm", "tabulate", "safetensors", "not_installed"):
        (tmp_path / f"{name}.py").write_text(PLANTED)
    (tmp_path / "own.py").write_text(
        "from torch import nn\nfrom parts import Conv\n"
        "def Net():\n    import late\n    return nn.Sequential(Conv(1, 4, 3), Conv(4, 8, 3))\n"
    )
    (tmp_path / "parts.py").write_text("from torch import nn\nclass Conv(nn.Conv2d): pass\n")
    (tmp_path / "late.py").write_text("")
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.ran"))
    if "report" in command:
        assert done.returncode == 0, done.stderr
        for said in "Measured on cpu", "each figure in a fresh one", "time of a training step":
            assert said in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no -P")
def test_the_current_folder_is_not_searched_where_python_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from torch import nn\ndef net(): return nn.Conv2d(1, 2, 3)\n")
    command = ["-m", "pocketize", "plan", "own:net", "--pass", "pocket"]
    done = subprocess.run(
        [sys.executable, "-P", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "there is no module 'own'" in done.stderr


def test_control_characters_never_reach_the_terminal(run: Run, folder: Path) -> None:
    strange = "\x1b]0;owned\x07\x9b2J\u202e"
    for command in (
        ("plan", f"my_nets:{strange}"),
        ("plan", f"{strange}.pt2", "--pass", "pocket"),
        ("plan", "my_nets:Net", "--pass", f"pocket:keep={strange}", "--debug"),
        ("plan", "my_nets:Net", "--pass", strange),
        ("plan", "my_nets:Net", "--weights", f"{strange}.safetensors", "--pass", "pocket"),
        ("plan", "my_nets:Net", "--kwargs", f"[{strange}", "--pass", "pocket"),
        (strange,),
        ("zoo", "a", strange),
        ("apply", "my_nets:Net", "--pass", "pocket", "-o", f"{strange}.txt"),
        ("apply", "my_nets:Net", "--pass", "pocket", "-o", f"{strange}.pt"),
    ):
        _, out, err = run(*command)
        assert not set(out + err) & set(strange) - set("]0;owned2J"), command


@pytest.mark.slow
def test_a_name_in_a_model_is_shown_as_text(run: Run, folder: Path) -> None:
    (folder / "my_nets.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    made = nn.Sequential(nn.Conv2d(1, 8, 3))\n"
        "    made.add_module('\\x1b[2J<img src=x>\\n\\n# title', nn.Conv2d(8, 16, 3))\n"
        "    made.add_module('last', nn.Conv2d(16, 2, 1))\n"
        "    return made\n"
    )
    given = ("my_nets:net", "--pass", "width:scale=0.5", "--input", "1x1x16x16")
    for layout in ("text", "markdown"):
        for command in (("plan", *given), ("report", *given, "--estimate")):
            code, out, err = run(*command, "--format", layout)
            assert code == 0, err
            assert "\x1b" not in out
            assert "\n# title" not in out
            assert "\\x1b[2J" in out.replace("\\\\", "\\").replace("\\[", "[")
    assert "<img" not in run("plan", *given, "--format", "markdown").out
