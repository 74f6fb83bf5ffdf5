"""InternVL: InternViT tower with a CLS token, pixel shuffle of 2 x 2 patches, Qwen2- or Llama-like decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.models.base import Family, layer_from, one_feature_layer


class InternVL(Family):
    """`InternVLForConditionalGeneration`, among them InternVL 2.5 to 3.5 in the Hugging Face layout.

    The processor cuts a picture in tiles and adds a thumbnail. Each tile is an image here: `VTCCLS(keep=64)` keeps
    64 tokens of every tile and DAMRO takes its outliers from every tile. The frames of a video are tiles as well.
    """

    name: ClassVar[str] = "InternVL"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    # Of the published checkpoints; the image processor's class has CLIP's, which none of them uses.
    pixel_mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    pixel_std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)

    def tower_attention(self, model: Any) -> list[nn.Module]:
        config = model.config
        if (
            config.vision_feature_select_strategy != "default"
            or config.vision_config.model_type != "internvl_vision"
        ):
            raise UnsupportedModelError(
                f"this InternVL's vision tower ({config.vision_config.model_type}) has no CLS token that its features "
                "leave out (vision_feature_select_strategy is not 'default'): the methods here need InternViT"
            )
        return [layer.attention for layer in model.base_model.vision_tower.encoder.layer]

    def feature_layer(self, model: Any) -> int:
        return layer_from(one_feature_layer(model), len(self.tower_attention(model)))

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id

    def token_grids(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        # From the pixels, not from the configuration: the tower interpolates its positions for other sizes.
        tiles, _, height, width = inputs["pixel_values"].shape
        patch, kept = model.config.vision_config.patch_size, model.config.downsample_ratio
        return [(int(height // patch[0] * kept), int(width // patch[1] * kept))] * tiles
