"""Does the model show what the methods act on? Measured on evaluation scenes, with a picture.

`python -m lvlm_fix.assets.recipe.phenomena --model DIR --scenes DIR --out DIR` writes `phenomena.json` and
`phenomena.png`: outlier tokens of the vision tower (DAMRO), sink tokens of the decoder (VAR), how concentrated CLS
attention (VTC-CLS) and the decoder's attention (ZipVL) are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from lvlm_fix.functional import cls_scores

PROMPT = "Describe the image."
SHARE = 0.975  # ZipVL's tau


def covered(boxes: list[list[int]], size: int, grid: int) -> np.ndarray:
    """Image tokens (grid * grid,) bool at least a quarter of which lies in some object's box."""
    inside = np.zeros((size, size), dtype=bool)
    for x, y, width, height in boxes:
        inside[y : y + height, x : x + width] = True
    side = size // grid
    return inside.reshape(grid, side, grid, side).mean((1, 3)).reshape(-1) >= 0.25


class Probe:
    """Hooks that keep the tower's queries and keys and the decoder's inputs of one forward pass."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.inputs: list[Tensor] = []
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.q_proj.register_forward_hook(
                lambda module, given, made: self.queries.append(made)
            )
            layer.self_attn.k_proj.register_forward_hook(lambda module, given, made: self.keys.append(made))
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(lambda module, given: self.inputs.append(given[0]))

    @torch.inference_mode()
    def run(self, inputs: Any) -> dict[str, Tensor]:
        """CLS scores, feature norms, normalised activations and decoder attention of one picture."""
        self.queries, self.keys, self.inputs = [], [], []
        features = self.model.model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
        output = self.model(**inputs, output_attentions=True)
        heads = self.model.config.vision_config.num_attention_heads
        per_layer = [cls_scores(q, k, heads)[0] for q, k in zip(self.queries, self.keys, strict=True)]
        count = self.model.config.vision_config.num_hidden_layers
        width_wide = cls_scores(self.queries[count - 2], self.keys[count - 2], 1)[0]
        hidden = torch.stack([given[0] for given in self.inputs])  # (layers, T, C)
        return {
            "layer_scores": torch.stack(per_layer[:count]),
            "feature_scores": width_wide,
            "norms": features.hidden_states[-2][0, 1:].norm(dim=-1),
            "activations": hidden.abs() / hidden.pow(2).mean(-1, keepdim=True).sqrt(),
            "attention": torch.stack([weights[0, :, -1] for weights in output.attentions]),  # (layers, H, T)
        }


def tokens_for(share: float, weights: Tensor) -> float:
    """Fraction of tokens that together hold `share` of the weight, mean over leading dimensions."""
    ordered = weights.sort(-1, descending=True).values
    needed = (ordered.cumsum(-1) < share * ordered.sum(-1, keepdim=True)).sum(-1) + 1
    return float(needed.float().mean() / weights.shape[-1])


def measure(
    folder: Path, scenes: Path, count: int
) -> tuple[dict[str, Any], list[tuple[Image.Image, Any, Any]]]:
    """All numbers over the first `count` scenes, and what is needed to draw the first six."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(folder)
    annotations = json.loads((scenes / "instances_scenes.json").read_text())
    boxes: dict[int, list[list[int]]] = {}
    for box in annotations["annotations"]:
        boxes.setdefault(box["image_id"], []).append(box["bbox"])
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    probe, rows = Probe(model), []
    drawn: list[tuple[Image.Image, Any, Any]] = []
    token = model.config.image_token_id
    for record in tqdm(annotations["images"][:count], desc="phenomena", unit="scene"):
        image = Image.open(scenes / "images" / record["file_name"]).convert("RGB")
        inputs = processor(images=image, text=text, return_tensors="pt")
        seen = probe.run(inputs)
        grid = int(len(seen["feature_scores"]) ** 0.5)
        on_object = torch.from_numpy(covered(boxes[record["id"]], record["width"], grid))
        is_image = inputs["input_ids"][0] == token
        rows.append(_row(seen, on_object, is_image))
        if len(drawn) < 6:
            drawn.append((image, seen["feature_scores"], seen["layer_scores"][-4:-1].sum(0)))
    numbers = {
        key: float(np.mean([row[key] for row in rows])) for key in rows[0] if not key.startswith("largest")
    }
    numbers |= {
        key: float(np.max([row[key] for row in rows])) for key in rows[0] if key.startswith("largest")
    }
    width = model.config.text_config.hidden_size
    numbers |= {
        "scenes": len(rows),
        "most_possible_activation": width**0.5,
        "sink_threshold": 20 / 4096**0.5 * width**0.5,
    }
    return {key: round(value, 4) for key, value in numbers.items()}, drawn


