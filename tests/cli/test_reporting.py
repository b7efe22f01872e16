from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

Run = Callable[..., Ran]
INPUT = ("--input", "1x1x16x16")


@pytest.mark.slow
def test_a_model_is_compared_with_what_a_pass_makes_of_it(run: Run) -> None:
    code, out, err = run("report", "my_nets:Net", "--pass", "pocket", *INPUT, "--estimate")
    assert (code, err) == (0, "")
    assert out.startswith("pocketize report: Net\n")
    assert "Estimated" in out
    assert "698" in out
    assert "206" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "start"),
    [
        ("markdown", "# pocketize report"),
        ("json", "{"),
        ("html", "<!"),
        ("text", "pocketize report"),
    ],
)
def test_the_format_is_an_option_or_read_off_the_file(
    run: Run, folder: Path, layout: str, start: str
) -> None:
    suffix = {"markdown": "md", "json": "json", "html": "html", "text": "txt"}[layout]
    command = ("report", "my_nets:Net", "my_nets:small", *INPUT, "--estimate")
    written = run(*command, "-o", f"report.{suffix}")
    assert written.code == 0
    assert written.out.startswith("Better. Estimated on cpu: training peak ")
    assert (folder / f"report.{suffix}").read_text().lower().startswith(start)
    if layout == "markdown":  # one that is printed too is enough: the rest is the same road
        printed = run(*command, "--format", layout)
        assert (folder / "report.md").read_text() == printed.out


@pytest.mark.slow
def test_the_json_holds_the_figures(run: Run) -> None:
    code, out, _ = run(
        *("report", "my_nets:Net", "my_nets:Net", *INPUT, "--estimate", "--format", "json"),
        *("--kwargs", '{"width": 32}', "--after-kwargs", '{"width": 8}', "--optimizer", "none"),
    )
    assert code == 0
    document = json.loads(out)
    before, after = document["before"]["train"], document["after"]["train"]
    assert before["parameters"] == 40 + 37 * 32 + 2 * 32 + 2 * 32 + 2
    assert after["parameters"] == 40 + 37 * 8 + 2 * 8 + 2 * 8 + 2
    assert before["categories"]["optimizer_state"] == 0


@pytest.mark.slow
def test_a_saved_model_is_compared_through_the_factory_of_the_first(run: Run) -> None:
    saved = run("apply", "my_nets:Net", "--pass", "pocket", *INPUT, "-o", "small.safetensors")
    assert saved.code == 0
    code, out, _ = run("report", "my_nets:Net", "small.safetensors", *INPUT, "--estimate")
    assert code == 0
    assert "What pocket did" in out
    assert "206" in out


@pytest.mark.slow
def test_the_optimizer_may_step_in_the_backward_pass(run: Run) -> None:
    command = ("report", "my_nets:Net", "my_nets:Net", *INPUT, "--estimate", "--step-in-backward")
    code, out, _ = run(*command, "--optimizer", "adamw")
    assert code == 0
    assert "adamw, in the backward pass" in out
    code, _, err = run(*command, "--optimizer", "none")
    assert code != 0
    assert "--step-in-backward needs an optimizer" in err


def test_a_saved_model_cannot_be_compared_without_a_factory(run: Run) -> None:
    saved = ("--pass", "pocket", *INPUT, "-o")
    assert run("apply", "my_nets:Net", *saved, "small.safetensors").code == 0
    assert run("apply", "my_nets:Net", *saved, "small.pt2").code == 0
    code, _, err = run("report", "small.pt2", "small.safetensors", "--estimate", "--trust-pickle")
    assert code == 2
    assert "needs the factory of the original as BEFORE; small.pt2 is none" in err


@pytest.mark.slow
def test_a_budget_that_is_exceeded_exits_with_1_after_the_report(run: Run) -> None:
    command = ("report", "my_nets:small", "my_nets:Net", *INPUT, "--estimate")
    code, out, err = run(*command, "--fail-over", "peak 2% 1KiB", "--fail-over", "macs 900%")
    assert code == 1
    assert out.startswith("pocketize report")
    assert err.startswith("pocketize: over the limit: peak: expected at most ")
    assert "macs" not in err
    # both have to be exceeded, the percentage and the amount
    assert run(*command, "--fail-over", "peak 2% 16MiB").code == 0


@pytest.mark.parametrize("without", [("--estimate",), ("--time-steps", "0")])
def test_a_limit_on_times_that_are_not_taken_is_refused_before_the_work(
    run: Run, without: tuple[str, ...]
) -> None:
    code, _, err = run("report", "no_such:Net", "no:Net", "--fail-over", "time 5%", *without)
    assert code == 2
    assert "a limit on time needs times: leave out --estimate, --time-steps 0" in err


