"""What a run asks of a model and how it judges the answers: POPE and CHAIR."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np

from .build_pope import Split, build_pope
from .chair import Caption, ChairScore, Rule, hallucinated, score_captions
from .coco import read_instances, read_objects
from .pope import RATIOS, parse_answer, score_answers
from .records import DataError, read_jsonl
from .sources import file_hash, find_scenes, pictures_hash, scenes_folder
from .statistics import Array, ratio

__all__ = ["Chair", "Item", "Pope", "Task", "chair", "pope", "scenes_folder"]

SPLITS: tuple[str, ...] = get_args(Split)
DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    id: str  # unique in its task
    image: str  # the picture's name in the data set
    path: Path
    question: str
    split: str
    label: str = ""


@dataclass(frozen=True)
class Task(ABC):
    """Items, and how their answers become counts and metrics. A benchmark is a subclass.

    Attributes:
        items: what is asked, in the order of the results.
        data: name -> SHA-256 of what the items were made from.
    """

    items: tuple[Item, ...]
    data: Mapping[str, str] = field(default_factory=dict)

    name: ClassVar[str]
    max_new_tokens: ClassVar[int]
    metrics_shown: ClassVar[tuple[str, ...]]  # columns of the printed table
    better: ClassVar[Mapping[str, int]]  # metric -> 1 where more is better, -1 less, 0 neither
    exact_test: ClassVar[str | None] = None  # the metric that McNemar's test is about
    columns: ClassVar[tuple[str, ...]]  # of `counts`
    percent: ClassVar[float] = 100  # what a metric is multiplied by to print it
    late: ClassVar[tuple[str, ...]] = ()  # columns of results lines that `late_columns` makes

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError(
                f"{self.name} has nothing to ask: no question is left; check the data and --limit"
            )
        if len({item.id for item in self.items}) < len(self.items):
            raise ValueError(
                f"{self.name} has two items of one id; give each file of questions a name of its own"
            )
        missing = list(dict.fromkeys(str(item.path) for item in self.items if not item.path.is_file()))
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} pictures are missing, the first is {missing[0]}; check --images"
            )

    @property
    def options(self) -> dict[str, Any]:
        """What else changes the numbers, for the manifest."""
        return {}

    @property
    def late_options(self) -> dict[str, Any]:
        """What `late_columns` are made with; noted in the manifest, but a run may go on with others."""
        return {}

    def late_columns(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The columns `late` of finished results lines, by judges too slow to hold up the answers.

        Made at the summary, so it may be asked for after the run; lines that have the columns keep them as long as
        `late_options` stay the same.
        """
        raise TypeError(f"{self.name} has no late columns")

    @abstractmethod
    def judge(self, item: Item, answer: str) -> dict[str, Any]:
        """What a results line says of an answer besides the answer."""

    def right(self, row: Mapping[str, Any]) -> bool:
        """Whether the answer of a results line is right, for McNemar's test; only of tasks with an accuracy."""
        raise TypeError(f"{self.name} has no right and wrong answers")

    @abstractmethod
    def counts(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        """Columns to be summed over images, of the results lines of one image, split and seed."""

    @abstractmethod
    def metrics(self, counts: Array) -> dict[str, Array]:
        """Metrics (...) of summed counts (..., columns)."""


@dataclass(frozen=True)
class Pope(Task):
    """Is there a ... in the image? Half of the right answers are yes."""

    name: ClassVar[str] = "pope"
    max_new_tokens: ClassVar[int] = 16
    metrics_shown: ClassVar[tuple[str, ...]] = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    better: ClassVar[Mapping[str, int]] = {**dict.fromkeys(RATIOS, 1), "yes_ratio": 0}
    exact_test: ClassVar[str | None] = "accuracy"
    columns: ClassVar[tuple[str, ...]] = ("TP", "FP", "TN", "FN", "unparsed")

    def judge(self, item: Item, answer: str) -> dict[str, Any]:
        return {"label": item.label, "said": parse_answer(answer)}

    def right(self, row: Mapping[str, Any]) -> bool:
        return parse_answer(row["answer"]) == row["label"]

    def counts(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        score = score_answers([row["label"] for row in rows], [row["answer"] for row in rows])
        return [getattr(score, name) for name in self.columns]

    def metrics(self, counts: Array) -> dict[str, Array]:
        """As `PopeScore` has them, for many at once."""
        tp, fp, tn, fn = (counts[..., index] for index in range(4))
        total = tp + fp + tn + fn
        return {
            "accuracy": ratio(tp + tn, total),
            "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn),
            "yes_ratio": ratio(tp + fp, total),
        }


@dataclass(frozen=True)
class Chair(Task):
    """Which objects of a description are not in the picture."""

    truth: Mapping[str, Collection[str]] = field(default_factory=dict)
    rule: Rule = "english"

    name: ClassVar[str] = "chair"
    max_new_tokens: ClassVar[int] = 128
    metrics_shown: ClassVar[tuple[str, ...]] = ("CHAIRs", "CHAIRi", "recall", "f1", "average_length")
    better: ClassVar[Mapping[str, int]] = {
        "CHAIRs": -1, "CHAIRi": -1, "recall": 1, "f1": 1, "average_length": 0,
    }  # fmt: skip
    percent: ClassVar[float] = 1
    columns: ClassVar[tuple[str, ...]] = (
        "captions", "hallucinated_captions", "mentions", "hallucinated_mentions",
        "true_objects", "recalled_objects", "tokens",
    )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        return {"rule": self.rule}

    def judge(self, item: Item, answer: str) -> dict[str, Any]:
        truth = self.truth[item.id]
        wrong = hallucinated(answer, truth, self.rule)
        return {"objects": sorted(truth), "hallucinated": [mention._asdict() for mention in wrong]}

    def counts(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        captions = [Caption(row["id"], row["answer"]) for row in rows]
        score: ChairScore = score_captions(captions, self.truth, self.rule)
        return [getattr(score, name) for name in Chair.columns]

    def metrics(self, counts: Array) -> dict[str, Array]:
        """As `ChairScore` has them, for many at once."""
        captions, wrong_captions, mentions, wrong, true, recalled, tokens = np.moveaxis(counts, -1, 0)
        precision = 100 * ratio(mentions - wrong, mentions)
        recall = 100 * ratio(recalled, true)
        return {
            "CHAIRs": 100 * ratio(wrong_captions, captions),
            "CHAIRi": 100 * ratio(wrong, mentions),
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall),
            "average_length": ratio(tokens, captions),
        }


def pope(
    splits: Sequence[str] = (),
    questions: Sequence[str | Path] = (),
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    statistics: str | Path | None = None,
    limit: int | None = None,
) -> Pope:
    """POPE on question files, or on questions built from annotations (seed 0, 3 objects an image).

    Without data of your own it is the embedded scenes. `limit` keeps the first questions of each split, and warns
    where that leaves more questions with one answer than with the other.

    Raises `OSError`; `DataError` for a faulty file; `ValueError` for splits that do not go with the rest.
    """
    folder, instances, statistics = find_scenes(images, annotations, statistics)
    data = {}
    items: list[Item] = []
    if questions:
        if splits or annotations:
            raise ValueError("question files are what they are; leave --split and --annotations out")
        for path, split in _named(list(map(Path, questions))):
            data[f"questions, {split}"] = file_hash(path)
            items += _asked(path, split, folder, limit)
    else:
        data["annotations"] = file_hash(instances)
        data |= {"statistics": file_hash(statistics)} if statistics else {}
        for split in dict.fromkeys(splits or SPLITS):
            rows = build_pope(instances, split, 0, statistics=statistics)  # type: ignore[arg-type]
            items += [
                Item(
                    f"{split}/{row['question_id']}",
                    row["image"],
                    folder / row["image"],
                    row["text"],
                    split,
                    row["label"],
                )
                for row in rows[:limit]
            ]
    if limit is not None:
        _warn_unbalanced(items, limit)
    task = Pope(tuple(items), data)
    return Pope(task.items, {**data, "images": pictures_hash(task.items)})


def _warn_unbalanced(items: Sequence[Item], limit: int) -> None:
    """POPE's yes ratio and accuracy mean what they do because half of the answers are yes."""
    for split in dict.fromkeys(item.split for item in items):
        labels = [item.label for item in items if item.split == split]
        yes, no = labels.count("yes"), labels.count("no")
        if yes != no:
            warnings.warn(
                f"of the first {limit} questions of {split} {yes} are to be answered yes and {no} no, so its scores "
                "are not POPE's; an even --limit keeps the balance where the questions take turns",
                stacklevel=3,
            )
            return


def chair(
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    limit: int | None = None,
    rule: Rule = "english",
    prompt: str = DESCRIBE,
) -> Chair:
    """CHAIR on the pictures of a folder that COCO annotations know, or on the embedded scenes.

    `annotations` is an instances file, or a folder that holds captions besides, as the published metric has
    it. `limit` keeps the first images by name.

    Raises `OSError`; `DataError` for a faulty file.
    """
    folder, instances, _ = find_scenes(images, annotations, None)
    place = Path(annotations) if annotations else instances.parent
    sources = sorted(place.glob("*_*.json*")) if place.is_dir() else [place]
    names: dict[str, str] = {}
    for path in sources if not place.is_dir() else sorted(place.glob("instances_*.json*")):
        names |= read_instances(path).files
    known = sorted((name, image) for image, name in names.items() if (folder / name).is_file())
    if not known:
        raise DataError(f"{folder}: holds no picture that {place} knows; check --images and --annotations")
    items = tuple(Item(image, name, folder / name, prompt, "all") for name, image in known[:limit])
    truth = read_objects([place], {item.id for item in items}, rule)
    used = [path for path in sources if path.name.startswith(("instances_", "captions_")) or path == place]
    data = {path.name: file_hash(path) for path in used} | {"images": pictures_hash(items)}
    return Chair(items, data, {item.id: frozenset(truth.get(item.id, ())) for item in items}, rule)


def _named(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Question files with their splits' names: the one of the three in a file's name, or else all of it."""
    names = [next((name for name in SPLITS if name in path.stem.lower()), path.stem) for path in paths]
    if len(set(names)) < len(names):
        names = [path.stem for path in paths]
    return list(zip(paths, names, strict=True))


def _asked(path: Path, split: str, folder: Path, limit: int | None) -> Iterator[Item]:
    seen: set[str] = set()
    for record in read_jsonl(path):
        if limit is not None and len(seen) >= limit:
            return
        key, image, label = record.id("question_id"), record.text("image"), record.text("label")
        if label not in ("yes", "no"):
            raise record.error(f'"label" is {label!a}; give "yes" or "no"')
        if key in seen:
            raise record.error(f"question {key} was asked before; keep one")
        seen.add(key)
        yield Item(f"{split}/{key}", image, folder / image, record.text("text"), split, label)
