"""Decoding steps as CUDA graphs that stop at attention: the words and logits of plain steps, bit for bit.

On a GPU, by LVLM_FIX_GPU=1 CUDA_VISIBLE_DEVICES=0; without one, operations are recorded instead.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from on_device import GPU
from recorded_operations import stand_in
from test_compiling import CONTRAST, FIXES, OPTIONS, PACK, prompts, say  # noqa: F401

from lvlm_fix import UnsupportedModelError, attach, recording
from lvlm_fix.attention import MethodAttention

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]


@pytest.fixture(scope="module")
def placed(embedded, prompts):  # noqa: F811
    if not GPU:
        return embedded[0], prompts
    return deepcopy(embedded[0]).cuda(), deepcopy(prompts).to("cuda")


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """What stands in for CUDA graphs; None on a GPU."""
    return None if GPU else stand_in(monkeypatch)


@torch.inference_mode()
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", FIXES)
def test_the_words_and_logits_are_those_of_plain_steps(placed, name, how):
    model, inputs = placed
    plainly, replayed = (
        say(model, FIXES[name], inputs, compile, **OPTIONS[how]) for compile in (False, True)
    )
    assert torch.equal(replayed.sequences, plainly.sequences)
    for ours, theirs in zip(replayed.logits, plainly.logits, strict=True):
        assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_a_step_is_recorded_once_for_all_prompts_of_as_many_rows(placed, graphs):
    model, inputs = placed
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    layers = model.config.get_text_config().num_hidden_layers
    with attach(model, *FIXES["all"], compile=True) as fix:
        said = [model.generate(**inputs, **options) for _ in range(2)]
        recordings = list(fix.pipeline.recordings[-1].known.values())
        if graphs is not None:
            # The first step of 14 is as it was, and in the second each graph runs as it is made.
            made = [graph.replayed for recording in recordings for graph in recording.graphs]
            assert made == [13] * (layers + 1)
    assert torch.equal(*said)
    assert [len(recording.graphs) for recording in recordings] == [layers + 1]


@torch.inference_mode()
def test_what_was_recorded_is_given_back_with_the_methods_off(placed):
    model, inputs = placed
    with attach(model, *FIXES["all"], compile=True) as fix:
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        assert all(any(one.known.values()) for one in fix.pipeline.recordings)
    assert not any(one.known for one in fix.pipeline.recordings)
    assert fix.report


@torch.inference_mode()
def test_what_a_step_said_stays_when_the_next_one_runs(placed):
    model, inputs = placed
    with attach(model, PACK, compile=True):
        cache = model(**inputs, use_cache=True)
        ids, said = inputs["input_ids"][:, -1:], []
        kept = getattr(cache, "cache", None) or cache.past_key_values
        for _ in range(5):
            logits = model(input_ids=ids, past_key_values=kept, use_cache=True).logits
            said.append((logits, logits.clone()))
    assert all(torch.equal(now, then) for now, then in said)
    assert not torch.equal(said[-1][0], said[-2][0])


@torch.inference_mode()
def test_under_autocast_nothing_is_recorded(placed, graphs):
    model, inputs = placed
    with torch.autocast(model.device.type, torch.bfloat16):
        plainly = say(model, (CONTRAST,), inputs, compile=False)
        with attach(model, CONTRAST, compile=True) as fix:
            said = model.generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False)
            assert list(fix.pipeline.recordings[-1].known.values()) == [None]
    assert torch.equal(said, plainly.sequences)


@torch.inference_mode()
def test_hooks_are_called_in_every_step(placed):
    model, inputs = placed
    calls = []
    with attach(model, CONTRAST, compile=True) as fix:
        hook = model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
        hook.remove()
        assert len(calls) == 6
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, output_hidden_states=True)
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
        assert None not in fix.pipeline.recordings[-1].known.values()


@torch.inference_mode()
def test_recordings_do_not_pile_up(placed, ask, embedded, sample_pictures, monkeypatch):
    model = placed[0]
    monkeypatch.setattr(recording, "MOST", 2)
    with attach(model, CONTRAST, compile=True) as fix:
        for rows in (1, 2, 3):
            inputs = ask(embedded[1], *[([sample_pictures["kitchen"]], "Is there a fork?")] * rows)
            model.generate(**inputs.to(model.device), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        kept = list(fix.pipeline.recordings[-1].known.values())
        # Each row has a negative one beside it.
        assert [len(recording.given["input_ids"]) for recording in kept] == [4, 6]


@torch.inference_mode()
def test_a_model_that_asks_the_device_for_a_number_is_refused(placed, monkeypatch):
    model, inputs = placed
    norm = model.get_decoder().norm
    plain = norm.forward
    with attach(model, CONTRAST, compile=True) as fix:
        with monkeypatch.context() as patched:
            patched.setattr(norm, "forward", lambda x: plain(x) if x.sum().item() < 1e9 else x)
            with pytest.raises(
                UnsupportedModelError, match=r"cannot record .* as CUDA graphs .*: leave it out"
            ):
                model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
        assert fix.pipeline.recordings[-1].where is None
        # What failed leaves nothing behind that would keep the next from being recorded.
        said = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(
        said, say(model, (CONTRAST,), inputs, False, max_new_tokens=4, min_new_tokens=4).sequences
    )


@torch.inference_mode()
def test_an_error_in_attention_comes_through(placed, monkeypatch):
    model, inputs = placed
    config = model.get_decoder().config
    before, update_and_attend = config._attn_implementation, MethodAttention.update_and_attend
    layers, calls = config.num_hidden_layers, []

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > layers + 1:  # in the second step, which is recorded
            raise KeyError("stop")
        return update_and_attend(self, *args, **kwargs)

    with attach(model, CONTRAST, compile=True):
        attached = config._attn_implementation
        monkeypatch.setattr(MethodAttention, "update_and_attend", fail)
        with pytest.raises(KeyError, match="stop"):
            model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
        assert config._attn_implementation == attached
    assert config._attn_implementation == before
