"""From results lines to metrics with intervals, speed, and tests of every setting against the plain model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .results import Key, Row
from .settings import Setting
from .statistics import CONFIDENCE, RESAMPLES, Array, Bootstrap, holm, mcnemar, spread
from .tasks import Task

SIGNIFICANCE = 0.05
NO_DIFFERENCE = "no significant difference"
MEAN = "mean"  # of the splits


def summarize(
    task: Task,
    settings: Sequence[Setting],
    rows: Sequence[Mapping[Key, Row]],
    seeds: Sequence[int] = (0,),
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Everything that a report says, from each setting's results lines; the first setting is the plain one.

    Of each setting: per split, and for the mean of the splits, each metric with its bootstrap interval, the
    counts, and with several seeds their standard deviation; time, tokens a second and peak memory. Of
    each setting but the first, and each metric: its difference to the plain model with the interval, p and
    p by Holm (over the settings and splits of that metric), and a verdict in words.
    """
    splits = list(dict.fromkeys(item.split for item in task.items))
    table = _table(task, rows, splits, seeds)
    boot = Bootstrap(table.sum(axis=1), task.metrics, resamples)
    places: list[tuple[str, int | None]] = [(name, index) for index, name in enumerate(splits)]
    if len(splits) > 1:
        places.append((MEAN, None))
    described = []
    for index, (setting, lines) in enumerate(zip(settings, rows, strict=True)):
        results = {
            name: {metric: asdict(boot.estimate(metric, index, place)) for metric in boot.values}
            for name, place in places
        }
        if len(seeds) > 1:
            _add_spread(results, task, table[index], places)
        counts = {
            name: _counts(task, table[index, :, place].sum(axis=(0, 1))) for place, name in enumerate(splits)
        }
        described.append(
            {
                **setting.as_dict(),
                "slug": setting.slug,
                "splits": results,
                "counts": counts,
                **speed(lines.values()),
            }
        )
    return {
        "task": task.name,
        "items": len(task.items),
        "images": table.shape[3],
        "seeds": list(seeds),
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "settings": described,
        "comparisons": _comparisons(task, settings, rows, boot, places, len(seeds)),
    }


def speed(rows: Iterable[Row]) -> dict[str, Any]:
    """Time, throughput and peak memory of results lines; answers used twice were given once.

    The time is that of each batch from its pictures to its texts, summed over the batches, and over the processes
    that shared them: several processes need less of the clock's.
    """
    asked = [row for row in rows if "seconds" in row]
    seconds, tokens = sum(row["seconds"] for row in asked), sum(row["tokens"] for row in asked)
    return {
        "answers": len(asked),
        "tokens": tokens,
        "compute_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 3) if seconds else 0.0,
        "seconds_per_answer": round(seconds / len(asked), 6) if asked else 0.0,
        "peak_memory_bytes": max((row["memory"] for row in asked), default=0),
    }


def _table(
    task: Task, rows: Sequence[Mapping[Key, Row]], splits: Sequence[str], seeds: Sequence[int]
) -> Array:
    """Counts: (settings, seeds, splits, images, columns)."""
    images = {name: index for index, name in enumerate(dict.fromkeys(item.image for item in task.items))}
    at_split, at_seed = ({name: index for index, name in enumerate(names)} for names in (splits, seeds))
    table: Array | None = None
    for index, lines in enumerate(rows):
        together: dict[tuple[int, int, int], list[Row]] = defaultdict(list)
        for row in lines.values():
            together[at_seed[row["seed"]], at_split[row["split"]], images[row["image"]]].append(row)
        for place, same in together.items():
            counts = task.counts(same)
            if table is None:
                table = np.zeros((len(rows), len(seeds), len(splits), len(images), len(counts)))
            table[(index, *place)] = counts
    assert table is not None, "a task has items, and every item has a line"
    return table


def _add_spread(
    results: dict[str, dict[str, Any]], task: Task, table: Array, places: Sequence[tuple[str, int | None]]
) -> None:
    each = task.metrics(table.sum(axis=2))  # (seeds, splits)
    for name, place in places:
        for metric, values in each.items():
            by_seed = values.mean(axis=1) if place is None else values[:, place]
            results[name][metric]["by_seed"] = by_seed.tolist()
            results[name][metric]["deviation"] = spread(by_seed.tolist())


def _counts(task: Task, counts: Array) -> dict[str, float]:
    values = counts.tolist()
    return {name: int(x) if x.is_integer() else x for name, x in zip(task.columns, values, strict=True)}


def _comparisons(
    task: Task,
    settings: Sequence[Setting],
    rows: Sequence[Mapping[Key, Row]],
    boot: Bootstrap,
    places: Sequence[tuple[str, int | None]],
    seeds: int,
) -> list[dict[str, Any]]:
    found = []
    for metric in boot.values:
        family: list[dict[str, Any]] = []
        for index in range(1, len(settings)):
            for name, place in places:
                entry: dict[str, Any] = {
                    "setting": settings[index].name,
                    "against": settings[0].name,
                    "split": name,
                }
                difference = asdict(boot.difference(metric, index, 0, place))
                entry |= {"metric": metric, "difference": difference.pop("value"), **difference}
                entry["test"] = "paired bootstrap over images"
                if metric == task.exact_test and place is not None and seeds == 1:
                    entry["p"] = _exact(task, rows[index], rows[0], name)
                    entry["test"] = "McNemar, exact, paired by question"
                family.append(entry)
        corrected = holm([entry["p"] for entry in family])
        for entry, p in zip(family, corrected, strict=True):
            entry["p_holm"] = p
            entry["significant"] = p < SIGNIFICANCE
            entry["verdict"] = _verdict(task, entry)
        found += family
    return found


def _exact(task: Task, rows: Mapping[Key, Row], plain: Mapping[Key, Row], split: str) -> float:
    keys = [key for key, row in plain.items() if row["split"] == split]
    return mcnemar([task.right(rows[key]) for key in keys], [task.right(plain[key]) for key in keys])


def _verdict(task: Task, entry: Mapping[str, Any]) -> str:
    if not entry["significant"]:
        return NO_DIFFERENCE
    direction = task.better[entry["metric"]]
    if not direction:
        return "higher" if entry["difference"] > 0 else "lower"
    return "better" if entry["difference"] * direction > 0 else "worse"
