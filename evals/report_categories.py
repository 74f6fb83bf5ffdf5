"""How often each category is hallucinated, as bars."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .chair import mentioned
from .report_markup import Markup, element, join
from .report_plots import breakable, level, sign
from .report_runs import Run
from .results import Row
from .tasks import Chair, Pope

MOST = 12
_ASKED = re.compile(r"is there (?:an? )?(.+?) in (?:the|this) (?:image|picture|photo)", re.IGNORECASE)


@dataclass(frozen=True)
class Category:
    """How often something is taken for there that is not.

    Attributes:
        wrong: of each setting, the answers that hallucinate it.
        chances: the answers about pictures that do not show it, the same for all settings.
    """

    name: str
    wrong: tuple[int, ...]
    chances: int

    def rates(self) -> list[float]:
        """Shares, 0 to 1."""
        return [count / self.chances for count in self.wrong]


def categories(run: Run) -> list[Category]:
    """Hallucinated categories, the most often hallucinated over all settings first.

    Of captions the COCO categories that they wrongly name, of POPE's questions the objects that they ask for,
    of MME's its subsets. Questions that two splits share count once.
    """
    chances: Counter[str] = Counter()
    wrong = [Counter[str]() for _ in run.names]
    if run.task is Chair:
        rows = list(run.rows[run.names[0]].values())
        shown = Counter(name for row in rows for name in row["objects"])
        for counts, name in zip(wrong, run.names, strict=True):
            counts.update(category for row in run.rows[name].values() for category in run.wrong(row))
        chances.update({name: len(rows) - shown[name] for name in {key for own in wrong for key in own}})
    else:
        for counts, name in zip(wrong, run.names, strict=True):
            for row in run.rows[name].values():
                if row["label"] == "no" and "same_as" not in row:
                    asked = _asked(run, row)
                    counts[asked] += row["said"] == "yes"
                    chances[asked] += name == run.names[0]
    total = sum(wrong, Counter[str]())
    order = sorted(total, key=lambda name: (-total[name], name))
    return [
        Category(name, tuple(counts[name] for counts in wrong), chances[name])
        for name in order
        if total[name]
    ]


def bars(run: Run, found: Sequence[Category]) -> Markup:
    """The first categories with a bar and a number a setting, all on one scale."""
    shown = found[:MOST]
    most = max(max(one.rates()) for one in shown)
    blocks = []
    for one in shown:
        rows = []
        for index, (name, rate, count) in enumerate(zip(run.names, one.rates(), one.wrong, strict=True)):
            value = element(
                "span", f"{100 * rate:.1f}\u00a0%", element("small", f"{count:,} of {one.chances:,}")
            )
            label = element("span", sign(index), element("span", breakable(name)), class_="who")
            rows.append(element("li", label, level(index, rate / most), value))
        blocks.append(element("div", element("h4", one.name), element("ul", *rows), class_="category"))
    left = len(found) - len(shown)
    what = {
        Chair: "Share of the captions of pictures without the object that name it all the same",
        Pope: "Share of the questions about an absent object that were answered yes",
    }.get(run.task, "Share of the questions with the right answer no that were answered yes")
    note = f"{what}. The most frequent first{f'; {left} more are not shown' if left else ''}. All bars share one "
    note += "scale. Few cases stand behind each bar: read them as a description, not as a test."
    return element(
        "figure",
        element("div", join(blocks), class_="categories"),
        element("figcaption", note),
        class_="whole",
    )


def _asked(run: Run, row: Row) -> str:
    """The object that a question is about, by its COCO category where it has one."""
    if run.task is not Pope:
        return row["split"]
    mentions = mentioned(row["question"], "english")
    if mentions:
        return mentions[0].category
    match = _ASKED.search(row["question"])
    return match[1].lower() if match else row["question"]
