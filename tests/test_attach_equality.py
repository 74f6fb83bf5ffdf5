"""The plug-in against the same computation done slowly and plainly, and against itself in other shapes.

The slow way has no hooks, no batch and no padding: the tower runs in eager attention with all weights kept, tokens
are chosen in Python loops, and each branch of each prompt is decoded by itself, head by head (see `slow`).
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from itertools import combinations
from threading import Thread

import pytest
import torch
from slow import Conversation, SlowDecoder, best, largest_difference, stages
from transformers import TextIteratorStreamer

from lvlm_fix import DAMRO, VAR, VTCCLS, ZipVL, attach, load

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]

PRUNE, CONTRAST = VTCCLS(keep=40, start_layer=0), DAMRO(alpha=1.0, beta=0.01, topk=7)
# The models have no sinks of their own: thresholds low enough that some image tokens count as such.
MOVE = VAR(p=0.9, rho=0.05, min_image_attention=0.05, tau=9.0, first_layer=1, sink_dims=(39, 20))
PACK = ZipVL(tau=0.8, recent=12, random=20, window=6)
# Some words of both models are surer than that, and some are not.
GATED = replace(CONTRAST, gate=0.6)
FIXES = {
    "vtc_cls": (PRUNE,),
    "damro": (CONTRAST,),
    "gated damro": (GATED,),
    "var": (MOVE,),
    "zipvl": (PACK,),
    "vtc_cls damro": (PRUNE, CONTRAST),
    "zipvl var": (PACK, MOVE),
    "all": (PRUNE, CONTRAST, MOVE, PACK),
}
# What VAR and ZipVL do to a prompt, its answer and a further question is not what they do to all of it as one prompt.
WITHOUT_MEMORY = {name: FIXES[name] for name in ("vtc_cls", "damro", "gated damro", "vtc_cls damro")}
TOLERANCE = 1e-4
SHORT, LONG = "What is in the image?", "Is there a fork in the image? Is there a traffic light in the image?"


@pytest.fixture(params=FIXES, ids=lambda name: name.replace("_", "-"))
def fix(request):
    return FIXES[request.param]


@pytest.fixture(params=WITHOUT_MEMORY, ids=lambda name: name.replace("_", "-"))
def forgetful_fix(request):
    return FIXES[request.param]


@pytest.fixture(scope="session")
def batches(sample_pictures):
    kitchen, office, street = (sample_pictures[name] for name in ("kitchen", "office", "street"))
    return {
        "one picture": [([kitchen], SHORT)],
        "two pictures": [([street, kitchen], "Describe the images.")],
        "rows of different length": [([office], SHORT), ([kitchen, street], LONG), ([street], LONG)],
        "a row with no picture": [
            ([kitchen], SHORT),
            ([], "Is there a dog? Is there a cat? Is there a cup?"),
        ],
    }


class SlowModel:
    """The papers' computation for one prompt, written to be read."""

    def __init__(self, model) -> None:
        self.fused, self.model = model, copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.decoder = SlowDecoder(self.model.model.language_model, self.model.lm_head)

    def see(self, pixels):
        """Image tokens (N, C), per-head mean CLS rows of all layers (L, N), DAMRO's full-width row (N,)."""
        tower = self.model.model.vision_tower
        seen = tower(pixels[None], output_attentions=True, output_hidden_states=True)
        # Of the model as it came: eager attention rounds its softmax to float32.
        tokens = self.fused.model.get_image_features(pixel_values=pixels[None]).pooler_output[0]
        layers = [weights[0, :, 0, 1:].mean(0).tolist() for weights in seen.attentions]
        index = len(seen.attentions) - 2  # its output is hidden_states[-2], which the projector takes
        layer = [module for module in tower.modules() if type(module).__name__ == "CLIPEncoderLayer"][index]
        x = layer.layer_norm1(seen.hidden_states[index])[0]
        query, key = layer.self_attn.q_proj(x), layer.self_attn.k_proj(x)
        row = ((query[0] * key).sum(-1) / query.shape[-1] ** 0.5).softmax(0)
        return tokens, layers, row[1:].tolist()

    def chosen(self, pixels, prune, contrast):
        """Tokens of one image for the positive and for the negative branch."""
        tokens, layers, row = self.see(pixels)
        kept = range(len(row))
        if prune is not None:
            total = [sum(layer[i] for layer in layers[prune.start_layer : -1]) for i in range(len(row))]
            kept = best(total, prune.keep)
        outliers = best(row, contrast.topk) if contrast is not None else []
        return [tokens[i] for i in kept], [tokens[i] for i in outliers]

    def branch(self, ids, images):
        """Embeddings and image flags; each run of image placeholders stands for the tokens of one image."""
        placeholder, rows, image, images = self.model.config.image_token_id, [], [], list(images)
        for place, word in enumerate(ids):
            if word != placeholder:
                rows.append(self.word(word))
                image.append(False)
            elif sum(other == placeholder for other in ids[:place]) % 144 == 0:
                image += [True] * len(images[0])
                rows.extend(images.pop(0))
        assert not images
        return torch.stack(rows), image

    def word(self, word):
        return self.model.get_input_embeddings().weight[word]

    def converse(self, ids, pixels, fix):
        """A conversation that begins with the prompt `ids`; its `logits` are those of the next word."""
        prune, contrast, *_ = stages(fix)
        seen = [self.chosen(one, prune, contrast) for one in pixels]
        branches = [self.branch(ids, [kept for kept, _ in seen])]
        if contrast is not None:
            branches.append(self.branch(ids, [outliers for _, outliers in seen]))
        return Conversation(self.decoder, branches, fix)


