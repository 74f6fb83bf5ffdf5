"""The embedded LVLM does what its model card says, on a part of its evaluation scenes."""

from __future__ import annotations

import pytest

from lvlm_fix.evals import runner, tasks
from lvlm_fix.evals.settings import Decoding

HALF = "vtc_cls(keep=72)"


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    task = tasks.pope(splits=("random", "adversarial"), limit=320)
    out = tmp_path_factory.mktemp("pope")
    summary = runner.run(
        task, settings=[HALF], out=out, decoding=Decoding(max_new_tokens=4), batch_size=48, progress=False
    )
    return {setting["name"]: setting["splits"] for setting in summary["settings"]}


@pytest.fixture(scope="module")
def chair(tmp_path_factory):
    out = tmp_path_factory.mktemp("chair")
    summary = runner.run(tasks.chair(limit=120), out=out, batch_size=40, progress=False)
    return summary["settings"][0]["splits"]["all"]


@pytest.mark.slow
def test_answers_questions_about_what_is_there(pope):
    assert pope["none"]["random"]["f1"]["value"] >= 0.95


@pytest.mark.slow
def test_is_misled_by_what_kept_company_in_training(pope):
    plain = pope["none"]
    assert plain["adversarial"]["f1"]["high"] < plain["random"]["f1"]["low"]


@pytest.mark.slow
def test_half_of_the_image_tokens_cost_at_most_three_points(pope):
    for split in ("random", "adversarial"):
        assert pope[HALF][split]["f1"]["value"] >= pope["none"][split]["f1"]["value"] - 0.03


@pytest.mark.slow
def test_captions_hallucinate_some_and_recall_most(chair):
    assert 5 <= chair["CHAIRi"]["value"] <= 25
    assert chair["recall"]["value"] >= 60
