"""LLaVA-OneVision: a SigLIP tower, which has no CLS token, over LLaVA-NeXT's crops; Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.models.llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`.

    A picture is cut into crops where it is the only one of its prompt. A joined map larger than `vision_aspect_ratio`
    allows is interpolated, scores like features; a token then counts to the crop that most of it comes from.
    """

    name: ClassVar[str] = "LLaVA-OneVision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    has_cls: ClassVar[bool] = False
    pixel_mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    pixel_std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def tower_attention(self, model: Any) -> list[nn.Module]:
        tower = model.base_model.vision_tower
        if model.config.vision_feature_select_strategy != "full":
            raise UnsupportedModelError(
                f"this LLaVA-OneVision leaves the first token of its vision tower ({tower.config.model_type}) out "
                "(vision_feature_select_strategy is not 'full'): towers without a CLS token are supported"
            )
        return [
            module for module in tower.modules() if hasattr(module, "q_proj") and hasattr(module, "k_proj")
        ]

    def pooling_attention(self, model: Any) -> nn.MultiheadAttention | None:
        """SigLIP's pooling head asks all patches with one learned query; checkpoints mostly come without it."""
        head = getattr(model.base_model.vision_tower, "head", None)
        return getattr(head, "attention", None)

    def crop_counts(self, model: Any, inputs: Mapping[str, Any]) -> list[int]:
        counts = super().crop_counts(model, inputs)
        if inputs.get("batch_num_images") is None:
            return counts
        alone = [int(images) == 1 for images in inputs["batch_num_images"] for _ in range(int(images))]
        return [count if cut else 1 for count, cut in zip(counts, alone, strict=True)]

    def pack(
        self, model: Any, channels: Tensor, image: int, newline: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        packed, _ = model.base_model.pack_image_features(
            [channels],
            inputs["image_sizes"][image : image + 1],
            image_newline=newline,
            vision_aspect_ratio=inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio,
        )
        return packed[0]
