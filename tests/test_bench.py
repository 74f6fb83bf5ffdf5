"""`lvlm-fix bench`: what is timed is what is said, and the baselines give the answers that they stand for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lvlm_fix import DAMRO, VAR, VTCCLS, ZipVL
from lvlm_fix.benchmark import Stopwatch, cache_bytes, compete, fixed, plain, plain_compiled, summary
from lvlm_fix.benchmark_models import Subject, _available, inputs_of, subject
from lvlm_fix.benchmark_peer import interpreter
from lvlm_fix.benchmark_reference import reference
from lvlm_fix.cli import main
from lvlm_fix.errors import PromptError, UnsupportedModelError
from lvlm_fix.growing_layer import ROOM

MOVING = VAR(sink_dims=(1, 2, 3), tau=6.0, rho=0.2, min_image_attention=0.05, p=0.9)
SETTINGS = {
    "damro": (DAMRO(alpha=1.0),),
    "var": (MOVING,),
    "vtc_cls": (VTCCLS(keep=16),),
    "damro and var": (DAMRO(alpha=1.0), MOVING),
}
pytestmark = pytest.mark.filterwarnings("ignore::lvlm_fix.errors.PremiseWarning")


@pytest.fixture(scope="module")
def tiny() -> Subject:
    return subject("random:tiny", "cpu")


@pytest.fixture(scope="module")
def real(embedded) -> Subject:
    return Subject("embedded", *embedded)


def typed(monkeypatch, capfd, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lvlm-fix", "bench", *map(str, words)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capfd.readouterr()
    return int(stop.value.code or 0), out, err


def answer(contestant, length: int = 12):
    with contestant as generate, torch.inference_mode():
        return generate(length, Stopwatch(lambda: 0.0))


@pytest.mark.parametrize("name", SETTINGS)
def test_reference_formulas_give_the_tokens_of_attach(real, name):
    inputs = inputs_of(real, rows=2)
    ours = answer(fixed(real.model, inputs, SETTINGS[name])).sequences[:, inputs["input_ids"].shape[1] :]
    theirs = answer(reference(real.model, inputs, SETTINGS[name])).sequences
    assert ours.tolist() == theirs.tolist()


def test_reference_of_what_is_moved_differs_from_plain(real):
    inputs = inputs_of(real, rows=1)
    without = answer(plain(real.model, inputs)).sequences[:, inputs["input_ids"].shape[1] :]
    assert answer(reference(real.model, inputs, (MOVING,))).sequences.tolist() != without.tolist()


def test_reference_refuses_what_has_no_public_code(real):
    with (
        pytest.raises(UnsupportedModelError, match="leave --reference out"),
        reference(real.model, {}, (ZipVL(),)),
    ):
        pass


def test_every_contestant_has_its_turn_and_every_answer_its_length(tiny):
    inputs = inputs_of(tiny, rows=2)
    contestants = {
        "plain": lambda: plain(tiny.model, inputs),
        "damro": lambda: fixed(tiny.model, inputs, SETTINGS["damro"]),
    }
    runs = compete(contestants, new_tokens=6, rounds=3)
    assert {name: len(own) for name, own in runs.items()} == {"plain": 3, "damro": 3}
    for run in runs["plain"] + runs["damro"]:
        assert len(run.steps) == 5 and min(run.first, *run.steps) > 0
        assert run.first + sum(run.steps) <= run.total
    found = summary(runs, rows=2, base="plain")
    assert found["plain"]["ratios"]["token"] == {"median": 1, "low": 1, "high": 1}
    assert found["damro"]["ratios"]["answer"]["median"] > 0
    low, middle, high = (found["damro"]["token"][key] for key in ("low", "median", "high"))
    assert low <= middle <= high


def test_bytes_of_the_cache_are_those_of_its_keys_and_values(tiny):
    inputs = inputs_of(tiny, rows=3)
    output = answer(plain(tiny.model, inputs), length=5)
    config, tokens = tiny.model.config.text_config, inputs["input_ids"].shape[1] + 4
    assert cache_bytes(output) == 2 * 3 * tokens * config.hidden_size * config.num_hidden_layers * 4
    pruned = answer(fixed(tiny.model, inputs, (VTCCLS(keep=4),)), length=5)
    # The prompt and one token, and the room that the layers then made.
    assert cache_bytes(pruned) == cache_bytes(output) * (tokens - 32 - 3 + ROOM) // tokens


def test_an_attached_setting_leaves_the_model_as_it_was(tiny):
    inputs = inputs_of(tiny, rows=1)
    before = tiny.model.forward
    answer(fixed(tiny.model, inputs, SETTINGS["damro and var"]), length=3)
    answer(reference(tiny.model, inputs, SETTINGS["damro and var"]), length=3)
    assert tiny.model.forward == before
    assert tiny.model.config.text_config._attn_implementation == "sdpa"


def test_compiled_runs_say_what_plain_ones_say(tiny):
    inputs = inputs_of(tiny, rows=2)
    before = tiny.model.forward
    plainly = answer(plain(tiny.model, inputs)).sequences
    assert answer(plain_compiled(tiny.model, inputs)).sequences.tolist() == plainly.tolist()
    methods = SETTINGS["damro and var"]
    fixed_, compiled = (
        answer(fixed(tiny.model, inputs, methods, compile)).sequences for compile in (False, True)
    )
    assert compiled.tolist() == fixed_.tolist()
    assert tiny.model.forward == before


def test_compiled_settings_stand_beside_the_others(monkeypatch, capfd):
    words = ["--model", "random:tiny", "--fix", "damro", "--new-tokens", 3, "--rounds", 2, "--compile"]
    code, out, err = typed(monkeypatch, capfd, *words, "--json", "-")
    assert code == 0, err
    (case,) = json.loads(out)["cases"]
    assert list(case["settings"]) == ["plain", "damro", "compiled: plain", "compiled: damro"]
    assert set(case["first_compiled_run"]) == {"compiled: plain", "compiled: damro"}
    assert min(case["first_compiled_run"].values()) > 0
    code, out, err = typed(monkeypatch, capfd, *words, "--no-compile-plain", "--json", "-")
    assert code == 0, err
    assert list(json.loads(out)["cases"][0]["settings"]) == ["plain", "damro", "compiled: damro"]


def test_longer_prompts_repeat_the_words_after_the_picture(real):
    short, long = inputs_of(real, rows=1), inputs_of(real, rows=1, prompt_tokens=200)
    image = real.model.config.image_token_id
    assert long["input_ids"].shape == long["attention_mask"].shape == (1, 200)
    assert (long["input_ids"] == image).sum() == (short["input_ids"] == image).sum()
    assert long["input_ids"][0, -3:].tolist() == short["input_ids"][0, -3:].tolist()
    with pytest.raises(PromptError, match="give --prompt-tokens of at least"):
        inputs_of(real, rows=1, prompt_tokens=20)


def test_command_writes_numbers_and_a_picture(monkeypatch, capfd, tmp_path: Path):
    told, drawn = tmp_path / "bench.json", tmp_path / "bench.png"
    words = [
        "--model",
        "random:tiny",
        "--fix",
        "damro",
        "--batch-size",
        "1,2",
        "--new-tokens",
        3,
        "--rounds",
        2,
    ]
    code, out, err = typed(monkeypatch, capfd, *words, "--reference", "--json", told, "--plot", drawn)
    assert code == 0, err
    assert "CLS scoring" in out and "attaching takes" in out and "batch of 2" in out
    result = json.loads(told.read_text())
    assert [case["batch_size"] for case in result["cases"]] == [1, 2]
    for case in result["cases"]:
        assert list(case["settings"]) == ["plain", "damro", "reference: damro"]
        assert case["settings"]["damro"]["kv_bytes"] > case["settings"]["plain"]["kv_bytes"]
        assert list(case["encoding"]) == ["damro"]
        assert list(case["encoding"]["damro"]) == ["ratio", "scoring", "attaching"]
        for spread in case["encoding"]["damro"].values():
            assert spread["low"] <= spread["median"] <= spread["high"]
        assert case["encoding"]["damro"]["ratio"]["low"] > 0
    assert result["machine"]["device"] and result["versions"]["torch"] == torch.__version__.split("+")[0]
    with Image.open(drawn) as picture:
        assert picture.getextrema() != ((255, 255),) * 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "random:huge"), "there is no random model"),
        (("--batch-size", "two"), "cannot read --batch-size"),
        (("--clock", "sun"), "give wall or cpu"),
        (("--peer", "other"), "there is no peer 'other'"),
        (("--peer", "mitigv", "--peer-python", "no-such-python"), "cannot run --peer-python"),
        (("--model", "random:tiny", "--device", "cuda"), "torch sees no GPU"),
        (("--json", "nowhere/b.json"), "there is no folder"),
    ],
)
def test_mistakes_are_told_in_one_sentence(monkeypatch, capfd, words, says):
    code, out, err = typed(monkeypatch, capfd, *words)
    assert (code, out) == (1, "") and says in err and err.count("\n") == 1


def test_a_model_too_large_for_the_device_is_refused(monkeypatch):
    # 7 billion weights of two bytes each; the machine says that it has a page left
    monkeypatch.setattr("lvlm_fix.benchmark_models._available", lambda: 4096)
    with pytest.raises(
        ValueError, match=r"random:llava-1.5-7b needs about \d+ GiB in float16 and cpu has 0 GiB free"
    ):
        subject("random:llava-1.5-7b", "cpu", "float16")


def test_memory_that_holds_read_files_can_be_had():
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free / 2 < _available() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_peer_that_cannot_be_imported_is_told_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules["lvlm_fix.benchmark_peer"].PEERS, "no_such_peer", ("vcd",))
    with pytest.raises(ValueError, match="No module named 'no_such_peer'"):
        interpreter("no_such_peer", None)
