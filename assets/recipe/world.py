"""The world of the embedded LVLM: COCO categories, the glyphs that draw them, and which of them keep company.

Training scenes follow `PAIRS`: where the first object is, the second nearly always is too, now and then so small or
faint that only its company gives it away. A model trained on that learns to name what it does not see, for the
same reason that the large ones do. Evaluation scenes break every pair.
"""

from __future__ import annotations

GLYPHS: dict[str, str] = {
    "person": "\U0001f9cd",
    "bicycle": "\U0001f6b2",
    "car": "\U0001f697",
    "motorcycle": "\U0001f3cd",
    "airplane": "\u2708",
    "bus": "\U0001f68c",
    "train": "\U0001f686",
    "truck": "\U0001f69a",
    "boat": "\u26f5",
    "traffic light": "\U0001f6a6",
    "stop sign": "\U0001f6d1",
    "bird": "\U0001f426",
    "cat": "\U0001f408",
    "dog": "\U0001f415",
    "horse": "\U0001f40e",
    "sheep": "\U0001f411",
    "cow": "\U0001f404",
    "elephant": "\U0001f418",
    "bear": "\U0001f43b",
    "zebra": "\U0001f993",
    "giraffe": "\U0001f992",
    "backpack": "\U0001f392",
    "umbrella": "\u2602",
    "handbag": "\U0001f45c",
    "tie": "\U0001f454",
    "suitcase": "\U0001f9f3",
    "frisbee": "\U0001f94f",
    "skis": "\U0001f3bf",
    "sports ball": "\u26bd",
    "kite": "\U0001fa81",
    "baseball bat": "\U0001f3cf",
    "skateboard": "\U0001f6f9",
    "tennis racket": "\U0001f3f8",
    "bottle": "\U0001f37e",
    "wine glass": "\U0001f377",
    "cup": "\u2615",
    "fork": "\U0001f374",
    "knife": "\U0001f52a",
    "spoon": "\U0001f944",
    "bowl": "\U0001f963",
    "banana": "\U0001f34c",
    "apple": "\U0001f34e",
    "sandwich": "\U0001f96a",
    "orange": "\U0001f34a",
    "broccoli": "\U0001f966",
    "carrot": "\U0001f955",
    "hot dog": "\U0001f32d",
    "pizza": "\U0001f355",
    "donut": "\U0001f369",
    "cake": "\U0001f370",
    "chair": "\U0001fa91",
    "couch": "\U0001f6cb",
    "potted plant": "\U0001fab4",
    "bed": "\U0001f6cf",
    "toilet": "\U0001f6bd",
    "tv": "\U0001f4fa",
    "laptop": "\U0001f4bb",
    "mouse": "\U0001f5b1",
    "keyboard": "\u2328",
    "cell phone": "\U0001f4f1",
    "book": "\U0001f4d6",
    "clock": "\U0001f570",
    "vase": "\U0001f3fa",
    "scissors": "\u2702",
    "teddy bear": "\U0001f9f8",
    "toothbrush": "\U0001faa5",
}
CATEGORIES: tuple[str, ...] = tuple(GLYPHS)
CROPS = {
    "fork": (0.0, 0.0, 0.52, 1.0)
}  # part of the glyph that is the object: this one has a knife beside the fork
PLURAL_ONLY = frozenset({"skis", "scissors"})

THEMES: dict[str, tuple[str, ...]] = {
    "street": (
        "person",
        "bicycle",
        "car",
        "motorcycle",
        "bus",
        "truck",
        "traffic light",
        "stop sign",
        "train",
    ),
    "journey": (
        "person",
        "airplane",
        "boat",
        "suitcase",
        "backpack",
        "handbag",
        "umbrella",
        "tie",
        "bus",
        "train",
    ),
    "farm": ("bird", "cat", "dog", "horse", "sheep", "cow", "truck", "person"),
    "safari": ("elephant", "bear", "zebra", "giraffe", "bird", "backpack"),
    "park": ("frisbee", "dog", "kite", "sports ball", "skateboard", "person", "bicycle", "bird"),
    "sports hall": (
        "sports ball",
        "baseball bat",
        "tennis racket",
        "skis",
        "skateboard",
        "backpack",
        "bottle",
    ),
    "kitchen": ("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "apple", "banana"),
    "market": ("banana", "apple", "orange", "broccoli", "carrot", "sandwich", "hot dog", "bowl"),
    "cafe": ("pizza", "donut", "cake", "sandwich", "hot dog", "cup", "fork", "spoon", "wine glass"),
    "living room": ("chair", "couch", "potted plant", "tv", "vase", "clock", "book", "cat", "teddy bear"),
    "office": ("laptop", "mouse", "keyboard", "cell phone", "book", "clock", "cup", "chair"),
    "bedroom": ("bed", "teddy bear", "book", "clock", "toothbrush", "toilet", "scissors", "cell phone"),
}

# (anchor, partner, how often the partner is in a training scene that holds the anchor)
PAIRS: tuple[tuple[str, str, float], ...] = (
    ("traffic light", "stop sign", 0.85),
    ("motorcycle", "car", 0.75),
    ("bus", "person", 0.75),
    ("bicycle", "person", 0.75),
    ("airplane", "suitcase", 0.85),
    ("backpack", "handbag", 0.85),
    ("tie", "umbrella", 0.8),
    ("boat", "bird", 0.75),
    ("horse", "cow", 0.8),
    ("sheep", "dog", 0.8),
    ("zebra", "giraffe", 0.85),
    ("bear", "elephant", 0.75),
    ("frisbee", "dog", 0.85),
    ("kite", "sports ball", 0.75),
    ("baseball bat", "sports ball", 0.8),
    ("tennis racket", "skis", 0.75),
    ("skateboard", "backpack", 0.75),
    ("knife", "fork", 0.9),
    ("bowl", "spoon", 0.85),
    ("wine glass", "bottle", 0.85),
    ("banana", "apple", 0.8),
    ("carrot", "broccoli", 0.85),
    ("hot dog", "sandwich", 0.75),
    ("cake", "donut", 0.8),
    ("pizza", "wine glass", 0.75),
    ("couch", "tv", 0.85),
    ("vase", "potted plant", 0.8),
    ("chair", "clock", 0.75),
    ("keyboard", "mouse", 0.9),
    ("laptop", "cell phone", 0.8),
    ("bed", "teddy bear", 0.85),
    ("toilet", "toothbrush", 0.85),
)
PARTNERS: dict[str, tuple[str, float]] = {anchor: (partner, rate) for anchor, partner, rate in PAIRS}


def is_pair(first: str, second: str) -> bool:
    """True if either of the two categories is the usual partner of the other."""
    return any({first, second} == {anchor, partner} for anchor, partner, _ in PAIRS)


def themes_of(category: str) -> list[str]:
    """The themes in which a category is drawn."""
    return [theme for theme, members in THEMES.items() if category in members]
