"""Stage two: the projector and the decoder, over the frozen tower.

The image's tokens are the cost and questions are nearly free, so each sequence is one image followed by eight turns
that cannot see one another: a turn attends to the image and to itself, with positions as if it stood alone. What is
trained is then what is used, a single question about a picture.

Most batches keep only a random part of the image tokens, in raster order with packed positions, from a handful up.
Objects none of whose tokens are kept count as absent: the model learns to say what its tokens show, and meets
pruned images (VTC-CLS) and DAMRO's negative branch prepared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from lvlm_fix.assets.recipe.architecture import Preset
from lvlm_fix.assets.recipe.captions import DESCRIBE, conversations
from lvlm_fix.assets.recipe.dataset import Scenes, order
from lvlm_fix.assets.recipe.scenes import BACKGROUND, UNCLEAR
from lvlm_fix.assets.recipe.training import train
from lvlm_fix.assets.recipe.world import THEMES

IMAGE_TOKENS = 144
BUCKETS = (24, 72, 144)  # most image tokens of a batch; the rest is masked, so only three shapes are compiled
BUCKET_CHANCES = (0.2, 0.25, 0.55)
TEXT_TOKENS = 160  # room for the turns of one image
TURNS = 8
IGNORED = -100


@dataclass
class Packed:
    """One batch of packed conversations; T = prefix + image tokens + turns.

    `ids`, `positions`, `labels` (B, T); `allowed` (B, T, T) bool; `kept` (B, N) which image tokens stand in the image
    slots; `described` (B, T) marks the answers of descriptions among the labels.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    allowed: Tensor
    kept: Tensor
    described: Tensor


class Packer:
    """Writes conversations about scenes as packed batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, scenes: Scenes) -> None:
        self.tokenizer, self.scenes = tokenizer, scenes
        head = tokenizer("USER: ").input_ids  # with the BOS token
        self.prefix, self.newline = head, tokenizer("\n", add_special_tokens=False).input_ids
        self.encode = lru_cache(maxsize=100_000)(
            lambda text: tokenizer(text, add_special_tokens=False).input_ids
        )

    def keep_tokens(self, rng: np.random.Generator, index: int, bucket: int) -> np.ndarray:
        """Sorted indices of the image tokens that stay: all, or a random part that leans towards objects."""
        if bucket == IMAGE_TOKENS and rng.random() < 0.7:
            return np.arange(IMAGE_TOKENS)
        least = {24: 6, 72: 25, 144: 73}[bucket]
        count = int(rng.integers(least, bucket + 1))
        weights = np.where(self.scenes.patches[index] == BACKGROUND, 1.0, rng.uniform(1.0, 6.0))
        return np.sort(rng.choice(IMAGE_TOKENS, count, replace=False, p=weights / weights.sum()))

    def named(self, index: int, kept: np.ndarray) -> list[str]:
        """The objects that are spoken of: hidden ones, and those of which a token is left."""
        shown = set(self.scenes.patches[index][kept].tolist()) - {BACKGROUND, UNCLEAR}
        names, objects, hidden = (
            self.scenes.names(index),
            self.scenes.objects[index],
            self.scenes.hidden[index],
        )
        return [
            name
            for name, o, h in zip(names, objects[: len(names)], hidden, strict=False)
            if h or int(o) in shown
        ]

    def batch(self, rng: np.random.Generator, indices: np.ndarray) -> Packed:
        bucket = int(rng.choice(BUCKETS, p=BUCKET_CHANCES))
        size, start = len(indices), len(self.prefix)
        stop = start + bucket
        total = stop + len(self.newline) + TEXT_TOKENS
        ids = np.zeros((size, total), dtype=np.int64)
        positions, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
        turn = np.full((size, total), -1)  # -1: belongs to every turn
        valid, described = np.zeros((size, total), dtype=bool), np.zeros((size, total), dtype=bool)
        kept = np.zeros((size, bucket), dtype=np.int64)
        for row, index in enumerate(indices):
            keep = self.keep_tokens(rng, int(index), bucket)
            kept[row, : len(keep)] = keep
            ids[row, :start] = self.prefix
            ids[row, stop : stop + len(self.newline)] = self.newline
            valid[row, : start + len(keep)] = valid[row, stop : stop + len(self.newline)] = True
            at = stop + len(self.newline)
            positions[row, :at] = np.cumsum(valid[row, :at]) - 1
            names, theme = self.named(int(index), keep), list(THEMES)[self.scenes.themes[index]]
            for number, (asked, answer) in enumerate(
                conversations(rng, names, theme, TURNS) if names else []
            ):
                question = self.encode(f"{asked} ASSISTANT:")
                reply = [*self.encode(f" {answer}"), self.tokenizer.eos_token_id]
                end = at + len(question) + len(reply)
                if end > total:
                    continue
                ids[row, at:end] = question + reply
                positions[row, at:end] = (
                    positions[row, stop + len(self.newline) - 1] + 1 + np.arange(end - at)
                )
                # shifted by one: a position predicts the next token
                labels[row, end - len(reply) - 1 : end - 1] = reply
                described[row, end - len(reply) - 1 : end - 1] = asked in DESCRIBE
                turn[row, at:end], valid[row, at:end] = number, True
                at = end
        turns = torch.from_numpy(turn)
        allowed = (turns[:, None, :] == -1) | (turns[:, None, :] == turns[:, :, None])
        allowed &= torch.from_numpy(valid)[:, None, :] & torch.ones(total, total, dtype=torch.bool).tril()
        return Packed(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
            allowed=allowed,
            kept=torch.from_numpy(kept),
            described=torch.from_numpy(described),
        )


class DecoderObjective(nn.Module):
    """Tower features (B, N, width) and a packed batch in; losses of descriptions and of yes/no answers out."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.projector, self.head = model.model.multi_modal_projector, model.lm_head
        self.language_model = model.model.language_model

    def forward(
        self,
        features: Tensor,
        ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        bias: Tensor,
        described: Tensor,
        start: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        words = self.language_model.embed_tokens(ids)
        image = self.projector(features).to(words.dtype)
        stop = start + features.shape[1]
        embeddings = torch.cat([words[:, :start], image, words[:, stop:]], dim=1)
        hidden = self.language_model(
            inputs_embeds=embeddings, attention_mask=bias, position_ids=positions, use_cache=False
        ).last_hidden_state
        logits = self.head(hidden[:, stop:]).float()
        wanted, told = labels[:, stop:], described[:, stop:]
        losses = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
        )
        losses, asked = losses.view_as(wanted), (wanted != IGNORED) & ~told
        right = ((logits.argmax(-1) == wanted) & asked).sum() / asked.sum()
        return losses[told].sum() / told.sum(), losses[asked].sum() / asked.sum(), right


