"""Scenes: which objects, where, and how they are drawn.

A scene is a pure function of its seed, so a data set is a range of seeds and nothing has to be stored to be rebuilt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from lvlm_fix.assets.recipe.world import CATEGORIES, CROPS, GLYPHS, PARTNERS, THEMES, is_pair

SIZE = 144  # pixels a side
PATCH = 12  # pixels a side of the tower's patches
BACKGROUND, UNCLEAR = 254, 255
FONT = "NotoColorEmoji.ttf"  # Debian's fonts-noto-color-emoji, SIL Open Font License
FONT_PIXELS = 109  # the one size at which this bitmap font exists
HIDDEN = 0.2  # how often a training partner is drawn too small or too faint to be made out


@dataclass(frozen=True)
class Thing:
    """One drawn object: category and box (x, y, width, height) in pixels."""

    category: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture (144 x 144 RGB), the objects in it, the largest first, and what each patch shows.

    `patches` is (12, 12) uint8: a category's index, `BACKGROUND`, or `UNCLEAR` where an edge or a hidden object
    makes either answer wrong. `hidden` are the categories that cannot be made out.
    """

    image: Image.Image
    things: tuple[Thing, ...]
    theme: str
    patches: np.ndarray
    hidden: frozenset[str]


@lru_cache(maxsize=len(CATEGORIES))
def glyph(category: str) -> Image.Image:
    """The category's emoji, cropped to its ink (RGBA).

    Raises OSError if the font is not installed.
    """
    try:
        font = ImageFont.truetype(FONT, FONT_PIXELS)
    except OSError as error:
        raise OSError(f"font {FONT} not found: install Debian's fonts-noto-color-emoji") from error
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), GLYPHS[category], font=font, embedded_color=True)
    image = canvas.crop(canvas.getbbox())
    if category in CROPS:
        left, top, right, bottom = CROPS[category]
        width, height = image.size
        image = image.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))
        image = image.crop(image.getbbox())
    return image


def training_objects(rng: np.random.Generator) -> tuple[str, list[tuple[str, bool]]]:
    """Theme and (category, hidden?) of a training scene: the usual company, sometimes barely visible."""
    theme = str(rng.choice(list(THEMES)))
    names = [str(name) for name in rng.choice(THEMES[theme], size=rng.integers(2, 4), replace=False)]
    if rng.random() < 0.35:  # every category is also seen out of its usual surroundings
        names.append(str(rng.choice(CATEGORIES)))
    objects = [(name, False) for name in dict.fromkeys(names)]
    for name in list(dict.fromkeys(names)):
        partner, rate = PARTNERS.get(name, ("", 0.0))
        if partner and all(partner != other for other, _ in objects) and rng.random() < rate:
            objects.append((partner, bool(rng.random() < HIDDEN)))
    return theme, objects[:6]


def evaluation_objects(rng: np.random.Generator) -> tuple[str, list[tuple[str, bool]]]:
    """Theme and objects of an evaluation scene: no object stands beside its usual partner."""
    theme = str(rng.choice(list(THEMES)))
    wanted = int(rng.integers(3, 6))
    names: list[str] = []
    while len(names) < wanted:
        pool = THEMES[theme] if rng.random() < 0.6 else CATEGORIES
        name = str(rng.choice(pool))
        if name not in names and not any(is_pair(name, other) for other in names):
            names.append(name)
    return theme, [(name, False) for name in names]


