"""What LLaVA-NeXT and LLaVA-OneVision promise alike; their test files bring the models."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from anyres import (
    BATCHES,
    CELLS,
    CONTRAST,
    FIXES,
    MOVE,
    NOTHING,
    ONE_CODE,
    PACK,
    PRUNE,
    SHORT,
    TOLERANCE,
    answers,
    ask,
    run,
    with_logits,
)
from PIL import Image
from slow import largest_difference, stages

from lvlm_fix import CLSFrom, attach
from lvlm_fix.models import family_of


class FamilyTests:
    """What every family promises. The test file gives the fixtures `loaded` (model, processor) and `slow`."""

    @pytest.fixture(params=FIXES)
    def fix(self, request):
        return FIXES[request.param]

    @torch.inference_mode()
    @pytest.mark.parametrize("batch", BATCHES)
    def test_logits_equal_the_slow_way_at_every_step(self, loaded, slow, fix, batch, record_property):
        differences = self.differences_by_step(loaded, slow, fix, batch)
        record_property("largest difference", max(differences))
        print(f"largest difference {max(differences):.2e}")
        assert differences[0] < TOLERANCE
        # A number on the border of two codes of the packed cache may fall to the other side for its last bit.
        assert max(differences) < (TOLERANCE if stages(fix)[3] is None else ONE_CODE)

    @torch.inference_mode()
    @pytest.mark.parametrize("batch", BATCHES)
    @pytest.mark.parametrize("name", [name for name in FIXES if stages(FIXES[name])[3] is not None])
    def test_packed_caches_equal_the_slow_way_in_double_precision(self, loaded, slow, name, batch, doubles):
        model, processor = loaded
        double = copy.deepcopy(model).double()
        differences = self.differences_by_step((double, processor), type(slow)(double), FIXES[name], batch)
        print(f"largest difference {max(differences):.2e}")
        assert max(differences) < TOLERANCE

    @pytest.fixture
    def doubles(self):
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)

    @staticmethod
    def differences_by_step(loaded, slow, fix, batch):
        model, processor = loaded
        inputs = ask(processor, *BATCHES[batch]).to(model.dtype)
        output, prompt = with_logits(model, fix, inputs), inputs["input_ids"].shape[1]
        assert len(output.logits) == 5
        differences = [0.0] * 5
        for row, seen in enumerate(slow.seen(inputs, BATCHES[batch])):
            start = int(inputs["attention_mask"][row].argmax())
            conversation = slow.converse(output.sequences[row, start:prompt].tolist(), seen, fix)
            for step, logits in enumerate(output.logits):
                # generate hands logits out in single precision
                found = largest_difference(logits[row], conversation.logits.to(logits.dtype))
                differences[step] = max(differences[step], found)
                conversation.say(slow.word(output.sequences[row, prompt + step]))
        return differences

    @torch.inference_mode()
    @pytest.mark.parametrize("batch", BATCHES)
    def test_the_report_names_the_tokens_that_loops_choose(self, loaded, slow, batch):
        model, processor = loaded
        inputs = ask(processor, *BATCHES[batch])
        with attach(model, PRUNE, CONTRAST) as fixed:
            model(**inputs)
        expected = [
            (row, *slow.chosen(one, (PRUNE, CONTRAST)), (1, len(one[0])))
            for row, seen in enumerate(slow.seen(inputs, BATCHES[batch]))
            for one in seen
        ]
        kept, outliers = fixed.report["vtc_cls"], fixed.report["damro"]
        reported = [
            (a["prompt"], a["kept"], b["outliers"], a["grid"]) for a, b in zip(kept, outliers, strict=True)
        ]
        assert reported == expected
        assert {entry["source"] for entry in kept + outliers} == {slow.source}

    @torch.inference_mode()
    @pytest.mark.parametrize("batch", ["one picture", "two pictures"])
    def test_a_companion_scores_every_crop_that_the_tower_sees(self, loaded, slow, batch):
        open_clip = pytest.importorskip("open_clip")
        torch.manual_seed(3)
        text = {"context_length": 8, "vocab_size": 32, "width": 64, "heads": 1, "layers": 1}
        clip = open_clip.CLIP(16, {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3}, text).eval()
        companion, (model, processor) = CLSFrom(clip), loaded

        def look(crop):
            [scores] = companion.maps([crop], [(CELLS, CELLS)], family_of(model))
            return slow.look(crop)[0], scores[:-1].flatten(1), scores[-1].flatten()

        by_companion = copy.copy(slow)
        by_companion.look = look
        inputs = ask(processor, *BATCHES[batch])
        with attach(model, PRUNE, CONTRAST, scores=companion) as fixed:
            model(**inputs)
        [seen] = by_companion.seen(inputs, BATCHES[batch])
        expected = [by_companion.chosen(one, (PRUNE, CONTRAST)) for one in seen]
        kept, outliers = fixed.report["vtc_cls"], fixed.report["damro"]
        assert [(a["kept"], b["outliers"]) for a, b in zip(kept, outliers, strict=True)] == expected
        assert {entry["source"] for entry in kept + outliers} == {companion.source}

    @torch.inference_mode()
    def test_the_report_of_the_decoder(self, loaded):
        model, processor = loaded
        rows = BATCHES["rows of different length"]
        inputs = ask(processor, *rows)
        image = inputs["input_ids"] == model.config.image_token_id
        with attach(model, MOVE, PACK) as fixed:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        sinks, packed = fixed.report["var"], fixed.report["zipvl"]
        assert [entry["prompt"] for entry in sinks] == [entry["prompt"] for entry in packed] == [0, 1, 2, 3]
        for row, (moved, kept) in enumerate(zip(sinks, packed, strict=True)):
            assert moved["layers"] == [1, 2] and kept["layers"] == [0, 1, 2, 3]
            for all_sinks, of_image in zip(moved["sinks"], moved["image_sinks"], strict=True):
                assert len(of_image) <= len(all_sinks)
                assert bool(of_image) == bool(image[row].any())
                assert all(0 <= token < image[row].sum() for token in of_image)
            assert all(0 < ratio <= 1 for ratio in kept["ratios"])
        # With so few tokens the ranges weigh as much as the codes: no saving yet, but a sum there is.
        assert all(entry["bytes"] > 0 and entry["full_bytes"] > 0 for entry in packed)
        assert any(ratio < 1 for entry in packed for ratio in entry["ratios"])

    @torch.inference_mode()
    @pytest.mark.parametrize("batch", ["one picture", "rows of different length"])
    @pytest.mark.parametrize("nothing", NOTHING)
    def test_methods_set_to_nothing_are_the_plain_model(self, loaded, nothing, batch):
        model, processor = loaded
        inputs = ask(processor, *BATCHES[batch])
        plain, fixed = with_logits(model, (), inputs), with_logits(model, NOTHING[nothing], inputs)
        assert torch.equal(fixed.sequences, plain.sequences)
        for ours, theirs in zip(fixed.logits, plain.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)

    @torch.inference_mode()
    @pytest.mark.parametrize("name", FIXES)
    def test_methods_change_the_logits_by_far_more_than_the_tolerance(self, loaded, name):
        model, processor = loaded
        inputs = ask(processor, *BATCHES["one picture"])
        plain, fixed = with_logits(model, (), inputs), with_logits(model, FIXES[name], inputs)
        differences = [
            (ours - theirs)[ours.isfinite()].abs().max()
            for ours, theirs in zip(fixed.logits, plain.logits, strict=True)
        ]
        assert max(differences) > 100 * TOLERANCE

    @torch.inference_mode()
    def test_the_order_of_methods_does_not_matter(self, loaded):
        model, processor = loaded
        inputs = ask(processor, *BATCHES["rows of different length"])
        one = with_logits(model, FIXES["all"], inputs)
        for order in itertools.permutations(FIXES["all"]):
            other = with_logits(model, order, inputs)
            assert torch.equal(one.sequences, other.sequences)
            assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))

    @torch.inference_mode()
    def test_compiled_steps_say_the_same(self, loaded, doubles):
        """In float64, where no rounding chooses another of ZipVL's codes."""
        double = copy.deepcopy(loaded[0]).double()
        inputs = ask(loaded[1], *BATCHES["rows of different length"]).to(torch.float64)
        plainly, compiled = (
            with_logits(double, FIXES["all"], inputs, compile=compile) for compile in (False, True)
        )
        assert torch.equal(compiled.sequences, plainly.sequences)
        assert max(map(largest_difference, compiled.logits, plainly.logits)) < TOLERANCE

    @torch.inference_mode()
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    def test_a_padded_batch_says_what_its_rows_say_alone(self, loaded, fix, options):
        model, processor = loaded
        # Alone, a prompt without pictures is the plain model's; beside others its cache is packed like theirs.
        rows = [row for row in BATCHES["rows of different length"] if row[0] or stages(fix)[3] is None]
        rows += BATCHES["one picture"]
        inputs = ask(processor, *rows)
        together = answers(processor, inputs, run(model, fix, inputs, **options))
        alone = []
        for row in rows:
            inputs = ask(processor, row)
            alone += answers(processor, inputs, run(model, fix, inputs, **options))
        assert together == alone
        assert all(together)

    @torch.inference_mode()
    def test_sampling_follows_the_seed(self, loaded, fix):
        model, processor = loaded
        inputs = ask(processor, *BATCHES["rows of different length"])

        def sample(seed, **options):
            torch.manual_seed(seed)
            return run(model, fix, inputs, do_sample=True, temperature=5.0, **options)

        assert torch.equal(sample(1), sample(1))
        assert any(not torch.equal(sample(1), sample(seed)) for seed in (2, 3, 4))
        assert torch.equal(sample(1, top_k=1), run(model, fix, inputs))

    @torch.inference_mode()
    @pytest.mark.parametrize("name", ["vtc_cls damro", "var"])
    def test_generating_without_a_cache_says_the_same(self, loaded, name):
        model, processor = loaded
        inputs = ask(processor, *BATCHES["rows of different length"])
        cached = run(model, FIXES[name], inputs)
        assert torch.equal(cached, run(model, FIXES[name], inputs, use_cache=False))

    @torch.inference_mode()
    def test_a_bare_forward_pass_is_the_first_step_of_generate(self, loaded, fix):
        model, processor = loaded
        inputs = ask(processor, *BATCHES["rows of different length"])
        first = with_logits(model, fix, inputs).logits[0]
        with attach(model, *fix):
            bare = model(**inputs).logits[:, -1]
        torch.testing.assert_close(bare, first, rtol=0, atol=TOLERANCE)

    @torch.inference_mode()
    def test_afterwards_the_model_is_what_it_was(self, loaded, fix):
        model, processor = loaded
        inputs = ask(processor, *BATCHES["two pictures"])
        before, traces = with_logits(model, (), inputs), marks(model)
        with pytest.raises(KeyError, match="stop"), attach(model, *fix):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            raise KeyError("stop")
        assert marks(model) == traces
        after = with_logits(model, (), inputs)
        assert torch.equal(before.sequences, after.sequences)
        assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))

    @torch.inference_mode()
    def test_pictures_of_equal_pixels_and_different_size_are_two_pictures(self, loaded, fix):
        model, processor = loaded
        black = [Image.new("RGB", size) for size in ((60, 60), (60, 40))]
        rows = [([one], SHORT) for one in black]
        inputs = ask(processor, *rows)
        first = with_logits(model, fix, inputs).logits[0]
        with attach(model, *fix):
            bare = model(**inputs).logits[:, -1]
        torch.testing.assert_close(bare, first, rtol=0, atol=TOLERANCE)


def marks(model):
    """All that attaching could leave behind."""
    return [
        (
            name,
            sorted(module.__dict__),
            len(module._forward_pre_hooks),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    ]
