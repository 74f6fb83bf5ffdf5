"""The words by which the CHAIR metric recognises the 80 COCO categories (Rohrbach et al., arXiv 1809.02156).

The list and its joining rules are the metric's published definition, oddities included: a score is only
comparable with published ones when the same words count. Words that the reference script holds in its list
but, as its code stands, can never match stay in `WORDS` and are named in `NEVER_FOUND`.

Below the table stand the tokens and singulars that lead to it, twice. Those of the reference are nltk's and
pattern.en's as the script uses them: "cups/mugs" is one unknown word, and a "bus" becomes "bu" and is not
seen while "buses" are; "ties" and "canoes" are lost too. The plain ones read as a person would.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Category: the singular words that name it besides its own name. An underscore stands for a space.
_TABLE = {
    "person": (
        "adult baby baker bicyclist biker boy bride buyer caller camper chef child children cop "
        "cowboy coworker doctor drinker driver father female foreigner gentleman girl grandchild "
        "groom guy hunter kid lady male man mother offender officer passenger patient people pitcher "
        "player policeman politician rider serviceman shopper sister skateboarder skater skier "
        "snowboarder soldier solider student teenager thief traveler trespasser villager walker woman "
        "worker"
    ),
    "bicycle": "bike minibike trike unicycle",
    "car": "automobile cab coupe hatchback jeep limo minivan sedan suv taxi taxicab van",
    "motorcycle": "moped motor_bike motor_cycle motorbike scooter",
    "airplane": "air_plane airbus aircraft biplane jet jetliner monoplane plane seaplane",
    "bus": "minibus trolley",
    "train": "caboose locomotive tramway",
    "truck": "firetruck hauler lorry pickup",
    "boat": (
        "barge battleship canoe catamaran dinghy ferry ferryboat freighter houseboat kayak lifeboat "
        "liner motorboat paddleboat pontoon powerboat riverboat rowboat sailboard sailboat schooner "
        "ship skiff speedboat steamboat steamship trawler tugboat vessel watercraft yacht"
    ),
    "traffic light": "stop_light stoplight street_light streetlight traffic_signal",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "pew",
    "bird": (
        "blackbird bluebird bluejay buzzard chickadee cockatiel cockatoo condor cormorant cowbird "
        "crow duck egret falcon finch flamingo fowl goose gosling gull heron hummingbird kingfisher "
        "loon lorikeet macaw magpie mallard oriole osprey ostrich owl parakeet parrot peacock peafowl "
        "pelican pheasant pigeon puffin quail raven robin rooster sandpiper seabird seagull shorebird "
        "songbird sparrow swan turkey vulture warbler waterbird waterfowl willet woodpecker"
    ),
    "cat": "feline kitten tabby",
    "dog": (
        "beagle brindle bulldog canine chihuahua cocker collie corgi dachshund doberman doggie doggy "
        "greyhound hound husky labrador mutt pitbull poodle pug pup puppy retriever rottweiler "
        "schnauzer sheepdog spaniel terrier weimaraner whippet"
    ),
    "horse": "bronc bronco clydesdale colt equine foal mare mustang palomino pony racehorse stallion",
    "sheep": "ewe goat lamb ram",
    "cow": "bison buffalo bull calf cattle heifer holstein ox oxen zebu",
    "elephant": "",
    "bear": "panda",
    "zebra": "",
    "giraffe": "",
    "backpack": "knapsack",
    "umbrella": "",
    "handbag": "briefcase purse wallet",
    "tie": "bow bow_tie",
    "suitcase": "luggage suit_case",
    "frisbee": "",
    "skis": "ski",
    "snowboard": "",
    "sports ball": "ball",
    "kite": "",
    "baseball bat": "",
    "baseball glove": "",
    "skateboard": "",
    "surfboard": "longboard shortboard skimboard wakeboard",
    "tennis racket": "racket",
    "bottle": "",
    "wine glass": "",
    "cup": "",
    "fork": "",
    "knife": "knive pocketknife",
    "spoon": "",
    "bowl": "container",
    "banana": "",
    "apple": "",
    "sandwich": "burger cheeseburger hamburger sub",
    "orange": "",
    "broccoli": "",
    "carrot": "",
    "hot dog": "",
    "pizza": "",
    "donut": "bagel doughnut",
    "cake": "cheesecake coffeecake cupcake pancake shortcake",
    "chair": "seat stool",
    "couch": "chesterfield futon loveseat recliner settee sofa",
    "potted plant": "houseplant",
    "bed": "",
    "dining table": "desk table",
    "toilet": "commode lavatory potty urinal",
    "tv": "monitor television televison",
    "laptop": "computer laptop_computer lenovo macbook netbook notebook",
    "mouse": "",
    "remote": "",
    "keyboard": "",
    "cell phone": "cellphone iphone mobile_phone phon phone smartphone telephone",
    "microwave": "",
    "oven": "stove stove_top_oven stovetop",
    "toaster": "",
    "sink": "",
    "refrigerator": "freezer fridge",
    "book": "",
    "clock": "",
    "vase": "",
    "scissors": "",
    "teddy bear": "teddybear",
    "hair drier": "hairdryer",
    "toothbrush": "",
}

# COCO category, in COCO's order -> the words that name it besides its own name
WORDS: dict[str, tuple[str, ...]] = {
    category: tuple(word.replace("_", " ") for word in words.split()) for category, words in _TABLE.items()
}

CATEGORIES: tuple[str, ...] = tuple(WORDS)

# word -> COCO category
CATEGORY_OF: dict[str, str] = {
    word: category for category, words in WORDS.items() for word in (category, *words)
}

# The published list spells these with a stray space or a capital, so the reference script cannot match them.
NEVER_FOUND: frozenset[str] = frozenset({"motor bike", "cheesecake", "iphone"})

# Words that are read as one with the word after them. Only what a phrase counts as is then looked up: so a
# train track is no train, a baby elephant no person, and a home plate nothing at all.
_PAIRS = {
    "air": "plane",
    "baseball": "bat glove",
    "cell": "phone",
    "fire": "hydrant",
    "hair": "drier",
    "home": "plate",
    "hot": "dog",
    "laptop": "computer",
    "mobile": "phone",
    "motor": "bike cycle",
    "parking": "meter",
    "potted": "plant",
    "sports": "ball",
    "stop": "light sign",
    "street": "light",
    "suit": "case",
    "teddy": "bear",
    "tennis": "racket",
    "traffic": "light signal",
    "train": "track",
    "wine": "glass",
}
_SILENT = {  # the first word says what kind, and must not count as a person
    "adult": "animal bear bird cat cow cub dog elephant giraffe horse sheep zebra",
    "baby": "animal bear bird cat cow cub dog elephant giraffe horse sheep zebra",
    "passenger": "jet train",
}

# phrase -> the word it counts as
PHRASES: dict[str, str] = {
    **{f"{first} {last}": f"{first} {last}" for first, lasts in _PAIRS.items() for last in lasts.split()},
    **{f"{first} {last}": last for first, lasts in _SILENT.items() for last in lasts.split()},
    "bow tie": "tie",
    "toilet seat": "toilet",
}


def category_of(name: str) -> str | None:
    """The COCO category that a word or category name stands for, or None where the metric has no such word.

    >>> category_of("Bike"), category_of("dining table"), category_of("lamp")
    ('bicycle', 'dining table', None)
    """
    return CATEGORY_OF.get(name.strip().lower())


# nltk's tokens, as far as they decide which words stand alone: a clitic, a run of dots or dashes, a word, or
# a mark. Inside a word a full stop, hyphen, slash or apostrophe stays, a comma or colon only before a digit.
REFERENCE_TOKEN = re.compile(
    r"""
    '(?:s|m|d|ll|re|ve)\b | n't\b | \.{2,} | --+
    | (?: (?!n't\b)
          (?: [^\s,:;@\#$%&?!"()\[\]{}<>'‘’“”«».…-]
            | [,:](?=\d)
            | -(?!-)
            | \.(?=[^\s"'\])}>.?!,;:’”])
            | '(?!(?:s|m|d|ll|re|ve)\b)(?=\w)
          )
      )+
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
PLAIN_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*")

_IRREGULAR = {
    "people": "person",
    "children": "child",
    "men": "man",
    "geese": "goose",
    "mice": "mouse",
    "oxen": "ox",
}
_IRREGULAR_END = re.compile(f"({'|'.join(_IRREGULAR)})$")
_LEFT_ALONE = ("scissors", "collies", "doggies")  # by pattern.en: rightly, wrongly and wrongly


def _irregular(word: str) -> str | None:
    end = _IRREGULAR_END.search(word)
    return word[: end.start()] + _IRREGULAR[end[0]] if end else None


@lru_cache(maxsize=1 << 16)
def reference_singular(word: str) -> str:
    """The singular as pattern.en's suffix rules form it, right or wrong ("buses" -> "bus", "bus" -> "bu")."""
    if irregular := _irregular(word):
        return irregular
    if not word.endswith("s") or word in _LEFT_ALONE:
        return word
    if word.endswith(("ches", "shes", "sses", "xes", "buses", "oes")) and not word.endswith("shoes"):
        return word[:-2]
    if word.endswith("ies") and word[-4:-3] not in "aeiouy":
        return word[:-3] + "y"
    if word.endswith(("alves", "elves", "olves")):
        return word[:-3] + "f"
    if word.endswith(("nives", "lives", "wives")):
        return word[:-3] + "fe"
    return word[:-1]


@lru_cache(maxsize=1 << 16)
def plain_singular(word: str) -> str:
    """The vocabulary's word of which this is the plural, or the word itself."""
    if word in _PARTS:
        return word
    guesses = [_irregular(word) or word]
    if word.endswith("s"):
        stem = word[:-3]
        guesses += [word[:-1], word[:-2], stem + "y", stem + "f", stem + "fe"]
    return next((guess for guess in guesses if guess in _PARTS), word)


# every single word that means something, alone or in a phrase
_PARTS = frozenset(part for name in (*CATEGORY_OF, *PHRASES) for part in name.split())