@pytest.mark.slow
def test_an_existing_report_is_replaced_only_by_force(run: Run, folder: Path) -> None:
    (folder / "report.md").write_text("precious")
    command = ("report", "my_nets:Net", "my_nets:small", *INPUT, "--estimate", "-o", "report.md")
    code, _, err = run(*command)
    assert code == 2
    assert "report.md exists already; choose another name or add --force" in err
    assert run(*command, "--force").code == 0
    assert (folder / "report.md").read_text().startswith("# pocketize report")


@pytest.mark.slow
def test_a_stored_baseline_is_compared_as_it_was_measured(run: Run) -> None:
    taken = run("measure", "my_nets:Net", *INPUT, "--estimate", "--mode", "train", "-o", "b.json")
    assert (taken.code, taken.out, taken.err) == (0, "", "")
    code, out, err = run("report", "b.json", "my_nets:small", "--fail-over", "parameters 0%")
    assert (code, err) == (0, "")
    assert out.startswith("pocketize report: Net\n")
    assert "Estimated" in out
    assert "inference" not in out  # was not taken
    code, out, err = run("report", "my_nets:small", "b.json", "--fail-over", "parameters 0%")
    assert code == 1
    assert "over the limit: parameters" in err
    assert run("report", "b.json", "b.json").code == 0


def test_unlike_figures_are_compared_only_anyway(run: Run) -> None:
    assert run("measure", "my_nets:Net", *INPUT, "--estimate", "-o", "b.json").code == 0
    command = ("report", "b.json", "my_nets:Net", "--input", "1x1x8x8", "--optimizer", "sgd")
    code, _, err = run(*command)
    assert code == 2
    assert "input is 1x1x16x16 float32 before and 1x1x8x8 float32 after" in err
    assert "optimizer is adam before and sgd after" in err
    code, out, err = run(*command, "--anyway")
    assert (code, err) == (0, "")
    assert "Compared although they differ: optimizer is adam before and sgd after." in out


def test_figures_are_no_model(run: Run, folder: Path) -> None:
    (folder / "b.json").write_text("{}")
    code, _, err = run("report", "b.json", "my_nets:Net")
    assert code == 2
    assert "b.json: measurement: expected schema 2, got None" in err
    assert run("measure", "my_nets:Net", *INPUT, "--estimate", "-o", "b.json", "--force").code == 0
    code, _, err = run("report", "b.json", "--pass", "pocket")
    assert code == 2
    assert "b.json holds figures and no model that --pass could rewrite" in err


def test_a_pass_without_effect_is_told(run: Run) -> None:
    code, out, err = run("report", "my_nets:small", "--pass", "pocket", *INPUT, "--estimate")
    assert code == 0
    assert err.startswith("pocketize: warning: pocket changes nothing in my_nets:small")
    assert "206" in out


@pytest.mark.slow
@pytest.mark.whole  # .ci/run runs the demo in three environments
def test_the_demo_fits_and_reports(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    assert out.startswith("$ pocketize fit zoo:pocketnet_unet3d --kwargs ")
    assert "(exact): " in out
    assert "Measured in a fresh process: " in out
    assert "Measured on cpu: training peak " in out
    assert "5,470,850" in out
    assert out.endswith("pocketize apply zoo:pocketnet_unet3d --pass pocket -o small.safetensors\n")


@pytest.mark.slow
def test_long_work_says_how_far_it_is(run: Run) -> None:
    saved = run("apply", "my_nets:Net", "--pass", "pocket", *INPUT, "-o", "small.pt")
    assert saved.code == 0
    code, out, err = run("report", "my_nets:Net", "small.pt", *INPUT, "--estimate", "-v")
    assert code == 0
    assert "parameters 698 -> 206" in out
    assert err == (
        "pocketize: building my_nets:Net\n"
        "pocketize: figure 1 of 4: before, a training step of Net\n"
        "pocketize: figure 2 of 4: before, inference of Net\n"
        "pocketize: figure 3 of 4: after, a training step of Net\n"
        "pocketize: figure 4 of 4: after, inference of Net\n"
    )


def test_a_file_that_does_not_fit_is_wrong_usage(run: Run) -> None:
    saved = run("apply", "my_nets:small", "--pass", "pocket:width=2", *INPUT, "-o", "a.safetensors")
    assert saved.code == 0
    for command in (
        ("report", "my_nets:Net", "a.safetensors", *INPUT, "--estimate"),
        ("plan", "my_nets:Net", "--weights", "a.safetensors", "--pass", "pocket", *INPUT),
    ):
        code, _, err = run(*command)
        assert (code, "the factory does not build the model that was saved" in err) == (2, True)
