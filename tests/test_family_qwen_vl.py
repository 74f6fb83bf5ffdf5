"""Qwen2-VL and Qwen2.5-VL: packed towers without a CLS token, window attention, merged patches, positions in 3D."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from conftest import noise_picture
from family_checks import (
    CONTRAST,
    FIXES,
    LONG,
    MOVE,
    PRUNE,
    SHORT,
    TOLERANCE,
    FamilyChecks,
    Seen,
    build_tokenizer,
    logits_of,
    mean,
    run,
    sharpen,
    slow_branches,
)
from slow import best, largest_difference

from lvlm_fix import DAMRO, LVLM, VTCCLS, CLSFrom, PromptError, UnsupportedModelError, attach, load
from lvlm_fix.models import family_of
from lvlm_fix.recorder import PROBES

PATCH, MERGE, WINDOW = 4, 2, 2
BLOCK = PATCH * MERGE
NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endfor %}{{ ' ASSISTANT :' }}"
)


def save_model(folder, kind, **vision):
    """`kind` is Qwen2VL or Qwen2_5_VL."""
    tokenizer = build_tokenizer([], NAMED)
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    area = {"shortest_edge": BLOCK**2, "longest_edge": 64**2}
    processor = getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(size=area, **sizes),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=area, **sizes),
        chat_template=TEMPLATE,
    )
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in NAMED.items()}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 4, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE} | vision
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    sharpen(model, 6)
    # A placeholder in an answer would be one picture too few for the next call, with methods or without.
    model.generation_config.suppress_tokens = [ids["image_token_id"], ids["video_token_id"]]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build(processor, *rows):
    """Rows of (pictures, question) as model inputs; two pictures side by side need something between them."""
    one = "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [f"USER : {one * len(pictures)} {question} ASSISTANT :" for pictures, question in rows]
    pictures = [picture for pictures, _ in rows for picture in pictures]
    return processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")


@dataclass
class OnGrid(Seen):
    """An image and the rows and columns of its tokens."""

    grid: tuple[int, int]


def positions_of(ids, grids, model):
    """Time, height and width (3, T) of a prompt's tokens, and the position after it, counted out."""
    grids, places, now, left = list(grids), [], 0, []
    for word in ids:
        if word != model.config.image_token_id:
            places.append((now, now, now))
            now += 1
            continue
        if not left:
            rows, columns = grids.pop(0)
            left = [(now, now + row, now + column) for row in range(rows) for column in range(columns)]
            after = now + max(rows, columns)
        places.append(left.pop(0))
        now = now if left else after
    return places, max(max(place) for place in places) + 1


def branches(model, ids, images, fix):
    """The branches of a prompt; their tokens stay where they were, and what follows comes after the whole prompt."""
    whole, after = positions_of(ids, [image.grid for image in images], model)
    kept = [[image.kept(fix_of(fix, VTCCLS)) for image in images]]
    kept += [[image.outliers(method) for image in images] for method in fix if isinstance(method, DAMRO)]
    result = []
    for branch, chosen in zip(slow_branches(model, ids, images, fix), kept, strict=True):
        counts = [(image, i) for image in range(len(images)) for i in range(len(images[image].row))]
        own = []
        for word, place in zip(ids, whole, strict=True):
            if word == model.config.image_token_id:
                image, i = counts.pop(0)
                if i not in chosen[image]:
                    continue
            own.append(place)
        result.append((*branch, torch.tensor(own).T, after))
    return result


def fix_of(fix, kind):
    return next((method for method in fix if isinstance(method, kind)), None)


def in_windows(rows, columns, side):
    """Raster indices of tokens, window after window, as Qwen2.5-VL's tower has them."""
    order = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            for row in range(top, min(top + side, rows)):
                order += [row * columns + column for column in range(left, min(left + side, columns))]
    return order