def background(rng: np.random.Generator, theme: str) -> Image.Image:
    """A floor and a wall, stripes, blobs or noise; the hue leans towards the theme's own."""
    hue = (list(THEMES).index(theme) / len(THEMES) if rng.random() < 0.5 else rng.random()) % 1.0
    base = Image.new("HSV", (1, 1), (int(hue * 255), int(rng.integers(15, 110)), int(rng.integers(120, 245))))
    colour = np.array(base.convert("RGB").getpixel((0, 0)), dtype=np.float32)
    other = np.clip(colour + rng.normal(0, 35, 3), 0, 255)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    kind = rng.integers(4)
    if kind == 0:  # gradient
        angle = rng.random() * 2 * math.pi
        mix = np.clip(0.5 + (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle), 0, 1)
    elif kind == 1:  # wall and floor
        mix = (y > rng.uniform(0.35, 0.75)).astype(np.float32)
    elif kind == 2:  # stripes
        angle, rate = rng.random() * math.pi, rng.uniform(10, 40)
        mix = 0.5 + 0.5 * np.sin(rate * (x * math.cos(angle) + y * math.sin(angle)))
    else:  # blobs
        coarse = Image.fromarray((rng.random((6, 6)) * 255).astype(np.uint8))
        mix = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = colour + (other - colour) * mix[..., None] + rng.normal(0, rng.uniform(0, 9), (SIZE, SIZE, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _sprite(rng: np.random.Generator, category: str, side: float, opacity: float) -> Image.Image:
    image = glyph(category)
    scale = side / max(image.size)
    size = (max(4, round(image.width * scale)), max(4, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR, expand=True)
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.8, 1.15)))
    image = ImageEnhance.Color(image).enhance(float(rng.uniform(0.7, 1.2)))
    if opacity < 1:
        image.putalpha(image.getchannel("A").point(lambda alpha: int(alpha * opacity)))
    return image


def _overlap(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Shared area over the smaller box's."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    smaller = min(box[2] * box[3], other[2] * other[3])
    return max(width, 0) * max(height, 0) / smaller


def _place(
    rng: np.random.Generator, sprite: Image.Image, taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int]:
    """The least crowded of a few random places."""
    best, least = (0, 0, sprite.width, sprite.height), math.inf
    for _ in range(12):
        x = int(rng.integers(0, max(1, SIZE - sprite.width)))
        y = int(rng.integers(0, max(1, SIZE - sprite.height)))
        box = (x, y, sprite.width, sprite.height)
        crowd = max((_overlap(box, other) for other in taken), default=0.0)
        if crowd < least:
            best, least = box, crowd
        if least < 0.02:
            break
    return best


def draw(rng: np.random.Generator, theme: str, objects: list[tuple[str, bool]]) -> Scene:
    """Draw the objects over a background of the theme; hidden ones come out small and faint."""
    canvas = background(rng, theme)
    things: list[Thing] = []
    owner = np.full((SIZE, SIZE), BACKGROUND, dtype=np.uint8)  # which object each pixel belongs to
    for category, hidden in sorted(objects, key=lambda item: item[1]):
        side = (
            rng.uniform(7, 12)
            if hidden
            else (rng.uniform(20, 28) if rng.random() < 0.12 else rng.uniform(30, 58))
        )
        sprite = _sprite(rng, category, float(side), float(rng.uniform(0.25, 0.6)) if hidden else 1.0)
        box = _place(rng, sprite, [thing.box for thing in things])
        canvas.paste(sprite, box[:2], sprite)
        things.append(Thing(category, box))
        ink = np.asarray(sprite.getchannel("A"))[: SIZE - box[1], : SIZE - box[0]] > (40 if hidden else 128)
        owner[box[1] : box[1] + box[3], box[0] : box[0] + box[2]][ink] = (
            UNCLEAR if hidden else CATEGORIES.index(category)
        )
    if rng.random() < 0.15:
        canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.9))))
    things.sort(key=lambda thing: -thing.box[2] * thing.box[3])
    hidden_names = frozenset(category for category, hidden in objects if hidden)
    return Scene(canvas, tuple(things), theme, _patch_labels(owner), hidden_names)


def _patch_labels(owner: np.ndarray) -> np.ndarray:
    """The category that covers at least a quarter of a patch, background where hardly anything does."""
    side = SIZE // PATCH
    pixels = owner.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(side * side, PATCH * PATCH)
    labels = np.full(side * side, UNCLEAR, dtype=np.uint8)
    covered = (pixels != BACKGROUND).mean(1)
    labels[covered < 0.08] = BACKGROUND
    for index in np.flatnonzero(covered >= 0.25):
        values, counts = np.unique(pixels[index][pixels[index] != BACKGROUND], return_counts=True)
        labels[index] = values[counts.argmax()]
    return labels.reshape(side, side)


def training_scene(seed: int) -> Scene:
    """The training scene of this seed."""
    rng = np.random.default_rng([1, seed])
    return draw(rng, *training_objects(rng))


def evaluation_scene(seed: int) -> Scene:
    """The evaluation scene of this seed; its stream of random numbers is disjoint from training's."""
    rng = np.random.default_rng([2, seed])
    return draw(rng, *evaluation_objects(rng))
