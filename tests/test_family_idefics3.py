"""Idefics3 and SmolVLM: tiles of a prompt in one piece, blocks of patches a token, a tower without a CLS token."""

from __future__ import annotations

import pytest
import torch
from conftest import noise_picture
from family_checks import (
    FIXES,
    MOVE,
    PRUNE,
    STEPS,
    FamilyChecks,
    Seen,
    build,
    build_tokenizer,
    logits_of,
    mean,
    merged,
    sharpen,
    slow_branches,
)
from slow import Conversation, SlowDecoder, largest_difference

from lvlm_fix import VTCCLS, attach, load
from lvlm_fix.models import family_of
from lvlm_fix.recorder import PROBES

SIDE = 6
TILE = SIDE * 8


def save_model(folder, kind, block):
    import transformers

    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    special += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    tokenizer = build_tokenizer(special, {})
    options = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    tokens = (SIDE // block) ** 2
    # The first SmolVLM was published with this processor; its own, SmolVLMProcessor, needs num2words.
    processor = transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(**options),
        tokenizer=tokenizer,
        image_seq_len=tokens,
    )
    text = transformers.LlamaConfig(
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
    tower = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tower | {"image_size": TILE, "patch_size": 8},
        text_config=text,
        image_token_id=processor.image_token_id,
        scale_factor=block,
    )
    torch.manual_seed(11)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    sharpen(model, 6)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def real_tiles(inputs, row):
    """Tiles of a prompt, without those that fill it up, and their masks of patches."""
    tiles = []
    for pixels, mask in zip(inputs["pixel_values"][row], inputs["pixel_attention_mask"][row], strict=True):
        if (pixels != 0).any():
            patches = [
                bool(mask[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].any())
                for r in range(SIDE)
                for c in range(SIDE)
            ]
            tiles.append((pixels, torch.tensor(patches).view(SIDE, SIDE)))
    return tiles


def received(weights):
    """Attention that each patch gets, mean over heads and evenly spaced query rows; weights (H, P, P)."""
    patches = weights.shape[-1]
    count = min(PROBES, patches)
    rows = [round(i * (patches - 1) / max(count - 1, 1)) for i in range(count)]
    weights = weights.tolist()
    return [mean([head[row][patch] for head in weights for row in rows]) for patch in range(patches)]


class Idefics3Checks(FamilyChecks):
    records_tower = False  # it takes a mask of the pixels, too
    image_entries = 2  # one a prompt, whatever its pictures

    @pytest.fixture(scope="class")
    @classmethod
    def pictures(cls):
        return [noise_picture(1, (48, 48)), noise_picture(2, (100, 50)), noise_picture(3, (50, 100))]

    @staticmethod
    def see(model, inputs, row):
        tokens, tiles, layers = [], [], [[] for _ in model.model.vision_model.encoder.layers]
        for tile, (pixels, mask) in enumerate(real_tiles(inputs, row)):
            seen = model.model.vision_model(pixels[None], mask[None], output_attentions=True)
            block = model.config.scale_factor
            packed = [torch.cat(own) for own in merged(list(seen.last_hidden_state[0]), SIDE, block)]
            tokens += [model.model.connector.modality_projection(token) for token in packed]
            for scores, weights in zip(layers, seen.attentions, strict=True):
                scores += [mean(own) for own in merged(received(weights[0]), SIDE, block)]
            tiles += [tile] * len(packed)
        return [Seen(torch.stack(tokens), layers, layers[-1], tiles)]


class TestIdefics3(Idefics3Checks):
    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("idefics3")
        save_model(folder, "Idefics3", 2)
        return load(folder)

    def test_tiles_of_a_prompt_are_crops_in_order(self, loaded, inputs):
        model, _ = loaded
        family, counts = family_of(model), [len(real_tiles(inputs, row)) for row in (0, 1)]
        assert counts[0] < counts[1]  # so that the first prompt is filled up with tiles of zeros
        found = family.pixels(model, inputs)
        expected = [pixels for row in (0, 1) for pixels, _ in real_tiles(inputs, row)]
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with attach(model, VTCCLS(keep=10**6, start_layer=0)) as fix:
            model.generate(**inputs, max_new_tokens=1)
            tokens = [len(entry["kept"]) for entry in fix.report["vtc_cls"]]
        assert tokens == [9 * count for count in counts]

    def test_a_prompt_of_one_tile_has_its_grid(self, loaded, pictures):
        model, processor = loaded
        text = f"USER : {processor.image_token} what ?"
        inputs = processor(images=[[pictures[0]]], text=[text], do_image_splitting=False, return_tensors="pt")
        assert inputs["pixel_values"].shape[1] == 1
        with attach(model, VTCCLS(keep=4, start_layer=0)) as fix:
            model.generate(**inputs, max_new_tokens=1)
        [entry] = fix.report["vtc_cls"]
        assert entry["grid"] == (3, 3)
        assert entry["source"].startswith("received attention")

    @torch.inference_mode()
    @pytest.mark.parametrize("name", ["vtc_cls damro", "all"])
    def test_masked_patches_of_a_tile_get_no_attention(self, loaded, eager, pictures, name):
        model, processor = loaded
        inputs = build(processor, ([pictures[1]], "what is this ?"))
        inputs["pixel_attention_mask"][:, -1, TILE // 2 :] = 0
        inputs["pixel_values"][:, -1, :, TILE // 2 :] = 0
        [seen] = self.see(eager, inputs, 0)
        assert seen.row[-1] == 0  # the last block of the last tile
        assert seen.row[-9] > 0
        logits, sequences = logits_of(model, FIXES[name], inputs)
        ids = inputs["input_ids"][0].tolist()
        decoder = SlowDecoder(model.get_decoder(), model.lm_head)
        slow = Conversation(decoder, slow_branches(model, ids, [seen], FIXES[name]), FIXES[name])
        for step in range(STEPS):
            if step:
                slow.say(model.get_input_embeddings().weight[sequences[0, len(ids) + step - 1]])
            assert largest_difference(logits[step][0], slow.logits) < 1e-4

    @pytest.mark.parametrize("first", [True, False], ids=["picture first", "words first"])
    def test_a_prompt_without_pictures_beside_one_with_says_what_it_says_alone(self, loaded, pictures, first):
        model, processor = loaded
        rows = [([pictures[1]], "what is this ?"), ([], "is there a dog or a cat ? yes or no ?")]
        rows = rows if first else rows[::-1]
        together, _ = logits_of(model, (PRUNE, MOVE), build(processor, *rows))
        for row, asked in enumerate(rows):
            alone, _ = logits_of(model, (PRUNE, MOVE) if asked[0] else (), build(processor, asked))
            assert largest_difference(together[0][row], alone[0][0]) < 1e-4


class TestSmolVLM(Idefics3Checks):
    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("smolvlm")
        save_model(folder, "SmolVLM", 3)
        return load(folder)
