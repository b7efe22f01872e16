"""Commands that nobody meant: the documented exit codes, and never a traceback."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketize.cli import main
from tests.cli.conftest import NETS
from tests.fuzz.mutations import TIMES, seeded

NUMBERS = ("0", "-1", "1", "7", "1e9", "99999999999", "9" * 30, "9" * 5000, "nan", "inf", "-0", "x")
TEXTS = (
    "",
    "a",
    "n" * 252,
    "é" * 300,
    "\x1b[2J",
    "a b",
    "*",
    "[",
    "{}",
    '"',
    "../x",
    "/",
    ":",
    ",",
)
SIZES = (
    "1x1x8x8",
    "1x1x0x0",
    "0x1x8x8",
    "1",
    "1x1x99999999x99999999",
    f"1x1x{'9' * 30}x8",
    "1x1x8x8:int64",
    "1x1x8x8:complex64",
    "1x1x8x8:float99",
    "1x1x8x8,1x1x8x8",
    "-1x1x8x8",
    "x" * 252,
    "x".join(["1"] * 100),
)
DEVICES = ("cpu", "cuda", "cuda:99", "meta", "mps", "xpu", "cpu:7", "hpu", "n" * 252, "", "cuda:-1")
MODELS = ("own:Net", "own:small", "own:broken", "own:Crash", "own", "own:", ":x", "zoo:", "x.pt2")
MODELS += ("x.pt", "x.safetensors", "zoo:memory_fcn3d_separable", "torch.nn:Conv2d", "n" * 252)
PASSES = ("pocket", "width", "levels", "recompute", "in-place-norm", "checkpoint", "offload")
PASSES += ("patchwise", "amp", "bottleneck", "separable", "compact-block", "nobody")
OPTIONS = ("width", "keep", "weights", "scale", "size", "mode", "min_bytes", "to", "dtype", "x")
OPTIONS += ("folder", "max_peak", "levels", "only", "force", "ratio", "overlap", "batch", "axis")
OUTPUTS = ("x.pt", "x.pt2", "x.safetensors", "x.txt", "n" * 252 + ".pt", "no/x.pt", ".", "")


GOOD = (
    *("pocket", "pocket:width=2", "pocket:weights=reset", "width:scale=0.5", "recompute"),
    *("recompute:min_bytes=1", "in-place-norm", "checkpoint", "checkpoint:only=wide"),
    *("offload:to=disk,min_bytes=1B", "patchwise:size=4,progress=no", "amp", "bottleneck"),
    *("patchwise:size=4,mode=slab", "patchwise:size=4,mode=window,overlap=0.5", "separable"),
    *("patchwise:max_peak=1MiB", "patchwise:size=4,train=yes", "compact-block:force=wide"),
)


def _spec(rng: random.Random) -> str:
    """A pass, as it may be given, or with one value that may not."""
    good = rng.choice(GOOD)
    how = rng.random()
    hostile = rng.choice((*NUMBERS, *TEXTS, "0.5", "8", "disk", "1B", "slab"))
    if how < 0.5:
        return good
    if how < 0.7 and "=" in good:
        return f"{good.rpartition('=')[0]}={hostile}"
    name = good.partition(":")[0] if how < 0.95 else rng.choice(PASSES)
    return f"{name}:{rng.choice(OPTIONS)}={hostile}"


def _kwargs(rng: random.Random) -> str:
    value = rng.choice((*NUMBERS, "8", "null", '"a"', "[]", "[" * rng.choice((3, 3000))))
    return rng.choice((f'{{"width": {value}}}', f'{{"channels": {value}}}', value, "{", ""))


def commands(rng: random.Random, times: int) -> Iterator[list[str]]:
    """Yield commands that would do something, in most of which one or two words are wrong."""
    hostile = {
        "--input": lambda: rng.choice(SIZES),
        "--seed": lambda: rng.choice(NUMBERS),
        "--kwargs": lambda: _kwargs(rng),
        "--weights": lambda: rng.choice(("x.pt", "x.safetensors", "no.pt", *TEXTS)),
        "--folder": lambda: rng.choice(TEXTS),
        "--recipe": lambda: rng.choice(("x.toml", "own.py", "no.toml", ".", *TEXTS)),
        "--pass": lambda: _spec(rng),
        "--format": lambda: rng.choice(("text", "markdown", "json", "html", "x")),
    }
    report = {
        "--fail-over": lambda: f"{rng.choice(('peak', 'time', 'x'))} {rng.choice(NUMBERS)}%",
        "--device": lambda: rng.choice(DEVICES),
        "--time-steps": lambda: rng.choice(("0", "-1", "x", "9" * 30)),
        "--optimizer": lambda: rng.choice(("adam", "adamw", "sgd", "none", "x")),
    }
    for _ in range(times * TIMES):
        command = rng.choice(("plan", "plan", "apply", "apply", "report", "explain", "zoo", "x"))
        if command in ("zoo", "x"):
            yield [rng.choice(("zoo", "passes", *TEXTS)), rng.choice((*TEXTS, "pocket", "*3d*"))]
            continue
        words = [command, rng.choice(("own:Net",) * 12 + MODELS)]
        given = {"--input": "1x1x8x8"}
        if command == "explain":
            words.append(rng.choice((*TEXTS, "wide", "stem.weight")))
        else:
            given["--pass"] = _spec(rng)
        if command == "apply":
            given["-o"] = rng.choice(("x.pt", "x.pt2", "x.safetensors", *OUTPUTS))
            words.append("--force")
        words += ["--estimate"] if command == "report" else []
        known = hostile | (report if command == "report" else {})
        for option in rng.sample(sorted(known), rng.choice((0, 1, 1, 2))):
            given[option] = known[option]()
        words += [word for pair in given.items() for word in pair]
        yield words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(NETS)
    (tmp_path / "x.toml").write_text('[[pass]]\nname = "pocket"\n')
    for name in ("x.pt", "x.pt2", "x.safetensors"):
        (tmp_path / name).write_bytes(b"no model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_commands_end_with_a_documented_code(
    folder: Path, capsys: pytest.CaptureFixture[str], part: int
) -> None:
    for words in commands(seeded(f"commands {part}"), 60):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = main(words)
            except BaseException as error:
                raise AssertionError(f"pocketize {words!r:.2000}: {error!r:.300}") from error
        told = capsys.readouterr()
        assert code in (0, 1, 2, 3), words
        assert code in (0, 1) or told.err, words
        assert "\x1b" not in told.out + told.err, words
        for made in folder.glob("*.pt*"):
            if made.read_bytes() != b"no model":
                made.unlink()
