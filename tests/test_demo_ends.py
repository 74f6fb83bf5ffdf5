"""A person at the demo for whom things do not go straight on: who waits, stops, leaves, errs or changes the picture."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from demo_server import CHROMIUM, SAMPLES, chromium, compare, serving, visiting
from PIL import Image

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("demo")) as server, chromium() as browser:
        yield browser, server


@pytest.fixture
def visit(place):
    with visiting(*place) as open_page:
        yield open_page


def test_an_error_is_a_sentence_on_the_page_and_leaves_nothing_running(visit):
    page = visit()
    page.fill("#question textarea, #question input", " ")
    page.click("#run")
    page.wait_for_selector(".toast-body :text('the question is empty')")
    page.wait_for_selector("#status :text('Not answered')")
    assert page.locator("#plain").inner_text() == page.locator("#fixed").inner_text() == "Not answered."
    page.fill("#question textarea, #question input", "What is <image> here?")
    page.click("#run")
    page.wait_for_selector(".toast-body :text('the question holds <image>: leave it out')")
    assert "Traceback" not in page.locator("body").inner_text()


def bring(page, path: Path) -> None:
    page.locator("#picture [aria-label='Clear'], #picture [aria-label='Remove Image']").first.click()
    page.set_input_files("#picture input[type=file]", path)


def test_an_upload_is_asked_about_and_its_truth_is_not_claimed(visit, tmp_path):
    Image.open(SAMPLES / "street.png").rotate(90).save(tmp_path / "mine.png")
    page = visit()
    assert page.locator("#samples [aria-pressed=true]").get_attribute("data-pick") == "street"
    bring(page, tmp_path / "mine.png")
    page.wait_for_selector("#code :text('picture.png')")
    page.wait_for_selector("#picture img[alt='your picture']")
    assert page.locator("#samples [aria-pressed=true]").count() == 0
    compare(page)
    assert "not known here" in page.locator("#plain").inner_text()
    assert page.locator(".word.wrong").count() == 0


def test_a_broken_upload_is_told_at_once(visit, tmp_path):
    (tmp_path / "bad.png").write_bytes((SAMPLES / "street.png").read_bytes()[:2000])
    page = visit()
    bring(page, tmp_path / "bad.png")
    page.wait_for_selector(".toast-body :text('the file is damaged')")
    page.click("#run")
    page.wait_for_selector("#status :text('Not answered')")
    page.get_by_role("tab", name="Probe").click()
    page.click("#ask")
    page.wait_for_selector("#probe-table :text('Not asked')")


def test_answers_about_the_picture_before_are_said_to_be(visit):
    page = visit()
    compare(page)
    page.click("#samples [data-pick=office]")
    page.wait_for_selector("#status :text('about the picture before')")
    assert float(page.locator("#answers").evaluate("it => getComputedStyle(it).opacity")) < 1
    compare(page)
    assert float(page.locator("#answers").evaluate("it => getComputedStyle(it).opacity")) == 1


def probe(page) -> None:
    page.get_by_role("tab", name="Probe").click()
    page.click("#ask")


# Not cut off by a box around it, nor faded: to be read by eyes, and not only in the document.
SHOWN = """it => {
  const box = it.getBoundingClientRect();
  for (let up = it; up; up = up.parentElement) {
    const style = getComputedStyle(up), own = up.getBoundingClientRect();
    if (style.opacity < 0.6) return false;
    const left = Math.min(box.bottom, own.bottom) - Math.max(box.top, own.top);
    if (style.overflowY === 'hidden' && left < 0.8 * box.height) return false;
  }
  return box.height > 10;
}"""


def test_who_waits_sees_that_and_may_stop(visit):
    others = [visit("?fix=damro") for _ in range(2)]
    page = visit()
    for one in others:
        probe(one)
    others[0].wait_for_selector("#probe-table table")
    page.click("#run")
    page.wait_for_selector("#status p:text('Waiting for a turn')")
    # it fades in; the probes leave seconds for that
    page.wait_for_function(
        f"() => ['#status .progress-text', '#status p'].map(one => document.querySelector(one))"
        f".every(one => one && ({SHOWN})(one)) && document.querySelector('#status').innerText.includes('queue')",
        timeout=15_000,
    )
    page.click("#stop")
    page.wait_for_selector("#status :text('Stopped.')")
    assert page.locator("#plain").inner_text() == "Stopped."
    others[1].click("#stop-probe")
    others[1].wait_for_selector("#probe-table :text('Stopped.')")
    others[0].click("#stop-probe")


def test_stop_ends_an_answer_and_keeps_what_was_said(visit):
    page = visit("?fix=damro,zipvl&tokens=256&picture=safari")
    page.wait_for_selector("#code :text('safari.png')")
    page.click("#run")
    page.wait_for_selector("#plain .caret:text('▍')")
    page.click("#stop")
    page.wait_for_selector("#status :text('Stopped.')")
    page.wait_for_timeout(500)
    assert page.locator("#status").inner_text() == "Stopped."
    # A word of the second answer may have come before the click did.
    assert page.locator(".caret").count() == 0 and page.locator("#fixed").inner_text().endswith("Stopped.")
    assert page.locator("#plain").inner_text().startswith("The")
    compare(page)


def test_stop_ends_a_probe_and_the_model_answers_the_next_visitor(visit):
    page = visit()
    probe(page)
    page.wait_for_selector("#probe-table :text('to go')")
    page.click("#stop-probe")
    page.wait_for_selector("#probe-table :text('Stopped.')")
    left = page.locator("#probe-table [role=status]").inner_text()
    other = visit()
    compare(other)
    assert page.locator("#probe-table [role=status]").inner_text() == left
    assert left.startswith("Stopped. ") and left.endswith(" questions to go.")


def test_a_closed_tab_frees_the_model(visit):
    whole = visit()
    began = time.monotonic()
    probe(whole)
    whole.wait_for_selector("#probe-table :text('All asked')")
    once = time.monotonic() - began
    leaving = [visit() for _ in range(3)]
    page = visit()
    for one in leaving:
        probe(one)
    leaving[0].wait_for_selector("#probe-table table")
    for one in leaving:
        one.close()
    began = time.monotonic()
    compare(page)
    assert time.monotonic() - began < 1.8 * once + 2  # three probes would take three times
