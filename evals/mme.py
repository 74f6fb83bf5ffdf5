"""MME's perception subsets about objects (Fu et al., arXiv 2306.13394), from a local copy of the benchmark.

Each picture has two questions, one whose answer is yes and one no. Accuracy is over questions; accuracy+ over
pictures, both of whose questions must be right; a subset's score is the sum of the two in percent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .records import DataError, read_bytes
from .sources import pictures_hash
from .statistics import Array, ratio
from .tasks import Item, Task

SUBSETS = ("existence", "count", "position", "color")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_PER_PICTURE = 2


@dataclass(frozen=True)
class Mme(Task):
    """Yes-or-no questions in pairs about one picture."""

    name: ClassVar[str] = "mme"
    max_new_tokens: ClassVar[int] = 16
    metrics_shown: ClassVar[tuple[str, ...]] = ("accuracy", "accuracy+", "score")
    better: ClassVar[Mapping[str, int]] = {"accuracy": 1, "accuracy+": 1, "score": 1}
    exact_test: ClassVar[str | None] = "accuracy"
    percent: ClassVar[float] = 1
    columns: ClassVar[tuple[str, ...]] = ("right", "questions", "pictures_right", "pictures", "unparsed")

    def judge(self, item: Item, answer: str) -> dict[str, Any]:
        return {"label": item.label, "said": parse_answer(answer)}

    def right(self, row: Mapping[str, Any]) -> bool:
        return parse_answer(row["answer"]) == row["label"]

    def counts(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        right = sum(map(self.right, rows))
        unparsed = sum(parse_answer(row["answer"]) == "other" for row in rows)
        return [right, len(rows), int(right == len(rows)), 1, unparsed]

    def metrics(self, counts: Array) -> dict[str, Array]:
        accuracy = 100 * ratio(counts[..., 0], counts[..., 1])
        plus = 100 * ratio(counts[..., 2], counts[..., 3])
        return {"accuracy": accuracy, "accuracy+": plus, "score": accuracy + plus}


def parse_answer(answer: str) -> str:
    """What the official script takes an answer for: "yes" or "no" among its first four letters, else "other".

    >>> parse_answer("Yes, two."), parse_answer("No"), parse_answer("There is no dog.")
    ('yes', 'no', 'other')
    """
    start = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def mme(data: str | Path, subsets: Sequence[str] = SUBSETS, limit: int | None = None) -> Mme:
    """MME from its folder: `<subset>/<name>.txt` ("question <tab> answer" a line) beside `<name>.jpg`.

    Pictures may also stand in `<subset>/images` and texts in `<subset>/questions_answers_YN`, as in some
    subsets of the release. `limit` keeps the first pictures of each subset.

    Raises `OSError`; `DataError` for a folder or a line that is not as described.
    """
    items: list[Item] = []
    total = hashlib.sha256()
    for subset in dict.fromkeys(subsets):
        folder = Path(data) / subset
        texts, pictures = folder, folder
        if (folder / "questions_answers_YN").is_dir():
            texts, pictures = folder / "questions_answers_YN", folder / "images"
        found = sorted(texts.glob("*.txt"))
        if not found:
            raise DataError(f"{texts}: holds no text with questions; give the folder of MME's subsets")
        for path in found[:limit]:
            total.update(f"{subset}/{path.name}\n".encode() + path.read_bytes())
            items += _pair(path, pictures, subset)
    return Mme(tuple(items), {"questions": total.hexdigest(), "images": pictures_hash(items)})


def _pair(path: Path, pictures: Path, subset: str) -> Iterator[Item]:
    beside = (pictures / f"{path.stem}{suffix}" for suffix in (*_PICTURES, *map(str.upper, _PICTURES)))
    picture = next((file for file in beside if file.is_file()), None)
    if picture is None:
        raise DataError(f"{path}: there is no picture of this name in {pictures}; add it")
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; save the file as UTF-8") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len(numbered) != _PER_PICTURE:
        raise DataError(f"{path}: holds {len(numbered)} questions; MME asks {_PER_PICTURE} about a picture")
    for number, line in numbered:
        question, _, answer = line.rpartition("\t")
        label = answer.strip().lower()
        if not question.strip() or label not in ("yes", "no"):
            raise DataError(f"{path}, line {number}: is not a question, a tab, and Yes or No; correct it")
        name = f"{subset}/{picture.name}"
        yield Item(f"{subset}/{path.stem}/{number}", name, picture, question.strip(), subset, label)
