"""The HTML page as a browser lays it out, on a screen and on a phone."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pocketize.report import Comparison
from tests.report.fixed import AFTER, BEFORE, MEASURED

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
WIDTHS = (1200, 400)

#: Elements that are wider than their place, but for those that cut their text off by design.
MEASURE = """
addEventListener("load", () => {
  document.body.dataset.found = JSON.stringify([...document.querySelectorAll("iframe")].map(f => {
    const page = f.contentDocument, wide = page.documentElement.clientWidth;
    return [wide, ...[...page.querySelectorAll("body, body *")].filter(e =>
      e.getBoundingClientRect().right > wide + 1 ||
      (e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 &&
       getComputedStyle(e).overflowX === "visible" && getComputedStyle(e).display !== "inline")
    ).map(e => e.outerHTML.slice(0, 200))];
  }));
});
"""


@pytest.mark.slow
def test_nothing_overflows_in_a_browser(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here")
    long = tuple(
        dataclasses.replace(layer, path=f"network_of_a_long_name.{layer.path}" * 3)
        for layer in AFTER.layers
    )
    after = dataclasses.replace(AFTER, layers=(*AFTER.layers, *long))
    page = Comparison(BEFORE, after).with_limits(["peak 2% 16MiB", "parameters -99%"]).to_html()
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><body><script>{MEASURE}</script>{frames}", encoding="utf-8")
    flags = (
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'user'}",
    )
    shown = subprocess.run(
        [browser, *flags, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    found = re.search(r'data-found="([^"]*)"', shown)
    assert found is not None
    assert json.loads(html.unescape(found[1])) == [[width] for width in WIDTHS]


def test_the_timelines_of_both_sides_have_one_scale_and_mark_the_peak() -> None:
    page = MEASURED.to_html()
    assert page.count("<svg") == 2
    assert (
        "over a training step, before: peak 1.84 GiB, in the backward pass of decoder.3.conv"
        in page
    )
    assert 'title="backward decoder.3.conv: 1.46 GiB"' in page
    tops = [float(top) for top in re.findall(r"top:([\d.]+)%", page)]
    assert tops == [0.0, pytest.approx(20.71)]  # 1497 MiB of 1888


def test_what_a_notebook_shows_is_short_and_has_no_styles_of_its_own() -> None:
    for drawn in (MEASURED._repr_html_(), BEFORE._repr_html_()):
        assert "<style" not in drawn
        assert "<svg" not in drawn
        assert drawn.index("training peak") < drawn.index("<details>")
        assert drawn.count("<details>") == drawn.count("</details>") >= 3
    assert repr(MEASURED).startswith("<Comparison of UNet and UNet: Better. Measured on cpu: ")
    assert len(repr(MEASURED)) < 400
    assert repr(BEFORE).startswith("<Measurement of UNet: Measured on cpu: training peak 1.84 GiB")
