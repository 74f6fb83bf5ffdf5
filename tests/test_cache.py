"""The cache of all branches: its rows, layers that slide, several devices; and what is reported of its bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_attach_equality import CONTRAST, MOVE, PACK, PRUNE, SHORT, TOLERANCE
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import DynamicCache, LlavaForConditionalGeneration, MistralConfig

from lvlm_fix import DAMRO, VAR, VTCCLS, UnsupportedModelError, ZipVL, attach
from lvlm_fix.branches import Branch, stacked_sinks
from lvlm_fix.dispatch import refuse_what_is_not_plain_attention
from lvlm_fix.methods import AttentionStep
from lvlm_fix.reporting import Report

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]
# Always, or never but in a further turn: such a branch is kept apart, and in the latter case waits.
ASKED, WAITING = replace(CONTRAST, gate=1.0), replace(CONTRAST, gate=0.0)


@pytest.fixture(scope="module")
def three(random_llava, sample_pictures, ask):
    kitchen, street, office = (sample_pictures[name] for name in ("kitchen", "street", "office"))
    return ask(random_llava[1], ([kitchen], SHORT), ([street], "Is it?"), ([office, kitchen], SHORT))


@torch.inference_mode()
@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, False])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ],
    ids=["mask", "mask of one", "indices", "repeated", "beams"],
)
@pytest.mark.parametrize(
    "fix",
    [(CONTRAST, MOVE), (CONTRAST, PACK), (ASKED, MOVE), (ASKED, PACK), (WAITING,)],
    ids=["stacked", "packed", "apart", "apart, packed", "waiting"],
)
def test_chosen_rows_go_on_as_they_would_have(random_llava, three, fix, change, rows):
    model, _ = random_llava
    said, turn = torch.randint(5, 100, (3, 2)), torch.randint(5, 100, (3, 4))

    def go_on(change, rows):
        with attach(model, *fix):
            cache = model(**three).past_key_values
            model(input_ids=said[:, :1], past_key_values=cache)
            change(cache)
            found = [model(input_ids=said[rows, 1:], past_key_values=cache).logits]
            return cache, torch.cat(
                [*found, model(input_ids=turn[rows], past_key_values=cache).logits], dim=1
            )

    cache, chosen = go_on(change, rows)
    _, every = go_on(lambda cache: None, [0, 1, 2])
    assert len(cache.mask) == len(rows) * (2 if CONTRAST in fix else 1)
    assert [len(other.mask) for other in cache.apart] == ([] if CONTRAST in fix else [len(rows)])
    finite = every[rows].isfinite()
    assert torch.equal(chosen.isfinite(), finite)
    assert (chosen - every[rows])[finite].abs().max() < TOLERANCE
    assert (every[0] - every[1])[every[0].isfinite() & every[1].isfinite()].abs().max() > 100 * TOLERANCE


@pytest.fixture(scope="module")
def sliding(random_llava):
    """Models of the same random weights whose decoder's window is so wide; None for all."""
    base, processor = random_llava
    text = base.config.text_config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")

    def build(window):
        torch.manual_seed(3)
        mistral = MistralConfig(sliding_window=window, **{name: getattr(text, name) for name in same})
        config = type(base.config)(**(base.config.to_dict() | {"text_config": mistral}))
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and "embed" not in name:
                    parameter.mul_(6)
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return model

    return build


def logits(model, fix, inputs, steps=12, **options):
    asked = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "output_logits": True}
    with attach(model, *fix):
        made = model.generate(**inputs, **asked, **options, return_dict_in_generate=True)
    return torch.stack(made.logits)


def test_a_window_is_refused_once_there_are_more_columns(sliding, random_llava, sample_pictures, ask):
    inputs = ask(random_llava[1], ([sample_pictures["kitchen"]], SHORT))
    model, fix = sliding(inputs["input_ids"].shape[1] + 4), (VAR(sink_dims=(39, 20), tau=9.0),)
    assert logits(model, fix, inputs, steps=5).isfinite().all()
    with pytest.raises(UnsupportedModelError, match="slides a window"):
        logits(model, fix, inputs, steps=6)


def test_attention_with_sinks_that_are_no_tokens_is_refused():
    with pytest.raises(UnsupportedModelError, match="sink that is no token"):
        refuse_what_is_not_plain_attention(5, {"s_aux": torch.zeros(4), "sliding_window": None})
    refuse_what_is_not_plain_attention(5, {"s_aux": None, "sliding_window": 5, "softcap": None})


