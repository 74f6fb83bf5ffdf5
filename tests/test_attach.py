"""Putting methods on and taking them off again leaves nothing behind; what cannot work is refused in words."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, pipeline
from transformers.cache_utils import DynamicLayer

from lvlm_fix import DAMRO, VAR, VTCCLS, AttachError, PromptError, UnsupportedModelError, ZipVL, attach, load
from lvlm_fix.models.base import Family, layer_from

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]

PRUNE, CONTRAST = VTCCLS(keep=40, start_layer=0), DAMRO(alpha=1.0, beta=0.01, topk=7)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture
def inputs(llava, ask, sample_pictures):
    _, processor = llava
    return ask(processor, ([sample_pictures["kitchen"]], "What is in the image?"))


@pytest.fixture
def small(random_llava):
    """A model of its own, to spoil as the test likes."""
    return copy.deepcopy(random_llava[0])


@pytest.fixture
def question(random_llava, ask, sample_pictures):
    return ask(random_llava[1], ([sample_pictures["kitchen"]], "What is in the image?"))


def state(model):
    """All that attach could leave changed, weights aside, and the objects themselves where identity counts."""
    return {
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "attention": [
            module.config._attn_implementation for module in model.modules() if hasattr(module, "config")
        ],
        "hooks": [
            [(key, id(hook)) for name in HOOKS for key, hook in getattr(module, name).items()]
            for module in model.modules()
        ],
        "attributes": [
            {name: id(value) for name, value in vars(module).items() if not name.startswith("_")}
            for module in model.modules()
        ],
        "training": [module.training for module in model.modules()],
    }


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before, before_weights):
    assert state(model) == before
    after = model.state_dict()
    assert list(after) == list(before_weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in before_weights.items())


def says(model, inputs, **options):
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False} | options)


# -- nothing is left behind


def test_leaving_the_with_leaves_nothing(llava, inputs):
    model, _ = llava
    plain = says(model, inputs)  # first: transformers puts hooks of its own on a model that runs first
    before, before_weights = state(model), weights(model)
    assert "forward" not in vars(model)
    with attach(model, PRUNE, CONTRAST):
        assert state(model)["attention"] != before["attention"]
        assert state(model)["attributes"] != before["attributes"]
        says(model, inputs, num_beams=2)
    assert_unchanged(model, before, before_weights)
    assert "forward" not in vars(model)
    assert "get_image_features" not in vars(model.base_model)
    assert torch.equal(says(model, inputs), plain)


def test_an_exception_inside_leaves_nothing(llava, inputs):
    model, _ = llava
    plain = says(model, inputs)  # first: transformers puts hooks of its own on a model that runs first
    before, before_weights = state(model), weights(model)
    with pytest.raises(KeyError, match="mine"), attach(model, CONTRAST, PRUNE):
        says(model, inputs)
        raise KeyError("mine")
    assert_unchanged(model, before, before_weights)
    assert torch.equal(says(model, inputs), plain)


def test_an_exception_inside_the_model_leaves_nothing(llava, inputs):
    model, _ = llava
    plain = says(model, inputs)  # first: transformers puts hooks of its own on a model that runs first
    before, before_weights = state(model), weights(model)
    with pytest.raises(ValueError, match="start_layer"), attach(model, VTCCLS(keep=4, start_layer=99)):
        says(model, inputs)
    assert_unchanged(model, before, before_weights)
    assert torch.equal(says(model, inputs), plain)


def test_detach_twice_is_fine_and_leaves_what_came_later_alone(llava, inputs):
    model, _ = llava
    plain = says(model, inputs)  # first: transformers puts hooks of its own on a model that runs first
    before, before_weights = state(model), weights(model)
    fix = attach(model, PRUNE)
    says(model, inputs)
    fix.detach()
    assert_unchanged(model, before, before_weights)
    with attach(model, CONTRAST):
        fix.detach()  # must not take the newcomer off
        assert state(model)["attention"] != before["attention"]
        assert model.forward._lvlm_fix.methods == (CONTRAST,)
    fix.detach()
    assert_unchanged(model, before, before_weights)
    assert torch.equal(says(model, inputs), plain)


def test_a_refused_attach_leaves_nothing(small):
    small.config.vision_feature_select_strategy = "full"
    before, before_weights = state(small), weights(small)
    with pytest.raises(UnsupportedModelError, match="no CLS token"):
        attach(small, CONTRAST)
    small.config.vision_feature_select_strategy, small.config.vision_feature_layer = "default", [-2, -1]
    with pytest.raises(UnsupportedModelError, match="models that take one layer are supported"):
        attach(small, CONTRAST)
    small.config.vision_feature_layer = -2
    before["config"] = small.config.to_dict()
    assert_unchanged(small, before, before_weights)


def test_a_models_own_hooks_and_patches_stay(small, question):
    calls = []
    small.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    plain_forward = small.forward
    small.forward = lambda *args, **kwargs: plain_forward(*args, **kwargs)
    plain = plain_forward(**question).logits
    before, before_weights = state(small), weights(small)
    calls.clear()
    with attach(small, VTCCLS(keep=144, start_layer=0)):
        assert torch.equal(small(**question).logits, plain)
    assert calls == ["tower"]
    assert_unchanged(small, before, before_weights)


def test_a_model_with_accelerate_hooks_is_left_as_it_was(small, question):
    expected = says(small, question)
    model = dispatch_model(small, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model)  # accelerate's own
    says(model, question)
    before, before_weights = state(model), weights(model)
    with attach(model, PRUNE, CONTRAST):
        says(model, question)
    assert_unchanged(model, before, before_weights)
    assert torch.equal(says(model, question), expected)


def test_a_device_map_gives_the_same_text(embedded, ask, sample_pictures):
    model, processor = embedded
    inputs = ask(processor, ([sample_pictures["kitchen"]], "What is in the image?"))
    mapped, _ = load(device_map={"": "cpu"})
    with attach(mapped, PRUNE, CONTRAST), attach(model, PRUNE, CONTRAST):
        assert torch.equal(says(mapped, inputs), says(model, inputs))


# -- what users do with it


@pytest.mark.parametrize(
    "fix",
    [
        (PRUNE, CONTRAST),
        (ZipVL(tau=0.5, window=4, evict=True), VAR(tau=9.0, first_layer=1, sink_dims=(39, 20))),
    ],
    ids=["vtc_cls damro", "zipvl var"],
)
def test_a_transformers_pipeline_runs_with_the_methods(embedded, fix, sample_pictures):
    model, processor = embedded
    picture, asked = sample_pictures["street"], "Describe the image."
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": asked}]
    generation = {"max_new_tokens": 30, "do_sample": False}

    def piped():
        answers = pipe(
            text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=generation
        )
        return answers[0]["generated_text"].strip()

    plain = piped()
    with attach(model, *fix):
        fixed = piped()
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        direct = says(model, chat, max_new_tokens=30)[:, chat["input_ids"].shape[1] :]
    assert fixed == processor.batch_decode(direct, skip_special_tokens=True)[0].strip()
    assert fixed != plain
    assert piped() == plain


def test_the_report_tells_of_each_picture_in_plain_numbers(llava, ask, sample_pictures):
    model, processor = llava
    one, two = sample_pictures["kitchen"], sample_pictures["street"]
    inputs = ask(processor, ([one, two], "Describe the images."), ([two], "What is in the image?"))
    with attach(model, PRUNE, CONTRAST) as fix:
        assert fix.report == {}
        says(model, inputs, num_beams=3)
        report = fix.report
        says(model, ask(processor, ([one], "What is in the image?")))
        alone = fix.report
        says(model, ask(processor, ([], "What is in the image?")))
        assert fix.report == {"vtc_cls": [], "damro": []}
    assert [set(entry) for entry in report["vtc_cls"]] == [{"kept", "grid", "prompt", "source"}] * 3
    assert [set(entry) for entry in report["damro"]] == [{"outliers", "grid", "prompt", "source"}] * 3
    for name, key, count in (("vtc_cls", "kept", 40), ("damro", "outliers", 7)):
        chosen = [entry[key] for entry in report[name]]
        assert all(len(set(some)) == count and sorted(some) == some for some in chosen)
        assert all(type(token) is int and 0 <= token < 144 for some in chosen for token in some)
        assert chosen[0] == alone[name][0][key]
        assert chosen[1] == chosen[2] != chosen[0]
        assert report[name][0]["grid"] == (12, 12)


def test_conflicting_methods_warn_at_the_callers_line(random_llava):
    with pytest.warns(UserWarning, match="damro with vtc_cls: .*unpruned image") as warned:
        attach(random_llava[0], PRUNE, CONTRAST).detach()
    assert warned[0].filename == __file__


# -- what is refused


def test_nested_attach_is_refused(random_llava):
    model, _ = random_llava
    with attach(model, PRUNE):
        with pytest.raises(AttachError, match=r"already carries VTCCLS\(keep=40.*give all methods to one"):
            attach(model, CONTRAST)
        with pytest.raises(AttachError, match="already carries"):
            attach(model, PRUNE)
        assert model.forward._lvlm_fix.methods == (PRUNE,)
    attach(model, CONTRAST).detach()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((), "at least one method"),
        (("damro",), "'damro' is not a method: pass instances"),
        ((DAMRO,), "is not a method: pass instances"),
        ((DAMRO(), PRUNE, DAMRO(alpha=2)), "damro is given more than once"),
    ],
)
def test_what_is_no_set_of_methods_is_refused(random_llava, methods, message):
    with pytest.raises(AttachError, match=message):
        attach(random_llava[0], *methods)


def test_an_unsupported_model_is_refused_with_the_supported_ones_named():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM \(model_type llama\).*LLaVA-1\.5"):
        attach(model, CONTRAST)
    with pytest.raises(UnsupportedModelError, match="cannot attach to str"):
        attach("embedded", CONTRAST)


@pytest.mark.parametrize("pictures", [0.5, 1, 3])
def test_placeholders_that_do_not_match_the_pictures_are_refused(
    random_llava, ask, sample_pictures, pictures
):
    model, processor = random_llava
    inputs = ask(processor, (list(sample_pictures.values())[:2], "Describe the images."))
    if pictures == 0.5:  # of 288 placeholders one is gone
        first = (inputs["input_ids"] == model.config.image_token_id).nonzero()[0]
        inputs["input_ids"][tuple(first)] = 5
        message = "287 image tokens but 2 pictures give 288"
    else:
        inputs["pixel_values"] = inputs["pixel_values"][[0] * pictures]
        message = f"288 image tokens but {pictures} pictures give {144 * pictures}"
    with attach(model, PRUNE), pytest.raises(PromptError, match=message):
        says(model, inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_implementation": "static"}, PromptError, "into an empty DynamicCache.*static"),
        ({"prefill_chunk_size": 16}, PromptError, "prefill_chunk_size"),
        ({"prefill_chunk_size": 150}, PromptError, "prefill_chunk_size"),
    ],
)
def test_ways_to_generate_that_cannot_work_are_refused(random_llava, question, options, error, message):
    model, _ = random_llava
    with attach(model, PRUNE, CONTRAST), pytest.raises(error, match=message):
        says(model, question, max_new_tokens=12, **options)


def test_assisted_decoding_is_refused(random_llava, question):
    model, _ = random_llava
    repeating = torch.tensor([[40, 41, 40]])  # so that the look-up proposes these words, not image tokens
    ids = torch.cat([question["input_ids"], repeating], dim=1)
    inputs = dict(question) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with attach(model, CONTRAST), pytest.raises(NotImplementedError, match="assisted decoding"):
        says(model, inputs, prompt_lookup_num_tokens=2)


def test_a_new_picture_in_a_continued_conversation_is_refused(random_llava, question):
    model, _ = random_llava
    with attach(model, PRUNE):
        first = says(model, question, return_dict_in_generate=True)
        further = {"past_key_values": first.past_key_values, "pixel_values": question["pixel_values"]}
        ids = torch.cat([first.sequences, question["input_ids"]], dim=1)
        with pytest.raises(PromptError, match="goes on in text"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **further, max_new_tokens=2)


def test_a_picture_after_cached_text_is_refused(random_llava, question):
    model, _ = random_llava
    cache = DynamicCache(config=model.config.get_text_config())
    model(input_ids=torch.tensor([[1, 5, 6]]), past_key_values=cache)
    with attach(model, PRUNE), pytest.raises(PromptError, match="into an empty DynamicCache"):
        model(**question, past_key_values=cache)


@pytest.mark.parametrize(
    ("before", "after"), [(PRUNE, CONTRAST), (ZipVL(), PRUNE), (ZipVL(), VAR(sink_dims=(1,)))], ids=repr
)
def test_a_cache_made_with_other_methods_is_refused(random_llava, question, before, after):
    model, _ = random_llava
    with attach(model, before):
        first = says(model, question, return_dict_in_generate=True)
    with attach(model, after), pytest.raises(PromptError, match="made under other methods"):
        model(input_ids=torch.tensor([[5]]), past_key_values=first.past_key_values)


@pytest.mark.parametrize("fix", [VAR(sink_dims=(1,)), CONTRAST, PRUNE, ZipVL()], ids=lambda fix: fix.name)
def test_the_callers_own_cache_is_refused_once_it_was_taken_over(random_llava, question, fix):
    model, _ = random_llava
    own = DynamicCache(config=model.config.text_config)
    with attach(model, fix):
        first = says(model, question, past_key_values=own)
        whole = {"input_ids": first, "attention_mask": torch.ones_like(first)}
        with pytest.raises(PromptError, match="took this KV cache over"):
            says(model, whole, past_key_values=own)


def test_a_cache_that_does_not_just_grow_is_refused(random_llava, question):
    model, _ = random_llava
    other = Cache(layer_class_to_replicate=DynamicLayer)
    with (
        attach(model, PRUNE),
        pytest.raises(PromptError, match="empty DynamicCache that stays on its device"),
    ):
        model(**question, past_key_values=other)


def test_what_scores_no_pictures_is_refused(random_llava):
    with pytest.raises(AttachError, match="Linear scores no pictures"):
        attach(random_llava[0], PRUNE, scores=torch.nn.Linear(1, 1))


def test_a_part_that_transformers_calls_otherwise_is_named(small):
    layer = small.model.language_model.layers[1]
    layer.attention = layer.self_attn
    del layer.self_attn
    with pytest.raises(UnsupportedModelError, match=r"this LLaVA-1.5 model: .*'self_attn'; it assumes"):
        attach(small, VAR(sink_dims=(1,)))


@pytest.mark.parametrize("fix", [(PRUNE,), (CONTRAST,), (ZipVL(),)], ids=lambda fix: fix[0].name)
def test_a_cache_used_after_its_methods_are_gone_is_refused(random_llava, question, fix):
    model, _ = random_llava
    with attach(model, *fix):
        first = says(model, question, return_dict_in_generate=True)
    with pytest.raises(PromptError, match="made under attach, and the methods have been taken off since"):
        model(input_ids=torch.tensor([[5]]), past_key_values=first.past_key_values)
    with attach(model, *fix):
        model(input_ids=torch.tensor([[5]]), past_key_values=first.past_key_values)


def test_a_decoder_that_attends_in_its_own_way_is_refused(small, question):
    layer = small.model.language_model.layers[1].self_attn
    layer.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with attach(small, ZipVL()), pytest.raises(RuntimeError, match="3 of the decoder's 4 layers attended"):
        small(**question)


def test_a_tower_that_attends_in_its_own_way_is_refused(small, question):
    layer = small.model.vision_tower.encoder.layers[0].self_attn
    layer.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with attach(small, PRUNE), pytest.raises(RuntimeError, match="tower's layers were not all seen"):
        small(**question)


def test_image_tokens_without_a_picture_are_refused(random_llava, question):
    model, _ = random_llava
    with attach(model, PRUNE), pytest.raises(PromptError, match="image tokens but no picture comes with it"):
        model(input_ids=question["input_ids"])


def test_calls_that_hide_the_prompt_are_refused(random_llava, question):
    model, _ = random_llava
    embeddings = model.get_input_embeddings()(question["input_ids"])
    seen = model.base_model.get_image_features(pixel_values=question["pixel_values"])
    with attach(model, PRUNE):
        with pytest.raises(TypeError, match="keyword arguments"):
            model(question["input_ids"], question["pixel_values"])
        with pytest.raises(PromptError, match="not inputs_embeds"):
            model(inputs_embeds=embeddings, pixel_values=question["pixel_values"])
        with pytest.raises(PromptError, match="not made under this attach"):
            model(input_ids=question["input_ids"], mm_encoder_outputs={"image": seen})


@pytest.mark.parametrize("extra", [{"return_dict": False}, {"labels": torch.zeros(1, 1, dtype=torch.long)}])
def test_training_and_tuple_calls_are_refused_in_words(embedded, sample_pictures, ask, extra):
    model, processor = embedded
    inputs = ask(processor, ([sample_pictures["kitchen"]], "Describe the image."))
    with attach(model, VTCCLS()), pytest.raises(PromptError, match="without labels and return_dict=False"):
        model(**inputs, **extra)


def test_the_readmes_family_is_all_that_a_family_needs(embedded, question, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = next(block for block in readme.split("```python\n") if block.startswith("class Llava(Family)"))
    names = {"Family": Family, "layer_from": layer_from}
    exec(code.split("```")[0], names)
    model, _ = embedded
    with attach(model, PRUNE, CONTRAST) as fix:
        expected, report = says(model, question), fix.report
    monkeypatch.setattr("lvlm_fix.models.FAMILIES", (names["Llava"](),))
    with attach(model, PRUNE, CONTRAST) as fix:
        assert torch.equal(says(model, question), expected)
        assert fix.report == report
