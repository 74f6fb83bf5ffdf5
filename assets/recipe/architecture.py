"""The embedded LVLM's parts, in the Hugging Face layout: tokenizer, processor, configuration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lvlm_fix.assets.recipe import captions, scenes
from lvlm_fix.assets.recipe.world import CATEGORIES

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' if message['role'] == 'assistant' else '' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Preset:
    """Sizes of the model and length of its training; `cpu` is what ships, `gpu` is the larger one."""

    tower_width: int
    tower_layers: int
    tower_heads: int
    decoder_width: int
    decoder_layers: int
    decoder_heads: int
    tower_scenes: int
    tower_steps: int
    tower_batch: int
    decoder_scenes: int
    decoder_steps: int
    decoder_batch: int
    compile: bool = True  # costs minutes before the first step, so not for a run of seconds


PRESETS = {
    "cpu": Preset(192, 8, 3, 256, 8, 4, 40_000, 2_800, 64, 40_000, 3_000, 32),
    "gpu": Preset(256, 10, 4, 320, 10, 5, 120_000, 20_000, 256, 120_000, 12_000, 128),
    "smoke": Preset(32, 3, 2, 32, 2, 2, 64, 6, 8, 64, 6, 4, compile=False),
}


def build_tokenizer(seed: int = 0, vocabulary: int = 768) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's own sentences: any text can be encoded, common words are one token."""
    rng = np.random.default_rng([3, seed])
    corpus = []
    for index in range(4_000):
        theme, objects = scenes.training_objects(np.random.default_rng([4, index]))
        for asked, answer in captions.conversations(rng, [name for name, _ in objects], theme, 8):
            corpus.append(f"USER: \n{asked} ASSISTANT: {answer}")
    # every category is seen equally often, so that each one's words become tokens
    corpus += [f" {captions.with_article(name)}, {captions.with_article(name)}." for name in CATEGORIES] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures are resized to a square, never cropped: no object may be lost before the model looks."""
    image_processor = CLIPImageProcessor(
        size={"height": scenes.SIZE, "width": scenes.SIZE}, do_center_crop=False
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """LLaVA-1.5's layout: penultimate vision layer, CLS dropped, two-layer projector, Llama decoder."""
    vision = CLIPVisionConfig(
        hidden_size=preset.tower_width,
        intermediate_size=4 * preset.tower_width,
        num_hidden_layers=preset.tower_layers,
        num_attention_heads=preset.tower_heads,
        image_size=scenes.SIZE,
        patch_size=12,
        projection_dim=preset.tower_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.decoder_width,
        intermediate_size=int(preset.decoder_width * 2.5),
        num_hidden_layers=preset.decoder_layers,
        num_attention_heads=preset.decoder_heads,
        num_key_value_heads=preset.decoder_heads,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer("<image>", add_special_tokens=False).input_ids[0],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=144,
        tie_word_embeddings=False,
    )