@pytest.mark.parametrize(
    "keep, topk", [(4, 20), (10, 60), (60, 10), (60, 60)], ids=["shorter", "one", "other", "both"]
)
def test_branches_of_any_length_slide_together(sliding, random_llava, sample_pictures, ask, keep, topk):
    """With a window of 40: none, one or both branches are longer than that."""
    inputs = ask(random_llava[1], ([sample_pictures["kitchen"]], SHORT))
    model = sliding(40)
    fix = (VTCCLS(keep=keep, start_layer=0), DAMRO(alpha=1.0, beta=0.0, topk=topk))
    kept, anew = logits(model, fix, inputs), logits(model, fix, inputs, use_cache=False)
    assert (kept - anew).abs().max() < TOLERANCE
    assert (kept - logits(sliding(None), fix, inputs)).abs().max() > 100 * TOLERANCE


def test_the_callers_cache_keeps_the_prompt_alone(random_llava, three):
    model, _ = random_llava
    cache = DynamicCache(config=model.config.get_text_config())
    logits(model, (PRUNE, CONTRAST), three, steps=3, past_key_values=cache)
    assert cache.layers[0].keys.shape[0] == 3


def test_sinks_of_branches_are_put_together_where_they_are():
    with FakeTensorMode():
        real, elsewhere = torch.ones(2, 5, dtype=torch.bool), torch.device("lazy")
        sinks = torch.ones(2, 7, dtype=torch.bool, device=elsewhere)
        wide = torch.ones(2, 7, dtype=torch.bool)
        branches = [
            Branch(DynamicCache(), real, real.sum(1), real),
            Branch(DynamicCache(), wide, wide.sum(1), wide, {3: sinks}),
        ]
        stacked = stacked_sinks(branches, 3, 7)
        assert stacked.shape == (4, 7) and stacked.device == elsewhere


def test_probes_follow_the_layers_to_their_device():
    method = ZipVL(recent=2, random=2, window=2)
    with FakeTensorMode():
        elsewhere = torch.device("lazy")
        query, real = torch.ones(1, 2, 6, 4, device=elsewhere), torch.ones(1, 6, dtype=torch.bool)
        mask = real.to(elsewhere)
        shared = {method: torch.arange(2, 6)[None]}
        told = {"real": mask, "image_mask": mask, "first_query": mask.sum(1), "hidden_states": query}
        step = AttentionStep(
            layer=1, layers=4, query=query, key=query, value=query, scale=None, shared=shared, **told
        )
        # The layer's own attention to the probes is made; what follows needs numbers, which fake tensors have not.
        with pytest.raises(DataDependentOutputException):
            method.attention(step)


@torch.inference_mode()
def test_a_rows_report_is_the_same_beside_others(random_llava, ask, sample_pictures):
    model, processor = random_llava
    kitchen, street = sample_pictures["kitchen"], sample_pictures["street"]
    rows = [([kitchen], SHORT), ([], "Is it?"), ([street, kitchen], "Is there a fork in the image?")]

    def report(*rows):
        with attach(model, PRUNE, MOVE, PACK) as fix:
            model(**ask(processor, *rows))
            return fix.report

    together, alone = report(*rows), [report(row) for row in rows]
    for row, own in enumerate(alone):
        for name in ("var", "zipvl"):
            (entry,) = (entry for entry in together[name] if entry["prompt"] == row)
            (expected,) = own[name]
            assert [key for key in entry if entry[key] != expected[key] and key != "prompt"] == []
    assert any(entry["sinks"] != entry["image_sinks"] for entry in together["var"])


@torch.inference_mode()
def test_bytes_alone_are_those_the_cache_holds(random_llava, three):
    model, _ = random_llava
    one = {name: tensor[:1] for name, tensor in three.items()}
    one = {
        name: tensor[..., three["attention_mask"][0] == 1] if tensor.ndim == 2 else tensor
        for name, tensor in one.items()
    }
    with attach(model, PACK) as fix:
        layers = model(**one).past_key_values.layers
        (entry,) = fix.report["zipvl"]
    assert entry["bytes"] == sum(layer.nbytes for layer in layers)
    assert entry["full_bytes"] == sum(layer.full_nbytes for layer in layers)


def test_copies_are_what_is_told():
    report = Report([CONTRAST])
    report.begin([], [], 3)
    report.contrasted(CONTRAST, torch.tensor([False] * 3 + [True] * 3))
    assert [(entry["prompt"], entry["contrasted"]) for entry in report.plain()["damro"]] == [(0, 0), (1, 1)]
