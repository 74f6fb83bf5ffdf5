"""LLaVA-NeXT: crops, unpadding and newline tokens, against the same counted out in loops."""

from __future__ import annotations

import copy

import pytest
import torch
from anyres import (
    BATCHES,
    CELLS,
    PATCH,
    PINPOINTS,
    SHORT,
    SIDE,
    SlowAnyres,
    ask,
    build_tokenizer,
    picture,
    sharpen,
)
from anyres_promises import FamilyTests, marks
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from lvlm_fix import DAMRO, VTCCLS, attach, load
from lvlm_fix.errors import PromptError, UnsupportedModelError
from lvlm_fix.models import family_of
from lvlm_fix.vision import VisionEncoding

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """A LLaVA-NeXT of random weights, saved and loaded."""
    torch.manual_seed(11)
    tokenizer = build_tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    model = LlavaNextForConditionalGeneration(config)
    sharpen(model, 6)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    folder = tmp_path_factory.mktemp("llava_next")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load(folder)


class SlowNext(SlowAnyres):
    source = "cls"

    def look(self, crop):
        model = self.model.model
        seen = model.vision_tower(crop[None], output_attentions=True, output_hidden_states=True)
        layers = [weights[0, :, 0, 1:].mean(0) for weights in seen.attentions]
        # The layer whose output, hidden_states[-2], the projector takes.
        index = len(seen.attentions) - 2
        encoder_layers = [
            module for module in model.vision_tower.modules() if type(module).__name__ == "CLIPEncoderLayer"
        ]
        x = encoder_layers[index].layer_norm1(seen.hidden_states[index])[0]
        query, key = encoder_layers[index].self_attn.q_proj(x[0]), encoder_layers[index].self_attn.k_proj(x)
        row = ((query * key).sum(-1) / query.shape[-1] ** 0.5).softmax(0)
        return model.multi_modal_projector(seen.hidden_states[-2][:, 1:])[0], layers, row[1:]


@pytest.fixture(scope="module")
def slow(loaded):
    return SlowNext(loaded[0])


class TestLlavaNext(FamilyTests):
    pass


def test_it_is_its_own_family(loaded):
    model, processor = loaded
    assert type(model) is LlavaNextForConditionalGeneration and type(processor) is LlavaNextProcessor
    assert family_of(model).name == "LLaVA-NeXT"


@torch.inference_mode()
@pytest.mark.parametrize("batch", BATCHES)
def test_the_crops_are_those_that_went_through_the_tower(loaded, batch):
    model, processor = loaded
    inputs, seen, family = ask(processor, *BATCHES[batch]), [], family_of(model)
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    hook.remove()
    assert torch.equal(torch.stack(family.pixels(model, inputs)), seen[0])
    assert family.token_grids(model, inputs) == [(CELLS, CELLS)] * len(seen[0])


@pytest.mark.parametrize("size", [(60, 40), (40, 20), (20, 60), (80, 16), (48, 48), (9, 70)])
def test_every_token_knows_its_crop(loaded, slow, size):
    """Each crop's map holds the crop's number: after packing, scores must be the crops."""
    model, processor = loaded
    inputs = ask(processor, ([picture(5, *size)], SHORT))
    family = family_of(model)
    count = family.crop_counts(model, inputs)[0]
    maps = [torch.full((3, CELLS, CELLS), float(crop)) for crop in range(count)]
    [(scores, grid, crops)] = family.arrange(model, maps, inputs)
    expected = [parts[0][1] if parts else -1 for parts in slow.tokens(*size)]
    assert crops.tolist() == expected and grid == (1, len(expected))
    assert torch.equal(scores, crops.clamp_min(0).expand(3, -1).float())
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == len(expected)


def by_hand():
    """Two crops: the whole picture of 2 x 2, and a map of two rows, each with its newline token."""
    crops = torch.tensor([0, 0, 0, 0, 1, 1, -1, 1, 1, -1])
    layer = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.5, 0.1, 0.0, 0.2, 0.6, 0.0])
    return VisionEncoding(torch.stack([layer, layer, torch.zeros(10)]), layer, (1, 10), crops)


@pytest.mark.parametrize(
    "topk, outliers", [(1, [1, 8, 9]), (2, [1, 3, 4, 8, 9]), (9, [0, 1, 2, 3, 4, 5, 7, 8, 9])]
)
def test_damro_takes_outliers_of_each_crop_and_the_last_newline(topk, outliers):
    assert DAMRO(topk=topk).negative_tokens(by_hand()).tolist() == outliers


@pytest.mark.parametrize(
    "keep, kept",
    [
        (1, [8, 9]),
        (2, [4, 6, 8, 9]),
        (3, [1, 4, 6, 8, 9]),
        (0.5, [1, 3, 4, 6, 8, 9]),
        (8, list(range(10))),
        (1000, list(range(10))),
    ],
)
def test_vtc_cls_keeps_the_best_of_all_crops_and_newlines_of_their_rows(keep, kept):
    assert VTCCLS(keep=keep, start_layer=0).select(by_hand()).tolist() == kept


@pytest.mark.parametrize(
    "change, said",
    [
        ({"vision_feature_select_strategy": "full"}, "no CLS token"),
        ({"vision_feature_layer": [-2, -3]}, "joins the features of layers"),
    ],
)
def test_towers_that_are_read_otherwise_are_refused(loaded, change, said):
    model = copy.deepcopy(loaded[0])
    for name, value in change.items():
        setattr(model.config, name, value)
    before = marks(model)
    with pytest.raises(UnsupportedModelError, match=said):
        attach(model, DAMRO())
    assert marks(model) == before


def test_videos_are_refused(loaded):
    model, _ = loaded
    ids = torch.tensor([[1, 5]])
    with attach(model, DAMRO()), pytest.raises(PromptError, match="videos are not read"):
        model(input_ids=ids, pixel_values_videos=torch.zeros(1, 2, 3, SIDE, SIDE))
