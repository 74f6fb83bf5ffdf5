"""The report's page in a browser: nothing lies beside the screen of a narrow phone, and nothing is cut on paper."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_pages import answered

from lvlm_fix.evals import tasks
from lvlm_fix.evals.clipscore import ClipScoredChair
from lvlm_fix.evals.report import write_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]
NAMES = (
    "none",
    "damro(alpha=0.5)",
    "damro(alpha=0.5),vtc_cls(keep=72)",
    "damro,var,vtc_cls,zipvl(evict=True)",
)
PAPER = 703  # CSS pixels between the margins of a sheet of A4


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("pages")
    chair = ClipScoredChair.of(tasks.chair(limit=12))
    told = {name: lambda item, seed, more=k * " and a dog": f"A cat{more}." for k, name in enumerate(NAMES)}
    answered(out / "chair", chair, told, score=lambda *_: {"clipscore": 0.8, "clipscore_truncated": False})
    pope = tasks.pope(limit=24)
    said = {name: lambda item, seed, yes=k: "Yes." if yes else item.label for k, name in enumerate(NAMES)}
    answered(out / "pope", pope, said)
    return Path(write_report(out).path).as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as starter:
        running = starter.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_page_does_not_scroll_sideways(browser, address, width) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_tables_fit_on_paper(browser, address) -> None:
    page = browser.new_page(viewport={"width": PAPER, "height": 1000})
    page.emulate_media(media="print")
    page.goto(address)
    widths = page.evaluate("[...document.querySelectorAll('table')].map(one => one.scrollWidth)")
    assert len(widths) == 6 and max(widths) <= PAPER
