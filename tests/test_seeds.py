"""Statistics over several seeds of sampling."""

from __future__ import annotations

import json
import statistics
import sys

import pytest

from lvlm_fix import LVLM
from lvlm_fix.cli import main
from lvlm_fix.evals import tasks
from lvlm_fix.evals.records import read_json
from lvlm_fix.evals.runner import run
from lvlm_fix.evals.settings import Decoding

SEEDS = (3, 4, 5)


def sampled(task: tasks.Task, lvlm: LVLM, out, *seeds: int) -> dict:
    decoding = Decoding(max_new_tokens=12, do_sample=True, temperature=1.5, seeds=seeds)
    return run(task, lvlm, ["vtc_cls(keep=48)"], out, decoding=decoding, progress=False)


@pytest.fixture(scope="module", params=["chair", "pope"])
def runs(request, embedded, tmp_path_factory) -> tuple[dict, list[dict], object]:
    """One run with all seeds, and one with each of them."""
    lvlm, out = LVLM(*embedded), tmp_path_factory.mktemp("seeds")
    task = tasks.chair(limit=6) if request.param == "chair" else tasks.pope(["random", "popular"], limit=18)
    each = [sampled(task, lvlm, out / str(seed), seed) for seed in SEEDS]
    return sampled(task, lvlm, out / "all", *SEEDS), each, out / "all"


def test_each_seed_counts_as_a_run_of_its_own(runs) -> None:
    together, each, _ = runs
    assert together["seeds"] == list(SEEDS)
    varied = False
    for index, setting in enumerate(together["settings"]):
        for split, metrics in setting["splits"].items():
            for metric, estimate in metrics.items():
                alone = [one["settings"][index]["splits"][split][metric]["value"] for one in each]
                assert estimate["by_seed"] == pytest.approx(alone)
                assert estimate["deviation"] == pytest.approx(statistics.stdev(alone))
                varied |= len(set(alone)) > 1
    assert varied, "sampling draws the same with every seed"


def test_values_intervals_and_tests_are_over_all_seeds(runs) -> None:
    together, each, _ = runs
    for index, setting in enumerate(together["settings"]):
        for split, counts in setting["counts"].items():
            alone = [one["settings"][index]["counts"][split] for one in each]
            assert counts == {name: sum(one[name] for one in alone) for name in counts}
        for metrics in setting["splits"].values():
            assert all(one["low"] <= one["value"] <= one["high"] for one in metrics.values())
    assert together["images"] == each[0]["images"]  # the draws of an image are not images
    assert {entry["test"] for entry in together["comparisons"]} == {"paired bootstrap over images"}


def test_every_item_has_a_line_for_every_seed(runs) -> None:
    _, _, out = runs
    for path in out.glob("results-*.jsonl"):
        keys = [(row["seed"], row["id"]) for row in map(json.loads, path.read_text().splitlines())]
        assert len(set(keys)) == len(keys) and {seed for seed, _ in keys} == set(SEEDS)
        assert len(keys) == len(SEEDS) * read_json(out / "manifest.json")["task"]["items"]


def test_the_table_shows_the_deviation_over_seeds(monkeypatch, capfd, tmp_path) -> None:
    words = "eval chair --limit 3 --max-new-tokens 12 --do-sample --temperature 1.5 --seed 3 --seeds 3 --out"
    monkeypatch.setattr(sys, "argv", ["lvlm-fix", *words.split(), str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capfd.readouterr().out
    assert not stop.value.code and "± standard deviation over 3 seeds" in printed
    recall = read_json(tmp_path / "summary.json")["settings"][0]["splits"]["all"]["recall"]
    assert f"± {recall['deviation']:.1f}" in printed


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("eval chair --limit 3 --max-new-tokens 4 --seed", ""),
        ("tune vtc_cls --grid keep=72 --limit 4 --max-new-tokens 4 --seed", "validation"),
    ],
)
def test_a_seed_without_sampling_changes_nothing_and_can_be_reported(
    words, folder, monkeypatch, capfd, tmp_path
) -> None:
    def enter(*typed: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lvlm-fix", *typed])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, capfd.readouterr().err

    enter(*words.split(), "5", "--out", str(tmp_path))
    path = next((tmp_path / folder).glob("results-none.jsonl"))
    before = path.read_bytes()
    enter("report", str(tmp_path), "--gallery", "0")
    assert {json.loads(line)["seed"] for line in before.splitlines()} == {0}
    assert read_json(path.parent / "manifest.json")["decoding"]["seeds"] == [0]
    if not folder:  # of tune the seed divides the images, so another one is another search
        enter(*words.split(), "6", "--out", str(tmp_path))
        assert path.read_bytes() == before
