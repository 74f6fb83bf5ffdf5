"""Pieces of the page as HTML: answers with their words, method cards, notes."""

from __future__ import annotations

from lvlm_fix.demo import overlays
from lvlm_fix.demo.looking import Look
from lvlm_fix.demo.samples import samples
from lvlm_fix.demo.service import Said
from lvlm_fix.demo.settings import PANELS
from lvlm_fix.diagnosis import Diagnosis
from lvlm_fix.evals.report_markup import Markup, element, join
from lvlm_fix.methods import METHODS, VTCCLS, Method

CLICK_ON = (
    "element.addEventListener('click', e => { const it = e.target.closest('[data-pick]'); if (!it) return;"
    " const group = element.closest('#answers') || element;"
    " group.querySelectorAll('[data-pick]').forEach(o => o.setAttribute('aria-pressed', o === it));"
    " trigger('click', {pick: it.dataset.pick}); });"
)
"""JavaScript of a piece whose buttons have data-pick: one of them, or of both answers', is pressed and told of."""

OWN_ALT = "your picture"


def samples_row(picked: str = "") -> Markup:
    """The samples as buttons, one of them pressed."""
    buttons = [
        element(
            "button",
            element("img", src=overlays.data_uri(one.image), alt=one.alt),
            element("span", one.name.replace("_", " ")),
            type="button", data_pick=one.name, aria_pressed=str(one.name == picked).lower(), class_="sample",
        )
        for one in samples().values()
    ]  # fmt: skip
    return element("div", *buttons, class_="samples", role="group", aria_label="Sample pictures")


def paper(name: str, whole: bool = False) -> Markup:
    """A link to a method's paper; title and authors are its tooltip, or written out."""
    number = METHODS[name].paper
    title = PANELS[name].paper
    place = element(
        "a", number, href=f"https://arxiv.org/abs/{number.split()[-1]}", title=title, target="_blank",
        rel="noreferrer",
    )  # fmt: skip
    return element("p", *([title, " "] if whole else ["Paper: "]), place, class_="paper")


def cards(diagnosis: Diagnosis | None) -> Markup:
    """What each method does, in plain words, and whether its premise holds for the model."""
    made = []
    for name, panel in PANELS.items():
        parts = [
            element("h3", panel.title, " ", element("small", panel.cures)),
            element("p", panel.plainly),
        ]
        if diagnosis is not None:
            premise = diagnosis.premises[name]
            sign = "✓ suits this model" if premise.holds else "✗ does not suit this model"
            kind = "verdict good" if premise.holds else "verdict poor"
            parts.append(element("p", element("strong", sign), f": {premise.sentence}.", class_=kind))
        made.append(element("article", *parts, paper(name, whole=True), class_="card"))
    return element("div", *made, class_="cards")


def waiting(text: str = "") -> Markup:
    """An answer that has not begun: words of ours, or the sign that it is on its way."""
    if text:
        return element("div", element("p", text, class_="muted"), class_="answer")
    return element("div", element("p", "…", class_="muted caret"), class_="answer running")


def beginning(text: str) -> Markup:
    """An answer so far."""
    caret = element("span", " ▍", class_="caret", aria_hidden="true")
    return element("div", element("p", text, caret), class_="answer running")


def answer(said: Said, look: Look | None = None) -> Markup:
    """A finished answer: hallucinated words are marked, and with a look every word is a button."""
    parts: list[str] = []
    at = 0
    spans = [(start, end) for start, end, _ in look.words] if look else _spans(said.text)
    marked = said.verdict.wrong or ()
    for number, (start, end) in enumerate(spans):
        parts.append(said.text[at:start])
        word, at = said.text[start:end], end
        wrong = next((one for one in marked if start < one.end and one.start < end), None)
        title = "show what the model looked at for this word" if look else None
        kind = "word"
        if wrong is not None:
            kind = "word wrong" if wrong.start < start else "word wrong first"  # "potted plant" has one sign
            title = f"{wrong.category} is not in the picture"
        label = f"{word} ({title})" if wrong is not None else None
        if look:
            parts.append(
                element(
                    "button", word, type="button", data_pick=str(number), aria_pressed="false",
                    class_=kind, title=title, aria_label=label,
                )
            )  # fmt: skip
        else:
            parts.append(element("span", word, class_=kind, title=title))
    parts.append(said.text[at:])
    return element("div", element("p", *parts, lang="en"), _verdict(said), _cost(said), class_="answer said")


def _spans(text: str) -> list[tuple[int, int]]:
    spans, at = [], 0
    for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        spans.append((start, at))
    return spans


def _verdict(said: Said) -> Markup:
    sign, kind = {"true": ("✓ ", "verdict good"), "wrong": ("✗ ", "verdict poor"), "unjudged": ("", "muted")}[
        said.verdict.kind
    ]
    return element("p", sign + said.verdict.sentence, class_=kind)


def _cost(said: Said) -> Markup:
    speed = said.tokens / said.seconds if said.seconds else 0.0
    rows = [
        ("time", f"{said.seconds:.2f} s"),
        ("speed", f"{speed:.0f} tokens/s"),
        # without a GPU only the whole server's is known: the model, other visitors, and what Python keeps
        ("GPU memory, peak" if said.of_gpu else "server memory", f"{said.peak_bytes / 2**20:,.0f} MB"),
    ]
    kept = said.report.get(VTCCLS.name, [])
    if kept:
        rows.append(
            ("image tokens read", f"{len(kept[0]['kept'])} of {kept[0]['grid'][0] * kept[0]['grid'][1]}")
        )
    packed = [entry for entry in said.report.get("zipvl", []) if "bytes" in entry]
    if packed:
        sizes = packed[0]["bytes"] / 2**20, packed[0]["full_bytes"] / 2**20
        rows.append(("KV cache of the prompt", f"{sizes[0]:.2f} of {sizes[1]:.2f} MB"))
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", value)) for name, value in rows),
        class_="cost",
    )


def notes(fix: list[Method], diagnosis: Diagnosis | None, model: str) -> Markup:
    """What is to be known of a setting: premises that fail, and methods that pull against each other."""
    said = []
    for method in fix:
        if diagnosis is not None and not diagnosis.premises[method.name].holds:
            title = PANELS[method.name].title
            reason = diagnosis.premises[method.name].sentence
            said.append(
                element("li", element("strong", f"{title} is not made for the {model} model"), f": {reason}.")
            )
        for other, reason in method.conflicts.items():
            if any(one.name == other for one in fix):
                said.append(element("li", f"{reason}."))
    if not said:
        return join([])
    return element("ul", *said, class_="notes")


def about(fix: str, line: str) -> Markup:
    """What is switched on, and what is known of it."""
    said = line or (
        "Nothing is attached: both answers are the model's own." if fix == "none" else NOT_MEASURED
    )
    return element("p", element("code", fix), element("br"), said, class_="muted")


NOT_MEASURED = "This setting is not among the shipped measurements."


def share(query: str, with_picture: bool) -> Markup:
    """The link that restores the setting."""
    note = "" if with_picture else " (your own picture stays with you)"
    return element("p", element("a", "Link to this setting", href=query, id="share-link"), note)


def status(text: str, running: bool = False, stale: bool = False) -> Markup:
    """What is going on, also for screen readers; scripts know by its class what has not ended."""
    kind = f"status{' running' if running else ''}{' stale' if stale else ''}"
    return element("p", text or "Ready.", role="status", aria_live="polite", class_=kind)


def probe_note(text: str, running: bool = False) -> Markup:
    """The line over the probe's table, alone."""
    return element(
        "div", element("p", text, role="status", class_="running" if running else None), class_="probe"
    )