@torch.no_grad()
def tower_features(
    model: LlavaForConditionalGeneration, scenes: Scenes, batch: int = 100, compiled: bool = True
) -> Tensor:
    """Image tokens of all scenes as the projector meets them: (S, 144, width), bfloat16."""
    device, parts = model.device, []
    tower = model.model.vision_tower
    tower = torch.compile(tower, dynamic=False) if compiled else tower
    for first in tqdm(range(0, len(scenes), batch), desc="tower features", unit=f"x{batch} scenes"):
        pixels = scenes.pixels(np.arange(first, min(first + batch, len(scenes)))).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        parts.append(hidden.bfloat16().cpu())
    return torch.cat(parts)


def train_decoder(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scenes: Scenes, preset: Preset,
    folder: Path, seed: int,
) -> None:  # fmt: skip
    """Train projector and decoder in place."""
    device = model.device
    features = tower_features(model, scenes, compiled=preset.compile)
    packer, objective = Packer(tokenizer, scenes), DecoderObjective(model)
    run = torch.compile(objective, dynamic=False) if preset.compile else objective
    modules = nn.ModuleDict({"objective": objective})

    def loss_of(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([6, seed, step])
        indices = order(seed + 1, step, len(scenes), preset.decoder_batch)
        packed = packer.batch(rng, indices)
        chosen = features[torch.from_numpy(indices)[:, None], packed.kept].to(device)
        bias = torch.zeros(packed.allowed.shape, dtype=torch.bfloat16).masked_fill_(~packed.allowed, -1e9)[
            :, None
        ]
        told, asked, right = run(
            chosen, packed.ids.to(device), packed.positions.to(device), packed.labels.to(device),
            bias.to(device), packed.described.to(device), len(packer.prefix),
        )  # fmt: skip
        return {"loss": told + asked, "described": told, "yes_no": asked, "right": right.detach()}

    model.train()
    train("decoder", modules, loss_of, folder, steps=preset.decoder_steps, rate=1e-3, decay=0.1)
    model.eval()
