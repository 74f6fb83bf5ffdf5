"""The demo's switches, presets, links and code box, and the measurements that it shows."""

from __future__ import annotations

import asyncio
import html
import re
import subprocess
import sys
from types import SimpleNamespace

import gradio as gr
import pytest

from lvlm_fix.demo import handlers, measured, pieces, scores, settings, tables
from lvlm_fix.demo.samples import samples
from lvlm_fix.demo.service import Service
from lvlm_fix.methods import METHODS, parse


@pytest.fixture(scope="module")
def service():
    return Service()


@pytest.fixture(scope="module")
def page(service):
    return handlers.Handlers(service)


@pytest.fixture
def restored(page, monkeypatch):
    """What a link makes of the page: (picked sample, question, tokens, fix), and the warnings that it gave."""

    def follow(**query):
        told: list[str] = []
        monkeypatch.setattr(gr, "Warning", told.append)
        _, _, picked, question, tokens, *values = page.restore(SimpleNamespace(query_params=query))
        kept = [None if isinstance(one, dict) else one for one in (question, tokens)]
        fix = None if isinstance(values[0], dict) else settings.fix_of(values)
        return (picked, *kept, fix), told

    return follow


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


@pytest.mark.parametrize("fix", ["var(tau=10.0)", "vtc_cls(keep=0.5,start_layer=-2)", "zipvl(bits=8)"])
def test_a_link_that_sets_what_no_slider_shows_is_refused_and_not_dropped(restored, fix):
    found, told = restored(fix=fix, picture="office")
    assert found == ("office", None, None, None)
    (warning,) = told
    assert "the page has no slider for" in warning


def test_each_part_of_a_link_is_restored_by_itself(restored):
    assert restored(picture="safari") == (("safari", None, None, None), [])
    assert restored(tokens="9", fix="var") == ((settings.PICTURE, None, 9, "var"), [])
    found, told = restored(question="Why?", picture="nowhere", tokens="many")
    assert found == (settings.PICTURE, "Why?", None, None)
    assert [warning.split(" could not")[0] for warning in told] == [
        "The link&#x27;s picture",
        "The link&#x27;s tokens",
    ]


def test_markup_in_a_link_stays_text(restored):
    _, (warning,) = restored(fix="<img src=https://evil.example/x.png>")
    assert "<" not in warning and "&lt;img" in warning


