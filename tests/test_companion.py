"""CLS scores from an OpenCLIP ViT: against attention with all weights kept, on other grids, and under attach."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import noise_picture

from lvlm_fix import DAMRO, VTCCLS, CLSFrom, UnsupportedModelError, attach
from lvlm_fix.models import family_of

open_clip = pytest.importorskip("open_clip")

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]

SIZES = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 4}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 64, "heads": 1, "layers": 1}


def build_clip(kind=None, **sizes):
    torch.manual_seed(5)
    clip = (kind or open_clip.CLIP)(16, SIZES | sizes, TEXT).eval()
    with torch.no_grad():  # so that patches differ in attention
        for block in clip.visual.transformer.resblocks:
            block.attn.in_proj_weight.mul_(2)
            block.attn.in_proj_bias.normal_()
    return clip


@pytest.fixture(scope="module")
def clip():
    return build_clip()


@pytest.fixture(scope="module")
def family(embedded):
    return family_of(embedded[0])


def normalised(colours, mean, std):
    """Crops (N, 3, H, W) of colours in 0..1 as an image processor hands them on."""
    return list((colours - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])


def naive(visual, pixels):
    """Rows (L + 1, N) of one crop, all attention weights kept; the last is the second last layer's, full width."""
    x = visual.conv1(pixels[None]).flatten(2).mT
    x = torch.cat([visual.class_embedding[None, None], x], dim=1) + visual.positional_embedding
    x, rows, full = visual.ln_pre(x), [], None
    for index, block in enumerate(visual.transformer.resblocks):
        normed = block.ln_1(x)
        out, weights = block.attn(normed, normed, normed, need_weights=True, average_attn_weights=False)
        rows.append(weights[0, :, 0, 1:].mean(0))
        if index == len(visual.transformer.resblocks) - 2:
            query, key, _ = (normed[0] @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(
                3, dim=-1
            )
            full = (key @ query[0] / query.shape[-1] ** 0.5).softmax(0)[1:]
        x = x + out
        x = x + block.mlp(block.ln_2(x))
    return torch.stack([*rows, full])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP", "visual alone"])
def test_scores_are_those_of_full_attention(family, kind):
    clip = build_clip(open_clip.CustomTextCLIP if kind == "CustomTextCLIP" else None)
    colours = torch.rand(3, 3, 32, 32)
    crops = normalised(colours, family.pixel_mean, family.pixel_std)
    maps = CLSFrom(clip.visual if kind == "visual alone" else clip).maps(crops, [(4, 4)] * 3, family)
    own = normalised(colours, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    for scores, pixels in zip(maps, own, strict=True):
        assert scores.shape == (5, 4, 4)
        torch.testing.assert_close(scores.flatten(1), naive(clip.visual, pixels), rtol=0, atol=1e-5)
        assert scores.max() > 2 * scores.mean()


@torch.no_grad()
def test_the_clips_own_statistics_and_the_processors_are_used(family):
    clip, colours = build_clip(), torch.rand(2, 3, 32, 32)
    clip.visual.image_mean, clip.visual.image_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    crops = normalised(colours, (0.1, 0.2, 0.3), (0.6, 0.5, 0.4))
    maps = CLSFrom(clip, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.6, 0.5, 0.4)).maps(
        crops, [(4, 4)] * 2, family
    )
    for scores, pixels in zip(maps, normalised(colours, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), strict=True):
        torch.testing.assert_close(scores.flatten(1), naive(clip.visual, pixels), rtol=0, atol=1e-5)


@torch.no_grad()
def test_crops_of_other_sizes_are_resized_each_by_itself(clip, family):
    crops = [torch.randn(3, 40, 24), torch.randn(3, 32, 32), torch.randn(3, 64, 64)]
    grids = [(4, 4), (4, 4), (4, 4)]
    together = CLSFrom(clip).maps(crops, grids, family)
    for crop, scores in zip(crops, together, strict=True):
        [alone] = CLSFrom(clip).maps([crop], [(4, 4)], family)
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_many_crops_are_scored_as_few(clip, family):
    crops = [torch.randn(3, 32, 32) for _ in range(35)]
    maps = CLSFrom(clip).maps(crops, [(4, 4)] * 35, family)
    torch.testing.assert_close(
        maps[33:], CLSFrom(clip).maps(crops[33:], [(4, 4)] * 2, family), rtol=0, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (3, 3), (8, 8), (6, 2), (1, 1)], ids=str)
def test_a_map_keeps_its_sum_on_every_grid(clip, family, grid):
    crop = torch.randn(3, 32, 32)
    [own] = CLSFrom(clip).maps([crop], [(4, 4)], family)
    [other] = CLSFrom(clip).maps([crop], [grid], family)
    assert other.shape == (5, *grid)
    assert other.min() >= 0
    torch.testing.assert_close(other.sum((1, 2)), own.sum((1, 2)), rtol=1e-5, atol=0)


