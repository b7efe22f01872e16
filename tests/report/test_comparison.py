from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from typing import Any

import pytest

from pocketize.errors import ReportError
from pocketize.report import Comparison
from pocketize.report.differences import changes
from pocketize.report.layers import LayerSummary
from pocketize.report.measurement import Rewrite
from pocketize.untrusted import scrub
from tests.report.fixed import AFTER, BEFORE, MEASURED, POCKET, estimated, with_peaks

COMPARISON = MEASURED


def _with_passes(*passes: Rewrite) -> Comparison:
    return Comparison(BEFORE, dataclasses.replace(AFTER, passes=passes))


def test_the_verdict_is_one_line_and_says_what_was_measured_and_what_was_counted() -> None:
    verdict = COMPARISON.verdict
    assert "\n" not in verdict
    start = "Better. Measured on cpu: training peak 1.84 GiB -> 1.46 GiB (-20.7 %)"
    assert verdict.startswith(start)
    assert "Counted: parameters 5,470,850 -> 150,066 (-97.3 %)." in verdict
    assert verdict.endswith("RETRAIN: the function changed, and has to be trained.")


def test_an_estimate_is_never_called_measured() -> None:
    comparison = estimated()
    assert comparison.verdict.startswith("Better. Estimated on cpu")
    for rendered in (str(comparison), comparison.to_markdown(), comparison.to_html()):
        assert "measured" not in rendered.lower()
        assert "estimated" in rendered.lower()


def test_a_peak_that_stays_is_called_unchanged_and_one_that_rises_is_shown_rising() -> None:
    assert "training peak 1.0 MiB, unchanged" in with_peaks(2**20, 2**20).verdict
    assert "1.0 MiB -> 2.0 MiB (+100.0 %)" in with_peaks(2**20, 2**21).verdict


def test_every_format_tells_the_verdict_and_the_limits() -> None:
    for limits, expected in (
        (["peak -30%"], "Over the limit: peak -30% allows 1.29 GiB. Measured"),
        (["peak 2% 16MiB", "parameters 0%"], "Better, within peak 2% 16MiB, parameters 0%. "),
    ):
        comparison = COMPARISON.with_limits(limits)
        assert Comparison.from_json(comparison.to_json()) == comparison
        assert json.loads(comparison.to_json())["status"] == comparison.status
        drawings = (str(comparison), comparison.to_markdown(), comparison.to_html())
        for drawn in (comparison.verdict, comparison.to_json(), *drawings):
            assert expected in " ".join(drawn.split())
    assert "OVER: -30% allows 1.29 GiB" in str(COMPARISON.with_limits("peak -30%"))
    assert "optimizer state at the training peak" in str(
        COMPARISON.with_limits("optimizer-state 0%")
    )


def test_the_status_is_a_word() -> None:
    grown = with_peaks(2**20, 2**21)
    worse = dataclasses.replace(grown, after=dataclasses.replace(grown.after, infer=None))
    assert COMPARISON.status == "better"
    assert worse.status == "changed"
    assert worse.with_limits("peak 100%").status == "ok"
    assert worse.with_limits("peak 99%").status == "over the limit"
    assert Comparison(BEFORE, BEFORE).status == "unchanged"
    assert Comparison(BEFORE, BEFORE).with_limits("peak 0%").status == "ok"


def test_changed_layers_and_passes_are_told_a_line_each() -> None:
    drawn = COMPARISON.to_markdown()
    assert "| `pocket(keep=['encoder.4.*'], width=16)` | pass added, RETRAIN |" in drawn
    assert "| `encoder.1.conv` | 32 -> 16 channels |" in drawn
    assert "| `encoder.2.conv` | 64 -> 16 channels, 32 -> 16 input channels |" in drawn
    kept, turned, *_ = BEFORE.layers
    swapped = dataclasses.replace(
        BEFORE,
        layers=(
            dataclasses.replace(kept, settings=kept.settings | {"kernel_size": "1x1x1"}),
            LayerSummary("new", "BatchNorm3d", {"": "16"}),
            dataclasses.replace(turned, kind="ConvTranspose3d", settings={"in": "1", "out": "2"}),
        ),
    )
    assert changes(BEFORE, swapped) == [
        ("encoder.0.conv", "kernel_size 3x3x3 -> 1x1x1"),
        ("new", "added: BatchNorm3d 16"),
        ("encoder.1.conv", "Conv3d 16 -> 32, 3x3x3 became ConvTranspose3d 1 -> 2"),
        ("encoder.2.conv", "removed: Conv3d 32 -> 64, 3x3x3"),
        ("encoder.3.conv", "removed: Conv3d 64 -> 128, 3x3x3"),
    ]
    assert "No layer changed, and no pass." in str(Comparison(BEFORE, BEFORE))


def test_what_a_reviewer_sees_at_once_fits_a_screen() -> None:
    many = tuple(LayerSummary(f"layer{i}", "Linear", {"in": "1", "out": "2"}) for i in range(100))
    comparison = Comparison(BEFORE, dataclasses.replace(AFTER, layers=many))
    drawn = comparison.with_limits(["peak 2% 16MiB", "parameters 0%"]).to_markdown()
    shown = re.sub(r"<details>.*?</details>", "folded", drawn, flags=re.DOTALL)
    assert len(shown.splitlines()) <= 45
    assert shown.count("folded") == 4
    assert "and 93 more, all of them in the JSON" in shown


