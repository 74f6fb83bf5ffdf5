"""CHAIR, the share of hallucinated objects in captions (Rohrbach et al., arXiv 1809.02156).

Captions are read by a `rule`. `"reference"`, the default everywhere, gives the published script's numbers.
`"english"` also sees what that script loses by its tokens and singulars ("a bus", "ties", "cups/mugs"): use
it to mark words for people to look at, not beside published numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from .records import DataError, Faults, read_jsonl
from .vocabulary import (
    CATEGORY_OF,
    NEVER_FOUND,
    PHRASES,
    PLAIN_TOKEN,
    REFERENCE_TOKEN,
    category_of,
    plain_singular,
    reference_singular,
)

Rule = Literal["reference", "english"]

_COUNTS = (
    "captions",
    "hallucinated_captions",
    "mentions",
    "hallucinated_mentions",
    "true_objects",
    "recalled_objects",
    "tokens",
)


class Mention(NamedTuple):
    """A word of a caption that names a COCO object."""

    word: str  # as the caption spells it: caption[start:end]
    category: str
    start: int  # in characters
    end: int


class Caption(NamedTuple):
    """A caption to score, and where it was read."""

    image_id: str
    text: str
    where: str = "caption"


class Marked(NamedTuple):
    """A scored caption and the mentions in it that its image does not bear out."""

    image_id: str
    caption: str
    hallucinated: list[Mention]


@dataclass(frozen=True)
class ChairScore:
    """Counts over captions, and the metric made of them in percent; a ratio over nothing is 0.

    >>> ChairScore(captions=2, hallucinated_captions=1, mentions=8, hallucinated_mentions=1).chair_i
    12.5
    """

    captions: int = 0
    hallucinated_captions: int = 0  # with at least one hallucinated mention
    mentions: int = 0  # repeats count
    hallucinated_mentions: int = 0
    true_objects: int = 0  # distinct categories in the captions' images, summed
    recalled_objects: int = 0  # those of them that are mentioned, summed
    tokens: int = 0  # words, a joined phrase being one; under the reference rule punctuation marks too
    marked: list[Marked] = field(default_factory=list, repr=False)

    @property
    def chair_s(self) -> float:
        """Captions that hallucinate, of all captions."""
        return _percent(self.hallucinated_captions, self.captions)

    @property
    def chair_i(self) -> float:
        """Hallucinated mentions, of all mentions."""
        return _percent(self.hallucinated_mentions, self.mentions)

    @property
    def recall(self) -> float:
        """True objects that are mentioned, of all true objects."""
        return _percent(self.recalled_objects, self.true_objects)

    @property
    def f1(self) -> float:
        """Harmonic mean of recall and of the precision of mentions, 100 - CHAIRi."""
        precision = _percent(self.mentions - self.hallucinated_mentions, self.mentions)
        total = precision + self.recall
        return 2 * precision * self.recall / total if total else 0.0

    @property
    def average_length(self) -> float:
        """Tokens a caption, the "Len" of the script's later versions before they divide by 100."""
        return self.tokens / self.captions if self.captions else 0.0

    def as_dict(self) -> dict[str, float]:
        """Every number, by the names that papers print."""
        return {
            "CHAIRs": self.chair_s,
            "CHAIRi": self.chair_i,
            "recall": self.recall,
            "f1": self.f1,
            "average_length": self.average_length,
            **{name: getattr(self, name) for name in _COUNTS},
        }


def mentioned(caption: str, rule: Rule = "reference") -> list[Mention]:
    """The words of a caption that name COCO objects, in order, repeats included.

    >>> for mention in mentioned("A man's hot dogs"):
    ...     print(mention)
    Mention(word='man', category='person', start=2, end=5)
    Mention(word='hot dogs', category='hot dog', start=8, end=16)
    """
    reader = _reader(rule)
    return reader.mentions(caption, reader.words(caption))


def hallucinated(caption: str, truth: Iterable[str], rule: Rule = "reference") -> list[Mention]:
    """The mentions of a caption whose category is not in `truth`, in order.

    `truth` names the objects in the image, by category or any word of the metric; other names do nothing.

    >>> [mention.word for mention in hallucinated("Two dogs near a bench.", {"dog"})]
    ['bench']
    """
    present = {category_of(name) for name in truth}
    return [mention for mention in mentioned(caption, rule) if mention.category not in present]


