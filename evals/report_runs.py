"""Reads the output folders of `lvlm-fix eval` for a report, and refuses what is not one whole run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .clipscore import ClipScoredChair
from .manifest import FILE as MANIFEST
from .mme import Mme
from .records import DataError, Record, read_bytes, read_json, read_jsonl
from .results import Key, Row, key_of, results_file
from .runner import SUMMARY
from .settings import PLAIN, Setting
from .tasks import Chair, Pope, Task

TASKS: Mapping[str, type[Task]] = {task.name: task for task in (Pope, Chair, Mme)}
AGAIN = "start its `lvlm-fix eval` command again to go on"
_SAYINGS = ("yes", "no", "other")
_SPEED = (
    "answers",
    "tokens",
    "compute_seconds",
    "tokens_per_second",
    "seconds_per_answer",
    "peak_memory_bytes",
)
_COMPARED = ("setting", "split", "metric", "test", "verdict", "significant")


@dataclass(frozen=True)
class Run:
    """One finished evaluation.

    Attributes:
        task: the benchmark's class; it knows its metrics, and what is better.
        rows: setting name -> results lines by seed and item, those of all settings in the same order.
    """

    folder: Path
    task: type[Task]
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Mapping[str, Mapping[Key, Row]]

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What the summary says of each setting, the plain one first."""
        return self.summary["settings"]

    @property
    def names(self) -> list[str]:
        return [setting["name"] for setting in self.settings]

    @property
    def splits(self) -> list[str]:
        """The splits and, of several, their mean."""
        return list(self.settings[0]["splits"])

    @property
    def clipscored(self) -> bool:
        """Whether the captions have a CLIPScore, too."""
        return self.task is Chair and "clipscore" in self.settings[0]["splits"][self.splits[0]]

    @property
    def better(self) -> Mapping[str, int]:
        """Of each metric, 1 where more is better, -1 less, 0 neither."""
        return ClipScoredChair.better if self.clipscored else self.task.better

    def wrong(self, row: Row) -> list[str]:
        """What an answer gets wrong: the categories it hallucinates, or the one answer that is not right."""
        if self.task is Chair:
            return sorted({mention["category"] for mention in row["hallucinated"]})
        return [row["said"]] if row["said"] != row["label"] else []


def find_runs(folder: Path) -> list[Run]:
    """The run in a folder, or those in its subfolders, by name.

    Raises `OSError`; `DataError` where there is none, and for one that is unfinished, damaged or a mixture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; give the one that --out of `lvlm-fix eval` named"
        )
    inner = sorted(place for place in folder.iterdir() if place.is_dir())
    found = [place for place in ([folder] if _holds_run(folder) else inner) if _holds_run(place)]
    if not found:
        raise DataError(f"{folder}: holds no results of `lvlm-fix eval`; give the folder that --out named")
    return [read_run(place) for place in found]


def read_run(folder: Path) -> Run:
    """One run, checked to be whole, of one piece, and what its summary was made of.

    Raises `OSError`; `DataError`, naming the file and, of results, the line.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{folder}: holds results but no {MANIFEST}, so nobody knows of what; make them again in a new folder"
        )
    manifest = _object(folder / MANIFEST)
    try:
        name, items = manifest["task"]["name"], int(manifest["task"]["items"])
        settings = [Setting(str(one["name"])) for one in manifest["settings"]]
        seeds = list(manifest["decoding"].get("seeds", [0]))
        task = TASKS[name]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{folder / MANIFEST}: is no manifest of {_or(TASKS)}; make the run again") from None
    _only_results_of(folder, settings)
    rows: dict[str, dict[Key, Row]] = {}
    for setting in settings:
        rows[setting.name] = _rows(results_file(folder, setting.slug), task, seeds)
        known = len(rows[setting.name])
        if known != items * len(seeds):
            missing = f"{known:,} of {items * len(seeds):,} answers of {setting.name}"
            raise DataError(f"{folder}: is unfinished, with {missing}; {AGAIN}")
    first = rows[settings[0].name]
    for setting in settings[1:]:
        rows[setting.name] = _like(first, rows[setting.name], results_file(folder, setting.slug))
    if not (folder / SUMMARY).is_file():
        raise DataError(f"{folder}: is unfinished, with no {SUMMARY}; {AGAIN}")
    run = Run(folder, task, manifest, _object(folder / SUMMARY), rows)
    _check_summary(run, [setting.name for setting in settings])
    return run