def attention_rows(attention, hidden_states, position_embeddings):
    """Attention (P,) that patches get in one layer, mean over heads and evenly spaced query rows."""
    patches, width = hidden_states.shape
    heads, rotate = attention.num_heads, sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    parts = attention.qkv(hidden_states).view(patches, 3, heads, width // heads)
    query, key = rotate(parts[:, 0], parts[:, 1], *position_embeddings)
    count = min(PROBES, patches)
    probes = [round(i * (patches - 1) / max(count - 1, 1)) for i in range(count)]
    weights = []
    for head in range(heads):
        for probe in probes:
            weights.append((key[:, head] @ query[probe, head] * (width // heads) ** -0.5).softmax(0).tolist())
    return [mean([row[patch] for row in weights]) for patch in range(patches)]


def see_picture(model, patches, grid):
    """One picture: its tokens and their scores, from the tower's own parts."""
    tower, caught = model.model.visual, {}
    rows, columns = int(grid[1]) // MERGE, int(grid[2]) // MERGE
    windowed = hasattr(tower.config, "window_size")
    scored = tower.config.fullatt_block_indexes if windowed else range(len(tower.blocks))
    hooks = []
    for index in scored:

        def catch(module, args, kwargs, index=index):
            states = args[0] if args else kwargs["hidden_states"]
            caught[index] = (states, kwargs["position_embeddings"])

        hooks.append(tower.blocks[index].attn.register_forward_pre_hook(catch, with_kwargs=True))
    seen = model.model.get_image_features(patches, grid[None])
    for hook in hooks:
        hook.remove()
    order = in_windows(rows, columns, WINDOW) if windowed else list(range(rows * columns))
    if windowed:  # the answer key of the order: merged in it, the tower's output gives the tokens
        merged = tower.merger(seen.last_hidden_state)
        assert all(torch.allclose(merged[i], seen.pooler_output[0][order[i]]) for i in range(len(order)))
    layers = []
    for index in sorted(caught):
        scores = attention_rows(tower.blocks[index].attn, *caught[index])
        blocks = [mean(scores[4 * i : 4 * i + 4]) for i in range(len(order))]
        layers.append([blocks[order.index(token)] for token in range(len(order))])
    return OnGrid(seen.pooler_output[0], layers, layers[-1], [0] * len(order), (rows, columns))


class QwenChecks(FamilyChecks):
    records_tower = False  # it takes the grids, too
    image_entries = 3
    build = staticmethod(build)
    branches = staticmethod(branches)

    @pytest.fixture(scope="class")
    @classmethod
    def pictures(cls):
        """3 x 6 tokens, whose 72 patches are more than the probes; 5 x 3; 2 x 2."""
        return [noise_picture(1, (48, 24)), noise_picture(2, (24, 40)), noise_picture(3, (16, 16))]

    @staticmethod
    def see(model, inputs, row):
        start = model.config.vision_start_token_id
        counts = (inputs["input_ids"] == start).sum(1).tolist()
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        images = []
        for index in range(sum(counts[:row]), sum(counts[: row + 1])):
            first = sum(sizes[:index])
            patches = inputs["pixel_values"][first : first + sizes[index]]
            images.append(see_picture(model, patches, inputs["image_grid_thw"][index]))
        return images

    @torch.inference_mode()
    @pytest.mark.parametrize("name", ["vtc_cls", "all"])
    @pytest.mark.parametrize("path", ["generate", "forward"])
    def test_tokens_keep_their_positions(self, loaded, inputs, seen, name, path):
        """Those that stay are where they were, and new words come after the whole prompt, in every branch."""
        model, fix = loaded[0], FIXES[name]
        steps, text = [], model.model.language_model
        hook = text.register_forward_pre_hook(
            lambda module, args, kwargs: steps.append((kwargs["position_ids"], kwargs["attention_mask"])),
            with_kwargs=True,
        )
        with attach(model, *fix):
            if path == "generate":
                model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            else:
                output = model(**inputs)
                for _ in range(2):
                    word = output.logits[:, -1:].argmax(-1)
                    output = model(input_ids=word, past_key_values=output.past_key_values)
        hook.remove()
        assert len(steps) == 1 + 2
        for row, images in enumerate(seen):
            ids = inputs["input_ids"][row, int(inputs["attention_mask"][row].argmax()) :].tolist()
            expected_of = branches(model, ids, images, fix)
            positions, mask = steps[0]
            whole = torch.cat([expected[2] for expected in expected_of], dim=-1)
            assert torch.equal(positions[:, row, mask[row].bool()], whole)
            for branch, expected in enumerate(expected_of):
                for step in (0, 1):
                    decoded = steps[1 + step][0][branch * 2 + row]
                    assert decoded.tolist() == [expected[3] + step]

    @torch.inference_mode()
    def test_kinds_of_tokens_need_not_be_passed(self, loaded, inputs):
        model = loaded[0]
        bare = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
        with attach(model, PRUNE):
            assert torch.equal(model(**bare).logits, model(**inputs).logits)

    @torch.inference_mode()
    def test_positions_that_are_passed_are_kept(self, loaded, inputs):
        model = loaded[0]
        moved, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
        moved = moved * 2
        everything = VTCCLS(keep=10**6, start_layer=0)
        plain = model(**inputs, position_ids=moved).logits
        text_only = inputs["attention_mask"].cumsum(1)
        text_plain = model(**inputs, position_ids=text_only).logits
        with attach(model, everything):
            fixed = model(**inputs, position_ids=moved).logits
            text_fixed = model(**inputs, position_ids=text_only).logits
        assert not torch.allclose(plain[:, -1], text_plain[:, -1], atol=1e-3)
        torch.testing.assert_close(fixed[:, -1], plain[:, -1])
        torch.testing.assert_close(text_fixed[:, -1], text_plain[:, -1])

    @torch.inference_mode()
    def test_the_plain_model_counts_on_by_itself_afterwards(self, loaded, inputs):
        """It keeps a difference of positions of its last prompt, which decoding without position_ids uses."""
        model = loaded[0]

        def two_steps():
            output = model(**inputs)
            word = output.logits[:, -1:].argmax(-1)
            return model(input_ids=word, past_key_values=output.past_key_values).logits

        before = two_steps()
        run(model, FIXES["all"], inputs)
        assert torch.equal(two_steps(), before)

    @torch.inference_mode()
    @pytest.mark.parametrize("told", [True, False], ids=["kinds of tokens told", "not told"])
    @pytest.mark.parametrize("rows_left", [2, 1], ids=["padded rows", "one row without a mask"])
    def test_a_conversation_goes_on_from_the_cache(self, loaded, rows, rows_left, told):
        model, fix = loaded[0], FIXES["vtc_cls damro"]
        inputs = build(loaded[1], *rows[:rows_left])
        mask = inputs.pop("attention_mask")
        said = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}

        def masked(length):
            longer = torch.nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)
            return {"attention_mask": longer} if rows_left > 1 else {}

        start = inputs["input_ids"].shape[1]
        with attach(model, *fix):
            first = model.generate(**inputs, **masked(start), max_new_tokens=3, min_new_tokens=3, **said)
            whole = torch.cat([first.sequences, inputs["input_ids"][:, -4:]], dim=1)
            kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, whole.shape[1] - start))
            longer = {"input_ids": whole} | masked(whole.shape[1])
            kinds = {"mm_token_type_ids": kinds}
            cache = {"past_key_values": first.past_key_values} | (kinds if told else {})
            onwards = model.generate(**longer, **cache, max_new_tokens=3, **said)
            again = model.generate(**dict(inputs) | longer | kinds, max_new_tokens=3, **said)
        assert torch.equal(onwards.sequences, again.sequences)
        for ours, theirs in zip(onwards.logits, again.logits, strict=True):
            assert largest_difference(ours, theirs) < TOLERANCE

    def test_generating_without_a_cache_says_the_same(self, loaded, inputs):
        fix = FIXES["vtc_cls damro"]
        assert torch.equal(run(loaded[0], fix, inputs), run(loaded[0], fix, inputs, use_cache=False))

    def test_crops_are_the_pictures_that_the_processor_cut_in_patches(self, loaded, pictures, inputs):
        model, processor = loaded
        family, tools = family_of(model), processor.image_processor
        crops = family.pixels(model, inputs)
        grids = family.token_grids(model, inputs)
        assert grids == [(3, 6), (5, 3), (2, 2)]
        for picture, crop in zip(pictures, crops, strict=True):
            expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
            mean_, std = (torch.tensor(part)[:, None, None] for part in (tools.image_mean, tools.image_std))
            torch.testing.assert_close(crop, (expected - mean_) / std, rtol=0, atol=1e-5)
        assert family.pixel_mean == pytest.approx(tuple(tools.image_mean))
        assert family.pixel_std == pytest.approx(tuple(tools.image_std))

    def test_a_companion_scores_pictures_of_any_shape(self, loaded, inputs):
        open_clip = pytest.importorskip("open_clip")
        sizes = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 4}
        text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 1, "layers": 1}
        companion, family = CLSFrom(open_clip.CLIP(16, sizes, text).eval()), family_of(loaded[0])
        with attach(loaded[0], PRUNE, CONTRAST, scores=companion) as fix:
            loaded[0].generate(**inputs, max_new_tokens=1)
            report = fix.report
        grids = family.token_grids(loaded[0], inputs)
        maps = companion.maps(family.pixels(loaded[0], inputs), grids, family)
        for entry, scores, grid in zip(report["vtc_cls"], maps, grids, strict=True):
            total = scores[:-2].flatten(1).sum(0).tolist()
            assert entry["kept"] == best(total, round(0.4 * len(total)))
            assert entry["grid"] == grid
            assert entry["source"].startswith("CLS of OpenCLIP")
        for entry, scores in zip(report["damro"], maps, strict=True):
            assert entry["outliers"] == best(scores[-1].flatten().tolist(), CONTRAST.topk)

    def test_videos_are_refused_by_generate_too(self, loaded, inputs):
        model, processor = loaded
        frames = np.stack([np.array(noise_picture(index, (16, 16))) for index in range(4)])
        text = "USER : <|vision_start|><|video_pad|><|vision_end|> what is this ? ASSISTANT :"
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        video = processor.video_processor(videos=[frames], return_tensors="pt")
        count = int(video["video_grid_thw"].prod()) // MERGE**2
        ids = processor.tokenizer(text.replace("<|video_pad|>", "<|video_pad|>" * count), return_tensors="pt")
        ids = ids["input_ids"]
        kinds = 2 * (ids == model.config.video_token_id).int()
        assert int(kinds.sum()) == 2 * count
        with attach(model, PRUNE), pytest.raises(PromptError, match="videos are not read"):
            model.generate(input_ids=ids, mm_token_type_ids=kinds, **video, max_new_tokens=1)

    def test_a_picture_of_several_frames_is_refused(self, loaded, inputs):
        frames = inputs["image_grid_thw"] * torch.tensor([2, 1, 1])
        twice = torch.cat([inputs["pixel_values"], inputs["pixel_values"]])
        ids = {"input_ids": inputs["input_ids"]}
        with attach(loaded[0], PRUNE), pytest.raises(PromptError, match="several frames"):
            loaded[0](pixel_values=twice, image_grid_thw=frames, **ids)

    def test_the_wrapper_asks_about_pictures(self, loaded, pictures):
        asked = LVLM(*loaded).ask(pictures[:2], [SHORT, LONG], fix=[PRUNE, MOVE], max_new_tokens=3)
        assert [answer.tokens for answer in asked] == [3, 3]
        assert [len(answer.report["vtc_cls"]) for answer in asked] == [1, 1]
        assert asked[0].report["vtc_cls"][0]["grid"] == (3, 6)


