"""How well the OpenCLIP model tells right from wrong: `python -m lvlm_fix.assets.recipe.clip_quality --out FILE`.

On evaluation scenes, and on training-like scenes that it has not seen (they hold the usual company).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from lvlm_fix.assets.recipe.captions import caption, enumerate_words, with_article
from lvlm_fix.assets.recipe.scenes import training_scene
from lvlm_fix.assets.recipe.world import CATEGORIES, PARTNERS

HELD_OUT = 10_000_000  # first seed of training-like scenes that no preset trains on
BATCH = 64


def with_one_swapped(text: str, name: str, other: str) -> str:
    """The caption with another object in the place of one that it names.

    >>> with_one_swapped("The image shows a hot dog and a dog.", "dog", "apple")
    'The image shows a hot dog and an apple.'
    """
    return re.sub(rf"\b{with_article(name)}\b", with_article(other), text)


def with_one_added(text: str, name: str) -> str:
    """The caption with one more object, in words that captions have for that.

    >>> with_one_added("The image shows a cat.", "dog")
    'The image shows a cat. There is also a dog.'
    """
    return f"{text} There is also {with_article(name)}."


def absent(rng: np.random.Generator, present: Sequence[str]) -> str:
    """Any category that is not among those present."""
    return str(rng.choice([name for name in CATEGORIES if name not in present]))


def usual_company(rng: np.random.Generator, present: Sequence[str]) -> str | None:
    """The usual partner of an object present, itself not there: what the LVLM hallucinates; None if there is none."""
    missing = [PARTNERS[name][0] for name in present if name in PARTNERS and PARTNERS[name][0] not in present]
    return str(rng.choice(missing)) if missing else None


def share_right(right: Tensor, wrong: Tensor) -> dict[str, Any]:
    """Pairs in which the right caption (scores (P,)) beats the wrong one; ties count half."""
    won = (right > wrong).double() + 0.5 * (right == wrong).double()
    return {"pairs": len(right), "right": round(float(won.mean()), 4)}


def retrieval(images: Tensor, texts: Tensor) -> dict[str, Any]:
    """Recall at 1 among 64, both ways; rows past the last full batch are left out."""
    found = []
    for start in range(0, len(images) - BATCH + 1, BATCH):
        scores = images[start : start + BATCH] @ texts[start : start + BATCH].T
        own = torch.arange(BATCH)
        found.append([(scores.argmax(1) == own).double().mean(), (scores.argmax(0) == own).double().mean()])
    to_text, to_image = torch.tensor(found).mean(0).tolist()
    return {"batches": len(found), "image_to_text": round(to_text, 4), "text_to_image": round(to_image, 4)}


Encoders = tuple[Callable[[Sequence[Image.Image]], Tensor], Callable[[Sequence[str]], Tensor]]


def encoders(folder: Path) -> Encoders:
    """Pictures, or captions, to normalised features (how many, width)."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()

    def images(pictures: Sequence[Image.Image]) -> Tensor:
        parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
        with torch.inference_mode():
            pixels = [torch.stack([preprocess(picture) for picture in part]) for part in parts]
            return torch.cat([model.encode_image(part, normalize=True) for part in pixels])

    def texts(captions: Sequence[str]) -> Tensor:
        parts = [list(captions[start : start + 256]) for start in range(0, len(captions), 256)]
        with torch.inference_mode():
            return torch.cat([model.encode_text(tokenizer(part), normalize=True) for part in parts])

    return images, texts


def measure(
    folder: Path,
    pictures: Sequence[Image.Image],
    objects: Sequence[Sequence[str]],
    told: Sequence[Sequence[str]],
    hidden: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """Retrieval by each picture's first caption, and right against wrong by all of them.

    `completed` guards against a taste for short captions: there the longer one, with the last object, is right.

    `objects` are those named in `told`; `hidden` are in the picture without being named, and are not held absent.
    """
    images, texts = encoders(folder)
    rng, seen = np.random.default_rng(12), images(pictures)
    rows: dict[str, list[tuple[int, str, str]]] = {
        "swapped": [], "added": [], "company": [], "completed": [],
    }  # fmt: skip
    for index, (names, captions) in enumerate(zip(objects, told, strict=True)):
        there = [*names, *(hidden[index] if hidden else ())]
        for text in captions:
            swapped = with_one_swapped(text, str(rng.choice(names)), absent(rng, there))
            rows["swapped"].append((index, text, swapped))
            rows["added"].append((index, text, with_one_added(text, absent(rng, there))))
            company = usual_company(rng, there)
            if company:
                rows["company"].append((index, text, with_one_added(text, company)))
            shorter = f"The image shows {enumerate_words([with_article(name) for name in names[:-1]])}."
            rows["completed"].append((index, with_one_added(shorter, names[-1]), shorter))
    result: dict[str, Any] = {"retrieval": retrieval(seen, texts([captions[0] for captions in told]))}
    for kind, pairs in rows.items():
        picture = seen[torch.tensor([index for index, _, _ in pairs])]
        right = (picture * texts([text for _, text, _ in pairs])).sum(1)
        wrong = (picture * texts([text for _, _, text in pairs])).sum(1)
        result[kind] = share_right(right, wrong)
    return result


def evaluation_part(scenes: Path) -> tuple[list[Image.Image], list[list[str]], list[list[str]]]:
    """Pictures, objects and captions of the shipped scenes."""
    instances = json.loads((scenes / "instances_scenes.json").read_text())
    written = json.loads((scenes / "captions_scenes.json").read_text())
    names = {category["id"]: category["name"] for category in instances["categories"]}
    objects: dict[int, list[str]] = {image["id"]: [] for image in instances["images"]}
    told: dict[int, list[str]] = {image["id"]: [] for image in instances["images"]}
    for box in instances["annotations"]:
        objects[box["image_id"]].append(names[box["category_id"]])
    for one in written["annotations"]:
        told[one["image_id"]].append(one["caption"])
    pictures = []
    for image in instances["images"]:
        with Image.open(scenes / "images" / image["file_name"]) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures, list(objects.values()), list(told.values())


def main() -> None:
    here = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(
        prog="python -m lvlm_fix.assets.recipe.clip_quality", description=__doc__
    )
    parser.add_argument("--clip", type=Path, default=here / "clip", help="folder of the OpenCLIP model")
    parser.add_argument(
        "--scenes", type=Path, default=here / "scenes", help="folder of the evaluation scenes"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    arguments = parser.parse_args()
    found = {"evaluation scenes": measure(arguments.clip, *evaluation_part(arguments.scenes))}
    rng, drawn = np.random.default_rng(13), [training_scene(HELD_OUT + number) for number in range(640)]
    seen = [[t.category for t in scene.things if t.category not in scene.hidden] for scene in drawn]
    told = [
        [caption(rng, [str(name) for name in rng.permutation(names)], scene.theme)]
        for names, scene in zip(seen, drawn, strict=True)
    ]
    hidden = [sorted(scene.hidden) for scene in drawn]
    pictures = [scene.image for scene in drawn]
    found["training-like scenes"] = measure(arguments.clip, pictures, seen, told, hidden)
    partial = arguments.out.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    partial.replace(arguments.out)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
