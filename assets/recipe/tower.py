"""Stage one: the vision tower and its projector.

Three losses at once. The CLS token names the objects (multi-label), at the last layer and at the one before, so that
its attention lies where the objects are. Every image token, through the projector, is classified against the
decoder's own word embeddings (LLaVA's projector alignment in its densest form): the object it lies on, or background.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from lvlm_fix.assets.recipe.architecture import Preset
from lvlm_fix.assets.recipe.dataset import Scenes, order
from lvlm_fix.assets.recipe.scenes import BACKGROUND, UNCLEAR
from lvlm_fix.assets.recipe.training import train
from lvlm_fix.assets.recipe.world import CATEGORIES


class Heads(nn.Module):
    """What stage one needs and the shipped model does not: multi-label heads, a background word, a temperature."""

    def __init__(self, tower_width: int, decoder_width: int) -> None:
        super().__init__()
        self.labels = nn.Linear(tower_width, len(CATEGORIES))
        self.early_labels = nn.Linear(tower_width, len(CATEGORIES))
        self.background = nn.Parameter(torch.randn(decoder_width))
        self.temperature = nn.Parameter(torch.tensor(2.5))


class TowerObjective(nn.Module):
    """Pixels (B, 3, 144, 144), labels (B, categories) and patches (B, 144) in; the three losses out."""

    def __init__(self, model: LlavaForConditionalGeneration, heads: Heads, name_ids: list[list[int]]) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        words: Any = model.get_input_embeddings()
        self.words, self.heads = words, heads
        counts = torch.zeros(len(name_ids), words.num_embeddings)
        for row, ids in enumerate(name_ids):
            for token in ids:
                counts[row, token] += 1 / len(ids)
        self.name_weights: Tensor
        self.register_buffer("name_weights", counts, persistent=False)
        weights = torch.ones(len(name_ids) + 1)
        weights[-1] = 0.3  # three quarters of the image tokens are background
        self.class_weights: Tensor
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, pixels: Tensor, labels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.tower(pixels, output_hidden_states=True)
        late = F.binary_cross_entropy_with_logits(self.heads.labels(seen.pooler_output).float(), labels)
        early = F.binary_cross_entropy_with_logits(
            self.heads.early_labels(
                F.layer_norm(seen.hidden_states[-2][:, 0], seen.hidden_states[-2].shape[-1:])
            ).float(),
            labels,
        )
        tokens = self.projector(seen.hidden_states[-2][:, 1:])
        names = torch.cat([self.name_weights @ self.words.weight, self.heads.background[None]])
        scores = F.normalize(tokens.float(), dim=-1) @ F.normalize(names.float(), dim=-1).T
        aligned = F.cross_entropy(
            (scores * self.heads.temperature.exp()).flatten(0, 1),
            patches.flatten(),
            weight=self.class_weights,
            ignore_index=-1,
        )
        return late, early, aligned


def targets(scenes: Scenes, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Multi-label targets (B, categories) of what can be seen, and patch classes (B, 144) with -1 for unclear."""
    labels = torch.zeros(len(indices), len(CATEGORIES))
    for row, index in enumerate(indices):
        shown = scenes.objects[index][(scenes.objects[index] >= 0) & ~scenes.hidden[index]]
        labels[row, torch.from_numpy(shown.astype(np.int64))] = 1
    patches = torch.from_numpy(scenes.patches[indices].astype(np.int64))
    patches[patches == BACKGROUND] = len(CATEGORIES)
    patches[patches == UNCLEAR] = -1
    return labels, patches


def train_tower(
    model: LlavaForConditionalGeneration,
    name_ids: list[list[int]],
    scenes: Scenes,
    preset: Preset,
    folder: Path,
    seed: int,
) -> None:
    """Train tower, projector and word embeddings in place."""
    device = model.device
    heads = Heads(preset.tower_width, preset.decoder_width).to(device)
    objective = TowerObjective(model, heads, name_ids).to(device)
    run = torch.compile(objective, dynamic=False) if preset.compile else objective
    modules = nn.ModuleDict(
        {"tower": objective.tower, "projector": objective.projector, "words": objective.words, "heads": heads}
    )

    def loss_of(step: int) -> dict[str, Tensor]:
        indices = order(seed, step, len(scenes), preset.tower_batch)
        pixels, (labels, patches) = scenes.pixels(indices), targets(scenes, indices)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        flip = torch.rand(len(indices), generator=generator) < 0.5
        pixels[flip] = pixels[flip].flip(-1)
        patches[flip] = patches[flip].view(-1, 12, 12).flip(-1).flatten(1)
        light = 1 + 0.15 * torch.randn(len(indices), 1, 1, 1, generator=generator)
        late, early, aligned = run((pixels * light).to(device), labels.to(device), patches.to(device))
        return {"loss": 10 * late + 5 * early + aligned, "late": late, "early": early, "aligned": aligned}

    model.train()
    train("tower", modules, loss_of, folder, steps=preset.tower_steps, rate=1e-3)
    model.eval()
