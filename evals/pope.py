"""Scoring of POPE, the yes-or-no test of object hallucination (Li et al., arXiv 2305.10355).

The rule for reading an answer is the official script's, to the letter: the text before the first full stop,
commas dropped, cut at spaces; "No", "no" or "not" among the words means no, and anything else yes. So "There
isn't a car" is a yes. Answers that say neither are counted as *unparsed*: the rule takes them for a yes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from .records import DataError, Faults, read_jsonl

Rule = Literal["official", "strict"]

RATIOS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
COUNTS = ("TP", "FP", "TN", "FN", "questions", "unparsed", "unanswered")

_YES = re.compile(r"\byes\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PopeScore:
    """Counts over one split, and the ratios (0 to 1) made of them; a ratio with nothing below the line is 0.

    >>> PopeScore(TP=2, FP=1, TN=1, FN=0).accuracy
    0.75
    """

    TP: int  # yes said, yes true
    FP: int  # yes said, no true: a hallucination
    TN: int
    FN: int
    unparsed: int = 0  # answers that said neither, all the same taken for a yes
    unanswered: int = 0  # questions left out because no usable answer came; not among the four counts

    @property
    def questions(self) -> int:
        return self.TP + self.FP + self.TN + self.FN

    @property
    def accuracy(self) -> float:
        return _ratio(self.TP + self.TN, self.questions)

    @property
    def precision(self) -> float:
        return _ratio(self.TP, self.TP + self.FP)

    @property
    def recall(self) -> float:
        return _ratio(self.TP, self.TP + self.FN)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.TP + self.FP, self.questions)

    def as_dict(self) -> dict[str, float]:
        """Every number, by the names that the official script prints."""
        return {name: getattr(self, name) for name in (*RATIOS, *COUNTS)}


def parse_answer(answer: str) -> Literal["yes", "no"]:
    """What the official rule takes an answer for.

    >>> parse_answer("No, there is none."), parse_answer("There isn't a car."), parse_answer("A car. No bus.")
    ('no', 'yes', 'yes')
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if "No" in words or "no" in words or "not" in words else "yes"


def is_unparsed(answer: str) -> bool:
    """Whether an answer says neither: its first sentence holds no "no" that the rule knows, and no "yes".

    >>> is_unparsed("Yes!"), is_unparsed("no"), is_unparsed("NO!"), is_unparsed("")
    (False, False, True, True)
    """
    return parse_answer(answer) == "yes" and not _YES.search(answer.split(".", 1)[0])


def score_answers(labels: Sequence[str], answers: Sequence[str]) -> PopeScore:
    """Score answers against labels ("yes" or "no") in the same order.

    Raises `ValueError` for unequal lengths or another label.

    >>> score_answers(["yes", "no"], ["Yes.", "Yes, a dog."]).f1
    0.6666666666666666
    """
    counts = {"TP": 0, "FP": 0, "TN": 0, "FN": 0}
    for label, answer in zip(labels, answers, strict=True):
        if label not in ("yes", "no"):
            raise ValueError(f'label is {label!r}; give "yes" or "no"')
        said = parse_answer(answer)
        counts[("T" if said == label else "F") + ("P" if said == "yes" else "N")] += 1
    return PopeScore(**counts, unparsed=sum(map(is_unparsed, answers)))


def score_files(
    questions: str | Path, answers: str | Path, rule: Rule = "official", faults: Faults | None = None
) -> PopeScore:
    """Score answers (`question_id`, `answer`) to questions (`question_id`, `text`, `label`), one JSON a line.

    Lines are paired by `question_id`, in any order. Where an answer repeats its `question`, that must be the
    one asked: the official splits number their questions alike, and a swapped file would otherwise pass.
    With `rule="strict"` an answer that says neither yes nor no is a fault.

    Raises `OSError`, and `DataError` for any fault. Where `faults` skips, faulty lines are left out and
    counted there, and questions left without an answer are counted in the score's `unanswered`.
    """
    if rule not in get_args(Rule):
        raise ValueError(f'rule is {rule!r}; give "official" or "strict"')
    faults = faults or Faults()
    asked = _read_questions(questions, faults)
    said = _read_answers(answers, asked, rule, questions, faults)
    missing = [key for key in asked if key not in said]
    if missing and not faults.skip:
        first = missing[0]
        raise DataError(f"{asked[first].where}: question {first} has no answer in {answers}; add it")
    if not said:
        raise DataError(f"{answers}: answers none of the questions of {questions}; check the pair")
    score = score_answers([asked[key].label for key in said], list(said.values()))
    return replace(score, unanswered=len(missing))


def mean_of(scores: Iterable[PopeScore]) -> dict[str, float]:
    """The plain mean of each ratio over splits, as papers print it; raises `ValueError` for no splits.

    >>> mean_of([PopeScore(1, 0, 1, 0), PopeScore(1, 1, 0, 0)])["accuracy"]
    0.75
    """
    splits = list(scores)
    if not splits:
        raise ValueError("the mean of no splits; give at least one")
    return {name: sum(getattr(split, name) for split in splits) / len(splits) for name in RATIOS}


class _Question(NamedTuple):
    text: str
    label: str
    where: str


def _read_questions(path: str | Path, faults: Faults) -> dict[str, _Question]:
    questions: dict[str, _Question] = {}
    for record in read_jsonl(path, faults):
        with faults.tolerated():
            key = record.id("question_id")
            question = _Question(record.text("text"), record.text("label"), record.where)
            if question.label not in ("yes", "no"):
                raise record.error(f'"label" is {question.label!a}; give "yes" or "no"')
            if key in questions:
                raise record.error(f"question {key} was asked before, at {questions[key].where}; keep one")
            questions[key] = question
    if not questions:
        raise DataError(f"{path}: holds no question; give a POPE file with one question a line")
    return questions


def _read_answers(
    path: str | Path, asked: dict[str, _Question], rule: Rule, questions: str | Path, faults: Faults
) -> dict[str, str]:
    answers: dict[str, str] = {}
    for record in read_jsonl(path, faults):
        with faults.tolerated():
            key, answer = record.id("question_id"), record.text("answer")
            if key not in asked:
                raise record.error(f"answers question {key}, which {questions} does not ask; check the pair")
            if key in answers:
                raise record.error(f"answers question {key} for the second time; keep one answer")
            if "question" in record.data and asked[key].text not in record.text("question"):
                raise record.error(f"question {key} is another at {asked[key].where}; check the pair")
            if rule == "strict" and is_unparsed(answer):
                raise record.error('the answer says neither yes nor no; have it begin with "Yes" or "No"')
            answers[key] = answer
    return answers


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
