"""The third stage, on its own: a small OpenCLIP model of the same world, which judges captions by CLIPScore.

It shares no weight and no training scene with the LVLM that it judges: a judge with the same eyes would make the
same mistakes. Captions name only what can be seen, and every caption comes with wrong ones that differ in one object,
most often in the usual company: telling those apart is all that this model is for.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from lvlm_fix.assets.recipe import captions, scenes
from lvlm_fix.assets.recipe.clip_losses import PATCH, SIDE, ClipObjective, Extra, coarser
from lvlm_fix.assets.recipe.dataset import Scenes, order
from lvlm_fix.assets.recipe.tower import targets
from lvlm_fix.assets.recipe.training import train
from lvlm_fix.assets.recipe.world import CATEGORIES, THEMES

log = logging.getLogger("lvlm_fix.recipe")
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
# Preprocessing as the training has it: resized to a square, never cropped, CLIP's own mean and deviation.
PREPROCESS = {
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


@dataclass(frozen=True)
class ClipPreset:
    """Sizes of the two towers and length of the training."""

    embed: int
    width: int
    layers: int
    head_width: int
    text_width: int
    text_layers: int
    text_heads: int
    context: int
    scenes: int
    steps: int
    complete_steps: int
    batch: int


PRESETS = {
    "cpu": ClipPreset(192, 192, 4, 64, 128, 2, 4, 48, 40_000, 1_500, 300, 64),
    "gpu": ClipPreset(256, 256, 8, 64, 256, 4, 4, 48, 120_000, 12_000, 1_500, 256),
    "smoke": ClipPreset(16, 32, 2, 16, 16, 1, 2, 48, 64, 8, 4, 8),
}


def build_clip_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The LVLM's vocabulary with an end token, at which OpenCLIP's text tower reads its result; padded on the right."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_config(preset: ClipPreset, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What `open_clip_config.json` holds; `model_cfg` are the arguments of `open_clip.CLIP`."""
    return {
        "model_cfg": {
            "embed_dim": preset.embed,
            "vision_cfg": {
                "image_size": scenes.SIZE,
                "patch_size": PATCH,
                "width": preset.width,
                "layers": preset.layers,
                "head_width": preset.head_width,
            },
            "text_cfg": {
                "context_length": preset.context,
                "vocab_size": len(tokenizer),
                # open_clip reads the tokenizer from the checkpoint's own folder and asks only that a name is given
                "hf_tokenizer_name": "local",
                "width": preset.text_width,
                "layers": preset.text_layers,
                "heads": preset.text_heads,
                "pool_type": "eos",
                "pad_id": tokenizer.pad_token_id,
                "eos_id": tokenizer.eos_token_id,
            },
        },
        "preprocess_cfg": PREPROCESS,
        # Read by lvlm_fix.evals.clipscore: captions were learnt as they stand, without the paper's prefix.
        "clipscore": {"prefix": ""},
    }


def right_and_wrong(
    rng: np.random.Generator, seen: list[str], present: set[str], theme: str, left_out: bool = True
) -> list[str]:
    """A caption of the objects `seen`, then the same with one swapped, with an absent one added, with one left out.

    `present` are all objects of the scene, for hidden ones are not absent; without `left_out` the last is not made.
    """
    names = [str(name) for name in rng.permutation(seen)]
    absent, added = captions.absent_objects(rng, present, theme, 2)
    swapped = list(names)
    swapped[int(rng.integers(len(names)))] = absent
    longer = list(names)
    longer.insert(int(rng.integers(len(names) + 1)), added)
    told = [names, swapped, longer]
    if left_out:
        one = int(rng.integers(len(names)))
        told.append(names[:one] + names[one + 1 :])
    return [captions.caption(rng, listed, theme) for listed in told]