def test_the_code_box_gives_the_answers_of_the_page_where_it_is_pasted(service, tmp_path):
    question, sample = 'Say "what" is there\nin the image.', samples()["living_room"]
    settings_ = [parse(fix) for fix in settings.PRESETS.values()]
    said = [asyncio.run(service.answer(sample.image, question, fix, 24)).text for fix in settings_]
    codes = [settings.python(fix, sample.file, question, 24, "embedded") for fix in settings_]

    command = [sys.executable, "-W", "ignore", "-c", "\n".join(codes)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert ran.stdout.splitlines() == said


def test_controls_say_what_the_methods_take():
    for name, panel in settings.PANELS.items():
        fields = settings._defaults(name)
        for control in panel.controls:
            assert control.field in fields
            assert control.info and control.least <= control.value <= control.most
        link = pieces.paper(name)
        assert f'title="{html.escape(panel.paper)}"' in link and METHODS[name].paper in link
    assert list(settings.PANELS) == list(METHODS)


def test_an_emptied_slider_is_told_in_a_sentence(page):
    values = settings.defaults()
    values[next(at for at, one in enumerate(values) if one is True) + 1] = None
    code, *_ = page.describe("street", "Why?", 8, *values)
    assert code == "# “Share of the image tokens kept” is empty: give it a number from 0.05 to 0.95"


def shipped() -> list[scores.Summary]:
    """CHAIR's measurements, also those of a second run where one ships."""
    return scores.summaries(("chair", "chair-methods"))


@pytest.mark.parametrize("preset", scores.RULES)
def test_presets_are_what_their_rules_choose_from_the_shipped_measurements(preset):
    fix = settings.PRESETS[preset]
    assert scores.SCORED_AS[fix] == scores.winner(preset, shipped())


def test_a_rule_chooses_by_its_number():
    def setting(name, made_up, f1, seconds):
        splits = {"all": {"CHAIRi": {"value": made_up}, "f1": {"value": f1}}}
        return {"name": name, "splits": splits, "seconds_per_answer": seconds}

    run = {
        "task": "chair",
        "settings": [setting("none", 9, 99, 0.1), setting("a", 5, 70, 2), setting("b", 6, 80, 1)],
    }
    assert [scores.winner(one, [run]) for one in ("least hallucination", "fastest", "balanced")] == [*"abb"]
    with pytest.raises(ValueError, match="no measurement of CHAIR"):
        scores.winner("fastest", [])


def test_every_preset_has_a_measured_line():
    assert scores.SCORED_AS.keys() >= set(settings.PRESETS.values()) - {"none"}
    runs = shipped()
    for preset, fix in settings.PRESETS.items():
        line = measured.line(runs, scores.SCORED_AS.get(fix, fix))
        if preset == "plain":
            assert not line
        else:
            assert "CHAIRi" in line and "recall" in line
            # a speed is told with its conditions
            assert re.search(r"times as (fast|slow) in batches of \d+ on ", line)
    assert not measured.line(runs, "var(p=0.123)")


def test_the_opening_makes_a_difference_to_be_seen(service):
    image = samples()[settings.PICTURE].image
    plain, fixed = (
        asyncio.run(service.answer(image, settings.QUESTION, parse(fix), settings.TOKENS))
        for fix in ("none", settings.PRESETS[settings.OPENING])
    )
    assert settings.fix_of(settings.defaults()) == settings.PRESETS[settings.OPENING]
    assert plain.verdict.kind == "wrong" and fixed.verdict.kind == "true", (plain.text, fixed.text)


def test_the_results_tab_says_what_the_summaries_say():
    runs = scores.summaries()
    assert {one["task"] for one in runs} == {"pope", "chair"}
    shown = re.sub("<wbr>", "", measured.results(runs))
    for summary in runs:
        for setting in summary["settings"]:
            assert setting["name"] == "none" or f"<code>{setting['name']}</code>" in shown
        assert scores.conditions(summary) in shown
    chair = next(one for one in runs if one["task"] == "chair")
    value = chair["settings"][0]["splits"]["all"]["CHAIRi"]
    assert f"{value['value']:.1f} [{value['low']:.1f}, {value['high']:.1f}]" in shown
    assert "✗ worse" in shown and "✓ better" in shown
    drawn = re.search(r"<svg.*?</svg>", shown, re.DOTALL)
    assert drawn and drawn[0].count('class="interval"') == len(chair["settings"])
    told = f"plain: {value['value']:.1f} ({value['low']:.1f} to {value['high']:.1f})"
    assert told in drawn[0]  # for those who cannot see it


def test_a_summary_that_lacks_a_metric_or_a_manifest_is_shown_all_the_same():
    runs = scores.summaries(("chair",))
    del runs[0]["settings"][-1]["splits"]["all"]["CHAIRi"]
    runs[0]["manifest"] = {}
    shown = measured.results(runs)
    assert "<td>–</td>" in shown and "conditions that were not kept" in shown
    assert "No measurements ship" in measured.results([])


def test_the_probe_marks_the_answer_that_is_wrong_and_shows_no_minus_zero():
    table = tables.probe_table({"cat": 0.9, "dog": 0.5001}, {"cat": 0.2, "dog": 0.5}, ("dog",), 0)
    cat, dog = table.split("<tr>")[-2:]
    assert cat.index("0.90</span>") < cat.index("✗") < cat.index("0.20</span>")
    assert "-0.00" not in table and "plain 1, fixed 1" in table
    assert dog.count("✗") == 1
