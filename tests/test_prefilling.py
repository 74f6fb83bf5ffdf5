"""All branches of a prompt in one forward pass: they are what they are in passes of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_attach_equality import CONTRAST, MOVE, PACK, PRUNE, SHORT, TOLERANCE
from transformers import GptOssConfig, LlavaConfig, LlavaForConditionalGeneration

from lvlm_fix import attach, prefilling
from lvlm_fix.dispatch import is_plain
from lvlm_fix.prefilling import Prefiller

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]
WORDS = prefilling.WORTH_SHARING + 3
GATED = replace(CONTRAST, gate=1.0)
LONG = "A chat between a curious human and an assistant who is helpful. "
FIXES = {
    "damro": (CONTRAST,),
    "gated": (GATED,),
    "damro, vtc_cls": (CONTRAST, PRUNE),
    "damro, var": (CONTRAST, MOVE),
    "damro, zipvl": (CONTRAST, PACK),
}


@pytest.fixture(scope="module", params=["one", "rows", "no picture first"])
def prompts(request, random_llava, sample_pictures, ask):
    """Prompts with words before the picture; rows of different length and with different numbers of pictures."""
    kitchen, street = sample_pictures["kitchen"], sample_pictures["street"]
    rows = {
        "one": [([kitchen], SHORT)],
        "rows": [([kitchen], "Is it?"), ([street, kitchen], SHORT), ([street], LONG)],
        "no picture first": [([], SHORT + LONG), ([kitchen], SHORT)],
    }[request.param]
    inputs = ask(random_llava[1], *rows)
    # The chat template puts the picture first: words of its own go before all of it, behind the padding.
    words = torch.randint(5, 100, (1, WORDS), generator=torch.Generator().manual_seed(1))
    ids, mask = [], []
    for row, seen in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        pads = int((seen == 0).sum())
        ids.append(torch.cat([row[:pads], words[0], row[pads:]]))
        mask.append(torch.cat([seen[:pads], torch.ones(WORDS, dtype=seen.dtype), seen[pads:]]))
    return dict(inputs) | {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}


@torch.inference_mode()
def ran(model, fix, prompts, **options):
    """Logits of the prefill and of two more tokens; how many tokens the decoder saw in each pass."""
    columns = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: columns.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    try:
        with attach(model, *fix):
            output = model(**prompts, **options)
            logits = [output.logits]
            for word in (
                torch.full((2, len(prompts["input_ids"]), 1), 7) if "use_cache" not in options else ()
            ):
                output = model(input_ids=word, past_key_values=output.past_key_values)
                logits.append(output.logits)
    finally:
        hook.remove()
    return logits, columns


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in FIXES
        for options in ({}, {"logits_to_keep": 3}, {"use_cache": False})
        # ZipVL packs the KV cache, which there must be.
        if options != {"use_cache": False} or PACK not in FIXES[name]
    ],
    ids=str,
)
def test_branches_say_together_what_they_say_alone(random_llava, prompts, monkeypatch, name, options):
    model, fix = random_llava[0], FIXES[name]
    together, columns = ran(model, fix, prompts, **options)
    monkeypatch.setattr(Prefiller, "_joins", lambda *_: False)
    alone, separate = ran(model, fix, prompts, **options)
    assert len(separate) == len(columns) + 1
    shares = name in ("damro", "gated", "damro, vtc_cls")
    saved = sum(separate[:2]) - columns[0]
    assert saved >= WORDS if shares else saved == 0
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape
        # Where a branch cuts a token, both must.
        assert torch.equal(one.isinf(), other.isinf())
        assert (one - other).masked_fill(one.isinf(), 0).abs().max() < TOLERANCE


def test_given_columns_of_logits_are_kept(random_llava, prompts):
    model, width = random_llava[0], prompts["input_ids"].shape[1]
    whole, _ = ran(model, (CONTRAST,), prompts)
    chosen, _ = ran(model, (CONTRAST,), prompts, logits_to_keep=torch.tensor([width - 4, width - 1]))
    assert (whole[0][:, [-4, -1]] - chosen[0]).nan_to_num(0, 0, 0).abs().max() < TOLERANCE


def test_who_looks_into_the_decoder_sees_the_positive_branch_alone(random_llava, prompts):
    model = random_llava[0]
    config = model.config.text_config
    with torch.inference_mode(), attach(model, CONTRAST):
        output = model(**prompts, output_hidden_states=True)
        assert {states.shape[1] for states in output.hidden_states} == {prompts["input_ids"].shape[1]}
    config.output_hidden_states = True
    try:
        _, columns = ran(model, (CONTRAST,), prompts, use_cache=False)
    finally:
        config.output_hidden_states = False
    assert len(columns) == 2


def test_a_model_on_several_devices_takes_a_pass_for_each_branch(random_llava, prompts, monkeypatch):
    model = random_llava[0]
    for devices, passes in (({"": 0}, 1), ({"model.vision_tower": 0, "lm_head": 1}, 2)):
        monkeypatch.setattr(model, "hf_device_map", devices, raising=False)
        _, columns = ran(model, (CONTRAST,), prompts, use_cache=False)
        assert len(columns) == passes


def test_a_decoder_of_attention_out_of_reach_takes_a_pass_for_each_branch(random_llava, prompts, monkeypatch):
    """What does not go through transformers' attention interface cannot be kept apart."""
    model = random_llava[0]
    monkeypatch.setattr(type(model.get_decoder()), "_supports_attention_backend", False)
    _, columns = ran(model, (CONTRAST,), prompts, use_cache=False)
    assert len(columns) == 2


def test_the_decoders_attention_is_its_own_again(random_llava, prompts):
    model = random_llava[0]
    config = model.config.text_config
    with torch.inference_mode(), attach(model, CONTRAST):
        before = config._attn_implementation
        model(**prompts)
        assert config._attn_implementation == before == "sdpa"


@pytest.mark.parametrize(
    ("changed", "plain"),
    [
        ({}, True),
        ({"sliding_window": 9}, False),
        ({"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]}, True),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
        ({"attn_logit_softcapping": 50.0}, False),
        ({"num_kv_shared_layers": 2}, False),
    ],
    ids=str,
)
def test_what_is_known_to_be_plain_attention(random_llava, changed, plain):
    config = random_llava[0].config.text_config.__class__()
    for name, value in changed.items():
        setattr(config, name, value)
    assert is_plain(config, [], columns=10) is plain


def test_a_decoder_of_other_attention_takes_a_pass_for_each_branch(random_llava, prompts):
    """gpt-oss has sinks that are no tokens, windows in every other layer, and experts."""
    vision = random_llava[0].config
    text = GptOssConfig(
        vocab_size=vision.text_config.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=16,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision.vision_config, text_config=text, image_token_index=vision.image_token_id
    )
    config.vision_feature_layer = vision.vision_feature_layer
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    _, columns = ran(model, (CONTRAST,), prompts)
    assert len(columns) == 4
