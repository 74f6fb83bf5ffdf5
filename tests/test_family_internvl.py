"""InternVL: tiles, 2 x 2 patches a token, a tower with a CLS token; a random model of the true architecture."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import noise_picture
from family_checks import FIXES, FamilyChecks, Seen, build_tokenizer, mean, merged, sharpen

from lvlm_fix import UnsupportedModelError, attach, load

SIDE, BLOCK = 6, 2
TILE = SIDE * 8


def save_model(folder, vision, feature_layer=-1):
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokenizer = build_tokenizer([], named | {"video_token": "<video>"})
    size = {"height": TILE, "width": TILE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size,
            min_patches=1,
            max_patches=3,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=(SIDE // BLOCK) ** 2,
    )
    tower = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    tower |= {"image_size": TILE, "patch_size": 8, "layer_scale_init_value": 1.0, "attention_bias": True}
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower | vision),
        text_config=text,
        image_token_id=processor.image_token_id,
        image_seq_length=(SIDE // BLOCK) ** 2,
        vision_feature_layer=feature_layer,
        tie_word_embeddings=False,
    )
    torch.manual_seed(11)
    model = InternVLForConditionalGeneration(config).eval()
    sharpen(model, 6)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


class TestInternVL(FamilyChecks):
    image_entries = 1 + 3 + 3  # tiles and thumbnails

    @pytest.fixture(scope="class", params=["plain", "normed queries and keys", "second last layer"])
    @classmethod
    def loaded(cls, request, tmp_path_factory):
        folder = tmp_path_factory.mktemp("internvl")
        normed = {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False}
        layer = -2 if request.param.startswith("second") else -1
        save_model(folder, normed if request.param.startswith("normed") else {}, layer)
        return load(folder)

    @pytest.fixture(scope="class")
    @classmethod
    def pictures(cls):
        return [noise_picture(1, (48, 48)), noise_picture(2, (100, 50)), noise_picture(3, (50, 100))]

    @staticmethod
    def see(model, inputs, row):
        places = (inputs["input_ids"] == model.config.image_token_id).sum(1) // (SIDE // BLOCK) ** 2
        first = int(places[:row].sum())
        return [see_tile(model, inputs["pixel_values"][first + i]) for i in range(int(places[row]))]

    def test_frames_of_a_video_are_tiles(self, loaded, pictures):
        model, processor = loaded
        frames = np.stack([np.asarray(picture.resize((48, 48))) for picture in pictures])
        inputs = processor(
            videos=[frames], text=[f"USER : {processor.video_token} what ?"], return_tensors="pt"
        )
        with attach(model, *FIXES["all"]) as fix:
            model.generate(**inputs, max_new_tokens=2)
            assert [entry["grid"] for entry in fix.report["damro"]] == [(3, 3)] * len(pictures)

    def test_a_tower_whose_cls_token_stays_is_refused(self, loaded):
        model = copy.deepcopy(loaded[0])
        model.config.vision_feature_select_strategy = "full"
        with pytest.raises(UnsupportedModelError, match="no CLS token that its features leave out"):
            attach(model, *FIXES["all"])

    def test_joined_layers_are_refused(self, loaded):
        model = copy.deepcopy(loaded[0])
        model.config.vision_feature_layer = [-2, -1]
        with pytest.raises(UnsupportedModelError, match="joins the features of layers"):
            attach(model, *FIXES["all"])

    @torch.inference_mode()
    def test_tiles_of_another_size_have_their_own_grid(self, loaded, eager):
        """The tower interpolates its positions, and the grid follows."""
        pixels = torch.randn(1, 3, 96, 96)
        ids = torch.tensor([[7, *[loaded[0].config.image_token_id] * 36, 8]])
        with attach(loaded[0], *FIXES["vtc_cls"]) as fix:
            loaded[0](input_ids=ids, pixel_values=pixels)
            [entry] = fix.report["vtc_cls"]
        assert entry["grid"] == (6, 6)
        assert entry["kept"] == see_tile(eager, pixels[0]).kept(FIXES["vtc_cls"][0])


def see_tile(model, pixels):
    tower, side, layer = model.model.vision_tower, pixels.shape[-1] // 8, model.config.vision_feature_layer
    seen = tower(pixels[None], output_attentions=True, output_hidden_states=True)
    features = seen.last_hidden_state if layer == -1 else seen.hidden_states[layer]
    patches = list(features[0, 1:])
    tokens = [torch.cat(four) for four in merged(patches, side, BLOCK)]
    layers = [
        [mean(four) for four in merged(list(weights[0, :, 0, 1:].mean(0)), side, BLOCK)]
        for weights in seen.attentions
    ]
    last = tower.encoder.layer[layer]
    x = last.layernorm_before(seen.hidden_states[layer - 1])[0]
    query = last.attention.q_norm(last.attention.q_proj(x))
    key = last.attention.k_norm(last.attention.k_proj(x))
    row = ((query[0] * key).sum(-1) / query.shape[-1] ** 0.5).softmax(0)[1:]
    row = [mean(four) for four in merged(list(row), side, BLOCK)]
    projected = model.model.multi_modal_projector(torch.stack(tokens)[None])[0]
    return Seen(projected, layers, row, [0] * len(row))
