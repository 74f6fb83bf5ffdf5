"""The demo's parts without a server: turns, cancelling, settings, overlays, and what a picture may be."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from lvlm_fix import LVLM, VAR, attach
from lvlm_fix.demo import bounds, figures, overlays, pieces, settings, tables
from lvlm_fix.demo.looking import look
from lvlm_fix.demo.samples import sample_of, samples, truth_of
from lvlm_fix.demo.service import Said, Service
from lvlm_fix.diagnosis import sample_pictures
from lvlm_fix.methods import METHODS, parse
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
    html = figures.looked(seen, said, fix)
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

    assert 'class="word wrong"' in html and 'aria-label="elephant. (elephant is not in the picture)"' in html
    assert html.count("<button") == len(said.text.split())
    assert "Not in the picture: elephant." in html


def test_an_answer_that_is_markup_stays_text():
    said = Said("<img src=x onerror=alert(1)> a dog", (), 3, 1.0, 0, {}, ("cat",), ())
    html = pieces.answer(said)
    assert "<img" not in html and "&lt;img" in html


@pytest.mark.parametrize(
    "fix", ["none", *METHODS, *settings.PRESETS.values(), "damro(alpha=1.2,topk=4),var(p=0.3)"]
)
def test_a_share_link_restores_its_setting(fix):
    fix = fix.replace("vtc_cls", "vtc_cls(keep=0.4)") if fix == "vtc_cls" else fix
    values = settings.values_of(fix)
    assert parse(settings.fix_of(values)) == parse(fix)
    assert settings.values_of(settings.fix_of(values)) == values


def test_a_link_out_of_the_sliders_reach_is_refused():
    with pytest.raises(ValueError, match=r"goes from 0\.05 to 0\.95, so 72 cannot be set"):
        settings.values_of("vtc_cls(keep=72)")


def test_the_code_box_gives_the_answers_of_the_page(service):
    question, sample = 'Say "what" is there\nin the image.', samples()["living_room"]
    settings_ = [parse(fix) for fix in settings.PRESETS.values()]
    said = [asyncio.run(service.answer(sample.image, question, fix, 24)).text for fix in settings_]
    codes = [settings.python(fix, sample.file, question, 24, "embedded") for fix in settings_]

    command = [sys.executable, "-W", "ignore", "-c", "\n".join(codes)]
    ran = subprocess.run(command, cwd=sample_pictures()[0].parent, capture_output=True, text=True, check=True)

    assert ran.stdout.splitlines() == said


def test_controls_say_what_the_methods_take():
    for name, panel in settings.PANELS.items():
        fields = settings._defaults(name)
        for control in panel.controls:
            assert control.field in fields
            assert control.info and control.least <= control.value <= control.most
    assert list(settings.PANELS) == list(METHODS)


def test_presets_are_described_by_the_shipped_measurements():
    shipped = settings.summaries()
    assert {one["task"] for one in shipped} == {"pope", "chair"}
    for fix in settings.SCORED_AS.values():
        assert "CHAIRi 14.5 to" in tables.measured(shipped, fix)
    assert tables.measured(shipped, "damro") and "(worse)" in tables.measured(shipped, "damro")
    assert not tables.measured(shipped, "var(p=0.123)")


def test_the_results_tab_says_what_the_summaries_say():
    html = tables.results(settings.summaries())
    for summary in settings.summaries():
        for setting in summary["settings"]:
            assert setting["name"] == "none" or setting["name"] in html
    chair = next(one for one in settings.summaries() if one["task"] == "chair")
    value = chair["settings"][0]["splits"]["all"]["CHAIRi"]
    assert f"{value['value']:.1f} [{value['low']:.1f}, {value['high']:.1f}]" in html
    assert "✗ worse" in html and "✓ better" in html


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


def test_the_command_refuses_a_port_in_use_before_it_loads(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = subprocess.run(
            [sys.executable, "-m", "lvlm_fix", "demo", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.strip().startswith(f"lvlm-fix: cannot listen on 127.0.0.1:{port}")
    assert "\n" not in ran.stderr.strip()


def test_the_space_has_what_a_space_needs():
    text = (files("lvlm_fix.demo") / "README.md").read_text(encoding="utf-8")
    head = dict(line.split(": ", 1) for line in text.split("---")[1].strip().splitlines())
    assert head["sdk"] == "gradio" and head["app_file"] == "app.py"
    assert (files("lvlm_fix.demo") / head["app_file"]).is_file()
    assert json.loads(head["pinned"]) is False
