"""LLaVA-NeXT (LLaVA-1.6): a CLIP tower over the whole picture and over crops of it, newline tokens between rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvlm_fix.models.llava import Llava


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`: anyres crops, unpadding, newline tokens.

    A picture's tokens are those of the whole picture, then the crops' joined to one map, cut to the picture and with a
    newline token after each row. Scores go the way of the features, through the model's own `pack_image_features`.
    """

    name: ClassVar[str] = "LLaVA-NeXT"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)

    def pixels(self, model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Pictures of fewer crops are filled up with empty ones, which the model leaves out."""
        pictures = inputs["pixel_values"]
        if pictures.ndim == 4:
            return list(pictures)
        counts = self.crop_counts(model, inputs)
        return [crop for crops, count in zip(pictures, counts, strict=True) for crop in crops[:count]]

    def arrange(
        self, model: Any, maps: list[Tensor], inputs: Mapping[str, Any]
    ) -> list[tuple[Tensor, tuple[int, int], Tensor | None]]:
        arranged: list[tuple[Tensor, tuple[int, int], Tensor | None]] = []
        scores = torch.stack(maps).flatten(2).mT
        for image, own in enumerate(scores.split(self.crop_counts(model, inputs))):
            # Behind the scores, a channel for each crop says which one a token comes from: the largest, where the
            # model interpolates. Newline tokens are the ones that carry the mark.
            crops = torch.eye(len(own), dtype=own.dtype, device=own.device)
            channels = torch.cat([own, crops[:, None].expand(-1, own.shape[1], -1)], dim=-1)
            mark = channels.new_full(channels.shape[-1:], torch.nan)
            packed = self.pack(model, channels, image, mark, inputs)
            values, origin = packed[:, : own.shape[-1]], packed[:, own.shape[-1] :]
            newline = origin.isnan().any(-1)
            crop = origin.nan_to_num().argmax(-1).masked_fill(newline, -1)
            arranged.append((values.masked_fill(newline[:, None], 0).mT, (1, len(packed)), crop))
        return arranged

    def crop_counts(self, model: Any, inputs: Mapping[str, Any]) -> list[int]:
        """Sequences that the tower makes of each picture: the whole, then its crops."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side = model.config.vision_config.image_size
        pinpoints = model.config.image_grid_pinpoints
        return [image_size_to_num_patches(size, pinpoints, side) for size in inputs["image_sizes"]]

    def pack(
        self, model: Any, channels: Tensor, image: int, newline: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        """Channels (crops, P, C) of picture `image` put in the order of its tokens, (N, C), by the model itself."""
        packed, _ = model.base_model.pack_image_features(
            [channels],
            inputs["image_sizes"][image : image + 1],
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            image_newline=newline,
        )
        return packed[0]
