"""How a report says numbers, and what came out of a run in one sentence a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .report_markup import Markup, element, join, listed
from .report_plots import setting_name
from .report_runs import Run
from .settings import PLAIN
from .summary import MEAN, NO_DIFFERENCE


class Benchmark(NamedTuple):
    """What a report says of a benchmark, and which of its metrics come first."""

    about: str
    paper: str  # its arXiv number
    first: tuple[str, ...]  # metrics that the opening sentences tell of
    plotted: tuple[str, ...]  # against seconds; the first of them also against tokens a second


BENCHMARKS: Mapping[str, Benchmark] = {
    "pope": Benchmark(
        "Questions of the form “Is there a fork in the image?”, half of them about objects that are not there: drawn "
        "at random, among the most popular, or among those that often keep company with what is there (adversarial). "
        "Yes to an absent object is a hallucination.",
        "2305.10355",
        ("f1",),
        ("f1",),
    ),
    "chair": Benchmark(
        "Captions: CHAIRs is the share of captions that name an object which is not in the picture, CHAIRi the share "
        "of such objects among all that are named, and recall the share of the picture’s objects that are named.",
        "1809.02156",
        ("CHAIRs", "CHAIRi", "recall"),
        ("CHAIRi", "CHAIRs", "recall"),
    ),
    "mme": Benchmark(
        "Two questions a picture, one to be answered yes and one no. Accuracy is over questions, accuracy+ over "
        "pictures with both answers right; the score is their sum, 200 at most.",
        "2306.13394",
        ("score",),
        ("score",),
    ),
}
CLIPSCORE = (
    "CLIPScore says how well a caption suits its picture in the eyes of a CLIP model: 2.5 times the cosine of the two, "
    "0 where that is negative."
)
CLIPSCORE_PAPER = "2104.08718"
_METRICS = {
    "clipscore": "CLIPScore",
    "f1": "F1",
    "yes_ratio": "yes ratio",
    "average_length": "average length",
}
_JOINED = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line
_UNITS = {
    **dict.fromkeys(("accuracy", "accuracy+", "precision", "recall", "f1", "yes_ratio"), "percent"),
    **dict.fromkeys(("CHAIRs", "CHAIRi"), "percent"),
    "average_length": "words",
    "score": "of 200",
    "clipscore": "×100, 250 at most",
}


def benchmark(run: Run) -> Benchmark:
    """What a run measured."""
    own = BENCHMARKS[run.task.name]
    if not run.clipscored:
        return own
    return own._replace(first=(*own.first, "clipscore"), plotted=(*own.plotted, "clipscore"))


def metric_name(metric: str) -> str:
    """What a page calls a metric."""
    return _METRICS.get(metric, metric.replace("_", " "))


def unit(metric: str) -> str:
    """What a metric's values are, as shown; empty where that is not known."""
    return _UNITS.get(metric, "")


def direction(run: Run, metric: str) -> str:
    """In words, which way is better; empty where neither is."""
    return {1: "higher is better", -1: "lower is better"}.get(run.better.get(metric, 0), "")


def data(value: float, text: str) -> Markup:
    """A number as people read it, with the whole of it for programs."""
    return element("data", text.replace("-", "−"), value=repr(value))


def change(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def probability(p: float) -> str:
    """
    >>> probability(0.00004), probability(0.0312), probability(1.0)
    ('p\xa0<\xa00.001', 'p\xa0=\xa00.031', 'p\xa0=\xa01')
    """
    return ("p < 0.001" if p < 0.001 else f"p = {p:.2g}").replace(" ", _JOINED)


def seconds(value: float) -> str:
    """
    >>> seconds(0.03148), seconds(0.0042), seconds(4.25), seconds(75)
    ('31\xa0ms', '4.2\xa0ms', '4.2\xa0s', '1\xa0min 15\xa0s')
    """
    if value >= 60:
        return f"{round(value) // 60:,}{_JOINED}min {round(value) % 60}{_JOINED}s"
    if value >= 1:
        return f"{value:.1f}{_JOINED}s"
    return f"{1000 * value:.{0 if value >= 0.01 else 1}f}{_JOINED}ms"


def size(value: float) -> str:
    """
    >>> size(1_215_266_816), size(0)
    ('1.1 GiB', 'not known')
    """
    if not value:
        return "not known"
    return f"{value / 2**30:,.1f} GiB" if value >= 2**29 else f"{value / 2**20:,.0f} MiB"


def decoding(manifest: Mapping[str, Any]) -> str:
    """How answers were decoded, in a few words."""
    how = manifest["decoding"]
    if how.get("do_sample"):
        number = len(how.get("seeds", ()))
        return f"sampling at temperature {how.get('temperature', 1):g}, {number} {'seeds' if number > 1 else 'seed'}"
    beams = how.get("num_beams", 1)
    return f"{beams} beams" if beams > 1 else "greedy decoding"


def model_name(run: Run) -> str:
    """The model's name, of a folder its last part."""
    name = str((run.manifest.get("model") or {}).get("name") or "a model without a name")
    return "the embedded LVLM" if name == "embedded" else name.rstrip("/").rsplit("/", 1)[-1]


def outcomes(run: Run) -> list[tuple[str, Markup]]:
    """Each setting but the plain one, and what it changed, said of the metrics that come first."""
    told = [split for split in run.splits if split != MEAN]
    found = []
    for setting in run.settings[1:]:
        changed: list[Markup] = []
        same: list[str] = []
        for entry in run.summary["comparisons"]:
            if entry["setting"] != setting["name"] or entry["split"] not in told:
                continue
            if entry["metric"] not in benchmark(run).first:
                continue
            name = metric_name(entry["metric"])
            name = f"{name} ({entry['split']})" if len(told) > 1 else name
            if entry["significant"]:
                number = change(entry["difference"] * scale(run, entry["metric"]))
                verdict = element("b", f"{name} {entry['verdict']}", class_=entry["verdict"])
                changed.append(join([verdict, f" ({number}, {probability(entry['p_holm'])})"]))
            else:
                same.append(name)
        sentence = [join(["makes ", listed(changed)])] if changed else []
        nothing = NO_DIFFERENCE if changed else f"shows {NO_DIFFERENCE}"
        sentence += [join([f"{nothing} in ", listed(same)])] if same else []
        found.append((setting["name"], join([*_between(sentence, "; "), "."])))
    return found


def scale(run: Run, metric: str) -> float:
    """What a metric is multiplied by to be shown."""
    return run.task.percent if metric in run.better else 1.0


def named(names: Sequence[str]) -> Markup:
    """Settings as a sentence lists them."""
    return listed(
        [element("code", setting_name(name)) if name != PLAIN else join(["plain"]) for name in names]
    )


def _between(parts: Sequence[str], what: str) -> list[str]:
    return [piece for part in parts for piece in (what, part)][1:]
