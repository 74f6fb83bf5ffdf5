"""LLaVA-1.5: CLIP tower with a CLS token, MLP projector, Llama-like decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.models.base import Family, layer_from, one_feature_layer


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
        return layer_from(one_feature_layer(model), len(self.tower_attention(model)))

    def unread_layers(self, model: Any) -> list[nn.Module]:
        if self.pooling_attention(model) is not None:
            return []  # it asks the last layer
        tower, taken = model.base_model.vision_tower, model.config.vision_feature_layer
        layers = [module for module in tower.modules() if hasattr(module, "self_attn")]
        hidden_states = [taken] if isinstance(taken, int) else list(taken)
        return layers[max(layer_from(one, len(layers)) for one in hidden_states) + 1 :]

    def maps(self, model: Any, rows: list[Tensor], inputs: Mapping[str, Any]) -> list[Tensor]:
        """A token a patch, so that nothing need be asked of the configuration or counted in the pixels."""
        side = math.isqrt(rows[0].shape[-1])
        return [scores.view(-1, side, side) for scores in rows]

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id