def _holds_run(folder: Path) -> bool:
    own = (folder / MANIFEST, folder / SUMMARY)
    return any(path.is_file() for path in own) or any(folder.glob("results-*.jsonl"))


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: is not a JSON object; make the run again in a new folder")
    return value


def _only_results_of(folder: Path, settings: Sequence[Setting]) -> None:
    expected = [results_file(folder, setting.slug) for setting in settings]
    for path in sorted(folder.glob("results-*.jsonl")):
        if re.search(r"\.rank\d+$", path.stem):
            raise DataError(f"{folder}: is unfinished, {path.name} is not merged yet; {AGAIN}")
        if path not in expected:
            raise DataError(
                f"{path}: is of no setting that {MANIFEST} names, so results of several runs are mixed here; "
                "move it to a folder of its own"
            )
    missing = [path.name for path in expected if not path.is_file()]
    if len(missing) == len(expected) and (folder / SUMMARY).is_file():
        raise DataError(
            f"{folder}: holds numbers without the answers that they were made of, and a report shows both; take a "
            "folder with its results-*.jsonl, or give the command of its manifest again with another --out"
        )
    if missing:
        raise DataError(f"{folder}: is unfinished, with no {missing[0]}; {AGAIN}")


def _rows(path: Path, task: type[Task], seeds: Sequence[int]) -> dict[Key, Row]:
    check = _check_caption if task is Chair else _check_yes_or_no
    rows: dict[Key, Row] = {}
    if not read_bytes(path).endswith(b"\n"):  # a kill leaves that behind, and the next start cuts it off
        raise DataError(f"{path.parent}: is unfinished, the last line of {path.name} ends early; {AGAIN}")
    for record in read_jsonl(path):
        for name in ("id", "split", "image", "question", "answer"):
            record.text(name)
        if record.data.get("seed") not in seeds:
            raise record.error(f"is of no seed that {MANIFEST} names; results of several runs are mixed here")
        check(record)
        key = key_of(record.data)
        if key in rows:
            raise record.error(f"answers {key[1]} for the second time; keep one line")
        rows[key] = record.data
    return rows


def _check_yes_or_no(record: Record) -> None:
    if record.text("label") not in _SAYINGS[:2] or record.text("said") not in _SAYINGS:
        raise record.error('"label" or "said" is neither yes nor no; delete the line to have it done again')


def _check_caption(record: Record) -> None:
    answer = record.text("answer")
    try:
        names = [str(name) for name in record.data["objects"]]
        marks = [
            (one["start"], one["end"], one["word"], one["category"]) for one in record.data["hallucinated"]
        ]
        usable = all(0 <= start < end and answer[start:end] == word for start, end, word, _ in marks)
        usable &= all(isinstance(name, str) for *_, name in marks) and names == record.data["objects"]
        usable &= all(one[1] <= other[0] for one, other in pairwise(marks))
    except (KeyError, TypeError):
        usable = False
    if not usable:
        raise record.error(
            '"objects" or "hallucinated" does not fit the answer; delete the line to have it done again'
        )