class Texts:
    """Captions as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context

    def __call__(self, texts: list[str]) -> Tensor:
        """(texts, context) int64."""
        encoded = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.context)
        return torch.tensor(encoded["input_ids"])

    def batch(self, drawn: Scenes, indices: np.ndarray, seed: int, step: int, left_out: bool) -> Tensor:
        """(B, 3 or, with `left_out`, 4, context): each scene's caption and its wrong ones."""
        rng = np.random.default_rng([11, seed, step])
        texts: list[str] = []
        for index in indices:
            present = drawn.names(index)
            seen = [name for name, hidden in zip(present, drawn.hidden[index], strict=False) if not hidden]
            theme = list(THEMES)[drawn.themes[index]]
            texts += right_and_wrong(rng, seen, set(present), theme, left_out)
        return self(texts).view(len(indices), -1, self.context)


def train_clip(
    tokenizer: PreTrainedTokenizerFast,
    drawn: Scenes,
    preset: ClipPreset,
    folder: Path,
    seed: int,
    device: str,
) -> open_clip.CLIP:
    """Train the model from scratch, or go on where an earlier run in `folder` stopped.

    Two stages. In the first every wrong caption is as long as the right one or longer, and the model learns, besides
    what the objects look like, that short captions are right. The second, short one adds wrong captions that leave
    an object out, and unteaches that.
    """
    torch.manual_seed(seed)
    model = open_clip.CLIP(**build_config(preset, tokenizer)["model_cfg"]).to(device)
    model.visual.output_tokens = True
    extra = Extra(preset.embed).to(device)
    objective = ClipObjective(model, extra).to(device)
    texts = Texts(tokenizer, preset.context)
    names = texts([f"There is {captions.with_article(name)}." for name in CATEGORIES]).to(device)

    def loss_of(step: int, left_out: bool = False) -> dict[str, Tensor]:
        with torch.no_grad():  # as OpenCLIP's own training holds it
            model.logit_scale.clamp_(0, math.log(100))
        indices = order(seed + 1_000, step, len(drawn), preset.batch)
        pixels, (labels, patches) = drawn.pixels(indices), targets(drawn, indices)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        flip = torch.rand(len(indices), generator=generator) < 0.5
        pixels[flip] = pixels[flip].flip(-1)
        patches = coarser(patches)
        patches[flip] = patches[flip].view(-1, SIDE, SIDE).flip(-1).flatten(1)
        light = 1 + 0.15 * torch.randn(len(indices), 1, 1, 1, generator=generator)
        inputs = (pixels * light, texts.batch(drawn, indices, seed, step, left_out), names, labels, patches)
        # On a CPU the backward pass of fused attention takes several times as long as the plain one's.
        with sdpa_kernel(SDPBackend.MATH):
            contrast, wrong, naming, dense = objective(*(part.to(device) for part in inputs))
        total = contrast + wrong + 5 * naming + dense
        return {"loss": total, "clip": contrast, "wrong": wrong, "named": naming, "dense": dense}

    model.train()
    modules = nn.ModuleDict({"clip": model, "extra": extra})
    every = min(200, max(1, preset.steps // 4))
    train("clip", modules, loss_of, folder, steps=preset.steps, rate=1e-3, every=every)

    def complete(step: int) -> dict[str, Tensor]:
        return loss_of(preset.steps + step, left_out=True)

    train("clip_complete", modules, complete, folder, steps=preset.complete_steps, rate=4e-4, every=every)
    model.visual.output_tokens = False
    return model.eval()


def write_clip(
    model: open_clip.CLIP, tokenizer: PreTrainedTokenizerFast, preset: ClipPreset, folder: Path
) -> None:
    """Write weights in float16, configuration and tokenizer as `open_clip.create_model("local-dir:...")` loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = json.dumps(build_config(preset, tokenizer), indent=2) + "\n"
    weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    for name, write in (
        (CONFIG, lambda path: path.write_text(config)),
        (WEIGHTS, lambda path: save_file(weights, path, metadata={"format": "pt"})),
    ):
        partial = folder / f"{name}.partial"
        write(partial)
        partial.chmod(0o644)  # safetensors lets nobody else read it
        partial.replace(folder / name)
    size = sum(file.stat().st_size for file in folder.iterdir())
    log.info("OpenCLIP model written: %.1f MB, %s", size / 1e6, asdict(preset))
