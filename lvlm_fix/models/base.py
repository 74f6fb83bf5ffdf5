"""What a family of models must tell: where its tower, its image tokens and its features are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class Family(ABC):
    """One family of LVLMs. A subclass is the only place that knows the family's attribute names."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of `config.model_type` that belong to the family."""

    @abstractmethod
    def tower_attention(self, model: nn.Module) -> list[nn.Module]:
        """Self-attention modules of the vision tower's layers, first to last, each with `q_proj` and `k_proj`."""

    @abstractmethod
    def feature_layer(self, model: nn.Module) -> int:
        """Index of the tower layer whose output the projector takes."""

    @abstractmethod
    def image_token_id(self, model: nn.Module) -> int:
        """Id of the placeholder that each image token takes in the prompt."""

    def encoder(self, model: Any) -> Any:
        """The module whose `get_image_features` makes the image tokens."""
        return model.base_model

    def grid(self, model: nn.Module, tokens: int) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else (1, tokens)

    def features(self, encoded: Any) -> list[Tensor]:
        """Projected image tokens, one (N, C) tensor an image, from what `get_image_features` returned."""
        return list(getattr(encoded, "pooler_output", encoded))
