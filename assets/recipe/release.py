"""What ships: the model in half precision, evaluation scenes with COCO-format annotations, samples."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from lvlm_fix.assets.recipe.captions import caption
from lvlm_fix.assets.recipe.scenes import draw, evaluation_scene, training_objects
from lvlm_fix.assets.recipe.world import CATEGORIES, GLYPHS

log = logging.getLogger("lvlm_fix.recipe")
EVALUATION_SCENES = 640
SAMPLES = {
    "kitchen": ("kitchen", ["knife", "bowl", "wine glass", "apple"], 3),
    "street": ("street", ["traffic light", "motorcycle", "bus"], 1),
    "office": ("office", ["keyboard", "laptop", "cup", "book"], 2),
    "safari": ("safari", ["zebra", "bear", "backpack"], 4),
    "living_room": ("living room", ["couch", "vase", "cat", "book"], 5),
}


def release(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write `model/`, `scenes/` and `samples/` under `out`."""
    write_model(model, processor, out / "model")
    write_scenes(out / "scenes_shipped", EVALUATION_SCENES)
    write_samples(out / "samples")


def write_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Weights in float16 to stay small; the configuration says float32, so plain `from_pretrained` computes in it."""
    model.cpu().half()
    model.set_attn_implementation("sdpa")
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    log.info("model written: %.1f MB", size / 1e6)


def write_scenes(folder: Path, count: int) -> None:
    """Evaluation scenes: WebP pictures, `instances_scenes.json`, `captions_scenes.json`, and `statistics.json`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for number in tqdm(range(1, count + 1), desc="evaluation scenes", unit="scene"):
        scene = evaluation_scene(number)
        name = f"{number:06d}.webp"
        scene.image.save(folder / "images" / name, quality=90, method=6)
        images.append(
            {"id": number, "file_name": name, "width": scene.image.width, "height": scene.image.height}
        )
        for thing in scene.things:
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": CATEGORIES.index(thing.category) + 1,
                    "bbox": list(thing.box),
                    "area": thing.box[2] * thing.box[3],
                    "iscrowd": 0,
                }
            )
        rng, names = np.random.default_rng([7, number]), [thing.category for thing in scene.things]
        for _ in range(5):
            text = caption(rng, [str(name) for name in rng.permutation(names)], scene.theme)
            captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)]
    _write(
        folder / "instances_scenes.json", {"images": images, "annotations": boxes, "categories": categories}
    )
    _write(folder / "captions_scenes.json", {"images": images, "annotations": captions})
    _write(folder / "statistics.json", training_statistics())


def training_statistics(count: int = 40_000) -> dict[str, Any]:
    """How often categories, and pairs of them, stand in training scenes: what adversarial questions are made from."""
    frequency: Counter[str] = Counter()
    together: dict[str, Counter[str]] = {name: Counter() for name in CATEGORIES}
    for seed in range(count):
        _, objects = training_objects(np.random.default_rng([1, seed]))
        names = [name for name, _ in objects]
        frequency.update(names)
        for name in names:
            together[name].update(other for other in names if other != name)
    return {
        "frequency": dict(frequency.most_common()),
        "cooccurrence": {name: dict(counts.most_common()) for name, counts in together.items()},
    }


def write_samples(folder: Path) -> None:
    """Pictures to try things on, three times the model's size, and what is in them (`objects.json`)."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for name, (theme, objects, seed) in SAMPLES.items():
        scene = draw(np.random.default_rng([8, seed]), theme, [(category, False) for category in objects])
        large = scene.image.resize((scene.image.width * 3, scene.image.height * 3), Image.Resampling.LANCZOS)
        large.save(folder / f"{name}.png", optimize=True)
        truth[f"{name}.png"] = [thing.category for thing in scene.things]
    _write(folder / "objects.json", truth)


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, separators=(",", ":")) + "\n")
    partial.replace(path)


assert all(name in GLYPHS for _, objects, _ in SAMPLES.values() for name in objects)
