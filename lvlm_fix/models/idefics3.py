"""Idefics3 and SmolVLM: SigLIP tower without a CLS token, pixel shuffle, Llama-like decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lvlm_fix.models.base import Family


class Idefics3(Family):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`.

    The processor cuts a picture in tiles and adds the whole picture, made small. The model hands on the tokens of all
    tiles of a prompt in one piece, so an image here is *all pictures of one prompt*, and a crop is a tile:
    `VTCCLS(keep=64)` keeps 64 tokens a prompt, DAMRO takes its outliers from every tile. The frames of a video are
    tiles as well.
    """

    name: ClassVar[str] = "Idefics3 and SmolVLM"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    has_cls: ClassVar[bool] = False
    pixel_mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    pixel_std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def tower(self, model: Any) -> nn.Module:
        return model.base_model.vision_model

    def tower_attention(self, model: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in model.base_model.vision_model.encoder.layers]

    def feature_layer(self, model: Any) -> int:
        return len(self.tower_attention(model)) - 1

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id

    def features(self, encoded: Any) -> list[Tensor]:
        # A prompt without pictures has an entry of no tokens, which is no image.
        return [feature for feature in super().features(encoded) if len(feature)]

    def images(self, features: list[Tensor], inputs: Mapping[str, Any]) -> list[Tensor]:
        tiles = [count for count in _real_tiles(inputs).sum(1).tolist() if count]
        if len(features) == len(tiles):
            return features
        # Older transformers: an entry a tile.
        return [torch.cat(part) for part in _parts(features, tiles)]

    def pixels(self, model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
        return list(inputs["pixel_values"][_real_tiles(inputs)])

    def token_grids(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        height, width = inputs["pixel_values"].shape[-2:]
        block = model.config.vision_config.patch_size * model.config.scale_factor
        return [(height // block, width // block)] * int(_real_tiles(inputs).sum())

    def arrange(
        self, model: Any, maps: list[Tensor], inputs: Mapping[str, Any]
    ) -> list[tuple[Tensor, tuple[int, int], Tensor | None]]:
        images, start = [], 0
        for tiles in _real_tiles(inputs).sum(1).tolist():
            own = maps[start : start + tiles]
            start += tiles
            if tiles == 1:
                images += super().arrange(model, own, inputs)
            elif tiles:
                scores = torch.cat([tile.flatten(1) for tile in own], dim=1)
                crops = torch.arange(tiles, device=scores.device).repeat_interleave(own[0][0].numel())
                images.append((scores, (1, scores.shape[1]), crops))
        return images


def _real_tiles(inputs: Mapping[str, Any]) -> Tensor:
    """Tiles (B, T) bool that are not the zeros with which the model fills up prompts of fewer tiles."""
    pixels = inputs["pixel_values"]
    return (pixels != 0).flatten(2).any(2)


def _parts(tiles: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    rest = iter(tiles)
    return [[next(rest) for _ in range(count)] for count in counts]
