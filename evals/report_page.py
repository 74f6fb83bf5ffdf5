"""The page of a report: what came out in plain words, and a section a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files

from .report_categories import bars, categories
from .report_gallery import Disagreement, changes, gallery
from .report_markup import Markup, document, element, join, listed, style
from .report_pictures import Thumbnail
from .report_plots import Point, legend, scatter, setting_name
from .report_runs import Run
from .report_tables import comparisons, facts, how_compared, how_read, results, speed
from .report_words import (
    CLIPSCORE,
    CLIPSCORE_PAPER,
    benchmark,
    decoding,
    direction,
    metric_name,
    model_name,
    named,
    outcomes,
    scale,
    seconds,
    unit,
)
from .summary import MEAN
from .tasks import Chair

_NOTHING_OUTSIDE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    runs: Sequence[Run],
    found: Sequence[Sequence[Disagreement]],
    shown: Sequence[Sequence[Disagreement]],
    pictures: Sequence[Mapping[str, Thumbnail]],
) -> str:
    """The page about runs, with the items on which the settings of each disagree, all of them and those shown."""
    benchmarks = listed(list(dict.fromkeys(run.task.name.upper() for run in runs)))
    models = listed(list(dict.fromkeys(map(model_name, runs))))
    title = join([benchmarks, " of ", models])
    sections = [
        _section(run, f"run{number}", len(runs) > 1, items, few, thumbs)
        for number, (run, items, few, thumbs) in enumerate(zip(runs, found, shown, pictures, strict=True), 1)
    ]
    links = [
        element("li", element("a", _heading(run, len(runs) > 1), href=f"#run{number}"))
        for number, run in enumerate(runs, 1)
    ]
    return document(
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_NOTHING_OUTSIDE),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            style(files("lvlm_fix.evals").joinpath("report.css").read_text(encoding="utf-8")),
        ),
        element(
            "body",
            element("a", "Skip to the results", href="#results", class_="skip"),
            element(
                "header",
                element("p", "lvlm-fix evaluation", class_="kicker"),
                element("h1", title),
                *(_opening(run, len(runs) > 1) for run in runs),
            ),
            *([element("nav", element("ul", *links), aria_label="Benchmarks")] if len(runs) > 1 else []),
            element("main", *sections, id="results"),
            element(
                "footer", element("p", "Written by lvlm-fix report from the results and their manifests.")
            ),
        ),
    )


def _opening(run: Run, several: bool) -> Markup:
    """In plain words what was compared and what came out."""
    others = run.names[1:]
    how = f"{model_name(run)}, {decoding(run.manifest)}, {run.summary['images']:,} pictures, "
    how += f"{run.summary['items']:,} questions"
    start = [element("b", _heading(run, several)), f" ({how}): "]
    if not others:
        return element("p", *start, "only the plain model was asked, so nothing is compared.", class_="lead")
    lines = [element("li", element("code", setting_name(name)), " ", text) for name, text in outcomes(run)]
    return join(
        [
            element("p", *start, "plain against ", named(others), ".", class_="lead"),
            element("ul", *lines, class_="outcomes"),
        ]
    )


def _heading(run: Run, several: bool) -> str:
    name, folder = run.task.name.upper(), run.folder.name
    return f"{name}, {folder}" if several and folder.upper() != name else name


def _section(
    run: Run,
    name: str,
    several: bool,
    found: Sequence[Disagreement],
    shown: Sequence[Disagreement],
    pictures: Mapping[str, Thumbnail],
) -> Markup:
    own = benchmark(run)
    parts: list[Markup] = [
        element("h2", _heading(run, several), id=f"{name}-heading"),
        element("p", own.about, " (", _paper(own.paper), ")"),
        *([element("p", CLIPSCORE, " (", _paper(CLIPSCORE_PAPER), ")")] if run.clipscored else []),
        element("h3", "Results"),
        results(run),
        *(element("p", text, class_="note") for text in how_read(run)),
    ]
    if len(run.names) > 1:
        parts += [
            element("h3", "Against plain"),
            comparisons(run),
            element("p", how_compared(run), class_="note"),
        ]
    parts += [element("h3", "Quality and latency"), _quality(run, name), speed(run)]
    wrong = categories(run)
    parts.append(element("h3", "What is hallucinated"))
    parts.append(bars(run, wrong) if wrong else element("p", "No setting hallucinates anything."))
    if len(run.names) > 1:
        parts += [element("h3", "Where settings disagree"), *_disagreeing(run, found, shown, pictures)]
    return element("section", *parts, facts(run), id=name, aria_labelledby=f"{name}-heading")


def _paper(number: str) -> Markup:
    return element("a", f"arXiv {number}", href=f"https://arxiv.org/abs/{number}")


def _quality(run: Run, name: str) -> Markup:
    metrics = benchmark(run).plotted
    split = MEAN if MEAN in run.splits else run.splits[0]
    axes = [(metric, "seconds_per_answer", "seconds an answer (lower is better)") for metric in metrics]
    axes.append((metrics[0], "tokens_per_second", "tokens a second (higher is better)"))
    plots = [
        _plot(run, metric, split, key, label, f"{name}-plot{number}")
        for number, (metric, key, label) in enumerate(axes, 1)
    ]
    what = f", mean of {len(run.splits) - 1} splits" if split == MEAN else ""
    note = f"Each sign is a setting{what}; upright lines are {run.summary['confidence']:.0%} intervals. "
    note += "Time is that of the whole batch, shared among its answers; it has no interval, so read small differences "
    note += "as none."
    return element(
        "figure",
        legend(run.names),
        element("div", *plots, class_="plots"),
        element("figcaption", note),
    )


def _plot(run: Run, metric: str, split: str, key: str, x_label: str, name: str) -> Markup:
    factor = scale(run, metric)
    points, told = [], []
    for index, setting in enumerate(run.settings):
        estimate, x = setting["splits"][split][metric], setting[key]
        value, low, high = (estimate[part] * factor for part in ("value", "low", "high"))
        points.append(Point(setting["name"], index, x, value, low, high))
        pace = seconds(x) if key == "seconds_per_answer" else f"{x:,.1f} tokens/s"
        told.append(f"{setting_name(setting['name'])}: {value:.1f} ({low:.1f} to {high:.1f}), {pace}")
    way = direction(run, metric)
    y_label = ", ".join(filter(None, (metric_name(metric), unit(metric).split(",")[0]))) + (
        f" ({way})" if way else ""
    )
    title = f"{run.task.name.upper()}: {metric_name(metric)} against {x_label.split(' (')[0]}"
    return scatter(points, x_label, y_label, title, "; ".join(told), name)


def _disagreeing(
    run: Run,
    found: Sequence[Disagreement],
    shown: Sequence[Disagreement],
    pictures: Mapping[str, Thumbnail],
) -> Iterator[Markup]:
    for name, better, worse in changes(run):
        if run.task is Chair:
            text = f" hallucinates less than plain in {better:,} captions and more in {worse:,}."
        else:
            text = f" corrects {better:,} wrong answers of plain and makes {worse:,} right ones wrong."
        yield element("p", element("code", setting_name(name)), text, class_="changes")
    if not found:
        yield element("p", "On every item all settings make the same mistakes, or none.")
    if not shown:
        return
    text = f"{len(shown)} of {len(found):,} items are shown, each kind of disagreement in turn, the "
    text += "largest differences first. "
    yield element("p", text, element("mark", "Marked words"), " speak of what is not there.", class_="note")
    if not pictures:
        yield element("p", "The pictures were not found; name their folder with --images.", class_="note")
    yield gallery(run, shown, pictures)
