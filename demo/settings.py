"""The page's switches and sliders, presets, the Python that does the same, and the link that restores them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from lvlm_fix.methods import METHODS, Method, parse


@dataclass(frozen=True)
class Control:
    """A slider, or a switch where `step` is 0, for one hyper-parameter of a method."""

    field: str
    label: str
    info: str
    value: float
    least: float = 0
    most: float = 1
    step: float = 0.05


@dataclass(frozen=True)
class Panel:
    """A method as people who never read the paper are told of it, and its controls."""

    title: str
    cures: str
    plainly: str
    paper: str
    controls: tuple[Control, ...]


PANELS: dict[str, Panel] = {
    "damro": Panel(
        "DAMRO",
        "against hallucination",
        "A few background patches draw the eye of the vision tower, the part of the model that sees. DAMRO asks twice, "
        "once with the whole picture and once with those patches alone, and subtracts what they alone would have said.",
        "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination. Xuan Gong, Tianshi Ming, "
        "Xinpeng Wang, Zhihua Wei. EMNLP 2024.",
        (
            Control(
                "alpha",
                "Strength of the contrast",
                "α in the paper; 0.5 for yes/no, 1.5 to 2 for captions",
                0.5,
                0,
                3,
                0.1,
            ),
            Control(
                "beta",
                "Plausibility cut-off",
                "β in the paper: words below this share of the likeliest are out",
                0.1,
            ),
            Control(
                "topk", "Outlier tokens", "top-k in the paper: patches in the second asking", 10, 1, 40, 1
            ),
        ),
    ),
    "var": Panel(
        "VAR",
        "against hallucination",
        "Some tokens soak up attention and tell nothing: attention sinks. VAR takes part of what they get and hands it "
        "to the rest of the picture, in those attention heads (the model's many parallel gazes) that look there.",
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models. Seil Kang, Jinyeong Kim, "
        "Junhyeok Kim, Seong Jae Hwang. ICLR 2025.",
        (
            Control("p", "Attention given back", "p in the paper: the share that every sink gives up", 0.6),
            Control(
                "rho",
                "Image-centric heads only",
                "ρ in the paper: least share of a head's image attention outside sinks",
                0.8,
            ),
            Control(
                "min_image_attention",
                "Least attention to the image",
                "the paper's 0.2: heads below are left alone",
                0.2,
            ),
        ),
    ),
    "vtc_cls": Panel(
        "VTC-CLS",
        "for speed",
        "The part of the model that sees sums the picture up in one [CLS] token, and looks at the patches that matter "
        "as it does. VTC-CLS keeps those and drops the others before the language model reads them.",
        "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs. Ao Wang, Fengyuan Sun, Hui Chen, "
        "Zijia Lin, Jungong Han, Guiguang Ding. arXiv 2024.",
        (
            Control(
                "keep",
                "Share of the image tokens kept",
                "N of N_total in the paper, which keeps 64, 128 or 192 of 576",
                0.5,
                0.05,
                0.95,
                0.01,
            ),
        ),
    ),
    "zipvl": Panel(
        "ZipVL",
        "for speed and memory",
        "Each layer needs only some of the tokens. ZipVL finds out how many, works among those, and packs the memory "
        "of the conversation (the KV cache) to 4 and 2 bits.",
        "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification. Yefei He, Feng Chen, "
        "Jing Liu, Wenqi Shao, Hong Zhou, Kaipeng Zhang, Bohan Zhuang. ICCV 2025.",
        (
            Control(
                "tau",
                "Attention that must be covered",
                "τ in the paper: important tokens hold this share",
                0.975,
                0.8,
                1,
                0.005,
            ),
            Control(
                "evict",
                "Drop unimportant tokens from the cache",
                "the paper's second version; off: 2 bits each",
                0,
                step=0,
            ),
        ),
    ),
}
"""By the method's name, in the order of `METHODS`."""

PRESETS: dict[str, str] = {
    "plain": "none",
    "least hallucination": "zipvl(evict=True)",
    "fastest": "vtc_cls(keep=0.33)",
    "balanced": "vtc_cls(keep=0.5)",
}
"""By name, what the switches are set to: `scores.RULES` choose, and a test tells when they choose another."""

QUESTION, PICTURE, TOKENS = "Describe the image.", "street", 64
OPENING = "fastest"
"""With that picture, a preset that makes a difference to be seen; a test tells when it no longer does."""


def defaults() -> list[Any]:
    """Values of all controls at the start: each method's switch, then its controls, as a preset has them."""
    return values_of(PRESETS[OPENING])


