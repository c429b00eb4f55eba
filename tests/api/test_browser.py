"""The report page in a real browser: headless Chromium, driven by the page's own fragment."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnrewrite
from attnrewrite.passes.report import Report
from attnrewrite.render.html import html_view

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: apt-get install chromium")

LAYERS = 100
PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, boxes = [...document.querySelectorAll("details[open] .box")];
  const outside = boxes.filter(box => {
    const frame = box.querySelector("rect").getBBox(), room = frame.width;
    return [...box.querySelectorAll("text")].some(text => text.getBBox().width > room);
  });
  const clipped = [...document.querySelectorAll(".site:not([hidden]) .line > *")]
    .filter(cell => cell.scrollWidth > cell.clientWidth + 1 && getComputedStyle(cell).display !== "inline");
  const sizes = boxes.map(box => parseFloat(getComputedStyle(box.querySelector("text")).fontSize));
  root.dataset.probe = JSON.stringify({
    wide: root.scrollWidth - root.clientWidth, boxes: boxes.length, outside: outside.length,
    clipped: clipped.length, smallest: Math.min(...sizes, 99),
    requests: performance.getEntriesByType("resource").length,
    head: (document.querySelector(".sites") || root).getBoundingClientRect().height
  });
});
</script>"""


class Mixed(nn.Module):
    """A matched attention, one with a relu between product and softmax, and a softmax over features."""

    def forward(self, x: Tensor) -> Tensor:
        good = torch.softmax(x @ x.mT, -1) @ x
        bad = torch.softmax(torch.relu(x @ x.mT), -1) @ x
        return good + bad * torch.softmax(x, -1)


@functools.cache
def large_report() -> Report:
    """110 sites: 100 equal layers, 9 that differ, 1 rejected; and a softmax that is no attention."""
    report = attnrewrite.explain(Mixed(), torch.ones(1, 5, 4))
    good, bad = report.sites
    alike = [replace(good, layer=f"model.layers.{n}.self_attn") for n in range(LAYERS)]
    others = [replace(good, layer=f"model.side.{n}.attn", source=f"side.py:{n}", heads=n + 1) for n in range(9)]
    return replace(report, model="large", sites=[*alike, *others, replace(bad, layer="model.head.attn")])


class Dom(HTMLParser):
    """The groups of sites, whether each is hidden or open, and what the page says beside the filter."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.groups: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "details":
            self.groups.append(dict(attrs))
        elif tag == "html":
            self.root = dict(attrs)

    @property
    def shown(self) -> list[dict[str, str | None]]:
        return [group for group in self.groups if "hidden" not in group]


@dataclass
class Visit:
    dom: Dom
    console: list[str]
    measured: dict[str, Any]


def visit(folder: Path, text: str, fragment: str = "", *, size: str = "1280,900") -> Visit:
    page = folder / "report.html"
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--window-size={size}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"{page.as_uri()}#{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    dom = Dom(done.stdout)
    console = re.findall(r".*CONSOLE.*", done.stderr)
    return Visit(dom, console, json.loads(str(dom.root.get("data-probe") or "{}")))


def test_errors_on_the_console_are_seen(tmp_path: Path) -> None:
    found = visit(tmp_path, html_view(large_report()).replace("function filter()", "function filtre()"))
    assert any("filter is not defined" in line for line in found.console)


def test_a_page_of_110_sites_opens_without_errors_and_stays_short(tmp_path: Path) -> None:
    found = visit(tmp_path, html_view(large_report()))
    assert found.console == []
    assert found.measured["requests"] == 0
    assert len(found.dom.shown) == len(found.dom.groups) == 12
    assert not any("open" in group for group in found.dom.groups)
    assert found.measured["head"] < 900
    assert found.measured["wide"] <= 0
    assert found.measured["clipped"] == 0
    assert sum(int(group["data-count"] or 0) for group in found.dom.groups) == 111


@pytest.mark.parametrize(
    ("fragment", "shown"),
    [
        ("status=rejected", ["rejected"]),
        ("filter=rejected", ["rejected"]),
        ("status=not-attention", ["not-attention"]),
        ("filter=layers.57.", ["matched"]),
        ("filter=side.py+AR203", []),
        ("filter=side.py%3A3", ["matched"]),
        ("filter=ar203&status=rejected", ["rejected"]),
        ("filter=model.side&status=matched", ["matched"] * 9),
    ],
)
def test_the_filter_filters(tmp_path: Path, fragment: str, shown: list[str]) -> None:
    found = visit(tmp_path, html_view(large_report()), fragment)
    assert found.console == []
    assert [group["data-status"] for group in found.dom.shown] == shown


def test_drawings_unfold_and_can_be_read(tmp_path: Path) -> None:
    found = visit(tmp_path, html_view(large_report()), "open=all")
    assert all("open" in group for group in found.dom.shown)
    assert found.measured["boxes"] > 100
    assert found.measured["outside"] == 0
    assert found.measured["smallest"] >= 11
    assert found.measured["wide"] <= 0
    one = visit(tmp_path, html_view(large_report()), "filter=layers.57.&open=all")
    assert 5 < one.measured["boxes"] < 20
    assert [group["data-status"] for group in one.dom.groups if "open" in group] == ["matched"]


def test_a_page_of_110_sites_that_all_differ_opens(tmp_path: Path) -> None:
    report = large_report()
    sites = [replace(site, source=f"model.py:{n}") for n, site in enumerate(report.sites)]
    found = visit(tmp_path, html_view(replace(report, sites=sites)), "filter=model.py%3A107&open=all")
    assert found.console == []
    assert (len(found.dom.groups), len(found.dom.shown)) == (111, 1)
    assert found.measured["wide"] <= 0


def test_a_narrow_window_does_not_scroll_sideways(tmp_path: Path) -> None:
    found = visit(tmp_path, html_view(large_report()), "open=all", size="500,900")
    assert found.console == []
    assert found.measured["wide"] <= 0


def test_an_empty_report_opens(tmp_path: Path) -> None:
    found = visit(tmp_path, html_view(Report("mlp")))
    assert (found.console, found.dom.groups) == ([], [])
