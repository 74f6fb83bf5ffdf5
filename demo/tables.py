"""The probe's table and the measurements that ship, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lvlm_fix.evals.report_markup import Markup, element, join


def probe_table(
    plain: dict[str, float], fixed: dict[str, float], truth: Sequence[str] | None, left: int
) -> Markup:
    """Categories with P(yes) of both, largest disagreement first; `left` are still to be asked."""
    order = sorted(fixed, key=lambda name: -abs(plain[name] - fixed[name]))
    heads = [
        "object",
        "plain P(yes)",
        "fixed P(yes)",
        "difference",
        *(["in the picture"] if truth is not None else []),
    ]
    rows = []
    for name in order:
        cells = [element("th", name, scope="row"), _share(plain[name]), _share(fixed[name])]
        cells.append(element("td", f"{fixed[name] - plain[name]:+.2f}"))
        if truth is not None:
            cells.append(element("td", "yes" if name in truth else "no"))
        wrong = truth is not None and any(
            (value > 0.5) != (name in truth) for value in (plain[name], fixed[name])
        )
        rows.append(element("tr", *cells, class_="wrong" if wrong else None))
    note = (
        f"{left} questions to go."
        if left
        else "All asked. P(yes) is the probability that the answer begins with yes."
    )
    if truth is not None and not left:
        errors = [sum((values[name] > 0.5) != (name in truth) for name in order) for values in (plain, fixed)]
        note += f" Wrong of {len(order)}: plain {errors[0]}, fixed {errors[1]}; a ✗ marks the rows."
    body = element("tbody", *rows)
    table = element(
        "table", element("thead", element("tr", *(element("th", one, scope="col") for one in heads))), body
    )
    return element(
        "div", element("p", note, role="status"), element("div", table, class_="scroll"), class_="probe"
    )


def _share(value: float) -> Markup:
    bar = element(
        "span", element("span", "", style=f"width:{100 * value:.1f}%"), class_="bar", aria_hidden="true"
    )
    return element("td", bar, " ", element("span", f"{value:.2f}", class_="value"), class_="share")


def results(summaries: Sequence[dict[str, Any]]) -> Markup:
    """The measurements that ship, as tables with intervals and verdicts."""
    return element("div", *map(_benchmark, summaries), class_="results")


def _benchmark(summary: dict[str, Any]) -> Markup:
    task = summary["task"]
    timed = task == "chair"  # an answer of one word tells little about speed
    wanted = {"pope": ("f1",), "chair": ("CHAIRs", "CHAIRi", "recall")}.get(task)
    first = summary["settings"][0]
    columns = [
        (split, metric)
        for split, values in first["splits"].items()
        for metric in values
        if not wanted or metric in wanted
    ]
    verdicts = {
        (one["setting"], one["split"], one["metric"]): one["verdict"]
        for one in summary["comparisons"] if one["significant"]
    }  # fmt: skip
    heads = [
        "setting",
        *(metric if len(first["splits"]) == 1 else f"{metric}, {split}" for split, metric in columns),
    ]
    if timed:
        heads.append("answers/s")
    rows = []
    for setting in summary["settings"]:
        cells = [element("th", "plain" if setting["name"] == "none" else setting["name"], scope="row")]
        for split, metric in columns:
            value = setting["splits"][split][metric]
            verdict = verdicts.get((setting["name"], split, metric))
            factor = _factor(task)
            text = (
                f"{factor * value['value']:.1f} [{factor * value['low']:.1f}, {factor * value['high']:.1f}]"
            )
            sign = {"better": " ✓ better", "worse": " ✗ worse"}.get(verdict or "", "")
            kind = {"better": "good", "worse": "poor"}.get(verdict or "")
            cells.append(element("td", text, element("strong", sign), class_=kind))
        if timed:
            cells.append(element("td", f"{1 / setting['seconds_per_answer']:.0f}"))
        rows.append(element("tr", *cells))
    what = {
        "pope": "POPE: yes/no questions, half of them about objects that are not there. Percent; higher is better.",
        "chair": "CHAIR: objects in captions that are not in the picture. Percent; lower is better, but for recall.",
    }.get(task, "")
    head = element("thead", element("tr", *(element("th", one, scope="col") for one in heads)))
    about = (
        f"{summary['images']:,} images, {summary['items']:,} questions; intervals hold {summary['confidence']:.0%} of "
        "bootstrap resamples of images; ✓ and ✗ are significant against plain after Holm's correction."
    )
    return element(
        "section",
        element("h3", task.upper()),
        element("p", what),
        element("div", element("table", head, element("tbody", *rows)), class_="scroll"),
        element("p", about, class_="muted"),
    )


def _factor(task: str) -> float:
    return 100.0 if task == "pope" else 1.0


def measured(summaries: Sequence[dict[str, Any]], setting: str) -> Markup:
    """One line on what a setting did to the embedded model, from the shipped measurements; empty where none is."""
    said: list[str] = []
    for summary in summaries:
        by_name = {one["name"]: one for one in summary["settings"]}
        if setting not in by_name or setting == "none":
            continue
        split, metric = {"pope": ("adversarial", "f1"), "chair": ("all", "CHAIRi")}.get(
            summary["task"], ("", "")
        )
        if not split:
            continue
        factor = _factor(summary["task"])
        plain, own = (by_name[name]["splits"][split][metric]["value"] * factor for name in ("none", setting))
        found = next(
            one for one in summary["comparisons"]
            if (one["setting"], one["split"], one["metric"]) == (setting, split, metric)
        )  # fmt: skip
        label = "POPE-adversarial F1" if summary["task"] == "pope" else "CHAIRi"
        said.append(f"{label} {plain:.1f} to {own:.1f} ({found['verdict']})")
        if summary["task"] == "chair":
            speed = by_name["none"]["seconds_per_answer"] / by_name[setting]["seconds_per_answer"]
            said.append(f"captions {speed:.1f} times as fast")
    return (
        join(["Measured on the embedded model, 640 pictures: ", "; ".join(said), "."]) if said else join([])
    )
