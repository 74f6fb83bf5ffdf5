"""What a family of models must tell: where its tower, its image tokens, its features and its decoder are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.vision import VisionEncoding


class Family(ABC):
    """One family of LVLMs. A subclass is the only place that knows the family's attribute names.

    An *image* is what one entry of `features` holds; a *crop* is what goes through the tower as one sequence. Most
    families need only the abstract methods: one crop an image, its tokens in raster order.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of `config.model_type` that belong to the family."""
    has_cls: ClassVar[bool] = True
    """Whether the tower's sequence begins with a CLS token."""
    full_width: ClassVar[bool] = True
    """Whether DAMRO's row is one softmax over the full width (its LLaVA code), or the mean over heads."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """Name of a method that makes no sense in the family -> why."""
    pixel_mean: ClassVar[tuple[float, ...]] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: ClassVar[tuple[float, ...]] = (0.26862954, 0.26130258, 0.27577711)
    """What the family's image processor subtracts and divides by, where it is not asked."""

    # -- vision

    @abstractmethod
    def tower_attention(self, model: Any) -> list[nn.Module]:
        """Attention modules of the tower layers whose scores are read, first to last.

        Raises:
            UnsupportedModelError: this model's tower is not one the family knows.
        """

    @abstractmethod
    def feature_layer(self, model: Any) -> int:
        """Index in `tower_attention` of the layer whose output the projector takes."""

    def pooling_attention(self, model: Any) -> nn.MultiheadAttention | None:
        """Of a tower without a CLS token, the attention with which one query pools its patches; None without one."""
        return None

    def tower(self, model: Any) -> nn.Module:
        """The vision tower, from pixels to hidden states."""
        return model.base_model.vision_tower

    def unread_layers(self, model: Any) -> list[nn.Module]:
        """Tower layers above all that `get_image_features` reads; each takes hidden states and returns others."""
        return []

    @abstractmethod
    def image_token_id(self, model: Any) -> int:
        """Id of the placeholder that each image token takes in the prompt."""

    def encoder(self, model: Any) -> Any:
        """The module whose `get_image_features` makes the image tokens."""
        return model.base_model

    def features(self, encoded: Any) -> list[Tensor]:
        """Projected image tokens, one (N, C) tensor an image, from what `get_image_features` returned."""
        features = getattr(encoded, "pooler_output", encoded)
        return features if isinstance(features, list) else list(features)

    def images(self, features: list[Tensor], inputs: Mapping[str, Any]) -> list[Tensor]:
        """The entries of `features` joined to images, where this version of transformers gives smaller ones."""
        return features

    def with_features(self, encoded: Any, features: list[Tensor]) -> Any:
        """`encoded` handing on these very tensors, by whose identity the prefill knows its images."""
        if not hasattr(encoded, "pooler_output"):
            return features
        if encoded.pooler_output is not features:
            encoded.pooler_output = features
        return encoded

    def pixels(self, model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The crops (3, H, W) that went through the tower, from the arguments of `get_image_features`."""
        return list(inputs["pixel_values"].flatten(0, -4).unbind())

    def token_grids(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of each crop's image tokens, after any merging of patches."""
        side = math.isqrt(self.features_per_crop(model))
        return [(side, side)] * len(self.pixels(model, inputs))

    def features_per_crop(self, model: Any) -> int:
        """Image tokens of a crop, in families whose crops are all of one size."""
        vision = model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def maps(self, model: Any, rows: list[Tensor], inputs: Mapping[str, Any]) -> list[Tensor]:
        """Scores (S, rows, columns) of each crop's image tokens from those of its patches, (S, P) in raster order.

        Where the projector merges blocks of patches, a token's score is the mean over its block.
        """
        grids = self.token_grids(model, inputs)
        return [_merge(scores, grid) for scores, grid in zip(rows, grids, strict=True)]

    def arrange(
        self, model: Any, maps: list[Tensor], inputs: Mapping[str, Any]
    ) -> list[tuple[Tensor, tuple[int, int], Tensor | None]]:
        """Of each image: scores (S, N) of its tokens, its grid, and the crop (N,) of each token (None for one crop)."""
        return [(scores.flatten(1), (scores.shape[1], scores.shape[2]), None) for scores in maps]

    def encodings(
        self, model: Any, maps: list[Tensor], inputs: Mapping[str, Any], source: str
    ) -> list[VisionEncoding]:
        """One encoding an image, from the score maps of its crops, whose last row is the feature layer's."""
        return [
            VisionEncoding(scores[:-1], scores[-1], grid, crops, source)
            for scores, grid, crops in self.arrange(model, maps, inputs)
        ]

    # -- prompt

    def positions(
        self, model: Any, input_ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]
    ) -> Tensor | None:
        """Positions (P, R, L) that tokens keep when others are dropped; None where positions are counted anew."""
        return None

    def negative_features(
        self, model: Any, features: Tensor, indices: Tensor, context: Mapping[str, Any], image: int
    ) -> tuple[Tensor, Tensor]:
        """What a negative branch sees of image `image`: its tokens (K, C), and which placeholders (K,) they take.

        Args:
            features: (N, C) image tokens.
            indices: (K,) of the tokens that the method's negative branch sees.
            context: the arguments of `get_image_features`, and under `result` what it returned.
            image: the image's place among those encoded together.
        """
        return features[indices.to(features.device)], indices

    # -- decoder

    def decoder(self, model: Any) -> Any:
        """The text model: `layers`, each with `self_attn`, and `config`."""
        return model.get_decoder()

    def generator(self, model: Any) -> Any:
        """The module whose `forward` `generate` calls."""
        return model

    def finds_images(self, embeddings: Tensor, features: list[Tensor]) -> Tensor | None:
        """Where the image tokens stand, (R, L) bool, in families whose generator gets embeddings, not ids."""
        return None

    def decoder_attention(self, model: Any) -> list[nn.Module]:
        """Self-attention modules of the decoder's layers, first to last."""
        return [layer.self_attn for layer in self.decoder(model).layers]


def layer_from(hidden_state: int, layers: int) -> int:
    """Tower layer whose output is `hidden_states[hidden_state]`; hidden_states[0] is the embedding."""
    return hidden_state + layers if hidden_state < 0 else hidden_state - 1


def one_feature_layer(model: Any) -> int:
    """`config.vision_feature_layer` of a model.

    Raises:
        UnsupportedModelError: it joins the features of several layers.
    """
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"this {type(model).__name__} joins the features of layers {list(layer)}: models that take one layer are "
            "supported"
        )
    return layer


def _merge(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """(S, P) scores of patches to (S, rows, columns) of tokens, each the mean over its square block."""
    rows, columns = grid
    block = math.isqrt(scores.shape[-1] // (rows * columns))
    if rows * columns * block**2 != scores.shape[-1]:
        raise UnsupportedModelError(
            f"the tower gives {scores.shape[-1]} patches a crop, which do not merge into {rows} x {columns} image "
            "tokens"
        )
    if block == 1:
        return scores.reshape(-1, rows, columns)
    return scores.reshape(-1, rows, block, columns, block).mean((2, 4))