def score_captions(
    captions: Iterable[Caption],
    truth: Mapping[str, Collection[str]],
    rule: Rule = "reference",
    faults: Faults | None = None,
) -> ChairScore:
    """Score captions against `truth`, image id -> the COCO categories in that image.

    Raises `DataError` for an image that `truth` does not know, unless `faults` skips it, and for no captions.

    >>> score_captions([Caption("7", "A dog on a bench.")], {"7": {"dog"}}).chair_i
    50.0
    """
    faults = faults or Faults()
    reader = _reader(rule)
    total = dict.fromkeys(_COUNTS, 0)
    marked: list[Marked] = []
    for caption in captions:
        with faults.tolerated():
            if caption.image_id not in truth:
                raise DataError(
                    f"{caption.where}: image {caption.image_id} has no ground truth; add its objects"
                )
            present = set(truth[caption.image_id])
            words = reader.words(caption.text)
            found = reader.mentions(caption.text, words)
            wrong = [mention for mention in found if mention.category not in present]
            recalled = present.intersection(mention.category for mention in found)
            counts = (1, bool(wrong), len(found), len(wrong), len(present), len(recalled), len(words))
            for name, count in zip(_COUNTS, counts, strict=True):
                total[name] += count
            marked.append(Marked(caption.image_id, caption.text, wrong))
    if not marked:
        raise DataError("no caption has ground truth; give captions and objects of the same images")
    return ChairScore(**total, marked=marked)


def read_captions(path: str | Path, faults: Faults | None = None) -> list[Caption]:
    """The captions of a JSON-lines file with `image_id` and `caption`; an image may have several.

    Raises `OSError`, and `DataError` for a fault unless `faults` skips it.
    """
    faults = faults or Faults()
    captions = []
    for record in read_jsonl(path, faults):
        with faults.tolerated():
            captions.append(Caption(record.id("image_id"), record.text("caption"), record.where))
    if not captions:
        raise DataError(f"{path}: holds no caption; give a file with one caption a line")
    return captions


class _Word(NamedTuple):
    text: str  # singular, lower case; a phrase as what it counts as
    start: int
    end: int


@dataclass(frozen=True)
class _Reader:
    """One rule's way from a caption to words, and from words to mentions."""

    token: re.Pattern[str]
    singular: Callable[[str], str]
    phrases: Mapping[str, str]
    findable: Collection[str]

    def words(self, caption: str) -> list[_Word]:
        """Cut a caption into words, joining the longest phrase at each place."""
        tokens = [_Word(self.singular(m[0].lower()), *m.span()) for m in self.token.finditer(caption)]
        words = []
        at = 0
        while at < len(tokens):
            size, text = self._phrase(tokens, at) if tokens[at].text in _OPENERS else (1, tokens[at].text)
            words.append(_Word(text, tokens[at].start, tokens[at + size - 1].end))
            at += size
        return words

    def mentions(self, caption: str, words: list[_Word]) -> list[Mention]:
        no_chairs = {"toilet", "seat"} <= {word.text for word in words}  # as in "the seat of the toilet"
        return [
            Mention(caption[start:end], CATEGORY_OF[text], start, end)
            for text, start, end in words
            if text in self.findable and not (no_chairs and text == "seat")
        ]

    def _phrase(self, tokens: list[_Word], at: int) -> tuple[int, str]:
        for size in (3, 2):
            phrase = " ".join(token.text for token in tokens[at : at + size])
            if phrase in self.phrases and at + size <= len(tokens):
                return size, self.phrases[phrase]
        return 1, tokens[at].text


_OPENERS = {phrase.split()[0] for phrase in (*PHRASES, *CATEGORY_OF) if " " in phrase}

_READERS = {
    "reference": _Reader(
        token=REFERENCE_TOKEN,
        singular=reference_singular,
        phrases={**PHRASES, "wine glas": "wine glass"},  # "glas" by the same rule as "bu"
        findable=CATEGORY_OF.keys() - NEVER_FOUND,
    ),
    "english": _Reader(
        token=PLAIN_TOKEN,
        singular=plain_singular,
        phrases={**{name: name for name in CATEGORY_OF if " " in name}, **PHRASES},
        findable=CATEGORY_OF.keys(),
    ),
}


def _reader(rule: Rule) -> _Reader:
    if rule not in _READERS:
        raise ValueError(f'rule is {rule!r}; give "reference" or "english"')
    return _READERS[rule]


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0
