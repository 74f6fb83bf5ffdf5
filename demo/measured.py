"""The measurements that ship, as HTML: tables and a plot with intervals, and one line on a setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lvlm_fix.demo.intervals import Row, intervals
from lvlm_fix.demo.scores import PLAIN, Summary, conditions, preset_of
from lvlm_fix.demo.settings import PRESETS
from lvlm_fix.evals.report_markup import Markup, element, join
from lvlm_fix.evals.report_plots import breakable

HEADINGS = {
    ("pope", "f1"): "right answers, F1",
    ("chair", "CHAIRs"): "captions that make something up, % (CHAIRs)",
    ("chair", "CHAIRi"): "made up among the named objects, % (CHAIRi)",
    ("chair", "recall"): "objects there that are named, % (recall)",
}
"""By benchmark and metric, in the order in which they are shown."""

TOLD = {
    "chair": ("CHAIR", "Objects in captions that are not in the picture. Lower is better, but for recall."),
    "pope": ("POPE", "Yes-or-no questions, half of them about objects that are not there. Higher is better."),
}

HEADLINES = {
    ("chair", "all", "CHAIRi"): "of the objects named {} to {} % are made up (CHAIRi: {})",
    ("chair", "all", "CHAIRs"): "of the captions {} to {} % make something up (CHAIRs: {})",
    ("chair", "all", "recall"): "of the objects there {} to {} % are named (recall: {})",
    ("pope", "adversarial", "f1"): "yes-or-no questions about likely objects {} to {} (POPE's F1: {})",
}
"""What the line on a setting says, by benchmark, split and metric."""


def results(summaries: Sequence[Summary]) -> Markup:
    """The measurements that ship: tables, and a plot of what is made up."""
    if not summaries:
        return element("p", "No measurements ship with this package.", class_="results")
    return element("div", *map(_benchmark, summaries), class_="results")


def line(summaries: Sequence[Summary], setting: str) -> Markup:
    """One line on what a setting did to the embedded model, from the shipped measurements; empty where none is."""
    said: list[str] = []
    images = 0
    for task, split, metric in HEADLINES:
        for summary in summaries:
            if summary["task"] == task:
                found = _change(summary, setting, split, metric)
                said += [found] if found else []
                images = max(images, summary["images"] if found else 0)
    said += [_pace(one, setting) for one in summaries if one["task"] == "chair" and _known(one, setting)]
    if not said:
        return join([])
    return join(
        [f"Measured on the embedded model, {images:,} pictures, plain to this: ", "; ".join(said), "."]
    )


def _known(summary: Summary, setting: str) -> bool:
    names = {one["name"] for one in summary["settings"]}
    return setting != PLAIN and {PLAIN, setting} <= names


def _change(summary: Summary, setting: str, split: str, metric: str) -> str:
    """One metric of a setting beside the plain model's, in words; empty where it was not measured."""
    if not _known(summary, setting):
        return ""
    by_name = {one["name"]: one for one in summary["settings"]}
    pair = [_value(by_name[name], split, metric) for name in (PLAIN, setting)]
    if pair[0] is None or pair[1] is None:
        return ""
    factor = _factor(summary["task"])
    before, after = (factor * one["value"] for one in pair if one is not None)
    found = next(
        (
            one["verdict"]
            for one in summary["comparisons"]
            if (one["setting"], one["split"], one["metric"]) == (setting, split, metric)
        ),
        "not compared",
    )
    return HEADLINES[summary["task"], split, metric].format(f"{before:.1f}", f"{after:.1f}", found)


def _pace(summary: Summary, setting: str) -> str:
    seconds = {one["name"]: one["seconds_per_answer"] for one in summary["settings"]}
    factor = seconds[PLAIN] / seconds[setting]
    pace = f"{factor:.1f} times as fast" if factor >= 1 else f"{1 / factor:.1f} times as slow"
    return f"captions {pace} {conditions(summary)}, and one question alone may differ"


