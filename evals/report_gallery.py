"""Items on which settings disagree: which they are, which tell most, and their cards."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .report_markup import Markup, element, join, listed
from .report_pictures import Thumbnail
from .report_plots import setting_name
from .report_runs import Run
from .results import Key, Row
from .tasks import Chair

_SENTENCE = re.compile(r"[^.]*\.?")


@dataclass(frozen=True)
class Disagreement:
    """An item, and what each setting answered, in the order of the settings."""

    key: Key
    rows: tuple[Row, ...]
    errors: tuple[int, ...]  # hallucinated categories, or 1 for a wrong answer

    @property
    def image(self) -> str:
        return self.rows[0]["image"]


def disagreements(run: Run) -> list[Disagreement]:
    """All items that settings get wrong in different ways, each question once, the most telling first.

    Kinds of disagreement (which settings do better than plain, and which worse) take turns, the frequent
    kinds first, so that a page shows what cures and what harms. In a kind the largest difference comes
    first. No picture comes twice before all have come once.
    """
    kinds: dict[tuple[int, ...], list[Disagreement]] = defaultdict(list)
    for key, plain in run.rows[run.names[0]].items():
        rows = tuple(run.rows[name][key] for name in run.names)
        wrong = [run.wrong(row) for row in rows]
        if "same_as" in plain or all(one == wrong[0] for one in wrong):
            continue
        errors = tuple(map(len, wrong))
        kind = tuple((count > errors[0]) - (count < errors[0]) for count in errors)
        kinds[kind].append(Disagreement(key, rows, errors))
    for members in kinds.values():
        members.sort(key=lambda one: min(one.errors) - max(one.errors))
    turns = [
        (place, -len(members), number, one)
        for number, members in enumerate(kinds.values())
        for place, one in enumerate(members)
    ]
    seen: dict[str, int] = defaultdict(int)
    ordered = []
    for place, frequency, number, one in sorted(turns, key=lambda turn: turn[:3]):
        ordered.append((seen[one.image], place, frequency, number, one))
        seen[one.image] += 1
    return [turn[-1] for turn in sorted(ordered, key=lambda turn: turn[:4])]


def changes(run: Run) -> list[tuple[str, int, int]]:
    """Each setting but the plain one: on how many items it does better and worse than plain."""
    plain = run.rows[run.names[0]]
    found = []
    for name in run.names[1:]:
        steps = [len(run.wrong(row)) - len(run.wrong(plain[key])) for key, row in run.rows[name].items()]
        found.append((name, sum(step < 0 for step in steps), sum(step > 0 for step in steps)))
    return found


def card(run: Run, item: Disagreement, picture: Thumbnail | None) -> Markup:
    """The picture, what was asked, the truth, and the answers, equal ones together."""
    first = item.rows[0]
    together: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(item.rows):
        together[row["answer"]].append(index)
    answers = []
    for indices in together.values():
        names = listed([setting_name(run.names[index]) for index in indices])
        row, errors = item.rows[indices[0]], item.errors[indices[0]]
        answers.append(element("dt", element("span", names), " ", _tag(run, row, errors)))
        answers.append(element("dd", marked(run, row)))
    place = [element("small", text) for text in _place(run, item)]
    body = element(
        "div",
        element("h4", first["question"]),
        element("p", *_between(place), class_="place"),
        element("p", _truth(run, first), class_="truth"),
        element("dl", *answers),
    )
    return element("article", *([_image(run, first, picture)] if picture else []), body, class_="card")


def marked(run: Run, row: Row) -> Markup:
    """An answer with the words in `<mark>` that speak of what is not there.

    Of a yes to something absent that is the sentence by which the official rule judges.
    """
    answer = row["answer"]
    if run.task is Chair:
        spans = [(one["start"], one["end"]) for one in row["hallucinated"]]
    elif row["said"] == "yes" and row["label"] == "no":
        match = _SENTENCE.match(answer)
        spans = [(0, match.end())] if match and match.end() else []
    else:
        spans = []
    parts: list[str] = []
    at = 0
    for start, end in spans:
        parts += [answer[at:start], element("mark", answer[start:end])]
        at = end
    if not answer.strip():
        return element("i", "no answer")
    return join([*parts, answer[at:]])


def _tag(run: Run, row: Row, errors: int) -> Markup:
    if run.task is Chair:
        text = (
            f"{errors} {'object' if errors == 1 else 'objects'} not there" if errors else "none hallucinated"
        )
    elif not errors:
        text = "right"
    else:
        text = "wrong yes" if row["said"] == "yes" else "wrong"
    return element("span", text, class_=f"tag {'worse' if errors else 'better'}")


def _truth(run: Run, row: Row) -> Markup:
    if run.task is Chair:
        objects = listed(row["objects"]) if row["objects"] else "no object of the benchmark"
        return join([element("b", "In the picture: "), objects, "."])
    return join([element("b", "Right answer: "), row["label"], "."])


def _place(run: Run, item: Disagreement) -> list[str]:
    told = [item.image]
    told += [item.rows[0]["split"]] if len(run.splits) > 1 else []
    return told + ([f"seed {item.key[0]}"] if len(run.summary["seeds"]) > 1 else [])


def _image(run: Run, row: Row, picture: Thumbnail) -> Markup:
    shows = f", which shows {', '.join(row['objects'])}" if run.task is Chair and row["objects"] else ""
    return element(
        "img",
        src=picture.uri,
        width=picture.width,
        height=picture.height,
        alt=f"Picture {row['image']}{shows}",
    )


def _between(parts: Sequence[Markup]) -> list[str]:
    return [piece for part in parts for piece in (", ", part)][1:]


def gallery(run: Run, items: Sequence[Disagreement], pictures: Mapping[str, Thumbnail]) -> Markup:
    """Cards of items, side by side where there is room."""
    return element("div", *(card(run, item, pictures.get(item.image)) for item in items), class_="gallery")