def _like(plain: Mapping[Key, Row], rows: Mapping[Key, Row], path: Path) -> dict[Key, Row]:
    """Lines in the order of the plain model's, which must have been asked the same."""
    for (_, item), row in rows.items():
        other = plain.get(key_of(row))
        asked = ("image", "question", "split", "label", "objects")
        if other is None or any(other.get(name) != row.get(name) for name in asked):
            raise DataError(
                f"{path}: asks something else under {item} than results-{PLAIN}.jsonl does, so results of "
                "several runs are mixed here; make the run again in a new folder"
            )
    return {key: rows[key] for key in plain}


def _check_summary(run: Run, names: Sequence[str]) -> None:
    path = run.folder / SUMMARY
    try:
        _touch(run.summary)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: is damaged ({error}); {AGAIN}") from None
    if run.clipscored and not _named_clip(run.manifest):
        raise DataError(f"{path}: has a CLIPScore, and {MANIFEST} does not say of which model; {AGAIN}")
    if run.names != list(names) or run.summary["task"] != run.task.name:
        raise DataError(f"{path}: is of other settings than {MANIFEST} names; {AGAIN}")
    for setting in run.settings:
        for split, counts in setting["counts"].items():
            rows = [row for row in run.rows[setting["name"]].values() if row["split"] == split]
            counted = _COUNTED[run.task.name](rows)
            counted |= _counted_clipscore(rows) if run.clipscored else {}
            for name, count in counted.items():
                if not math.isclose(counts.get(name, -1), count, rel_tol=1e-9):
                    raise DataError(
                        f"{path}: says {name} {counts.get(name)} of {setting['name']}, {split}, and the results "
                        f"lines say {count}; {AGAIN}, which makes the summary anew"
                    )


def _named_clip(manifest: Mapping[str, Any]) -> bool:
    late = manifest.get("late")
    own = late.get("clipscore") if isinstance(late, dict) else None
    return isinstance(own, dict) and {"name", "sha256"} <= own.keys()


def _counted_clipscore(rows: Sequence[Row]) -> dict[str, float]:
    """What the lines say; nothing of lines without a score, which then are other lines than the summary's."""
    return {
        "clipscore_total": math.fsum(row.get("clipscore", math.nan) for row in rows),
        "truncated_captions": sum(row.get("clipscore_truncated", False) for row in rows),
    }


def _touch(summary: Mapping[str, Any]) -> None:
    """Look once at everything that a report shows, so that a damaged summary fails here with its name."""
    float(summary["confidence"]), int(summary["images"]), int(summary["resamples"]), list(summary["seeds"])
    splits = summary["settings"][0]["splits"]
    for setting in summary["settings"]:
        for name in _SPEED:
            float(setting[name])
        dict(setting["counts"])
        for split in splits:
            for metric in splits[split]:
                for name in ("value", "low", "high"):
                    float(setting["splits"][split][metric][name])
    for entry in summary["comparisons"]:
        for name in ("difference", "low", "high", "p", "p_holm"):
            float(entry[name])
        if any(name not in entry for name in _COMPARED):
            raise KeyError(next(name for name in _COMPARED if name not in entry))


def _counted_pope(rows: Sequence[Row]) -> dict[str, float]:
    found = Counter((row["label"] == row["said"], row["said"]) for row in rows)
    cases = {"TP": (True, "yes"), "FP": (False, "yes"), "TN": (True, "no"), "FN": (False, "no")}
    return {name: found[case] for name, case in cases.items()}


def _counted_chair(rows: Sequence[Row]) -> dict[str, float]:
    marks = [len(row["hallucinated"]) for row in rows]
    return {
        "captions": len(rows),
        "hallucinated_captions": sum(map(bool, marks)),
        "hallucinated_mentions": sum(marks),
    }


def _counted_mme(rows: Sequence[Row]) -> dict[str, float]:
    return {"right": sum(row["said"] == row["label"] for row in rows), "questions": len(rows)}


_COUNTED: Mapping[str, Callable[[Sequence[Row]], dict[str, float]]] = {
    "pope": _counted_pope,
    "chair": _counted_chair,
    "mme": _counted_mme,
}


def _or(names: Mapping[str, Any]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
