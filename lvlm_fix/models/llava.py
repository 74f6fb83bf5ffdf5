"""LLaVA-1.5: CLIP tower with a CLS token, MLP projector, Llama-like decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.models.base import Family


class Llava(Family):
    """`LlavaForConditionalGeneration`, among them LLaVA-1.5 7B and 13B, BakLLaVA and the embedded LVLM."""

    name: ClassVar[str] = "LLaVA-1.5"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def tower_attention(self, model: Any) -> list[nn.Module]:
        tower = model.base_model.vision_tower
        layers = [
            module for module in tower.modules() if hasattr(module, "q_proj") and hasattr(module, "k_proj")
        ]
        if model.config.vision_feature_select_strategy != "default" or not layers:
            raise UnsupportedModelError(
                f"this LLaVA's vision tower ({tower.config.model_type}) has no CLS token that its features leave out "
                "(vision_feature_select_strategy is not 'default'): the methods here need a CLIP-like tower"
            )
        return layers

    def feature_layer(self, model: Any) -> int:
        layer, count = model.config.vision_feature_layer, len(self.tower_attention(model))
        if not isinstance(layer, int):
            raise UnsupportedModelError(
                f"this LLaVA joins the features of layers {list(layer)}: models that take one layer are supported"
            )
        # hidden_states[0] is the embedding, so hidden_states[k] is the output of layer k - 1
        return layer + count if layer < 0 else layer - 1

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id
