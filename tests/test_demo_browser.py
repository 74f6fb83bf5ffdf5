"""A person at the demo: a headless Chromium loads the page, picks, switches, runs, clicks and types.

`LVLM_FIX_SCREENSHOTS=demo/screenshots pytest tests/test_demo_browser.py` writes the screenshots that the README shows.
"""

from __future__ import annotations

import html
import io
import os
from pathlib import Path

import numpy as np
import pytest
from demo_server import CHROMIUM, PHONE, SAMPLES, chromium, compare, serving, visiting
from PIL import Image

from lvlm_fix import LVLM
from lvlm_fix.demo import measured, scores
from lvlm_fix.demo.settings import OPENING, PRESETS
from lvlm_fix.methods import parse

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


@pytest.fixture
def keep(tmp_path):
    """Saves a screenshot where the environment says, or in a folder of the test's own; it must show something."""
    folder = Path(os.environ.get("LVLM_FIX_SCREENSHOTS", tmp_path))

    def save(page, name: str, full: bool = False) -> None:
        page.mouse.move(0, 0)
        page.wait_for_timeout(300)  # transitions
        shot = page.screenshot(full_page=full)
        image = Image.open(io.BytesIO(shot)).convert("RGB")
        assert np.asarray(image).std() > 10
        image.quantize(256, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)

    return save


def switch(page, method: str) -> None:
    page.locator(f"#on-{method} input[type=checkbox]").click()


def test_a_visitor_picks_a_sample_switches_methods_runs_and_clicks_a_word(visit, keep):
    page = visit()
    page.click("#samples [data-pick=kitchen]")
    page.wait_for_selector("#code :text('kitchen.png')")
    page.click("#samples [data-pick=street]")
    page.wait_for_selector("#code :text('street.png')")
    switch(page, "zipvl")
    page.wait_for_selector("#code :text('ZipVL')")
    compare(page)

    alone = LVLM()
    for place, fix in (("plain", "none"), ("fixed", f"{PRESETS[OPENING]},zipvl")):
        expected = alone.ask(SAMPLES / "street.png", fix=parse(fix)).text
        assert page.locator(f"#{place} .answer > p").first.inner_text() == expected
    assert page.locator("#plain .word.wrong").count() == 1
    assert "tokens/s" in page.locator("#fixed .cost").inner_text()
    assert "48 of 144" in page.locator("#fixed .cost").inner_text()
    assert "KV cache" in page.locator("#fixed .cost").inner_text()
    assert page.locator("#looked figure").count() == 5
    assert page.locator("#looked .bars li").count() == 8

    wrong = page.locator("#plain .word.wrong")
    wrong.click()
    page.wait_for_selector("#word figure img")
    assert wrong.get_attribute("aria-pressed") == "true"
    assert wrong.inner_text().strip(".,") in page.locator("#word figcaption").inner_text()
    keep(page, "desktop-light", full=True)
    first = page.locator("#word img").get_attribute("src")
    page.locator("#fixed .word").nth(4).click()
    page.wait_for_function("old => document.querySelector('#word img').src !== old", arg=first)
    assert page.locator("#answers [aria-pressed=true]").count() == 1  # of both answers' words


