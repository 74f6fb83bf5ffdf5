"""The vision tower and short prefills as CUDA graphs: the features, words and reports without them, bit for bit.

On a GPU, by LVLM_FIX_GPU=1 CUDA_VISIBLE_DEVICES=0; without one, operations are recorded instead.
"""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from on_device import GPU
from recorded_operations import stand_in
from test_compiling import CONTRAST, FIXES

from lvlm_fix import DAMRO, VTCCLS, attach, recording, replayed_decoder, replayed_tower
from lvlm_fix.models import family_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore:vtc_cls with damro"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]
PRUNE = VTCCLS(keep=40)
QUESTIONS = {"one": ["Is there a fork?"], "padded": ["Is there a fork?", "Describe the image."]}


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """What stands in for CUDA graphs; None on a GPU."""
    return None if GPU else stand_in(monkeypatch)


@pytest.fixture(scope="module")
def model(embedded):
    return deepcopy(embedded[0]).cuda() if GPU else embedded[0]


@pytest.fixture
def prompts(embedded, model, ask, sample_pictures):
    """The same questions of one picture after another: run, recorded, and replayed twice."""

    def make(questions):
        chosen = [sample_pictures[name] for name in sorted(sample_pictures)]
        found = [[chosen[(turn + row) % len(chosen)] for row in range(len(questions))] for turn in range(4)]
        return [
            ask(embedded[1], *(([one], text) for one, text in zip(own, questions, strict=True))).to(
                model.device
            )
            for own in found
        ]

    return make


def answers(model, fix, prompts, compile, **options):
    """What is said to the prompts under one attach with what is reported, and what tower and prefill recorded."""
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | options
    with attach(model, *fix, compile=compile) as attached:
        said = []
        for inputs in prompts:
            output = model.generate(**inputs, **asked, output_logits=True, return_dict_in_generate=True)
            said.append((output, attached.report))
        return said, *(list(one.known.values()) for one in attached.pipeline.recordings[:2])


@torch.inference_mode()
@pytest.mark.parametrize("how", QUESTIONS)
@pytest.mark.parametrize("name", [*FIXES, "vtc_cls and damro"])
def test_words_logits_and_reports_are_those_without(model, prompts, name, how):
    fix = FIXES.get(name, (PRUNE, CONTRAST))
    asked = prompts(QUESTIONS[how])
    plainly, *_ = answers(model, fix, asked, compile=False)
    replayed, towers, prefills = answers(model, fix, asked, compile=True)
    for (ours, our_report), (theirs, their_report) in zip(replayed, plainly, strict=True):
        assert torch.equal(ours.sequences, theirs.sequences)
        for mine, other in zip(ours.logits, theirs.logits, strict=True):
            if GPU and how == "padded":
                # Where no method attends, unrecorded prefills hide padding by a mask, in another kernel.
                torch.testing.assert_close(mine, other, rtol=0, atol=2e-3)
            else:
                assert torch.equal(mine, other)
        assert our_report == their_report
    layers = model.config.get_text_config().num_hidden_layers
    # Where nothing differs between prompts, nothing stops at attention.
    is_whole = name == "vtc_cls" and how == "one"
    assert [len(one.graphs) for one in prefills] == [1 if is_whole else layers + 1]
    assert [len(one.graphs) for one in towers] == [1]


@torch.inference_mode()
def test_beams_are_the_same(model, prompts):
    asked = prompts(QUESTIONS["one"])
    said = [answers(model, (PRUNE, CONTRAST), asked, compile, num_beams=3)[0] for compile in (False, True)]
    for (ours, _), (theirs, _) in zip(*said, strict=True):
        assert torch.equal(ours.sequences, theirs.sequences)