def run(model, fix, inputs, **options):
    with attach(model, *fix) if fix else contextlib.nullcontext():
        return model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False} | options)


def packed_codes(cache):
    """The packed keys of every layer."""
    return [group.keys.packed for layer in cache.layers for group in layer.groups]


def texts(processor, inputs, output):
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def worst_difference(model, processor, fix, rows, ask, record_property, steps=5):
    """Of the plug-in's logits from the slow way's, over all rows of a batch and some steps."""
    inputs = ask(processor, *rows).to(model.dtype)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "output_logits": True}
    output = run(model, fix, inputs, return_dict_in_generate=True, **options)
    slow, worst, prompt = SlowModel(model), 0.0, inputs["input_ids"].shape[1]
    pixels = iter(inputs["pixel_values"])
    for row, (pictures, _) in enumerate(rows):
        own = [next(pixels) for _ in pictures]
        start = int(inputs["attention_mask"][row].argmax())
        conversation = slow.converse(output.sequences[row, start:prompt].tolist(), own, fix)
        assert len(output.logits) == steps
        for step, logits in enumerate(output.logits):
            worst = max(worst, largest_difference(logits[row], conversation.logits))
            conversation.say(slow.word(output.sequences[row, prompt + step]))
    record_property("largest difference", worst)
    print(f"largest difference {worst:.2e}")
    return worst


@torch.inference_mode()
@pytest.mark.parametrize("batch", ["one picture", "two pictures", "rows of different length"])
@pytest.mark.parametrize(
    "fix",
    [
        (PRUNE,),
        (CONTRAST,),
        (GATED,),
        (MOVE,),
        (PRUNE, CONTRAST),
        (MOVE, CONTRAST, PRUNE),
        (MOVE, GATED, PRUNE),
    ],
    ids=lambda fix: " ".join("gated" if method is GATED else method.name for method in fix),
)
def test_logits_equal_the_slow_way_at_every_step(llava, fix, batch, batches, ask, record_property):
    assert worst_difference(*llava, fix, batches[batch], ask, record_property) < TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("batch", ["one picture", "rows of different length"])
@pytest.mark.parametrize("fix", [(PACK,), (PACK, MOVE, PRUNE, CONTRAST)], ids=["zipvl", "all methods"])
def test_a_sparse_prefill_equals_the_slow_way(llava, fix, batch, batches, ask, record_property):
    assert worst_difference(*llava, fix, batches[batch], ask, record_property, steps=1) < TOLERANCE