def test_dark_follows_the_visitors_scheme(visit, keep):
    page = visit(scheme="dark")
    compare(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in background.strip("rgba()").split(",")[:3]) < 60
    keep(page, "desktop-dark", full=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(visit, scheme):
    page = visit("?picture=safari&fix=damro,var,vtc_cls(keep=0.5),zipvl", scheme=scheme)
    page.wait_for_selector("#notes li")
    compare(page)
    page.locator("#plain .word").first.click()
    page.wait_for_selector("#word figure img")
    for one in page.locator(".method button:has-text('Settings')").all():
        one.click()
    page.wait_for_timeout(500)
    poor = page.evaluate(CONTRAST)
    for name in ("Probe", "Results", "The methods"):
        page.get_by_role("tab", name=name).click()
        if name == "Probe":
            page.click("#ask")
            page.wait_for_selector("#probe-table table")
            page.click("#stop-probe")
        page.wait_for_timeout(400)
        poor += page.evaluate(CONTRAST)
    assert not poor


# Contrast of every text with the colour behind it: 4.5 to 1, WCAG's AA. A canvas resolves color-mix().
CONTRAST = """() => {
  const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v =>
    v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = it => { for (; it; it = it.parentElement) { const c = rgba(getComputedStyle(it).backgroundColor);
    if (c[3] > 200) return c; } return [255, 255, 255]; };
  const poor = [];
  for (const it of document.querySelectorAll('body *')) {
    const own = [...it.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !it.getClientRects().length || it.matches('style, script, desc, title')) continue;
    const style = getComputedStyle(it), back = behind(it);
    let seen = rgba(it.closest('svg') ? style.fill : style.color);
    let opacity = seen[3] / 255;
    for (let up = it; up; up = up.parentElement) opacity *= getComputedStyle(up).opacity;
    seen = seen.map((v, i) => v * opacity + back[i] * (1 - opacity));
    const pair = [light(seen), light(back)].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) poor.push(`${it.className || it.tagName} ${it.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


def test_a_phone_shows_all_of_it_without_scrolling_sideways(visit, keep):
    page = visit(viewport=PHONE)
    compare(page)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.locator("#plain").evaluate("it => it.getBoundingClientRect().top < innerHeight")
    keep(page, "phone")
    for name in ("Probe", "Results", "The methods"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_it_works_by_keyboard_alone(visit):
    page = visit()
    page.focus("#samples [data-pick=office]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#code :text('office.png')")
    page.focus("#question textarea, #question input")
    page.keyboard.press("End")
    page.keyboard.press("Enter")  # asks
    page.wait_for_selector("#fixed button.word")
    page.focus("#fixed button.word")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.pick") == "1"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Space")
    page.wait_for_selector("#word figure img")


def test_every_picture_has_an_alternative_text(visit):
    page = visit()
    compare(page)
    page.locator("#plain .word").nth(4).click()
    page.wait_for_selector("#word figure img")
    texts = page.evaluate(
        "[...document.querySelectorAll('img')].filter(one => !one.closest('footer')).map(one => one.alt)"
    )
    assert len(texts) >= 11 and all(len(text) > 10 for text in texts), texts
    unnamed = page.evaluate(
        "[...document.querySelectorAll('#samples button, #plain button, #run, #stop')]"
        ".filter(one => !(one.innerText || one.ariaLabel)).length"
    )
    assert unnamed == 0


def test_a_preset_sets_the_switches_and_says_what_was_measured(visit):
    page = visit()
    page.locator("#preset label").get_by_text("balanced").click()
    page.wait_for_selector("#code :text('0.5')")
    told = str(measured.line(scores.summaries(), scores.SCORED_AS[PRESETS["balanced"]]))
    assert told and html.unescape(told) in page.locator("#about").inner_text()
    switch(page, "damro")
    page.wait_for_selector("#notes li")
    page.wait_for_selector("#about :text('not among the shipped measurements')")
    assert page.locator("#preset input:checked").count() == 0
    told = page.locator("#notes").inner_text()
    assert "DAMRO is not made for the embedded model" in told
    assert "VTC-CLS keeps the tokens of highest CLS attention, which DAMRO takes for outliers" in told


def test_a_share_link_restores_the_setting(visit):
    page = visit()
    page.click("#samples [data-pick=office]")
    switch(page, "var")
    page.fill("#question textarea, #question input", "Is there a mouse & a cup?")
    page.wait_for_selector("#code :text('mouse')")
    page.wait_for_function("document.querySelector('#share-link').href.includes('mouse')")
    query = page.locator("#share-link").get_attribute("href")
    code = page.locator("#code .cm-content").inner_text()

    other = visit(query)
    other.wait_for_selector("#code :text('office.png')")
    assert other.locator("#code .cm-content").inner_text() == code
    assert "VAR()" in code and "office.png" in code
    assert other.locator("#on-var input").is_checked()


def test_a_link_that_asks_for_nonsense_is_told_in_a_sentence(visit):
    page = visit("?fix=magic%28%29")
    page.wait_for_selector(".toast-body :text('unknown method')")
    page = visit("?fix=%3Cimg%20src=https://evil.example/x.png%3E")
    page.wait_for_selector(".toast-body :text('<img src=https://evil.example/x.png>')")
    assert page.locator(".toast-body img").count() == 0  # and nothing was asked of evil.example


def test_the_probe_sorts_by_disagreement(visit, keep):
    page = visit("?picture=street&fix=damro")
    page.wait_for_selector("#code :text('street.png')")
    page.get_by_role("tab", name="Probe").click()
    page.click("#ask")
    page.wait_for_selector("#probe-table :text('All asked')")
    gaps = [abs(float(one)) for one in page.locator("#probe-table td:nth-child(4)").all_inner_texts()]
    assert len(gaps) == 66 and gaps == sorted(gaps, reverse=True) and gaps[0] > 0
    keep(page, "probe")


def test_the_other_tabs_show_results_and_methods(visit, keep):
    page = visit()
    page.get_by_role("tab", name="Results").click()
    page.wait_for_selector("#results table >> nth=1")
    assert page.locator("#results svg.plot").count() == 1
    assert "worse" in page.locator("#results").inner_text()
    keep(page, "results")
    page.get_by_role("tab", name="The methods").click()
    page.wait_for_selector("#cards .card >> nth=3")
    assert page.locator("#cards a").count() == 4
    titles = [one.get_attribute("title") for one in page.locator(".method .paper a, #cards a").all()]
    assert len(titles) == 8 and all(len(title) > 60 for title in titles)
    assert "does not suit this model" in page.locator("#cards").inner_text()
