"""InstructBLIP: query tokens in the prompt, patches in the tower, and a text model that `generate` gives embeddings."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import transformers
from conftest import noise_picture
from family_checks import (
    EVICT,
    LONG,
    MOVE,
    NOTHING,
    PACK,
    PACK_IMAGE,
    SHORT,
    STEPS,
    TOLERANCE,
    build_tokenizer,
    logits_of,
    run,
    say_the_same_replayed,
    sharpen,
)
from slow import Conversation, SlowDecoder, best, largest_difference, stages

from lvlm_fix import DAMRO, LVLM, VTCCLS, PromptError, UnsupportedModelError, attach, load
from lvlm_fix.models import family_of

SIDE, PATCH, QUERIES = 5, 8, 32
CONTRAST = DAMRO(alpha=1.0, beta=0.01, topk=4)
pytestmark = pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning")

FIXES = {
    "damro": (CONTRAST,),
    "var": (MOVE,),
    "zipvl": (PACK,),
    "zipvl image": (PACK_IMAGE,),
    "zipvl evict": (EVICT,),
    "damro var": (CONTRAST, MOVE),
    "all": (CONTRAST, MOVE, PACK),
}
DOES_NOTHING = {name: method for name, method in NOTHING.items() if name != "vtc_cls"}


def build_model(text, tokenizer, image_token="<image>"):
    config = transformers.InstructBlipConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": SIDE * PATCH,
            "patch_size": PATCH,
            "initializer_range": 0.02,
        },
        qformer_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
    )
    torch.manual_seed(3)
    model = transformers.InstructBlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.query_tokens.normal_()
    sharpen(model, 8)
    return model


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructblip")
    tokenizer, qformer_tokenizer = build_tokenizer([], {}), build_tokenizer([], {})
    size = {"height": SIDE * PATCH, "width": SIDE * PATCH}
    tokenizer.padding_side = "left"
    processor = transformers.InstructBlipProcessor(
        transformers.BlipImageProcessor(size=size), tokenizer, qformer_tokenizer, num_query_tokens=QUERIES
    )
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = build_model(text, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load(folder)


@pytest.fixture(scope="session")
def rows():
    return [(noise_picture(1), SHORT), (noise_picture(2), LONG)]


def build(processor, *rows):
    images, texts = [picture for picture, _ in rows], [question for _, question in rows]
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


@pytest.fixture(scope="session")
def inputs(loaded, rows):
    return build(loaded[1], *rows)


@pytest.fixture(scope="session")
def plain(loaded, inputs):
    return logits_of(loaded[0], (), inputs)


class SlowInstructBlip:
    """One row at a time: the tower in eager attention, then the Q-Former, then the slow decoder."""

    def __init__(self, model) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.decoder = SlowDecoder(self.model.language_model.model, self.model.language_model.lm_head)

    def see(self, inputs, row):
        """Patches (1 + P, C) as the Q-Former gets them, and DAMRO's CLS row (P,)."""
        seen = self.model.vision_model(inputs["pixel_values"][row : row + 1], output_attentions=True)
        heads = seen.attentions[-2][0, :, 0, 1:].tolist()
        row = [sum(head[patch] for head in heads) / len(heads) for patch in range(SIDE * SIDE)]
        return seen.last_hidden_state[0], row

    def query(self, inputs, row, patches, looked_at):
        """Image tokens (32, C) when of (1 + P) patches only those `looked_at` can be seen: the others are masked."""
        words = inputs["qformer_attention_mask"][row].bool()
        shown = torch.tensor([[int(place in looked_at) for place in range(len(patches))]])
        output = self.model.qformer(
            inputs["qformer_input_ids"][row][words][None],
            query_embeds=self.model.query_tokens,
            encoder_hidden_states=patches[None],
            encoder_attention_mask=shown,
        )
        return self.model.language_projection(output.last_hidden_state[0, :QUERIES])

    def outliers(self, inputs, row, damro):
        return best(self.see(inputs, row)[1], damro.topk)

    def converse(self, inputs, row, fix):
        _, damro, _, _ = stages(fix)
        patches, _ = self.see(inputs, row)
        tokens = [self.query(inputs, row, patches, range(len(patches)))]
        if damro is not None:
            outliers = [1 + patch for patch in self.outliers(inputs, row, damro)]
            tokens.append(self.query(inputs, row, patches, outliers))
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        image = [word == self.model.config.image_token_id for word in ids]
        assert image == [True] * QUERIES + [False] * (len(ids) - QUERIES)
        words = [self.word(word) for word in ids[QUERIES:]]
        return Conversation(self.decoder, [(torch.stack([*own, *words]), image) for own in tokens], fix)

    def word(self, word):
        return self.model.get_input_embeddings().weight[word]