class RMSNorm(torch.nn.Module):
    """Llama's norm rounds to float32 whatever the dtype; this one does not."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def in_float64(model):
    double = copy.deepcopy(model).double()
    for module in list(double.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, RMSNorm(child))
    return double


@torch.inference_mode()
@pytest.mark.parametrize("batch", ["one picture", "rows of different length"])
@pytest.mark.parametrize(
    "fix",
    [
        (PACK,),
        (replace(PACK, evict=True),),
        (replace(PACK, scope="image"), PRUNE),
        (PACK, MOVE),
        (replace(PACK, evict=True), MOVE, PRUNE, CONTRAST),
    ],
    ids=["all tokens", "evict", "image, pruned", "var", "all methods"],
)
def test_a_packed_cache_equals_the_slow_way_in_float64(llava, fix, batch, batches, ask, record_property):
    """In float64: between two of 4 or 16 codes the last digit of a float32 may decide, and then rightly shows."""
    model, processor = llava
    torch.set_default_dtype(torch.float64)
    try:
        double = in_float64(model)
        assert worst_difference(double, processor, fix, batches[batch], ask, record_property) < 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


@torch.inference_mode()
def test_methods_change_the_logits_by_far_more_than_the_tolerance(llava, fix, batches, ask):
    model, processor = llava
    inputs = ask(processor, *batches["one picture"])
    plain = model(**inputs).logits[0, -1]
    with attach(model, *fix):
        fixed = model(**inputs).logits[0, -1]
    assert (fixed - plain)[fixed.isfinite()].abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("batch", ["rows of different length", "a row with no picture"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["greedy", "beams", "several returned"],
)
def test_a_padded_batch_says_what_its_rows_say_alone(embedded, fix, batch, options, batches, ask):
    model, processor = embedded
    inputs = ask(processor, *batches[batch])
    together = texts(processor, inputs, run(model, fix, inputs, **options))
    alone = []
    for row in batches[batch]:
        inputs = ask(processor, row)
        alone += texts(processor, inputs, run(model, fix, inputs, **options))
    assert together == alone
    assert all(together)


@torch.inference_mode()
@pytest.mark.parametrize(
    "fix", [(CONTRAST,), (GATED,), (MOVE, CONTRAST, PRUNE)], ids=["damro", "gated", "three"]
)
def test_a_row_without_pictures_is_plain_beside_one_with(llava, fix, batches, ask):
    model, processor = llava
    rows = batches["a row with no picture"]
    options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    beside = run(model, fix, ask(processor, *rows), **options).logits
    plain = run(model, (), ask(processor, *rows), **options).logits
    for ours, theirs in zip(beside, plain, strict=True):
        assert largest_difference(ours[1], theirs[1]) < TOLERANCE
    assert beside[0][0].isinf().any()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generating_without_a_cache_says_the_same(llava, forgetful_fix, options, batches, ask):
    model, processor = llava
    inputs = ask(processor, *batches["rows of different length"])
    options = options | {"max_new_tokens": 6}
    cached = run(model, forgetful_fix, inputs, **options)
    assert torch.equal(cached, run(model, forgetful_fix, inputs, use_cache=False, **options))


def test_beams_differ_from_greedy_somewhere(random_llava, batches, ask):
    """Else the beam tests would show nothing."""
    model, processor = random_llava
    inputs = ask(processor, *batches["rows of different length"])
    assert not torch.equal(run(model, (), inputs), run(model, (), inputs, num_beams=3))


def test_sampling_follows_the_seed(random_llava, fix, batches, ask):
    model, processor = random_llava
    inputs = ask(processor, *batches["rows of different length"])

    def sample(seed, **options):
        torch.manual_seed(seed)
        return run(model, fix, inputs, do_sample=True, temperature=5.0, **options)

    assert torch.equal(sample(1), sample(1))
    assert any(not torch.equal(sample(1), sample(seed)) for seed in (2, 3, 4))
    assert torch.equal(sample(1, top_k=1), run(model, fix, inputs))


def test_a_streamer_gets_the_text(embedded, fix, batches, ask):
    model, processor = embedded
    inputs = ask(processor, *batches["two pictures"])
    streamer = TextIteratorStreamer(
        processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
    )
    with attach(model, *fix):
        options = {"max_new_tokens": 12, "do_sample": False, "streamer": streamer}
        thread = Thread(target=model.generate, kwargs=dict(inputs) | options)
        thread.start()
        streamed = "".join(streamer)
        thread.join()
    assert [streamed] == texts(processor, inputs, run(model, fix, inputs))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 3}], ids=["greedy", "beams"]
)
def test_returned_ids_begin_with_the_prompt_as_passed(llava, fix, options, batches, ask):
    model, processor = llava
    inputs = ask(processor, *batches["rows of different length"])
    output = run(model, fix, inputs, return_dict_in_generate=True, **options)
    copies = options.get("num_return_sequences", 1)
    prompt = inputs["input_ids"].repeat_interleave(copies, dim=0)
    assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt)
    assert 1 <= output.sequences.shape[1] - prompt.shape[1] <= 12
    assert torch.equal(output.sequences, run(model, fix, inputs, **options))


@torch.inference_mode()
@pytest.mark.parametrize("batch", ["two pictures", "rows of different length"])
@pytest.mark.parametrize(
    "nothing",
    [
        (VTCCLS(keep=144, start_layer=0),),
        (DAMRO(alpha=0, beta=0),),
        (DAMRO(alpha=3, beta=0, gate=0),),
        (VTCCLS(keep=1000, start_layer=0), DAMRO(alpha=0, beta=0, topk=3)),
    ],
    ids=["all tokens kept", "no contrast", "always sure", "both"],
)
def test_methods_set_to_nothing_are_the_plain_model(llava, nothing, batch, batches, ask):
    model, processor = llava
    inputs = ask(processor, *batches[batch])
    options = {"output_logits": True, "return_dict_in_generate": True}
    plain, fixed = run(model, (), inputs, **options), run(model, nothing, inputs, **options)
    assert torch.equal(fixed.sequences, plain.sequences)
    exact = not any(isinstance(method, DAMRO) for method in nothing)  # a batch of branches rounds differently
    for ours, theirs in zip(fixed.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if exact else TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize(
    "order", [(1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)], ids=lambda order: "".join(map(str, order))
)
def test_the_order_of_methods_does_not_matter(llava, order, batches, ask):
    model, processor = llava
    inputs = ask(processor, *batches["rows of different length"])
    options = {"output_logits": True, "return_dict_in_generate": True}
    one = run(model, FIXES["all"], inputs, **options)
    other = run(model, [FIXES["all"][place] for place in order], inputs, **options)
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


SUBSETS = [chosen for count in (1, 2, 3, 4) for chosen in combinations((PRUNE, CONTRAST, MOVE, PACK), count)]


@torch.inference_mode()
@pytest.mark.parametrize("chosen", SUBSETS, ids=lambda chosen: " ".join(method.name for method in chosen))
def test_any_subset_equals_the_slow_way_in_any_order(random_llava, chosen, batches, ask, record_property):
    model, processor = random_llava
    rows = batches["one picture"]
    assert worst_difference(model, processor, chosen, rows, ask, record_property, steps=1) < TOLERANCE
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    inputs = ask(processor, *rows)
    one, other = (run(model, fix, inputs, **options) for fix in (chosen, chosen[::-1]))
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


@torch.inference_mode()
def test_a_prompt_without_pictures_is_the_plain_model(llava, fix, ask):
    model, processor = llava
    inputs = ask(processor, ([], SHORT), ([], LONG))
    options = {"output_logits": True, "return_dict_in_generate": True}
    plain, fixed = run(model, (), inputs, **options), run(model, fix, inputs, **options)
    if PACK in fix:  # packs any prompt
        assert all(key.dtype != plain.logits[0].dtype for key in packed_codes(fixed.past_key_values))
        return
    assert torch.equal(fixed.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(fixed.logits, plain.logits, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("batch", ["one picture", "two pictures", "rows of different length"])
@pytest.mark.parametrize("only_new_ids", [False, True], ids=["whole conversation", "new words only"])
def test_a_conversation_goes_on_from_the_cache(llava, forgetful_fix, batch, only_new_ids, batches, ask):
    model, processor = llava
    inputs = ask(processor, *batches[batch])
    question = processor.tokenizer(" USER: Is there a cup? ASSISTANT:", add_special_tokens=False).input_ids
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    with attach(model, *forgetful_fix):
        first = model.generate(**inputs, max_new_tokens=6, **options)
        answered = first.sequences[:, inputs["input_ids"].shape[1] :]
        whole = torch.cat([first.sequences, torch.tensor([question]).expand(len(answered), -1)], dim=1)
        # a row that ended early holds padding in the middle
        real = torch.cat([inputs["attention_mask"], (answered != 0).long()], dim=1)
        mask = torch.cat([real, torch.ones(len(real), len(question), dtype=torch.long)], dim=1)
        again = model.generate(
            input_ids=whole,
            attention_mask=mask,
            pixel_values=inputs["pixel_values"],
            max_new_tokens=5,
            **options,
        )
        new = whole[:, -len(question) - 1 :] if only_new_ids else whole
        onwards = model.generate(
            input_ids=new,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=5,
            **options,
        )
    assert torch.equal(onwards.sequences[:, new.shape[1] :], again.sequences[:, whole.shape[1] :])
    worst = max(largest_difference(a, b) for a, b in zip(onwards.logits, again.logits, strict=True))
    assert worst < TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("batch", ["one picture", "rows of different length"])
@pytest.mark.parametrize("fix", [(MOVE, CONTRAST), (PACK, MOVE, PRUNE)], ids=["var", "zipvl"])
def test_a_conversation_goes_on_as_the_slow_one_does(llava, fix, batch, batches, ask):
    model, processor = llava
    question = processor.tokenizer(" USER: Is there a cup? ASSISTANT:", add_special_tokens=False).input_ids
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    torch.set_default_dtype(torch.float64)
    try:
        double = in_float64(model)
        inputs = ask(processor, *batches[batch]).to(torch.float64)
        with attach(double, *fix):
            first = double.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **options)
            whole = torch.cat(
                [first.sequences, torch.tensor([question]).expand(len(first.sequences), -1)], dim=1
            )
            after = torch.ones_like(whole[:, inputs["input_ids"].shape[1] :])
            mask = torch.cat([inputs["attention_mask"], after], dim=1)
            again = {"attention_mask": mask, "past_key_values": first.past_key_values, "max_new_tokens": 3}
            onwards = double.generate(input_ids=whole, **again, **options)
        slow, prompt = SlowModel(double), inputs["input_ids"].shape[1]
        pixels = iter(inputs["pixel_values"])
        for row, (pictures, _) in enumerate(batches[batch]):
            own = [next(pixels) for _ in pictures]
            start = int(inputs["attention_mask"][row].argmax())
            conversation = slow.converse(whole[row, start:prompt].tolist(), own, fix)
            for word in whole[row, prompt:].tolist():
                conversation.say(slow.word(word))
            for step, logits in enumerate(onwards.logits):
                assert largest_difference(logits[row], conversation.logits) < TOLERANCE
                conversation.say(slow.word(onwards.sequences[row, whole.shape[1] + step]))
    finally:
        torch.set_default_dtype(torch.float32)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_mostly_says_the_same(embedded, fix, dtype, sample_pictures, ask):
    model, processor = embedded
    half, _ = load(dtype=dtype)
    rows = [([picture], "Describe the image.") for picture in sample_pictures.values()]
    inputs = ask(processor, *rows)
    exact = run(model, fix, inputs, max_new_tokens=10)
    rounded = run(half, fix, inputs.to(dtype), max_new_tokens=10)
    start = inputs["input_ids"].shape[1]
    width = min(exact.shape[1], rounded.shape[1])
    same = (exact[:, start:width] == rounded[:, start:width]).float().mean().item()
    print(f"same tokens {same:.3f}")
    assert same > 0.8


@torch.inference_mode()
def test_half_precision_runs_with_beams_and_padding(random_llava, fix, batches, ask):
    model, processor = random_llava
    inputs = ask(processor, *batches["rows of different length"])
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        output = run(half, fix, inputs.to(dtype), num_beams=2)
        assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
