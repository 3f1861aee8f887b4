"""The page in headless Chromium: what its script does, what its policy forbids, and that it can be seen, light and
dark, wide and narrow.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pictures import browser, chromium
from launch.report import report
from launch.reports.runs import RLVR, STAGES
from tests import needs
from tests.launch import recorded as made

pytestmark = [
    pytest.mark.drill,
    needs.matplotlib,
    pytest.mark.skipif(browser() is None, reason="no Chromium is installed"),
]
HOSTILE = '</script><img src=x onerror="document.title=\'broken\'"><script>document.title="broken"</script>'
# finds, sorts and steps through the samples of the first table, and leaves what it saw in the page
DRIVER = """
const box = document.querySelector(".samples"), seen = {};
const shown = () => [...box.querySelectorAll("tbody tr")].filter((row) => !row.hidden);
const first = (key) => shown()[0].dataset[key];
const set = (name, value) => {
  const field = box.querySelector(name);
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
};
const here = () => {
  const row = box.querySelector(".here");
  return row ? [Number(row.dataset.step), row.querySelector(".prompt").textContent] : null;
};
const press = (key) => {
  const target = box.querySelector(".here") || box.querySelector("table");
  target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  return here();
};
seen.all = shown().length;
set(".find", "IT IS 7"); seen.found = shown().length; set(".find", "");
set(".which", "high"); seen.right = shown().length;
set(".which", "low"); seen.wrong = shown().length;
set(".which", "none"); seen.none = shown().length; set(".which", "");
set(".order", "-score"); seen.best = first("score");
set(".order", "-step"); seen.latest = first("step");
set(".order", "-length"); seen.longest = first("length"); set(".order", "step");
seen.first = press("ArrowDown"); seen.second = press("ArrowDown");
seen.later = press("ArrowRight"); seen.earlier = press("ArrowLeft");
seen.up = press("ArrowUp"); seen.top = press("ArrowUp");
seen.output = box.querySelector("output").textContent;
seen.wide = document.documentElement.scrollWidth; seen.window = innerWidth;
document.body.insertAdjacentHTML("beforeend", "<pre id=seen></pre>");
document.getElementById("seen").textContent = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    kept = [*made.samples(), {"step": 60, "prompt": "p", "response": HOSTILE + "y" * 3000, "reason": HOSTILE}]
    runs = [made.write(root / stage, stage, kept=kept if stage in RLVR else None) for stage in STAGES]
    rows = [{"name": HOSTILE, "accuracy": 0.1, "low": 0.05, "high": 0.2}, {"name": "ppo", "accuracy": 0.7}]
    report(runs, root / "page.html", results={"rows": rows}, title=HOSTILE)
    return root / "page.html"


def driven(page: Path, width: int) -> dict:
    """What DRIVER saw, in a copy of the page whose policy lets it run."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text)
    copy = page.with_name(f"driven{width}.html")
    copy.write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"), encoding="utf-8")
    found = re.search(r'<pre id="seen">(.*?)</pre>', chromium(copy, "--dump-dom", f"--window-size={width},900"))
    assert found is not None
    return json.loads(unescape(found[1]))


def test_samples_are_found_sorted_and_stepped_through(page):
    seen = driven(page, 1280)
    assert (seen["all"], seen["found"], seen["right"], seen["wrong"], seen["none"]) == (13, 1, 6, 6, 1)
    assert (seen["best"], seen["latest"], seen["longest"]) == ("1.0", "60", str(len(HOSTILE) + 3000))
    prompts = [f"What is {i} + 5?" for i in range(4)]
    assert (seen["first"], seen["second"]) == ([0, prompts[0]], [0, prompts[1]])
    assert (seen["later"], seen["earlier"], seen["up"], seen["top"]) == (
        [5, prompts[1]],
        [0, prompts[1]],
        *[[0, prompts[0]]] * 2,
    )
    assert seen["output"] == "13 of 13"


@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_is_wider_than_the_window(page, width):
    seen = driven(page, width)
    assert seen["wide"] <= seen["window"]


def test_the_policy_stops_what_escaping_would_have_let_through(page):
    """Markup is planted unescaped; its scripts and handlers do not run. Under a looser policy they do, so the test can
    fail.
    """
    text = page.read_text(encoding="utf-8").replace("<main>", f"<main>{HOSTILE}")
    strict, loose = page.with_name("strict.html"), page.with_name("loose.html")
    strict.write_text(text, encoding="utf-8")
    loose.write_text(re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text), encoding="utf-8")
    title = lambda path: re.search(r"<title>(.*?)</title>", chromium(path, "--dump-dom"), re.S)
    assert (found := title(strict)) and found[1] != "broken"
    assert (found := title(loose)) and found[1] == "broken"
    assert 'class="scripted"' in chromium(page, "--dump-dom")  # its own script runs


@pytest.mark.parametrize("width", [1280, 500])
def test_it_can_be_read_light_and_dark(page, width, tmp_path):
    """Paper and ink: most of the picture is paper, and there is ink that stands out from it, also in the drawings."""
    from PIL import Image

    for dark in (False, True):
        picture = tmp_path / f"{width}{dark}.png"
        chromium(page, f"--screenshot={picture}", f"--window-size={width},3000", dark=dark)
        with Image.open(picture) as image:
            grey = np.asarray(image.convert("L"), float)
        paper = np.median(grey)
        assert paper < 60 if dark else paper > 200
        for part in np.array_split(grey, 6):  # no stretch of the page is without ink
            assert (np.abs(part - paper) > 120).mean() > 0.002