@torch.inference_mode()
@pytest.mark.parametrize("name", FIXES)
def test_logits_equal_the_slow_way_at_every_step(loaded, inputs, name, record_property):
    model, fix = loaded[0], FIXES[name]
    logits, sequences = logits_of(model, fix, inputs)
    slow, worst, prompt = SlowInstructBlip(model), 0.0, inputs["input_ids"].shape[1]
    for row in range(len(sequences)):
        conversation = slow.converse(inputs, row, fix)
        for step in range(STEPS):
            if step:
                conversation.say(slow.word(sequences[row, prompt + step - 1]))
            worst = max(worst, largest_difference(logits[step][row], conversation.logits))
    record_property("largest difference", worst)
    print(f"largest difference {worst:.2e}")
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", FIXES)
def test_methods_change_the_logits_by_far_more_than_the_tolerance(loaded, inputs, plain, name):
    fixed, _ = logits_of(loaded[0], FIXES[name], inputs)
    for row in range(len(fixed[0])):
        finite = fixed[0][row].isfinite()
        assert (fixed[0][row] - plain[0][0][row])[finite].abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", DOES_NOTHING)
def test_methods_set_to_do_nothing_are_the_plain_model(loaded, inputs, plain, name):
    logits, sequences = logits_of(loaded[0], (DOES_NOTHING[name],), inputs)
    assert torch.equal(sequences, plain[1])
    for ours, theirs in zip(logits, plain[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_the_order_of_methods_does_not_matter(loaded, inputs):
    results = [logits_of(loaded[0], fix, inputs) for fix in itertools.permutations(FIXES["all"])]
    for logits, sequences in results[1:]:
        assert torch.equal(sequences, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(logits, results[0][0], strict=True))


@torch.inference_mode()
def test_compiled_steps_say_the_same(loaded, inputs):
    """In float64, where no rounding chooses another of ZipVL's codes."""
    double, inputs = copy.deepcopy(loaded[0]).double(), copy.deepcopy(inputs).to(torch.float64)
    logits, sequences = logits_of(double, FIXES["all"], inputs)
    compiled, said = logits_of(double, FIXES["all"], inputs, compile=True)
    assert torch.equal(said, sequences)
    assert max(map(largest_difference, compiled, logits)) < TOLERANCE


def test_what_is_recorded_and_replayed_says_the_same(loaded, inputs, monkeypatch):
    towers = say_the_same_replayed(loaded[0], inputs, monkeypatch, FIXES["all"])
    assert [len(one.graphs) for one in towers] == [1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", FIXES)
def test_a_padded_batch_says_what_its_rows_say_alone(loaded, rows, inputs, name, options):
    """The processor pads between the image tokens and the words."""
    model, processor = loaded
    together = run(model, FIXES[name], inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, said in zip(rows, together.tolist(), strict=True):
        own = build(processor, row)
        alone = run(model, FIXES[name], own, **options)[0, own["input_ids"].shape[1] :].tolist()
        pad = [processor.tokenizer.pad_token_id] * (len(said) - len(alone))
        assert said == alone + pad


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "several returned"]
)
def test_returned_ids_are_laid_out_as_by_the_plain_model(loaded, inputs, options):
    model, options = loaded[0], options | {"min_new_tokens": STEPS}
    plain, fixed = run(model, (), inputs, **options), run(model, FIXES["all"], inputs, **options)
    start = inputs["input_ids"].shape[1]
    assert plain.shape == fixed.shape
    assert torch.equal(plain[:, :start], fixed[:, :start])
    copies = options.get("num_return_sequences", 1)
    assert torch.equal(fixed[:, :start], inputs["input_ids"].repeat_interleave(copies, dim=0))


def test_sampling_follows_the_seed(loaded, inputs):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return run(loaded[0], FIXES["all"], inputs, do_sample=True, temperature=5.0, **options)

    assert torch.equal(sample(1), sample(1))
    assert any(
        one.shape != sample(1).shape or not torch.equal(one, sample(1)) for one in map(sample, (2, 3, 4))
    )
    assert torch.equal(sample(1, top_k=1), run(loaded[0], FIXES["all"], inputs))


@torch.inference_mode()
def test_a_bare_forward_gives_the_logits_that_generate_starts_from(loaded, rows):
    model, processor = loaded
    for row in rows:
        inputs = build(processor, row)
        plain = model(**inputs).logits
        with attach(model, DOES_NOTHING["damro"]):
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=TOLERANCE)
        with attach(model, *FIXES["all"]):
            bare = model(**inputs).logits[:, -1]
        logits, _ = logits_of(model, FIXES["all"], inputs)
        assert largest_difference(bare, logits[0]) < TOLERANCE


@torch.inference_mode()
def test_the_model_is_afterwards_what_it_was(loaded, inputs, plain):
    model = loaded[0]

    def state():
        configs = (
            model.config,
            model.config.vision_config,
            model.config.text_config,
            model.config.qformer_config,
        )
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
        kept = [sorted(part.__dict__) for part in (model, model.language_model)]
        return [config._attn_implementation for config in configs], hooks, kept

    before = state()
    with attach(model, *FIXES["all"]):
        assert state() != before
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert state() == before
    logits, sequences = logits_of(model, (), inputs)
    assert torch.equal(sequences, plain[1])
    assert all(torch.equal(a, b) for a, b in zip(logits, plain[0], strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_the_report_tells_of_patches_and_query_tokens(loaded, inputs, options):
    model = loaded[0]
    with attach(model, *FIXES["all"]) as fix:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
        report = fix.report
    slow = SlowInstructBlip(model)
    for row, entry in enumerate(report["damro"]):
        assert entry["outliers"] == slow.outliers(inputs, row, CONTRAST)
        assert entry["grid"] == (SIDE, SIDE)
        assert entry["source"] == "cls"
    for name in FIXES["all"]:
        assert [entry["prompt"] for entry in report[name.name]] == [0, 1]
    for entry in report["var"]:
        assert entry["layers"] == [1, 2]
        assert any(entry["image_sinks"])
        assert all(sink < QUERIES for layer in entry["image_sinks"] for sink in layer)
    for entry in report["zipvl"]:
        assert len(entry["ratios"]) == 4
        assert min(entry["ratios"]) < 1
        assert 0 < entry["bytes"] < entry["full_bytes"]


def test_vtc_cls_is_refused(loaded):
    with pytest.raises(
        UnsupportedModelError, match="vtc_cls makes no sense on InstructBLIP: its image tokens"
    ):
        attach(loaded[0], VTCCLS(keep=16))


def test_an_encoder_decoder_is_refused(loaded):
    _, processor = loaded
    text = {
        "model_type": "t5",
        "vocab_size": len(processor.tokenizer),
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    model = build_model(text, processor.tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"text model \(t5\) is an encoder-decoder"):
        attach(model, CONTRAST)
    assert "forward" not in model.language_model.__dict__


@torch.inference_mode()
def test_the_text_model_alone_is_plain(loaded, inputs):
    """Also after a picture, whose features its embeddings do not hold."""
    model, ids = loaded[0], inputs["input_ids"][:, QUERIES:]
    text = model.language_model
    words = text.get_input_embeddings()(ids)
    plain = text(input_ids=ids).logits
    with attach(model, *FIXES["damro var"]) as fix:
        model.generate(**inputs, max_new_tokens=1)
        assert fix.report["damro"]
        assert torch.equal(text(input_ids=ids).logits, plain)
        assert torch.equal(text(inputs_embeds=words).logits, plain)
        assert not fix.report["damro"]


def test_image_tokens_are_found_by_value_in_every_beam(loaded):
    family = family_of(loaded[0])
    first, second = torch.randn(2, 3, 4)
    prompt = torch.randn(2, 6, 4)
    prompt[0, 1:4], prompt[1, 3:6] = first, second
    prompt[1, 0] = second[0]  # a word like the first token is no image
    found = family.finds_images(prompt.repeat_interleave(2, dim=0), [first, second])
    assert found.long().tolist() == [[0, 1, 1, 1, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2
    assert family.finds_images(torch.randn(2, 6, 4), [first, second]) is None
    assert family.finds_images(prompt, []) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_runs_with_beams_and_padding(loaded, rows, dtype):
    half, inputs = copy.deepcopy(loaded[0]).to(dtype), build(loaded[1], *rows)
    with attach(half, *FIXES["all"]) as fix:
        output = half.generate(**inputs.to(dtype), num_beams=2, max_new_tokens=3)
        assert len(fix.report["damro"]) == 2
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_the_wrapper_asks_about_pictures(loaded, rows, inputs):
    model, processor = loaded
    pictures, questions = (list(part) for part in zip(*rows, strict=True))
    asked = LVLM(model, processor).ask(pictures, questions, fix=FIXES["all"], max_new_tokens=STEPS)
    said = run(model, FIXES["all"], inputs)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(said, skip_special_tokens=True)
    assert [answer.text for answer in asked] == [text.strip() for text in expected]
    assert [len(answer.report["damro"]) for answer in asked] == [1, 1]
    assert [answer.tokens for answer in asked] == (said != processor.tokenizer.pad_token_id).sum(1).tolist()


def test_the_wrapper_refuses_several_pictures_a_question(loaded, rows):
    with pytest.raises(PromptError, match="InstructBLIP takes one picture for each question, and this has 2"):
        LVLM(*loaded).ask((rows[0][0], rows[1][0]), SHORT)
