"""LLaVA-OneVision: no CLS token, maps that are interpolated, crops only for lone pictures."""

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
    THIN,
    WIDE,
    SlowAnyres,
    ask,
    build_tokenizer,
    picture,
    run,
    sharpen,
)
from anyres_promises import FamilyTests, marks
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from lvlm_fix import DAMRO, VAR, VTCCLS, attach, load
from lvlm_fix.errors import PromptError, UnsupportedModelError
from lvlm_fix.models import family_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]
# Maps of more than twice a crop's tokens are interpolated: here those of 2 x 2 and of 1 x 3 crops.
MOST_CROPS = 2


@pytest.fixture(scope="module", params=[False, True], ids=["no pooling head", "pooling head"])
def loaded(request, tmp_path_factory):
    """A LLaVA-OneVision of random weights, saved and loaded; released towers come without a pooling head."""
    torch.manual_seed(13)
    tokenizer = build_tokenizer("<image>", "<video>")
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=request.param,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{MOST_CROPS}",
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    sharpen(model, 6)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=PINPOINTS, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=CELLS**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{MOST_CROPS}",
    )
    folder = tmp_path_factory.mktemp("llava_onevision")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load(folder)


class SlowOnevision(SlowAnyres):
    @property
    def source(self):
        pools = self.model.config.vision_config.vision_use_head
        return "pooling attention" if pools else "received attention, mean over 64 query rows"

    def look(self, crop):
        model = self.model.model
        tower = model.vision_tower
        seen = tower(crop[None], output_attentions=True, output_hidden_states=True)
        tokens = model.multi_modal_projector(seen.hidden_states[-1])[0]
        if tower.config.vision_use_head:
            patches = tower.post_layernorm(seen.hidden_states[-1])
            row = tower.head.attention(tower.head.probe, patches, patches, need_weights=True)[1][0, 0]
            return tokens, [row] * len(seen.attentions), row
        rows = []
        for weights in seen.attentions:
            heads, queries, patches = weights[0].shape
            rows.append(
                [
                    sum(weights[0, head, query, patch] for head in range(heads) for query in range(queries))
                    / (heads * queries)
                    for patch in range(patches)
                ]
            )
        return tokens, rows, rows[-1]

    def resampled(self, cells):
        rows, columns = len(cells), len(cells[0])
        ratio = (rows * columns / (MOST_CROPS * CELLS**2)) ** 0.5
        if ratio <= 1.1:
            return cells
        # Bilinear, without antialiasing: each new token is a mix of the four around its centre.
        return [
            [
                [
                    (down * right * weight, crop, cell)
                    for y, down in between(row, rows, int(rows // ratio))
                    for x, right in between(column, columns, int(columns // ratio))
                    for weight, crop, cell in cells[y][x]
                ]
                for column in range(int(columns // ratio))
            ]
            for row in range(int(rows // ratio))
        ]

    def cuts(self, pictures):
        return pictures == 1


def between(place, old, new):
    """The two of `old` places around the centre of one of `new`, and their weights."""
    centre = max((place + 0.5) * old / new - 0.5, 0.0)
    low = int(centre)
    return [(low, 1 - (centre - low)), (min(low + 1, old - 1), centre - low)]


@pytest.fixture(scope="module")
def slow(loaded):
    return SlowOnevision(loaded[0])


class TestLlavaOnevision(FamilyTests):
    pass


def test_it_is_its_own_family(loaded):
    model, processor = loaded
    assert type(model) is LlavaOnevisionForConditionalGeneration
    assert type(processor) is LlavaOnevisionProcessor
    family = family_of(model)
    assert family.name == "LLaVA-OneVision"
    assert list(family.pixel_mean) == list(processor.image_processor.image_mean)
    assert list(family.pixel_std) == list(processor.image_processor.image_std)


@torch.inference_mode()
@pytest.mark.parametrize("batch", BATCHES)
def test_the_crops_are_those_that_went_through_the_tower(loaded, batch):
    model, processor = loaded
    inputs, seen, family = ask(processor, *BATCHES[batch]), [], family_of(model)
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.get_image_features(
        inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"]
    )
    hook.remove()
    assert torch.equal(torch.stack(family.pixels(model, inputs)), seen[0])
    assert family.token_grids(model, inputs) == [(CELLS, CELLS)] * len(seen[0])


@pytest.mark.parametrize("size", [(60, 40), (40, 20), (20, 60), (80, 16), (72, 24), (48, 48), (9, 70)])
def test_every_token_knows_its_crop(loaded, slow, size):
    """Each crop's map holds the crop's number: what packing makes of it, interpolated too, is the crops' mean."""
    model, processor = loaded
    inputs = ask(processor, ([picture(5, *size)], SHORT))
    family = family_of(model)
    count = family.crop_counts(model, inputs)[0]
    maps = [torch.full((3, CELLS, CELLS), float(crop)) for crop in range(count)]
    [(scores, grid, crops)] = family.arrange(model, maps, inputs)
    tokens = slow.tokens(*size)
    mean = torch.tensor([sum(weight * crop for weight, crop, _ in parts) for parts in tokens])
    torch.testing.assert_close(scores, mean.expand(3, -1), rtol=0, atol=1e-5)
    for crop, parts in zip(crops.tolist(), tokens, strict=True):
        shares = {origin: 0.0 for _, origin, _ in parts}
        for weight, origin, _ in parts:
            shares[origin] += weight
        assert shares[crop] == pytest.approx(max(shares.values()), abs=1e-5) if parts else crop == -1
    assert grid == (1, len(tokens))
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == len(tokens)


def test_some_tokens_are_mixed_from_two_crops(slow):
    """Else the interpolation tests would show nothing."""
    assert any(len({crop for _, crop, _ in parts}) > 1 for parts in slow.tokens(*THIN.size))


@torch.inference_mode()
def test_pictures_in_company_are_one_crop_and_a_newline(loaded):
    model, processor = loaded
    inputs = ask(processor, *BATCHES["two pictures"])
    encoder = model.model
    with attach(model, VTCCLS(keep=4, start_layer=0), DAMRO(topk=2)) as fixed:
        features = encoder.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"]
        ).pooler_output
        model(**inputs)
    assert [len(one) for one in features] == [CELLS**2 + 1] * 2
    for entry in fixed.report["vtc_cls"]:
        assert len(entry["kept"]) == 5 and entry["kept"][-1] == CELLS**2
    for entry in fixed.report["damro"]:
        assert len(entry["outliers"]) == 3 and entry["outliers"][-1] == CELLS**2


@torch.inference_mode()
def test_pictures_given_without_their_numbers_are_cut_each(loaded):
    """As the model does where `batch_num_images` is missing."""
    model, processor = loaded
    inputs = ask(processor, ([THIN], SHORT), ([WIDE], SHORT))
    number = inputs.pop("batch_num_images")
    assert number.tolist() == [1, 1]
    first = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    fixed = run(model, (VTCCLS(keep=10**6, start_layer=0),), inputs, max_new_tokens=1)
    assert torch.equal(first, fixed)


@torch.inference_mode()
def test_layers_are_read_only_where_nothing_pools(loaded):
    """A pooling row tells of all layers alike, so ensembles of any layers keep the same tokens."""
    model, processor = loaded
    inputs, kept = ask(processor, *BATCHES["one picture"]), []
    for start in (0, 1, 2):
        with attach(model, VTCCLS(keep=10, start_layer=start)) as fixed:
            model(**inputs)
        kept.append(fixed.report["vtc_cls"][0]["kept"])
    assert all(one == kept[0] for one in kept) == model.config.vision_config.vision_use_head


@pytest.mark.parametrize(
    "change, said",
    [
        ({"vision_feature_select_strategy": "default"}, "leaves the first token"),
        ({"vision_feature_layer": [-1, -2]}, "joins the features of layers"),
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


@pytest.mark.parametrize("method", [DAMRO(), VAR(sink_dims=(3,))], ids=["damro", "var"])
@pytest.mark.parametrize("beside_a_picture", [False, True])
def test_videos_are_refused(loaded, method, beside_a_picture):
    model, processor = loaded
    frames = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
    text, pictures = "USER <video> what is it ? ASSISTANT", None
    if beside_a_picture:
        text, pictures = f"USER <image> {text}", [[WIDE]]
    inputs = processor(images=pictures, videos=[frames], text=[text], return_tensors="pt")
    before = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with attach(model, method):
        with pytest.raises(PromptError, match="videos are not read"):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        with pytest.raises(PromptError, match="videos are not read"):
            model(**inputs)
    assert torch.equal(before, model.generate(**inputs, max_new_tokens=2, do_sample=False))


@torch.inference_mode()
def test_it_runs_in_half_precision(loaded):
    model, processor = loaded
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = ask(processor, *BATCHES["one picture"]).to(torch.bfloat16)
    with attach(half, VTCCLS(keep=10, start_layer=0), DAMRO(topk=2)) as fixed:
        logits = half(**inputs).logits[:, -1]
    assert logits.float().isfinite().any() and len(fixed.report["vtc_cls"][0]["kept"]) >= 10