@torch.inference_mode()
def test_features_and_scores_stay_when_the_next_picture_comes(model, prompts):
    asked, said = prompts(QUESTIONS["one"]), []
    for compile in (False, True):
        with attach(model, PRUNE, DAMRO(topk=7), compile=compile) as attached:
            encoder = family_of(model).encoder(model)
            results = [encoder.get_image_features(pixel_values=one["pixel_values"]) for one in asked]
            # The encoder keeps the last picture alone.
            (last,) = attached.pipeline.encoder.known.values()
            said.append(([one.pooler_output[0] for one in results], last.vision))
    for ours, theirs in zip(said[0][0], said[1][0], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(said[0][1].feature_scores, said[1][1].feature_scores)
    assert torch.equal(said[0][1].layer_scores.nan_to_num(), said[1][1].layer_scores.nan_to_num())
    assert not torch.equal(said[1][0][-1], said[1][0][-2])


@torch.inference_mode()
def test_who_looks_at_hidden_states_sees_those_of_this_picture(model, prompts):
    asked = prompts(QUESTIONS["one"])
    encoder = family_of(model).encoder(model)
    plainly = [encoder.get_image_features(**_looking(one)).hidden_states for one in asked]
    with attach(model, PRUNE, compile=True):
        ours = [encoder.get_image_features(**_looking(one)).hidden_states for one in asked]
        assert encoder.get_image_features(pixel_values=asked[0]["pixel_values"]).hidden_states is None
    for mine, other in zip(ours, plainly, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def _looking(inputs):
    return {"pixel_values": inputs["pixel_values"], "output_hidden_states": True}


@torch.inference_mode()
def test_long_prompts_and_many_pictures_are_not_recorded(model, prompts, monkeypatch):
    monkeypatch.setattr(replayed_decoder, "LONGEST", 256)
    monkeypatch.setattr(replayed_tower, "MOST_CROPS", 4)
    asked = prompts(["Is there a fork?"] * 5)
    assert answers(model, (PRUNE,), asked, compile=True)[1:] == ([], [])


@torch.inference_mode()
def test_what_was_asked_last_stays_recorded(model, prompts, monkeypatch):
    monkeypatch.setattr(recording, "MOST", 2)
    short, long, longer = (
        prompts([text])[0]
        for text in ("Is there a fork?", "Describe the image.", "Is there a red fork in it?")
    )
    _, _, prefills = answers(model, (PRUNE,), [short, short, long, short, longer, short], compile=True)
    assert len(prefills) == 2 and prefills[-1] is not None


@torch.inference_mode()
@pytest.mark.parametrize("fix", [(PRUNE,), (PRUNE, CONTRAST)], ids=["vtc_cls", "vtc_cls damro"])
def test_without_a_cache_the_same_is_said(model, prompts, fix):
    asked = prompts(QUESTIONS["one"])[:3]
    said = [answers(model, fix, asked, compile, use_cache=False)[0] for compile in (False, True)]
    for (ours, _), (theirs, _) in zip(*said, strict=True):
        assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.skipif(GPU, reason="there may be one GPU only")
@torch.inference_mode()
@pytest.mark.parametrize("fix", [(PRUNE,), (PRUNE, CONTRAST)], ids=["whole", "with stops"])
def test_streams_are_those_of_the_models_device(model, prompts, fix, monkeypatch):
    entered, made = [], []

    @contextmanager
    def on_device_of(x):
        entered.append(x)
        yield
        entered.pop()

    monkeypatch.setattr(replayed_decoder, "on_device_of", on_device_of)
    monkeypatch.setattr(replayed_tower, "on_device_of", on_device_of)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: made.append(bool(entered)))
    answers(model, fix, prompts(QUESTIONS["one"]), compile=True)
    assert len(made) == 6 and all(made)


def test_gradients_flow_through_the_prefill(model, prompts):
    inputs = prompts(QUESTIONS["one"])[0]
    with attach(model, PRUNE, compile=True):
        for _ in range(3):
            assert model(**inputs, use_cache=True).logits.requires_grad


def test_gradients_flow_through_the_tower(model, prompts):
    pixels = prompts(QUESTIONS["one"])[0]["pixel_values"]
    encoder = family_of(model).encoder(model)
    with attach(model, PRUNE, compile=True):
        for _ in range(3):
            own = pixels.clone().requires_grad_()
            encoder.get_image_features(pixel_values=own).pooler_output[0].sum().backward()
            assert own.grad.abs().sum() > 0


@torch.inference_mode()
def test_a_tower_that_cannot_be_recorded_is_queued(model, prompts, monkeypatch):
    asked = prompts(QUESTIONS["one"])
    plainly, *_ = answers(model, (PRUNE, CONTRAST), asked, compile=False)
    norm = family_of(model).tower(model).encoder.layers[-2].layer_norm2
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) if x.sum().item() < 1e9 else x)
    said, towers, _ = answers(model, (PRUNE, CONTRAST), asked, compile=True)
    assert all(torch.equal(a.sequences, b.sequences) for (a, _), (b, _) in zip(said, plainly, strict=True))
    assert towers == [None]
