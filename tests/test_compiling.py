"""Compiled decoding steps: the same words by the same logits, from one graph that nothing makes anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from lvlm_fix import DAMRO, VAR, VTCCLS, AttachError, UnsupportedModelError, ZipVL, attach
from lvlm_fix.compiling import CompiledStep
from lvlm_fix.models import family_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]
CONTRAST = DAMRO(alpha=1.0, beta=0.01, topk=7)
MOVE = VAR(sink_dims=(1, 2, 3), tau=6.0, rho=0.2, min_image_attention=0.05, p=0.9)
PACK = ZipVL(tau=0.8, recent=12, random=20, window=6)
FIXES = {
    "damro": (CONTRAST,),
    "gated damro": (replace(CONTRAST, gate=0.6),),
    "vtc_cls": (VTCCLS(keep=40),),
    "var": (MOVE,),
    "zipvl": (PACK,),
    "zipvl evict": (replace(PACK, evict=True),),
    "all": (VTCCLS(keep=40), CONTRAST, MOVE, PACK),
}
OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5, "min_new_tokens": 0},
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def prompts(embedded, ask, sample_pictures):
    """Padded, and one row has no picture."""
    kitchen, street = sample_pictures["kitchen"], sample_pictures["street"]
    rows = [
        ([kitchen], "Describe the image."),
        ([street, kitchen], "Is there a fork?"),
        ([], "Is there a cup?"),
    ]
    return ask(embedded[1], *rows)


def say(model, fix, inputs, compile, **options):
    torch.manual_seed(5)
    asked = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False} | options
    with attach(model, *fix, compile=compile):
        return model.generate(**inputs, **asked, output_logits=True, return_dict_in_generate=True)


@torch.inference_mode()
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", FIXES)
def test_the_words_and_logits_are_those_of_plain_steps(embedded, prompts, name, how):
    plainly, compiled = (
        say(embedded[0], FIXES[name], prompts, compile, **OPTIONS[how]) for compile in (False, True)
    )
    assert torch.equal(compiled.sequences, plainly.sequences)
    for ours, theirs in zip(compiled.logits, plainly.logits, strict=True):
        kept = theirs.isfinite()
        assert torch.equal(ours.isfinite(), kept)
        torch.testing.assert_close(ours[kept], theirs[kept], rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_one_graph_serves_all_methods_lengths_and_attachments(embedded, prompts):
    model = embedded[0]
    say(model, FIXES["all"], prompts, compile=True)
    counters.clear()
    for name, length in (("all", 10), ("damro", 40), ("var", 5), ("zipvl", 20)):
        say(model, FIXES[name], prompts, compile=True, max_new_tokens=length)
    assert not counters["frames"] and not counters["graph_break"] and not counters["recompiles"]


@torch.inference_mode()
def test_a_further_turn_and_its_answer_are_the_same(embedded, prompts):
    model, said = embedded[0], []
    for compile in (False, True):
        with attach(model, *FIXES["all"], compile=compile):
            options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
            first = model.generate(**prompts, **options, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, prompts["input_ids"][:, -9:]], dim=1)
            mask = torch.cat([prompts["attention_mask"], torch.ones_like(ids[:, : 6 + 9])], dim=1)
            cache = getattr(first, "cache", None) or first.past_key_values
            said.append(model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options))
    assert torch.equal(*said)


@torch.inference_mode()
def test_the_model_is_left_as_it_was_even_by_a_step_that_fails(embedded, prompts, monkeypatch):
    model = embedded[0]
    config = model.get_decoder().config
    before = config._attn_implementation

    def fail(self, *args, **kwargs):
        raise KeyError("stop")

    with attach(model, CONTRAST, compile=True):
        monkeypatch.setattr("lvlm_fix.attention.MethodAttention.update_and_attend", fail)
        with pytest.raises(KeyError, match="stop"):
            model.generate(**prompts, max_new_tokens=3)
        assert config._attn_implementation == before
    assert "forward" not in vars(model)


@torch.inference_mode()
def test_who_looks_into_the_layers_sees_them(embedded, prompts):
    options = {"output_hidden_states": True, "max_new_tokens": 3, "min_new_tokens": 3}
    plainly, compiled = (
        say(embedded[0], (CONTRAST,), prompts, compile, **options) for compile in (False, True)
    )
    for ours, theirs in zip(compiled.hidden_states, plainly.hidden_states, strict=True):
        assert len(ours) == len(theirs) > 1
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_without_a_compiler_it_says_what_to_install(embedded, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(AttachError, match=r"no C\+\+ compiler.*install g\+\+"):
        attach(embedded[0], CONTRAST, compile=True)
    assert "forward" not in vars(embedded[0])
    attach(embedded[0], CONTRAST).detach()


def test_layers_without_numbers_are_refused(embedded, monkeypatch):
    module = family_of(embedded[0]).decoder_attention(embedded[0])[1]
    monkeypatch.setattr(module, "layer_idx", 7)
    with pytest.raises(UnsupportedModelError, match="layer_idx"):
        attach(embedded[0], MOVE, compile=True)


def test_a_step_is_not_compiled_before_it_runs(embedded):
    counters.clear()
    with attach(embedded[0], CONTRAST, compile=True) as fix:
        assert isinstance(fix.pipeline.step.compiled, CompiledStep)
    assert not counters["frames"]