def _benchmark(summary: Summary) -> Markup:
    task = summary["task"]
    title, what = TOLD.get(task, (task.upper(), ""))
    about = (
        f"{summary['images']:,} images, {summary['items']:,} questions; in brackets the interval that holds "
        f"{summary['confidence']:.0%} of resampled sets of images; ✓ and ✗ are significant against plain, after Holm's "
        f"correction for many comparisons. Times were taken {conditions(summary)}."
    )
    return element(
        "section",
        element("h3", title),
        element("p", what),
        _plot(summary) if task == "chair" else join([]),
        element("div", _table(summary), class_="scroll"),
        element("p", about, class_="muted"),
    )


def _table(summary: Summary) -> Markup:
    task = summary["task"]
    timed = task == "chair"  # an answer of one word tells little about speed
    splits = summary["settings"][0]["splits"]
    columns = [
        (split, metric, heading if len(splits) == 1 else f"{heading}, {split}")
        for split in splits
        for (of, metric), heading in HEADINGS.items()
        if of == task
    ]
    verdicts = {
        (one["setting"], one["split"], one["metric"]): one["verdict"]
        for one in summary["comparisons"]
        if one["significant"]
    }
    rows = []
    for setting in summary["settings"]:
        name = setting["name"]
        cells = [element("th", *_named(name), scope="row")]
        cells += [
            _cell(_value(setting, split, metric), _factor(task), verdicts.get((name, split, metric)))
            for split, metric, _ in columns
        ]
        if timed:
            cells.append(element("td", f"{1 / setting['seconds_per_answer']:.0f}"))
        rows.append(element("tr", *cells))
    heads = ["setting", *(heading for _, _, heading in columns), *(["answers a second"] if timed else [])]
    head = element("thead", element("tr", *(element("th", one, scope="col") for one in heads)))
    return element("table", head, element("tbody", *rows))


def _cell(value: dict[str, float] | None, factor: float, verdict: str | None) -> Markup:
    if value is None:
        return element("td", "–")
    text = f"{factor * value['value']:.1f} [{factor * value['low']:.1f}, {factor * value['high']:.1f}]"
    sign = {"better": " ✓ better", "worse": " ✗ worse"}.get(verdict or "", "")
    kind = {"better": "good", "worse": "poor"}.get(verdict or "")
    return element("td", text, element("strong", sign), class_=kind)


def _named(setting: str) -> list[str]:
    if setting == PLAIN:
        return ["plain"]
    preset, code = preset_of(setting, PRESETS), element("code", breakable(setting))
    return [code] if preset is None else [preset, element("br"), code]


def _plot(summary: Summary) -> Markup:
    """The share of made-up objects by setting, with intervals."""
    rows = []
    for setting in summary["settings"]:
        value = _value(setting, "all", "CHAIRi")
        if value is not None:
            name = setting["name"]
            rows.append(Row(_short(name), value["value"], value["low"], value["high"], plain=name == PLAIN))
    if not rows:
        return join([])
    drawn = intervals(rows, "made-up objects, % (CHAIRi)", "Made-up objects by setting")
    return element(
        "figure", drawn, element("figcaption", "Further left is better; the dashed line is the plain model.")
    )


def _short(setting: str) -> str:
    """What a plot calls a setting; the table has its full name.

    >>> _short("none"), _short("vtc_cls(keep=48)"), _short("vtc_cls(keep=72),zipvl(evict=True)")
    ('plain', 'fastest', 'vtc_cls 72, zipvl evict')
    """
    if setting == PLAIN:
        return "plain"
    plainer = (
        setting.replace("=True", "")
        .replace("keep=", "")
        .replace("alpha=", "α ")
        .replace("start_layer=", "from ")
    )
    return preset_of(setting, PRESETS) or plainer.replace("(", " ").replace(")", "").replace(",", ", ")


def _value(setting: dict[str, Any], split: str, metric: str) -> dict[str, float] | None:
    return setting["splits"].get(split, {}).get(metric)


def _factor(task: str) -> float:
    return 100.0 if task == "pope" else 1.0