def fix_of(values: Sequence[Any]) -> str:
    """The switched-on methods as on the command line.

    >>> fix_of(defaults())
    'vtc_cls(keep=0.33)'
    """
    rest = iter(values)
    parts = []
    for name, panel in PANELS.items():
        on = next(rest)
        given = [(control, next(rest)) for control in panel.controls]
        if not on:
            continue
        own = _defaults(name)
        told = [
            f"{one.field}={_spelled(one, value)}"
            for one, value in given
            if _typed(one, value) != own[one.field]
        ]
        parts.append(f"{name}({', '.join(told)})" if told else name)
    return ",".join(parts) or "none"


def values_of(fix: str) -> list[Any]:
    """The controls' values for methods as on the command line: what `fix_of` undoes.

    Raises:
        ValueError: an unknown method, or a value that no slider reaches or the page has no slider for.

    >>> fix_of(values_of("damro(alpha=1),vtc_cls(keep=0.25)"))
    'damro(alpha=1.0),vtc_cls(keep=0.25)'
    """
    chosen = {method.name: method for method in parse(fix)}
    values: list[Any] = []
    for name, panel in PANELS.items():
        values.append(name in chosen)
        values += [_value_of(one, chosen.get(name)) for one in panel.controls]
    if {method.name: method for method in parse(fix_of(values))} != chosen:
        raise ValueError(f"{fix!r} sets something that the page has no slider for: use it from Python")
    return values


def _value_of(control: Control, method: Method | None) -> Any:
    """A control's value for a method, or its own where the method is off."""
    value = control.value if method is None else getattr(method, control.field)
    if not control.step:
        return bool(value)
    if method is not None and not control.least <= value <= control.most:
        raise ValueError(
            f"the slider for {method.name}'s {control.field} goes from {control.least:g} to {control.most:g}, so "
            f"{value:g} cannot be set"
        )
    return value


def _typed(control: Control, value: Any) -> Any:
    if not control.step:
        return bool(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"“{control.label}” is empty: give it a number from {control.least:g} to {control.most:g}"
        )
    return int(value) if control.step >= 1 else float(value)


def _spelled(control: Control, value: Any) -> str:
    return repr(_typed(control, value))


def _defaults(name: str) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]


def python(fix: list[Method], sample: str | None, question: str, tokens: int, model: str) -> str:
    """Python that gives the same answer, about a sample's file or one of the reader's own.

    >>> print(python(parse("vtc_cls(keep=0.5)"), "safari.png", "Describe the image.", 64, "embedded"))
    from importlib.resources import files
    <BLANKLINE>
    from lvlm_fix import LVLM, VTCCLS
    <BLANKLINE>
    picture = files("lvlm_fix.assets") / "samples" / "safari.png"
    lvlm = LVLM()
    answer = lvlm.ask(picture, "Describe the image.", fix=[VTCCLS(keep=0.5)], max_new_tokens=64)
    print(answer.text)
    """
    names = ", ".join(sorted({"LVLM", *(type(method).__name__ for method in fix)}))
    calls = ", ".join(_call(method) for method in fix)
    fixed = f", fix=[{calls}]" if fix else ""
    quoted = json.dumps(question, ensure_ascii=False)
    own = "" if model == "embedded" else json.dumps(model)
    found = f'files("lvlm_fix.assets") / "samples" / {json.dumps(sample)}' if sample else '"picture.png"'
    return (
        ("from importlib.resources import files\n\n" if sample else "")
        + f"from lvlm_fix import {names}\n\npicture = {found}\nlvlm = LVLM({own})\n"
        f"answer = lvlm.ask(picture, {quoted}{fixed}, max_new_tokens={tokens})\nprint(answer.text)"
    )


def _call(method: Method) -> str:
    own = _defaults(method.name)
    told = [f"{name}={getattr(method, name)!r}" for name in own if getattr(method, name) != own[name]]
    return f"{type(method).__name__}({', '.join(told)})"


def link(fix: str, picture: str | None, question: str, tokens: int) -> str:
    """The query that restores a setting; a picture that is no sample stays out of it.

    >>> link("vtc_cls(keep=0.5)", "safari", "Why?", 64)
    '?picture=safari&question=Why%3F&tokens=64&fix=vtc_cls%28keep%3D0.5%29'
    """
    query = {"picture": picture, "question": question, "tokens": tokens, "fix": fix}
    return "?" + urlencode({name: value for name, value in query.items() if value is not None})
