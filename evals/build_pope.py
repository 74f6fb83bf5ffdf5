"""Building POPE questions from annotations (Li et al., arXiv 2305.10355, section 5).

For each image, k objects that are there and k that are not, so that half the answers are yes. The absent
ones are drawn at random, or are the most frequent objects of the whole data set ("popular"), or those seen
most often together with the object just asked about ("adversarial").
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, get_args

from .coco import Annotations, read_instances
from .records import DataError, read_json

Split = Literal["random", "popular", "adversarial"]


@dataclass(frozen=True)
class Statistics:
    """How often objects appear in images, and how often together."""

    frequency: Mapping[str, int]
    cooccurrence: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, annotations: Annotations) -> Statistics:
        """Count images, not instances: ten chairs in a room are one chair."""
        frequency: Counter[str] = Counter()
        together: dict[str, Counter[str]] = {}
        for objects in annotations.objects.values():
            frequency.update(objects)
            for one, other in permutations(objects, 2):
                together.setdefault(one, Counter())[other] += 1
        return cls(frequency, together)


def build_pope(
    annotations: Annotations | str | Path,
    split: Split,
    seed: int,
    images: int | None = None,
    per_image: int = 3,
    statistics: Statistics | str | Path | None = None,
) -> list[dict[str, Any]]:
    """Ask about `per_image` present and as many absent objects of each of `images` images (default: all fit).

    Fit are images with at least `per_image` categories. One seed gives the same images and the same present
    objects in every split, as in the official files. `statistics` says where frequency and co-occurrence
    come from if not from `annotations`: another instances file, or JSON
    `{"frequency": {object: n}, "cooccurrence": {object: {object: n}}}`. Equal counts go by alphabet; where
    co-occurring objects run out, the rest is drawn at random.

    Returns rows with the official fields `question_id` (from 1), `image`, `text` and `label`.
    Raises `OSError`; `DataError` for faulty files; `ValueError` for an impossible request.
    """
    if split not in get_args(Split):
        raise ValueError(f'split is {split!r}; give "random", "popular" or "adversarial"')
    if per_image < 1 or (images is not None and images < 1):
        raise ValueError("images and per_image count from 1")
    if not isinstance(annotations, Annotations):
        annotations = read_instances(annotations)
    if statistics is None:
        statistics = Statistics.of(annotations)
    elif not isinstance(statistics, Statistics):
        statistics = read_statistics(statistics)
    absent = _absent(annotations, statistics, split, random.Random(f"absent {seed}"))
    rows: list[dict[str, Any]] = []
    for image, present in _choose(annotations, random.Random(f"images {seed}"), images, per_image):
        file = annotations.files[image]
        for name, label in _ask(annotations.objects[image], present, absent, file):
            article = "an" if name[0] in "aeiouAEIOU" else "a"
            text = f"Is there {article} {name} in the image?"
            rows.append({"question_id": len(rows) + 1, "image": file, "text": text, "label": label})
    return rows


def read_statistics(path: str | Path) -> Statistics:
    """Read statistics from an instances file or from the JSON that `build_pope` describes.

    Raises `OSError`, and `DataError` where the file is neither.
    """
    top = read_json(path)
    if isinstance(top, dict) and "annotations" in top:
        return Statistics.of(read_instances(path))
    if not isinstance(top, dict) or not {"frequency", "cooccurrence"} <= top.keys():
        raise DataError(f'{path}: holds neither COCO annotations nor "frequency" and "cooccurrence"')
    together = top["cooccurrence"]
    if not isinstance(together, dict):
        raise DataError(f'{path}: "cooccurrence" is not an object of objects; correct it')
    _check_counts(top["frequency"], f'{path}, "frequency"')
    for name, counts in together.items():
        _check_counts(counts, f'{path}, "cooccurrence" of {name!a}')
    return Statistics(top["frequency"], together)


def _check_counts(counts: Any, where: str) -> None:
    if not isinstance(counts, dict):
        raise DataError(f"{where}: is not an object of counts; correct it")
    for name, count in counts.items():
        if not name or type(count) is not int or count < 0:
            raise DataError(f"{where}: the count of {name!a} is {count!a}; give a name and a whole number")


def _choose(
    annotations: Annotations, chance: random.Random, images: int | None, per_image: int
) -> list[tuple[str, list[str]]]:
    """Images in the order of their file names, each with the present objects to ask about."""
    fit = sorted(
        (image for image, objects in annotations.objects.items() if len(objects) >= per_image),
        key=lambda image: (annotations.files[image], image),
    )
    if len(fit) < (images or 1):
        raise ValueError(
            f"{len(fit)} of {len(annotations.files)} images show at least {per_image} objects, too few for "
            f"{images or 1}; ask for fewer images or fewer objects per image"
        )
    chosen = sorted(chance.sample(range(len(fit)), images or len(fit)))
    return [(fit[index], chance.sample(annotations.objects[fit[index]], per_image)) for index in chosen]


def _absent(
    annotations: Annotations, statistics: Statistics, split: Split, chance: random.Random
) -> Callable[[str], Iterator[str]]:
    """Which objects to try as absent ones, best first, after a present one was asked about."""
    names = sorted(
        {*statistics.frequency, *(name for found in annotations.objects.values() for name in found)}
    )

    def by_count(counts: Mapping[str, int]) -> list[str]:
        return sorted(names, key=lambda name: (-counts.get(name, 0), name))

    popular = by_count(statistics.frequency)

    def candidates(present: str) -> Iterator[str]:
        if split == "popular":
            yield from popular
        if split == "adversarial":
            together = statistics.cooccurrence.get(present, {})
            yield from (name for name in by_count(together) if together.get(name))
        yield from chance.sample(names, len(names))

    return candidates


def _ask(
    there: Collection[str], present: list[str], absent: Callable[[str], Iterator[str]], file: str
) -> Iterator[tuple[str, Literal["yes", "no"]]]:
    asked: set[str] = set()
    for name in present:
        yield name, "yes"
        other = next((name for name in absent(name) if name not in there and name not in asked), None)
        if other is None:
            raise ValueError(f"{file} lacks only {len(asked)} known objects; ask for fewer per image")
        asked.add(other)
        yield other, "no"