@torch.no_grad()
def test_blocks_of_patches_are_summed_where_tokens_merge_them(clip, family):
    crop = torch.randn(3, 32, 32)
    [own] = CLSFrom(clip).maps([crop], [(4, 4)], family)
    [merged] = CLSFrom(clip).maps([crop], [(2, 2)], family)
    for row in range(2):
        for column in range(2):
            block = own[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(merged[:, row, column], block.sum((1, 2)), rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_finer_grid_keeps_what_stands_out_where_it_is(clip, family):
    crop = torch.randn(3, 32, 32)
    [own] = CLSFrom(clip).maps([crop], [(4, 4)], family)
    [finer] = CLSFrom(clip).maps([crop], [(12, 12)], family)
    for before, after in zip(own, finer, strict=True):
        place = int(after.argmax())
        assert (place // 12 // 3, place % 12 // 3) == divmod(int(before.argmax()), 4)


def test_the_clip_is_left_as_it_was(family):
    clip = build_clip(patch_dropout=0.5).train()
    found = CLSFrom(clip)
    maps = found.maps([torch.randn(3, 32, 32)], [(4, 4)], family)
    assert maps[0].shape == (5, 4, 4)  # no patch was dropped
    assert clip.visual.training
    assert not any(module._forward_pre_hooks for module in clip.modules())
    assert not maps[0].requires_grad
    with pytest.raises(RuntimeError):
        found.maps([torch.randn(4, 32, 32)], [(4, 4)], family)
    assert not any(module._forward_pre_hooks for module in clip.modules())


@torch.no_grad()
def test_half_precision_clips_give_nearly_the_same(family):
    crop = torch.randn(3, 32, 32)
    [exact] = CLSFrom(build_clip()).maps([crop], [(4, 4)], family)
    [half] = CLSFrom(build_clip().bfloat16()).maps([crop], [(4, 4)], family)
    assert half.dtype == torch.float32
    assert (half[0] - exact[0]).abs().max() < 0.1 * exact[0].max()


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": [1, 1, 1, 1], "head_width": 64},
        {"pool_type": "avg"},
        {"attentional_pool": True},
        {
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        {"block_type": "custom", "qk_norm": True},
    ],
    ids=["resnet", "average pooling", "attention pooling", "timm", "custom blocks"],
)
def test_towers_without_a_cls_token_are_refused(sizes):
    clip = open_clip.CustomTextCLIP(16, SIZES | sizes, TEXT)
    with pytest.raises(UnsupportedModelError, match="needs an OpenCLIP ViT that pools by its CLS token"):
        CLSFrom(clip)


def test_the_source_names_the_vit():
    assert CLSFrom(build_clip()).source == "CLS of OpenCLIP ViT-width64-8-32"
    assert CLSFrom(build_clip(image_size=224, patch_size=16, width=192)).source == "CLS of OpenCLIP ViT-Ti-16"


def test_attach_takes_the_scores_and_leaves_the_tower_alone(embedded, clip, ask):
    model, processor = embedded
    inputs = ask(
        processor, ([noise_picture(1)], "What is in the image?"), ([noise_picture(2)], "Is there a dog?")
    )
    tower = model.base_model.vision_tower.config
    before = tower._attn_implementation
    companion = CLSFrom(clip)
    grid = (12, 12)
    maps = companion.maps(list(inputs["pixel_values"]), [grid] * 2, family_of(model))
    with attach(model, VTCCLS(keep=20, start_layer=0), DAMRO(topk=5), scores=companion) as fix:
        assert tower._attn_implementation == before
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        report = fix.report
    for index, scores in enumerate(maps):
        kept, outliers = report["vtc_cls"][index], report["damro"][index]
        assert kept["source"] == outliers["source"] == "CLS of OpenCLIP ViT-width64-8-32"
        total = scores[:-2].sum(0).flatten()  # the last layer is left out, and DAMRO's row
        assert kept["kept"] == sorted(total.argsort(descending=True, stable=True)[:20].tolist())
        assert outliers["outliers"] == sorted(
            scores[-1].flatten().argsort(descending=True, stable=True)[:5].tolist()
        )
    with attach(model, VTCCLS(keep=20, start_layer=0)) as fix:
        assert tower._attn_implementation != before
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert fix.report["vtc_cls"][0]["source"] == "cls"
        assert fix.report["vtc_cls"][0]["kept"] != report["vtc_cls"][0]["kept"]


@pytest.mark.parametrize("name", ["test_family_idefics3", "test_family_internvl"])
def test_tiles_of_other_families_are_scored(clip, name, tmp_path):
    """Their pixels are those that the family says, tile by tile."""
    import importlib

    from family_checks import build

    from lvlm_fix import load

    family_test = importlib.import_module(name)
    arguments = ("Idefics3", 2) if name.endswith("idefics3") else ({},)
    family_test.save_model(tmp_path, *arguments)
    model, processor = load(tmp_path)
    rows = [([noise_picture(1, (48, 48))], "what ?"), ([noise_picture(2, (100, 50))], "is there a dog ?")]
    inputs = build(processor, *rows)
    family, companion = family_of(model), CLSFrom(clip)
    crops, grids = family.pixels(model, inputs), family.token_grids(model, inputs)
    assert set(grids) == {(3, 3)}
    maps = companion.maps(crops, grids, family)
    with attach(model, DAMRO(topk=2), scores=companion) as fix:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        entries = fix.report["damro"]
    expected = [sorted(tile[-1].flatten().argsort(descending=True)[:2].tolist()) for tile in maps]
    if name.endswith("idefics3"):  # all tiles of a prompt are one image
        found = [sorted(entry["outliers"]) for entry in entries]
        tiles = [(inputs["pixel_values"][row] != 0).flatten(1).any(1).sum().item() for row in (0, 1)]
        assert sum(tiles) == len(expected)
        own = [expected[: tiles[0]], expected[tiles[0] :]]
        assert found == [[9 * tile + i for tile, few in enumerate(prompt) for i in few] for prompt in own]
    else:
        assert [entry["outliers"] for entry in entries] == expected
    assert {entry["source"] for entry in entries} == {companion.source}


def test_open_clip_is_not_imported_for_the_rest():
    code = "import sys, lvlm_fix; lvlm_fix.CLSFrom; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