def _row(seen: dict[str, Tensor], on_object: Tensor, is_image: Tensor) -> dict[str, float]:
    norms, scores, ensemble = seen["norms"], seen["feature_scores"], seen["layer_scores"][-4:-1].sum(0)
    half = len(scores) // 2
    late = seen["activations"][2:]  # VAR looks from the third layer on
    attention = seen["attention"].mean(1)
    return {
        "object_share_of_tokens": float(on_object.float().mean()),
        "top10_cls_on_objects": float(on_object[scores.topk(10).indices].float().mean()),
        "top10_norm_on_objects": float(on_object[norms.topk(10).indices].float().mean()),
        "cls_weight_on_objects": float(ensemble[on_object].sum() / ensemble.sum()),
        "object_tokens_in_top_half_by_cls": float(
            on_object[ensemble.topk(half).indices].sum() / on_object.sum().clamp(min=1)
        ),
        "largest_norm_over_median": float(norms.max() / norms.median()),
        "mean_largest_norm_over_median": float(norms.max() / norms.median()),
        "largest_activation_bos": float(late[:, 0].max()),
        "largest_activation_text": float(late[:, 1:][:, ~is_image[1:]].max()),
        "largest_activation_image": float(late[:, is_image].max()),
        "attention_to_bos": float(attention[:, 0].mean()),
        "attention_to_image": float(attention[:, is_image].sum(-1).mean()),
        "tokens_for_97.5_percent_of_attention": tokens_for(SHARE, seen["attention"].mean(1)),
    }


def draw(drawn: list[tuple[Image.Image, Any, Any]], path: Path) -> None:
    """Three rows: the scenes, DAMRO's ten outlier tokens over CLS attention, the half that VTC-CLS keeps."""
    side = 216
    sheet = Image.new("RGB", (side * len(drawn), side * 3), "white")
    for column, (image, scores, ensemble) in enumerate(drawn):
        grid = int(len(scores) ** 0.5)
        cell = side // grid
        large = image.resize((side, side), Image.Resampling.LANCZOS)
        heat = (scores / scores.max()).reshape(grid, grid).numpy()
        shade = Image.fromarray((heat**0.5 * 255).astype(np.uint8)).resize(
            (side, side), Image.Resampling.NEAREST
        )
        lit = Image.composite(large, Image.blend(large, Image.new("RGB", large.size, "black"), 0.75), shade)
        pen = ImageDraw.Draw(lit)
        for index in scores.topk(10).indices.tolist():
            x, y = index % grid * cell, index // grid * cell
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline="#ff9500", width=2)
        kept = torch.zeros(grid * grid)
        kept[ensemble.topk(grid * grid // 2).indices] = 1
        mask = Image.fromarray((kept.reshape(grid, grid).numpy() * 255).astype(np.uint8))
        pruned = Image.composite(large, Image.new("RGB", large.size, "#202020"), mask.resize((side, side), 0))
        for row, picture in enumerate((large, lit, pruned)):
            sheet.paste(picture, (column * side, row * side))
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lvlm_fix.assets.recipe.phenomena", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="scenes to measure on")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers, drawn = measure(arguments.model, arguments.scenes, arguments.count)
    draw(drawn, arguments.out / "phenomena.png")
    text = json.dumps(numbers, indent=2)
    (arguments.out / "phenomena.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