class TestQwen2VL(QwenChecks):
    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("qwen2_vl")
        save_model(folder, "Qwen2VL", embed_dim=32, hidden_size=64, mlp_ratio=2)
        return load(folder)


WINDOWED = {
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "window_size": WINDOW * BLOCK,
}


class TestQwen25VL(QwenChecks):
    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("qwen2_5_vl")
        save_model(folder, "Qwen2_5_VL", fullatt_block_indexes=[1, 3], **WINDOWED)
        return load(folder)

    def test_only_layers_with_full_attention_are_scored(self, loaded):
        model = loaded[0]
        blocks = model.model.visual.blocks
        assert family_of(model).tower_attention(model) == [blocks[1].attn, blocks[3].attn]

    @torch.inference_mode()
    def test_one_layer_with_full_attention_counts_for_vtc_cls(self, tmp_path, pictures):
        save_model(tmp_path, "Qwen2_5_VL", fullatt_block_indexes=[2], **WINDOWED)
        model, processor = load(tmp_path)
        inputs = build(processor, ([pictures[0]], SHORT))
        [image] = self.see(model, inputs, 0)
        assert len(image.layers) == 1
        with attach(model, VTCCLS(keep=5, start_layer=0), CONTRAST) as fix:
            model(**inputs)
        assert fix.report["vtc_cls"][0]["kept"] == sorted(
            sorted(range(18), key=lambda token: -image.layers[0][token])[:5]
        )
        assert fix.report["damro"][0]["outliers"] == image.outliers(CONTRAST)

    def test_windows_in_every_layer_are_refused(self, tmp_path):
        save_model(tmp_path, "Qwen2_5_VL", fullatt_block_indexes=[], **WINDOWED)
        model, _ = load(tmp_path)
        with pytest.raises(UnsupportedModelError, match="attends within windows"):
            attach(model, PRUNE)
        with attach(model, MOVE):
            pass

    @torch.inference_mode()
    def test_a_row_without_pictures_beside_one_with_says_what_it_says_alone(self, loaded, pictures):
        model, processor = loaded
        rows = [([], LONG), ([pictures[1]], SHORT)]
        together, _ = logits_of(model, FIXES["vtc_cls"], build(processor, *rows))
        for row, asked in enumerate(rows):
            alone, _ = logits_of(model, FIXES["vtc_cls"], build(processor, asked))
            torch.testing.assert_close(together[0][row], alone[0][0], rtol=0, atol=1e-4)
