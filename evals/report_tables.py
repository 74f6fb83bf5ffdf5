"""Tables of a report: metrics with intervals, tests against the plain model, speed, and how a run was made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .report_markup import Markup, element, join
from .report_plots import breakable, setting_name, sign
from .report_runs import Run
from .report_words import change, data, direction, metric_name, probability, scale, seconds, size, unit
from .summary import NO_DIFFERENCE


def results(run: Run) -> Markup:
    """Every metric of every setting and split with its interval; what differs from plain is said in words."""
    verdicts = {(one["setting"], one["split"], one["metric"]): one for one in run.summary["comparisons"]}
    metrics = _metrics(run)

    def cells(setting: Mapping[str, Any], split: str) -> Iterator[Markup]:
        for metric in metrics:
            estimate, factor = setting["splits"][split][metric], scale(run, metric)
            low, high = estimate["low"] * factor, estimate["high"] * factor
            lines = [
                data(estimate["value"], f"{estimate['value'] * factor:.1f}"),
                element("small", f"{low:.1f} to {high:.1f}".replace("-", "−")),
            ]
            if "deviation" in estimate:
                lines.append(element("small", f"±{estimate['deviation'] * factor:.1f} over seeds"))
            verdict = verdicts.get((setting["name"], split, metric))
            if verdict and verdict["significant"]:
                lines.append(element("small", verdict["verdict"], class_=f"verdict {verdict['verdict']}"))
            yield element("td", *lines)

    confidence = run.summary["confidence"]
    return _by_split(
        run,
        f"Values with {confidence:.0%} intervals",
        [_metric_head(run, metric) for metric in metrics],
        run.settings,
        cells,
    )


def comparisons(run: Run) -> Markup:
    """The paired tests of every setting against the plain model, for every metric and split."""
    entries = {(one["setting"], one["split"], one["metric"]): one for one in run.summary["comparisons"]}
    metrics = [metric for metric in _metrics(run) if any(key[2] == metric for key in entries)]

    def cells(setting: Mapping[str, Any], split: str) -> Iterator[Markup]:
        for metric in metrics:
            entry = entries.get((setting["name"], split, metric))
            if entry is None:
                yield element("td", "not tested")
                continue
            factor = scale(run, metric)
            low, high = (change(entry[name] * factor) for name in ("low", "high"))
            verdict = entry["verdict"]
            kind = "same" if verdict == NO_DIFFERENCE else verdict
            yield element(
                "td",
                data(entry["difference"], change(entry["difference"] * factor)),
                element("small", f"{low} to {high}"),
                element("small", data(entry["p_holm"], probability(entry["p_holm"]))),
                element("small", verdict, class_=f"verdict {kind}"),
            )

    return _by_split(
        run,
        f"Differences to plain with {run.summary['confidence']:.0%} intervals, p corrected by Holm’s procedure",
        [_metric_head(run, metric) for metric in metrics],
        run.settings[1:],
        cells,
    )


def how_compared(run: Run) -> str:
    """Which tests the summary names, in one sentence."""
    kinds: dict[str, list[str]] = {}
    for entry in run.summary["comparisons"]:
        names = kinds.setdefault(entry["test"], [])
        if metric_name(entry["metric"]) not in names:
            names.append(metric_name(entry["metric"]))
    told = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in kinds.items())
    return f"Tests: {told}. Corrected over the settings and splits of each metric."


def how_read(run: Run) -> Iterator[str]:
    """What a reader must know to compare these numbers with others, a sentence each."""
    rule = (run.manifest.get("task") or {}).get("rule")
    if rule:
        rest = {
            "english": "it also sees words that the published script overlooks, so published tables, and "
            "`lvlm-fix score chair` as it comes, count by the other rule, reference.",
            "reference": "it reads words as the published script does.",
        }.get(rule)
        yield f"Objects were found in the captions by the {rule} rule" + (f": {rest}" if rest else ".")
    cut = {
        setting_name(setting["name"]): sum(
            own.get("truncated_captions", 0) for own in setting["counts"].values()
        )
        for setting in run.settings
    }
    if run.clipscored and any(cut.values()):
        told = ", ".join(f"{count:,} of {name}" for name, count in cut.items() if count)
        yield f"CLIPScore read only the beginning of some captions: {told}."


def speed(run: Run) -> Markup:
    """Time, throughput and memory of every setting."""
    plain = run.settings[0]["seconds_per_answer"]
    heads = (
        "time an answer",
        "against plain",
        "tokens/s",
        "compute time",
        "answers",
        "tokens",
        "peak memory",
    )
    rows = []
    for setting in run.settings:
        own = setting["seconds_per_answer"]
        cells = [
            data(own, seconds(own)),
            f"× {own / plain:.2f}" if plain else "not known",
            data(setting["tokens_per_second"], f"{setting['tokens_per_second']:,.1f}"),
            data(setting["compute_seconds"], seconds(setting["compute_seconds"])),
            f"{setting['answers']:,}",
            f"{setting['tokens']:,}",
            data(setting["peak_memory_bytes"], size(setting["peak_memory_bytes"])),
        ]
        rows.append(
            element("tr", _setting_head(run, setting["name"]), *(element("td", cell) for cell in cells))
        )
    return _table(
        "Time and memory as measured; whatever else the machine did is in them. Compute time is summed over batches, "
        "and over processes",
        [*map(join, heads)],
        [("", rows)],
    )


def facts(run: Run) -> Markup:
    """All that the manifest holds, folded away."""
    manifest = run.manifest
    model, task = manifest.get("model") or {}, manifest.get("task") or {}
    prompts, environment = manifest.get("prompts") or {}, manifest.get("environment") or {}
    entries: list[tuple[str, str]] = [
        ("model", join([str(model.get("name")), element("br"), _code(f"sha256 {model.get('sha256')}")])),
        ("benchmark", _values(task)),
        ("decoding", _values(manifest["decoding"])),
        ("seeds", ", ".join(map(str, run.summary["seeds"])) + _unused(manifest["decoding"])),
        ("batch size", str(manifest.get("batch_size"))),
        ("dtype", str(manifest.get("dtype"))),
        ("device", str(manifest.get("device"))),
        ("machine", _values(environment)),
        ("versions", _values(manifest.get("versions") or {})),
        ("data, sha256", _lines(manifest.get("data") or {})),
        ("methods", _lines({setting_name(one["name"]): _methods(one) for one in manifest["settings"]})),
        ("first question, as the model reads it", _code(str(prompts.get("example")))),
        ("all questions, sha256", _code(str(prompts.get("sha256")))),
        ("chat template", _code(str(manifest.get("chat_template")))),
        ("command", _code(shlex.join(map(str, manifest.get("command") or ())))),
        ("begun", str(manifest.get("created"))),
        ("by the clock", _clock(manifest.get("measured") or {})),
        *_clip_facts(run),
        ("bootstrap", f"{run.summary['resamples']:,} resamples of {run.summary['images']:,} images"),
    ]
    terms = (part for term, text in entries for part in (element("dt", term), element("dd", text)))
    return element(
        "details",
        element("summary", "How this was made: the manifest"),
        element("dl", *terms),
        class_="facts",
    )


def _clock(measured: Mapping[str, Any]) -> str:
    if "wall_seconds" not in measured:
        return "not known"
    lines, processes = measured.get("new_lines", 0), measured.get("processes", 1)
    told = f"{seconds(measured['wall_seconds'])} for {lines:,} results, on {processes} "
    return told + ("process" if processes == 1 else "processes")


def _clip_facts(run: Run) -> Iterator[tuple[str, str]]:
    if not run.clipscored:
        return
    own = dict(run.manifest["late"]["clipscore"])
    name, sha256 = own.pop("name"), own.pop("sha256")
    yield "CLIPScore", join([str(name), element("br"), _code(f"sha256 {sha256}"), element("br"), _pairs(own)])


def _by_split(run: Run, caption: str, heads: Sequence[Markup], settings: Sequence[Any], cells: Any) -> Markup:
    groups = []
    for split in run.splits:
        rows = [
            element("tr", _setting_head(run, setting["name"]), *cells(setting, split)) for setting in settings
        ]
        groups.append((split if len(run.splits) > 1 else "", rows))
    return _table(caption, heads, groups)


def _table(caption: str, heads: Sequence[Markup], groups: Iterable[tuple[str, Sequence[Markup]]]) -> Markup:
    head = element(
        "tr", element("th", "setting", scope="col"), *(element("th", one, scope="col") for one in heads)
    )
    bodies = []
    for name, rows in groups:
        title = element("th", element("span", name), colspan=len(heads) + 1, scope="rowgroup", class_="group")
        bodies.append(element("tbody", *([element("tr", title)] if name else []), *rows))
    table = element("table", element("caption", element("span", caption)), element("thead", head), *bodies)
    # Reachable by keyboard, or a reader without a mouse could not scroll it.
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _setting_head(run: Run, name: str) -> Markup:
    who = element("span", sign(run.names.index(name)), element("span", breakable(name)), class_="who")
    return element("th", who, scope="row")


def _metrics(run: Run) -> list[str]:
    return list(run.settings[0]["splits"][run.splits[0]])


def _metric_head(run: Run, metric: str) -> Markup:
    told = ", ".join(filter(None, (unit(metric), direction(run, metric))))
    return join([metric_name(metric), element("small", told)])


def _unused(decoding: Mapping[str, Any]) -> str:
    return "" if decoding.get("do_sample") else " (of no effect without sampling)"


def _methods(setting: Mapping[str, Any]) -> str:
    return "; ".join(_pairs(method) for method in setting.get("methods") or ()) or "none"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _values(values: Mapping[str, Any]) -> Markup:
    return join([_pairs(values)])


def _lines(values: Mapping[str, Any]) -> Markup:
    items = [element("li", f"{name}: ", _code(_plain(value))) for name, value in values.items()]
    return element("ul", *items)


def _code(text: str) -> Markup:
    return element("code", text)
