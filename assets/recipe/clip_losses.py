"""What the OpenCLIP model is trained on: contrast, wrong captions, names, and image tokens."""

from __future__ import annotations

import math

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lvlm_fix.assets.recipe import scenes
from lvlm_fix.assets.recipe.world import CATEGORIES

PATCH = 16  # pixels; with the LVLM's 12 a step takes twice as long
SIDE = scenes.SIZE // PATCH


class Extra(nn.Module):
    """What the training needs and the shipped model does not: a background word, temperatures and a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.background = nn.Parameter(torch.randn(width))
        self.patch_temperature = nn.Parameter(torch.tensor(2.5))
        self.name_temperature = nn.Parameter(torch.tensor(2.5))
        self.name_bias = nn.Parameter(torch.tensor(-3.0))


class ClipObjective(nn.Module):
    """Four losses.

    `clip` is OpenCLIP's own contrastive loss over the batch. `wrong` tells each picture's caption from its wrong
    ones. `named` tells which objects' names belong to a picture, `dense` which name belongs to which image token;
    without these two, learning what the objects look like takes far longer than the rest.
    """

    def __init__(self, model: open_clip.CLIP, extra: Extra) -> None:
        super().__init__()
        self.model, self.extra, self.contrast = model, extra, open_clip.ClipLoss()
        weights = torch.ones(len(CATEGORIES) + 1)
        weights[-1] = 0.3  # three quarters of the image tokens are background
        self.class_weights: Tensor
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(
        self, pixels: Tensor, texts: Tensor, names: Tensor, labels: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels (B, 3, 144, 144), captions (B, 1 + wrong, context) the right one first, names (categories, context),
        labels (B, categories), patches (B, 81)."""
        visual, batch = self.model.visual, len(pixels)
        pooled, tokens = visual(pixels)
        tokens = tokens @ visual.proj
        image = F.normalize(pooled.float(), dim=-1)
        said, named = self._encode(texts.flatten(0, 1)).unflatten(0, texts.shape[:2]), self._encode(names)
        scale = self.model.logit_scale.exp()
        contrast = self.contrast(image, said[:, 0], scale)
        own = scale * (said @ image[:, :, None]).squeeze(-1)
        wrong = F.cross_entropy(own, own.new_zeros(batch, dtype=torch.long))
        logits = image @ named.T * self.extra.name_temperature.exp() + self.extra.name_bias
        naming = F.binary_cross_entropy_with_logits(logits, labels)
        words = torch.cat([named, F.normalize(self.extra.background, dim=0)[None]])
        scores = F.normalize(tokens.float(), dim=-1) @ words.T * self.extra.patch_temperature.exp()
        dense = F.cross_entropy(
            scores.flatten(0, 1), patches.flatten(), weight=self.class_weights, ignore_index=-1
        )
        return contrast, wrong, naming, dense

    def _encode(self, texts: Tensor) -> Tensor:
        """What `encode_text` gives, normalised, without the time that it spends on padding."""
        model, ends = self.model, (texts == self.model.text_eos_id).int().argmax(-1)
        length = int(ends.max()) + 1
        words = model.token_embedding(texts[:, :length]) + model.positional_embedding[:length]
        words = model.transformer(words, attn_mask=model.attn_mask[:length, :length])
        last = model.ln_final(words)[torch.arange(len(texts)), ends]
        return F.normalize((last @ model.text_projection).float(), dim=-1)


def coarser(patches: Tensor) -> Tensor:
    """Classes (B, 144) of the LVLM's patches of 12 pixels as classes (B, 81) of this model's of 16; -1 is unclear.

    A patch shows an object where at least a quarter of it does, and background where all of it does.
    """
    unit = math.gcd(scenes.PATCH, PATCH)
    fine = patches.view(-1, scenes.SIZE // scenes.PATCH, scenes.SIZE // scenes.PATCH)
    fine = fine.repeat_interleave(scenes.PATCH // unit, 1).repeat_interleave(scenes.PATCH // unit, 2)
    parts = fine.unfold(1, PATCH // unit, PATCH // unit).unfold(2, PATCH // unit, PATCH // unit)
    parts = parts.reshape(len(patches), SIDE * SIDE, -1)
    counts = F.one_hot(parts + 1, len(CATEGORIES) + 2).sum(2)
    most, label = counts[..., 1:-1].max(-1)
    label = torch.where(most * 4 >= parts.shape[-1], label, torch.full_like(label, -1))
    return torch.where(counts[..., -1] == parts.shape[-1], torch.full_like(label, len(CATEGORIES)), label)
