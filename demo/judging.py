"""Whether an answer is true of a picture whose objects are known: what it makes up, and what is not judged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lvlm_fix.evals.chair import Mention, hallucinated, mentioned
from lvlm_fix.evals.pope import is_unparsed, parse_answer
from lvlm_fix.evals.vocabulary import category_of

_ASKED = re.compile(
    r"\s*(?:is|are) there (?:an? |any |the )?(.+?)(?: in (?:the|this) (?:image|picture|photo))?\s*\?*\s*",
    re.IGNORECASE,
)
_FIRST_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Verdict:
    """What is known of an answer.

    Attributes:
        kind: `true`, `wrong`, or `unjudged`.
        sentence: the verdict in words.
        wrong: words that claim an object which is not there; None where the answer is not judged.
    """

    kind: Literal["true", "wrong", "unjudged"]
    sentence: str
    wrong: tuple[Mention, ...] | None


def judge(question: str, answer: str, truth: Sequence[str] | None, cut: bool = False) -> Verdict:
    """Hold an answer against the objects of a picture.

    An answer to "Is there a ... in the image?" is read as POPE reads it; in any other, the objects that it names
    count, as in CHAIR.

    Args:
        question: what was asked.
        answer: what was said.
        truth: the objects in the picture, None where they are not known.
        cut: whether the answer was ended by its longest length, and not by the model.

    >>> judge("Is there an elephant in the image?", "Yes", ["zebra"]).sentence
    'Wrong: there is no elephant in the picture.'
    >>> judge("Is it day?", "It is sunny.", ["zebra"]).wrong is None
    True
    """
    if truth is None:
        return Verdict("unjudged", "What is in this picture is not known here, so nothing is marked.", None)
    asked = asked_about(question)
    if asked is not None and not is_unparsed(answer):
        return _yes_or_no(asked, answer, truth)
    wrong = tuple(hallucinated(answer, truth, rule="english"))
    if wrong:
        names = sorted({one.category for one in wrong})
        return Verdict("wrong", f"Not in the picture: {', '.join(names)}.", wrong)
    if not mentioned(answer, rule="english"):
        return Verdict("unjudged", "The answer names no object, so nothing is judged.", None)
    if cut:
        return Verdict("unjudged", "No object is made up so far, but the answer was cut off.", ())
    return Verdict("true", "No object is made up.", ())


def asked_about(question: str) -> str | None:
    """The object of a yes-or-no question about one; None for other questions.

    >>> asked_about("Is there an elephant in the image?"), asked_about("Describe the image.")
    ('elephant', None)
    """
    found = _ASKED.fullmatch(question)
    return None if found is None else category_of(found[1])


def _yes_or_no(asked: str, answer: str, truth: Sequence[str]) -> Verdict:
    there, says = asked in truth, parse_answer(answer)
    if says == "yes" and not there:
        own = [one for one in mentioned(answer, rule="english") if one.category == asked]
        first = _FIRST_WORD.search(answer)
        claim = own or ([Mention(first[0], asked, *first.span())] if first else [])
        return Verdict("wrong", f"Wrong: there is no {asked} in the picture.", tuple(claim))
    if says == "no" and there:
        return Verdict("wrong", f"Wrong: the picture does show: {asked}.", ())
    return Verdict("true", f"Right: the picture {'does show' if there else 'does not show'}: {asked}.", ())
