"""The demo's parts without a server: turns, cancelling, settings, overlays, and what a picture may be."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from lvlm_fix import LVLM, VAR, attach
from lvlm_fix.demo import api, bounds, figures, overlays, pieces
from lvlm_fix.demo.judging import judge
from lvlm_fix.demo.looking import look
from lvlm_fix.demo.samples import sample_of, samples, truth_of
from lvlm_fix.demo.service import Said, Service
from lvlm_fix.methods import parse
from lvlm_fix.prompting import model_inputs

QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def service():
    return Service()


@pytest.fixture
def kitchen():
    return samples()["kitchen"].image


def finished(service, image, fix: str) -> Said:
    return asyncio.run(service.answer(image, QUESTION, parse(fix), 64))


def test_an_answer_grows_and_ends_as_the_library_gives_it(service, kitchen):
    async def heard():
        return [one async for one in service.answers(kitchen, QUESTION, parse("vtc_cls"), 64)]

    *beginnings, said = asyncio.run(heard())

    assert len(beginnings) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(beginnings))
    alone = LVLM(service.lvlm.model, service.lvlm.processor).ask(kitchen, QUESTION, parse("vtc_cls"))
    assert said.text == beginnings[-1] == alone.text
    assert said.tokens == alone.tokens and said.report == alone.report


def test_a_reader_who_leaves_stops_the_model_at_the_next_token(service, kitchen):
    passes = []
    handle = service.lvlm.model.register_forward_hook(lambda *_: passes.append(1))

    async def leaves_early():
        reader = service.answers(kitchen, QUESTION, parse("damro"), 64)
        await anext(reader)
        await reader.aclose()
        began = len(passes)
        await service.answer(kitchen, QUESTION, [], 1)  # waits for its turn
        return began

    try:
        whole = finished(service, kitchen, "damro").tokens
        passes.clear()
        asyncio.run(leaves_early())
    finally:
        handle.remove()
    assert len(passes) < whole  # the rest of the answer was never computed


def test_a_request_that_is_cancelled_while_it_waits_is_never_run(service, kitchen):
    async def crowd():
        first = asyncio.create_task(service.answer(kitchen, QUESTION, [], 64))
        await asyncio.sleep(0)
        second = asyncio.create_task(
            service.answer(kitchen, "Is there a dog in the image?", parse("var"), 64)
        )
        await asyncio.sleep(0)
        second.cancel()
        said = await first
        with pytest.raises(asyncio.CancelledError):
            await second
        return said

    passes = []
    handle = service.lvlm.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        said = asyncio.run(crowd())
    finally:
        handle.remove()
    assert len(passes) == said.tokens


def test_the_model_carries_nothing_after_an_error(service, kitchen):
    before = finished(service, kitchen, "none").text
    with pytest.raises(ValueError, match="sink_dims"):
        finished(service, kitchen, "var(sink_dims=(99999,))")
    assert finished(service, kitchen, "none").text == before
    with attach(service.lvlm.model, VAR()):  # refused if methods were still attached
        pass


def test_word_attention_is_that_of_the_step_that_chose_the_word(service, kitchen):
    """Against an eager model that returns its attention while it generates."""
    said = finished(service, kitchen, "none")
    seen = look(service.lvlm, kitchen, QUESTION, list(said.ids), [])
    model, processor = service.lvlm.model, service.lvlm.processor
    inputs = model_inputs(model, processor, [[kitchen]], [QUESTION])
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                max_new_tokens=64,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            )
    finally:
        model.set_attn_implementation("sdpa")
    steps = [
        torch.stack([layer[0, :, -1] for layer in step]).mean((0, 1))[: len(is_image)][is_image]
        for step in out.attentions
    ]

    text = processor.tokenizer.decode(said.ids).strip()
    assert [text[start:end] for start, end, _ in seen.words] == said.text.split()
    # the model's words are one token each, but for commas, which end a word
    at = 0
    for start, end, values in seen.words:
        torch.testing.assert_close(torch.tensor(values), steps[at].float(), atol=2e-4, rtol=2e-2)
        at += len(processor.tokenizer(" " + text[start:end], add_special_tokens=False)["input_ids"])


def test_a_look_shows_what_the_report_says(service, kitchen):
    fix = parse("damro(topk=7),vtc_cls(keep=0.25),zipvl")
    with pytest.warns(UserWarning, match="CLS attention"):
        said = asyncio.run(service.answer(kitchen, QUESTION, fix, 64))
    seen = look(service.lvlm, kitchen, QUESTION, list(said.ids), fix)

    assert seen.kept == seen.seen == said.report["vtc_cls"][0]["kept"] and len(seen.kept) == 36
    assert sorted(seen.outliers) == sorted(said.report["damro"][0]["outliers"]) and len(seen.outliers) == 7
    dropped = set(range(144)) - set(seen.seen)
    assert all(seen.before[token] == 0 for token in dropped)
    assert all(values[token] == 0 for _, _, values in seen.words for token in dropped)
    hatched, whole = (
        np.asarray(overlays.hatched(Image.new("RGB", (48, 48)), (12, 12), tokens)) for tokens in (dropped, ())
    )
    assert hatched.any() and not whole.any()
    html = figures.looked(seen, said, fix)
    assert "dropped by VTC-CLS" in html
    assert html.count("<figure>") == 5 and html.count(' alt="') == 4
    assert f"{said.report['zipvl'][0]['ratios'][0]:.0%}" in html


def test_var_moves_attention_from_sinks_to_the_rest_of_the_picture(random_llava):
    """On a model with sinks: the one that ships has none."""
    lvlm = LVLM(*random_llava)
    image = samples()["office"].image
    var = VAR(sink_dims=(3, 11), tau=12.0, rho=0.0, min_image_attention=0.0)
    seen = look(lvlm, image, QUESTION, [5, 6, 7], [var])

    assert seen.changed > 0 and any(seen.sinks)
    assert sum(seen.after) >= sum(seen.before) - 1e-6
    moved = [after - before for after, before in zip(seen.after, seen.before, strict=True)]
    assert max(moved) > 1e-4
    always = [
        token
        for token, layers in enumerate(seen.sinks)
        if layers >= lvlm.model.config.text_config.num_hidden_layers - 1
    ]
    assert all(moved[token] <= 1e-6 for token in always)


def test_hallucinated_words_are_marked_for_eyes_and_for_screen_readers(service):
    image = samples()["safari"].image
    said = finished(service, image, "none")
    seen = look(service.lvlm, image, QUESTION, list(said.ids), [])

    html = pieces.answer(said, seen)

    assert (
        'class="word wrong first"' in html
        and 'aria-label="elephant. (elephant is not in the picture)"' in html
    )
    assert html.count("<button") == len(said.text.split())
    assert "Not in the picture: elephant." in html


def test_an_answer_that_is_markup_stays_text():
    said = Said("<img src=x onerror=alert(1)> a dog", (), 3, 1.0, 0, {}, judge("", "a dog", ["dog"]))
    html = pieces.answer(said)
    assert "<img" not in html and "&lt;img" in html


def test_a_name_of_two_words_has_one_sign():
    text = "a potted plant"
    said = Said(text, (), 3, 1.0, 0, {}, judge("", text, ["cat"]))
    html = pieces.answer(said)
    assert html.count('class="word wrong first"') == 1 and html.count('class="word wrong"') == 1


def test_memory_is_named_for_what_it_is():
    said = Said("a dog", (), 3, 1.0, 2**30, {}, judge("", "a dog", ["dog"]))
    assert "server memory" in pieces.answer(said)
    assert "GPU memory" in pieces.answer(dataclasses.replace(said, of_gpu=True))


@pytest.mark.parametrize(
    ("question", "answer", "kind", "words"),
    [
        ("Is there an elephant in the image?", "Yes", "wrong", ["Yes"]),
        ("Is there an elephant in the image?", "Yes, an elephant.", "wrong", ["elephant"]),
        ("is there a zebra in the picture", "Yes", "true", []),
        ("Is there a zebra in the image?", "No", "wrong", []),
        ("Is there an elephant in the image?", "No, there is no elephant.", "true", []),
        ("Is there a unicorn in the image?", "Yes", "unjudged", None),
        ("What time is it?", "Noon.", "unjudged", None),
        (QUESTION, "A zebra and an elephant.", "wrong", ["elephant"]),
        (QUESTION, "A zebra.", "true", []),
    ],
)
def test_an_answer_is_judged_by_what_it_claims(question, answer, kind, words):
    verdict = judge(question, answer, ["zebra", "bear"])
    assert verdict.kind == kind
    assert words == (None if verdict.wrong is None else [one.word for one in verdict.wrong])
    assert ("✓" in pieces.answer(Said(answer, (), 1, 1.0, 0, {}, verdict))) == (kind == "true")


def test_an_answer_that_was_cut_off_is_not_called_true(service, kitchen):
    said = asyncio.run(service.answer(kitchen, QUESTION, [], 5))
    assert said.verdict.kind == "unjudged" and "cut off" in said.verdict.sentence
    assert finished(service, kitchen, "none").verdict.kind == "true"


def test_a_message_on_the_page_brings_no_markup_and_the_api_tells_it_as_it_is():
    error = ValueError("the question holds <image>: leave it out")
    assert api.shown(error).message == "the question holds &lt;image&gt;: leave it out"
    assert api.sentence(error).message == str(error)


@pytest.mark.parametrize(
    ("fix", "told"),
    [
        ("vtc_cls(keep='a')", "keep"),
        ("damro(omega=1)", "omega"),
        (f"zipvl(seed={10**20})", "seed"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_our_own_words(fix, told):
    with pytest.raises(ValueError, match=told) as refused:
        bounds.methods(fix)
    assert not re.search(r"not supported|__init__|Overflow", str(refused.value))


def test_truth_is_known_by_the_pixels_and_by_nothing_else(kitchen):
    buffer = io.BytesIO()
    kitchen.save(buffer, format="PNG")
    assert truth_of(bounds.picture(buffer.getvalue())) == samples()["kitchen"].objects
    changed = np.asarray(kitchen).copy()
    changed[0, 0, 0] ^= 1
    assert sample_of(Image.fromarray(changed)) is None


def test_heat_is_brightest_where_the_map_is_highest(service, kitchen):
    said = finished(service, kitchen, "none")
    seen = look(service.lvlm, kitchen, QUESTION, list(said.ids), [])
    values = [0.0] * 144
    values[13] = 1.0  # second row, second column
    drawn = np.asarray(overlays.heat(seen, values, 1.0)).astype(int)
    cell = drawn.shape[0] // 12
    yellow = drawn[..., :2].sum(-1) - 2 * drawn[..., 2]
    rows, columns = np.unravel_index(yellow.argmax(), yellow.shape)
    assert (rows // cell, columns // cell) == (1, 1)
    assert overlays.where(seen, values) == "top left"
