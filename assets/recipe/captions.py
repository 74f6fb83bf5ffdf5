"""What is said about a scene: captions, and questions with their answers.

A caption names every annotated object from the largest to the smallest, so the least visible come last, where the
words already said weigh most.
"""

from __future__ import annotations

import numpy as np

from lvlm_fix.assets.recipe.world import CATEGORIES, PARTNERS, PLURAL_ONLY, THEMES

DESCRIBE = (
    "Describe the image.",
    "Please describe this image in detail.",
    "What is in the image?",
    "What do you see?",
    "Describe the picture.",
)
ASK = (
    "Is there {a} in the image?",
    "Is there {a} in the image?",  # POPE's own wording, the most frequent
    "Is there {a} in the picture?",
    "Can you see {a}?",
    "Does the image show {a}?",
)
OPENINGS = ("The image shows", "The image features", "The picture shows", "There is", "In the image there is")
FOLLOWS = ("There is also", "The scene also contains", "Next to it is", "In the background there is")
GROUNDS = {
    "street": "on a busy street",
    "journey": "at a station",
    "farm": "on a farm",
    "safari": "out in the wild",
    "park": "in a park",
    "sports hall": "in a sports hall",
    "kitchen": "in a kitchen",
    "market": "at a market",
    "cafe": "in a cafe",
    "living room": "in a living room",
    "office": "in an office",
    "bedroom": "in a bedroom",
}
assert set(GROUNDS) == set(THEMES)


def with_article(category: str) -> str:
    """The category with its article, as a caption says it.

    >>> with_article("umbrella"), with_article("skis"), with_article("zebra")
    ('an umbrella', 'a pair of skis', 'a zebra')
    """
    if category in PLURAL_ONLY:
        return f"a pair of {category}"
    return f"{'an' if category[0] in 'aeiou' else 'a'} {category}"


def enumerate_words(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def caption(rng: np.random.Generator, categories: list[str], theme: str) -> str:
    """One or two sentences that name all categories in the given order."""
    words = [with_article(name) for name in categories]
    first = len(words) if len(words) < 3 or rng.random() < 0.4 else int(rng.integers(2, len(words)))
    place = f" {GROUNDS[theme]}" if rng.random() < 0.5 else ""
    text = f"{rng.choice(OPENINGS)} {enumerate_words(words[:first])}{place}."
    if first < len(words):
        text += f" {rng.choice(FOLLOWS)} {enumerate_words(words[first:])}."
    return text


def question(rng: np.random.Generator, category: str) -> str:
    """A yes/no question about one category, in one of several wordings."""
    # POPE says "a skis" too: its template knows one article rule.
    article = "an" if category[0] in "aeiou" else "a"
    return str(rng.choice(ASK)).format(a=f"{article} {category}")


def absent_objects(rng: np.random.Generator, present: set[str], theme: str, count: int) -> list[str]:
    """Categories that are not there: at random, from the same theme, and usual partners that stayed away."""
    missing = [PARTNERS[name][0] for name in sorted(present) if name in PARTNERS]
    chosen = list(dict.fromkeys(name for name in missing if name not in present and rng.random() < 0.5))[
        :count
    ]
    same = [name for name in THEMES[theme] if name not in present]
    anywhere = [name for name in CATEGORIES if name not in present]
    while len(chosen) < count:
        pool = same if same and rng.random() < 0.4 else anywhere
        name = str(rng.choice(pool))
        if name not in chosen:
            chosen.append(name)
    return chosen


def conversations(
    rng: np.random.Generator, categories: list[str], theme: str, turns: int
) -> list[tuple[str, str]]:
    """`turns` questions with answers about one scene: one description, the rest balanced yes/no questions."""
    pairs = [(str(rng.choice(DESCRIBE)), caption(rng, categories, theme))]
    count = turns - 1
    present = [str(name) for name in rng.permutation(categories)][: count - count // 2]
    for name in present:
        pairs.append((question(rng, name), "Yes"))
    for name in absent_objects(rng, set(categories), theme, count - len(present)):
        pairs.append((question(rng, name), "No"))
    return pairs
