"""The drawings over the picture as HTML, with captions, alternative texts and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lvlm_fix.demo import overlays
from lvlm_fix.demo.looking import Look, zipvl_ratios
from lvlm_fix.demo.service import Said
from lvlm_fix.demo.settings import PANELS
from lvlm_fix.evals.report_markup import Markup, element
from lvlm_fix.methods import Method


def looked(look: Look, said: Said, fix: list[Method]) -> Markup:
    """The drawings over the picture, with captions that say what is to be seen."""
    on = {method.name for method in fix}
    figures = [
        _figure(
            overlays.boxed(overlays.heat(look, look.cls, max(look.cls)), look.grid, look.outliers),
            "CLS attention, and DAMRO's outliers",
            f"Where the part of the model that sees looks as it sums the picture up in one token, [CLS]; framed, the "
            f"{len(look.outliers)} tokens of which DAMRO asks alone, to subtract the answer{_off('damro', on)}.",
            f"CLS attention is highest at the {overlays.where(look, look.cls)}; {len(look.outliers)} tokens framed.",
        ),
        _figure(
            overlays.kept(look, look.kept),
            "What VTC-CLS keeps",
            f"{len(look.kept)} of {len(look.cls)} image tokens; the others are faded{_off('vtc_cls', on)}.",
            f"{len(look.kept)} of {len(look.cls)} parts of the picture are shown, the others are nearly white.",
        ),
    ]
    if look.missing:
        figures.append(element("p", look.missing[:1].upper() + look.missing[1:] + ".", class_="muted"))
    else:
        figures += _attention(look, on)
    ratios = zipvl_ratios(said.report)
    figures.append(_ratios(ratios))
    return element("div", element("div", *figures, class_="figures"), _legend(), class_="looked")


def _attention(look: Look, on: set[str]) -> list[Markup]:
    most = max([*look.before, *look.after])
    marks = [token for token, layers in enumerate(look.sinks) if layers]
    shares = [sum(values) for values in (look.before, look.after)]
    if not any(look.sinks):
        why = "This model has no attention sinks in the picture, so VAR finds nothing to give back and changes nothing."
    elif not look.changed:
        why = "None of the attention heads that look at the picture passes VAR's threshold here, so nothing changes."
    else:
        why = f"VAR acts in {look.changed} layers{_off('var', on)}. Rings: sink tokens."
    pairs = ((look.before, "Attention before VAR", "before"), (look.after, "Attention after VAR", "after"))
    return [
        _figure(
            overlays.ringed(_seen(look, values, most), look.grid, marks),
            title,
            f"As the answer begins, {share:.0%} of the decoder's attention is on the picture. "
            f"{why if when == 'after' else ''}",
            f"Attention {when} VAR is highest at the {overlays.where(look, values)}; {len(marks)} sinks are ringed.",
        )
        for (values, title, when), share in zip(pairs, shares, strict=True)
    ]


def word(look: Look, said: Said, number: int) -> Markup:
    """What the model looked at as it chose a word."""
    start, end, values = look.words[number]
    text = said.text[start:end].strip(".,;:!?")
    share = sum(values)
    return element(
        "div",
        _figure(
            _seen(look, values, max(values)),
            f"Looking for “{text}”",
            f"Where the decoder looked as it chose this word: {share:.0%} of its attention was on the picture, mean "
            "over its heads (many parallel gazes) and layers. Scaled to this word's own largest.",
            f"For the word {text}, attention is highest at the {overlays.where(look, values)} of the picture.",
        ),
        class_="figures one",
    )


def _seen(look: Look, values: Sequence[float], most: float) -> Any:
    """A map of the decoder's attention, in which tokens that never reached it are hatched."""
    dropped = set(range(len(look.cls))) - set(look.seen)
    return overlays.hatched(overlays.heat(look, values, most), look.grid, dropped)


def _off(name: str, on: set[str]) -> str:
    return "" if name in on else f" ({PANELS[name].title} is off: this is what it would do)"


def _figure(image: Any, title: str, caption: str, alt: str) -> Markup:
    return element(
        "figure",
        element("img", src=overlays.data_uri(image), alt=alt),
        element("figcaption", element("strong", title), element("br"), caption),
    )


def _ratios(ratios: Sequence[float]) -> Markup:
    title = element("strong", "ZipVL's kept ratio, by layer")
    if not ratios:
        return element(
            "figure",
            element(
                "figcaption", title, element("br"), "Switch ZipVL on to see how many tokens each layer needs."
            ),
        )
    bars = [
        element(
            "li",
            element("span", f"layer {number}", class_="name"),
            element(
                "span",
                element("span", "", style=f"width:{100 * ratio:.1f}%"),
                class_="bar",
                aria_hidden="true",
            ),
            element("span", f"{ratio:.0%}", class_="value"),
        )
        for number, ratio in enumerate(ratios, 1)
    ]
    said = f"On average {sum(ratios) / len(ratios):.0%} of the prompt's tokens attend in a layer; others pass it by."
    return element(
        "figure", element("ol", *bars, class_="bars"), element("figcaption", title, element("br"), said)
    )


def _legend() -> Markup:
    return element(
        "p",
        element("span", "", class_="ramp", role="img", aria_label="colours from dark blue to yellow"),
        " no attention (blue) to the picture's largest (yellow), root scale ",
        element("span", "", class_="key frame", aria_hidden="true"), " DAMRO's outlier ",
        element("span", "", class_="key ring", aria_hidden="true"), " VAR's sink ",
        element("span", "", class_="key hatch", aria_hidden="true"), " dropped by VTC-CLS, never seen",
        class_="legend",
    )  # fmt: skip