def test_parts_of_peaks_at_different_moments_get_no_ratio() -> None:
    assert "is in the backward pass of decoder.3.conv, before and after." in str(COMPARISON)
    assert AFTER.train is not None
    train = dataclasses.replace(AFTER.train, timeline=(("optimizer", 9),))
    text = str(Comparison(BEFORE, dataclasses.replace(AFTER, train=train)))
    assert (
        "The training peak moved. Before: in the backward pass of decoder.3.conv, mostly "
        "activations (1.46 GiB) and temporaries (300.0 MiB). After: in the optimizer's step, mostly"
    ) in " ".join(text.split())
    rows = {line.strip().partition("  ")[0]: line.split()[-1] for line in text.splitlines() if line}
    assert rows["activations"] == rows["encoder.0.norm"] == "-"
    assert rows["inference peak"] == "0.79x"


def test_the_weakest_guarantee_of_several_passes_decides() -> None:
    exact = dataclasses.replace(POCKET, name="inplace", guarantee="EXACT")
    for rewrites, expected in (
        ((exact,), "EXACT: the same function"),
        ((exact, POCKET, exact), "RETRAIN:"),
        ((), "No pass is recorded"),
    ):
        assert expected in _with_passes(*rewrites).verdict


def test_a_pass_that_the_second_network_lacks_is_told() -> None:
    verdict = Comparison(AFTER, BEFORE).verdict
    assert verdict.endswith("Without pocket, which the first network has.")


def test_json_has_integers_for_bytes_and_sorted_keys() -> None:
    data = json.loads(COMPARISON.to_json())
    assert (data["kind"], data["schema"]) == ("comparison", 2)
    assert data["before"]["train"]["peak"] == 1888 * 2**20
    assert all(type(size) is int for size in data["after"]["train"]["categories"].values())
    assert COMPARISON.to_json() == json.dumps(data, indent=2, sort_keys=True) + "\n"


def test_json_reads_back_to_the_same_comparison() -> None:
    assert Comparison.from_json(COMPARISON.to_json()) == COMPARISON


def _without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != key}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: "[]", "comparison: expected schema 2, got None"),
        (lambda d: "{", "not JSON"),
        (lambda d: json.dumps(d | {"schema": 1}), "expected schema 2, got 1. Make the file again"),
        (lambda d: BEFORE.to_json(), "expected a comparison, got a 'measurement'"),
        (lambda d: json.dumps(_without(d, "after")), "comparison: lacks after"),
        (lambda d: json.dumps(d | {"extra": 1}), "comparison: unknown extra"),
        (
            lambda d: json.dumps(d | {"before": d["before"] | {"exported": "no"}}),
            "comparison.before.exported: expected bool, got 'no'",
        ),
        (
            lambda d: json.dumps(d | {"before": d["before"] | {"train": d["before"]["infer"]}}),
            "train holds figures of mode 'infer'",
        ),
        (
            lambda d: json.dumps(d | {"before": d["before"] | {"train": None, "infer": None}}),
            "holds neither a training step nor a forward",
        ),
    ],
)
def test_json_that_is_no_comparison_is_refused_with_the_place(damage: Any, expected: str) -> None:
    with pytest.raises(ReportError, match=re.escape(expected)):
        Comparison.from_json(damage(json.loads(COMPARISON.to_json())))


def test_changes_beyond_a_screenful_are_counted_in_the_text_and_whole_in_json() -> None:
    assert len(POCKET.changed) == 15
    assert "and 3 more, all of them in the JSON" in str(COMPARISON)
    assert "encoder.3.conv4" not in str(COMPARISON)
    assert "encoder.3.conv4" in COMPARISON.to_json()


def test_every_table_of_the_markdown_has_as_many_cells_in_each_row() -> None:
    for table in re.findall(r"(?:^\|.*\n?)+", COMPARISON.to_markdown(), flags=re.MULTILINE):
        # A pipe that is escaped is text.
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().splitlines()]
        assert len(set(cells)) == 1, table


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [name for name, _ in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_escaped_and_loads_nothing() -> None:
    page = COMPARISON.to_html()
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"src", "href", "onload"} & set(tags.attributes)
    assert "&lt;the&gt;" in page
    assert "url(" not in page


def test_peaks_of_a_shared_process_are_told_with_the_reason() -> None:
    assert AFTER.train is not None
    shared = dataclasses.replace(
        AFTER.train, isolated=False, why_not_isolated="the class cannot be pickled"
    )
    text = str(Comparison(BEFORE, dataclasses.replace(AFTER, train=shared)))
    assert "this one for after training (the class cannot be pickled)" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<function f at 0x7f00aa> in /home/me/nets/unet.py", "<function f> in unet.py"),
        ("aten.view at net.py:88", "aten.view at net.py:88"),
        ("C:\\work\\nets\\unet.py failed", "unet.py failed"),
        ("64 / 4 = 16 and a/b/c stay", "64 / 4 = 16 and a/b/c stay"),
    ],
)
def test_addresses_and_absolute_paths_are_scrubbed(text: str, expected: str) -> None:
    assert scrub(text) == expected


def test_a_column_in_which_nothing_stands_is_left_out() -> None:
    unexplained = tuple(dataclasses.replace(row, why="") for row in POCKET.changed)
    bare = dataclasses.replace(POCKET, options={}, changed=unexplained, refused=())
    markdown = _with_passes(bare).to_markdown()
    assert "\npocket, RETRAIN: 15 changed, 0 refused.\n" in markdown
    assert "| changed | what |\n" in markdown
