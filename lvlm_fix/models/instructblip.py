"""InstructBLIP: EVA-CLIP tower, a Q-Former that reads its patches into 32 query tokens, Llama-like decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.models.base import Family


class InstructBlip(Family):
    """`InstructBlipForConditionalGeneration` with a decoder-only text model, such as Vicuna.

    What the decoder sees of a picture are query tokens, each of which looks at all patches of the tower: scores are
    of patches, and a picture has more of them than tokens. DAMRO takes its outliers from the tower's last layer but
    one, by the mean over heads of CLS attention, and the negative branch sees what the Q-Former, with the same
    instruction, makes of these patches alone.

    In a bare `model(**inputs)`, rows with padding count their positions as `generate` does.
    """

    name: ClassVar[str] = "InstructBLIP"
    model_types: ClassVar[tuple[str, ...]] = ("instructblip",)
    full_width: ClassVar[bool] = False
    unsupported: ClassVar[Mapping[str, str]] = {
        "vtc_cls": "its image tokens are queries of the Q-Former, not patches that the CLS token attends to"
    }

    def tower(self, model: Any) -> nn.Module:
        return model.vision_model

    def tower_attention(self, model: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in model.vision_model.encoder.layers]

    def feature_layer(self, model: Any) -> int:
        # The Q-Former takes the last layer; DAMRO's paper reads the attention of the one before.
        return max(len(self.tower_attention(model)) - 2, 0)

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id

    def encoder(self, model: Any) -> Any:
        return model

    def with_features(self, encoded: Any, features: list[Tensor]) -> Any:
        # The model wants one tensor; in the prompt, `finds_images` knows the features by their values.
        return encoded

    def token_grids(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        side = model.config.vision_config.patch_size
        count, _, height, width = inputs["pixel_values"].shape
        return [(height // side, width // side)] * count

    def negative_features(
        self, model: Any, features: Tensor, indices: Tensor, context: Mapping[str, Any], image: int
    ) -> tuple[Tensor, Tensor]:
        """What the Q-Former makes of the patches `indices` alone, without the CLS token: all of the image's tokens.

        The patches are those of the tower's output, after its last layer and normalisation, as the Q-Former gets them.
        """
        patches = context["result"].last_hidden_state[image : image + 1, 1:]
        patches = patches[:, indices.to(patches.device)]
        ids, mask = context["qformer_input_ids"][image : image + 1], context.get("qformer_attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[image : image + 1]
        queries = mask.new_ones(1, model.query_tokens.shape[1])
        output = model.qformer(
            input_ids=ids,
            attention_mask=torch.cat([queries, mask], dim=1),
            query_embeds=model.query_tokens,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            return_dict=True,
        )
        tokens = model.language_projection(output.last_hidden_state[0, : queries.shape[1]])
        return tokens, torch.arange(len(tokens), device=tokens.device)

    def generator(self, model: Any) -> Any:
        """The text model, whose `generate` the model's own calls with embeddings.

        Raises:
            UnsupportedModelError: the text model is an encoder-decoder.
        """
        text = model.language_model
        if text.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"this InstructBLIP's text model ({text.config.model_type}) is an encoder-decoder: decoder-only ones, "
                "such as Vicuna, are supported"
            )
        return text

    def finds_images(self, embeddings: Tensor, features: list[Tensor]) -> Tensor | None:
        if not features or len(embeddings) % len(features):
            return None
        beams, where = len(embeddings) // len(features), torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        where = where.to(embeddings.device)
        for row, embedded in enumerate(embeddings):
            tokens = features[row // beams].to(embedded.device, embedded.dtype)
            first = (embedded == tokens[0]).all(-1).nonzero()[:, 0]
            for start in first.tolist():
                found = embedded[start : start + len(tokens)]
                if found.shape == tokens.shape and bool((found == tokens).all()):
                    where[row, start : start + len(tokens)] = True
                    break
        return where if bool(where.any()) else None
