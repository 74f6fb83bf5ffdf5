"""A search of hyper-parameters: chosen on some images, tested on others."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_fix import LVLM, VTCCLS
from lvlm_fix.cli import main
from lvlm_fix.evals import tasks
from lvlm_fix.evals.chair import mentioned
from lvlm_fix.evals.records import read_json
from lvlm_fix.evals.settings import Decoding
from lvlm_fix.evals.tune import GRIDS, Objective, divide, settings_of, tune
from lvlm_fix.methods import METHODS, parse

SHORT = Decoding(max_new_tokens=24)
GRID = {"keep": [4, 72]}  # of 144 tokens; with 4 the model sees next to nothing


@pytest.fixture(scope="module")
def lvlm(embedded) -> LVLM:
    return LVLM(*embedded)


@pytest.fixture(scope="module")
def chair() -> tasks.Chair:
    return tasks.chair(limit=24)


def search(chair, lvlm, out, **given):
    return tune(chair, "vtc_cls", GRID, lvlm, out, **{"decoding": SHORT, "progress": False} | given)


@pytest.fixture(scope="module")
def found(chair, lvlm, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("tune")
    return out, search(chair, lvlm, out)


def untimed(found: dict) -> dict:
    lines = {
        part: [
            {key: value for key, value in line.items() if key != "tokens_per_second"} for line in found[part]
        ]
        for part in ("validation", "test")
    }
    return found | lines


def images(folder: Path) -> set[str]:
    return {
        json.loads(line)["image"]
        for path in folder.glob("results-*.jsonl")
        for line in path.read_text().splitlines()
    }


def test_validation_and_test_share_no_image_and_leave_none_out(found, chair) -> None:
    out, _ = found
    validation, test = images(out / "validation"), images(out / "test")
    assert not validation & test and len(validation) == len(test) == 12
    assert validation | test == {item.image for item in chair.items}
    assert (out / "validation" / "manifest.json").exists() and (out / "test" / "manifest.json").exists()


def test_questions_about_one_image_stay_together() -> None:
    pope = tasks.pope(limit=60)
    parts = divide(pope, 0.3, seed=5)
    first, second = ({item.image for item in parts[name].items} for name in ("validation", "test"))
    assert not first & second and len(first) == 3 and len(second) == 7
    assert {item.id for part in parts.values() for item in part.items} == {item.id for item in pope.items}
    again = divide(replace(pope, items=pope.items[::-1]), 0.3, seed=5)
    assert {item.image for item in again["validation"].items} == first
    assert {item.image for item in divide(pope, 0.3, seed=6)["validation"].items} != first


def test_every_setting_is_on_the_validation_part_and_only_the_best_on_the_test_part(found) -> None:
    out, tuned = found
    assert [line["setting"] for line in tuned["validation"]] == [
        "none",
        "vtc_cls(keep=4)",
        "vtc_cls(keep=72)",
    ]
    assert [line["setting"] for line in tuned["test"]] == list(dict.fromkeys(["none", tuned["chosen"]]))
    for line in (*tuned["validation"], *tuned["test"]):
        assert (
            line["low"] <= line["value"] <= line["high"]
            and line["value"] == line["metrics"]["CHAIRi"]["value"]
        )
    assert read_json(out / "tune.json") == tuned
    summary = read_json(out / "validation" / "summary.json")
    plain, *others = summary["settings"]
    floor = plain["splits"]["all"]["recall"]["value"] - 2
    able = [plain, *(one for one in others if one["splits"]["all"]["recall"]["value"] >= floor)]
    assert tuned["chosen"] == min(able, key=lambda one: one["splits"]["all"]["CHAIRi"]["value"])["name"]


def test_the_choice_reads_the_validation_part_only(found, chair, lvlm, tmp_path) -> None:
    """With other objects in the test part's pictures nothing changes but the test part's scores."""
    _, tuned = found
    test = {item.id for item in divide(chair)["test"].items}
    truth = {image: frozenset({"toilet"}) if image in test else own for image, own in chair.truth.items()}
    other = search(replace(chair, truth=truth), lvlm, tmp_path)
    assert untimed(other)["validation"] == untimed(tuned)["validation"]
    assert (other["chosen"], other["reason"]) == (tuned["chosen"], tuned["reason"])
    assert other["test"][0]["value"] == 100 != tuned["test"][0]["value"]


def test_a_search_that_was_stopped_goes_on(found, chair, lvlm, tmp_path) -> None:
    out, tuned = found
    (tmp_path / "validation").mkdir()
    for path in (out / "validation").iterdir():
        if path.name != "summary.json":
            (tmp_path / "validation" / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / "validation" / "results-none.jsonl"
    kept = cut.read_bytes()[:700]
    cut.write_bytes(kept)
    assert untimed(search(chair, lvlm, tmp_path)) == untimed(tuned)
    assert cut.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]) and kept.count(b"\n")


def test_another_search_is_refused(found, chair, lvlm) -> None:
    out, tuned = found
    for given in ({"seed": 1}, {"validation": 0.25}):
        with pytest.raises(ValueError, match="holds results of another run"):
            search(chair, lvlm, out, **given)
    assert read_json(out / "tune.json") == tuned


def test_a_better_setting_is_chosen_and_tested(chair, lvlm, tmp_path) -> None:
    """In a world where the nearly blind model is right, it wins on both parts."""
    paths = [item.path for item in chair.items]
    said = lvlm.ask(paths, chair.items[0].question, [VTCCLS(keep=4)], SHORT.max_new_tokens)
    truth = {
        item.id: frozenset(mention.category for mention in mentioned(answer.text, chair.rule))
        for item, answer in zip(chair.items, said, strict=True)
    }
    found = search(replace(chair, truth=truth), lvlm, tmp_path)
    assert found["chosen"] == "vtc_cls(keep=4)" and "significantly better than plain there" in found["reason"]
    assert [line["value"] for line in found["test"]][1] == 0 < found["test"][0]["value"]
    own = found["comparison"]
    assert own["difference"] == -found["test"][0]["value"] and own["metric"] == "CHAIRi"
    assert (
        own["p"] < 0.05 and own["verdict"] == "better" and own["low"] <= own["difference"] <= own["high"] < 0
    )
    assert {entry["metric"] for entry in own["others"]} == {"CHAIRs", "recall", "f1", "average_length"}


def test_mean_over_splits_is_what_pope_is_tuned_by(lvlm, tmp_path) -> None:
    pope = tasks.pope(["random", "adversarial"], limit=36)
    found = tune(
        pope, VTCCLS(), {"keep": [72]}, lvlm, tmp_path, decoding=Decoding(max_new_tokens=3), progress=False
    )
    assert found["objective"] == {
        "text": "highest f1 (mean of the splits)", "metric": "f1", "split": "mean",
    }  # fmt: skip
    for line in found["validation"]:
        each = read_json(tmp_path / "validation" / "summary.json")["settings"]
        splits = next(one["splits"] for one in each if one["name"] == line["setting"])
        mean = (splits["random"]["f1"]["value"] + splits["adversarial"]["f1"]["value"]) / 2
        assert line["value"] == pytest.approx(mean)


def summary_of(*settings: tuple[float, float]) -> list[dict]:
    """Settings of a summary with these CHAIRi and recall."""
    return [
        {"splits": {"all": {"CHAIRi": {"value": chair_i}, "recall": {"value": recall}}}}
        for chair_i, recall in settings
    ]


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ([(20, 80), (15, 79), (10, 77.9)], 1),  # the last says too little
        ([(20, 80), (15, 78), (10, 78)], 2),
        ([(20, 80), (20, 90)], 0),  # no better: plain, the first
        ([(20, 80), (25, 90)], 0),
    ],
)
def test_saying_less_does_not_win(chair, settings, best) -> None:
    assert Objective.of(chair).best(summary_of(*settings)) == best


def test_settings_are_spelled_as_fix_reads_them() -> None:
    for name in METHODS:
        settings = settings_of(name)
        assert len(settings) > 2
        for setting in settings:
            assert tuple(parse(setting.name)) == setting.methods
    assert GRIDS.keys() == METHODS.keys()
    assert [one.name for one in settings_of(VTCCLS(start_layer=-2), {"keep": (9,)})] == [
        "vtc_cls(start_layer=-2,keep=9)"
    ]


@pytest.fixture
def entered(monkeypatch, capfd):
    def enter(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lvlm-fix", "tune", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capfd.readouterr()

    return enter


def test_the_command_prints_one_json_object_or_a_table(entered, tmp_path) -> None:
    words = (
        "vtc_cls", "--task", "pope", "--split", "random", "--limit", "24", "--grid", "keep=72",
        "--max-new-tokens", "3", "--out", tmp_path,
    )  # fmt: skip
    code, out, _ = entered(*words, "--json")
    assert code == 0 and json.loads(out) == read_json(tmp_path / "tune.json")
    code, out, _ = entered(*words)
    assert code == 0 and "chosen: " in out and "2 images to choose by, 2 to test on" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("magic",), "unknown method 'magic'"),
        (("damro,var",), "holds 2 methods; tune one at a time"),
        (("none",), "holds 0 methods"),
        (("vtc_cls", "--grid", "size=3"), "give values for some of keep, start_layer"),
        (("vtc_cls", "--grid", "keep"), "cannot read grid 'keep'"),
        (("vtc_cls", "--grid", "keep=__import__('os')"), "cannot read grid"),
        (("vtc_cls", "--grid", "keep=3,-1"), "keep must be a positive number"),
        (("vtc_cls", "--grid", "keep='a'"), "keep is 'a'; give a number"),
        (("vtc_cls", "--grid", "keep=3,3"), "holds a value twice"),
        (("vtc_cls", "--metric", "average_length"), "cannot be tuned by 'average_length'"),
        (("vtc_cls", "--validation", "1"), "leaves one part empty"),
        (("vtc_cls", "--split", "random"), "give --task pope"),
        (("vtc_cls", "--recall-drop", "-1"), "recall drop"),
    ],
)
def test_what_cannot_be_searched_is_told_in_one_line(entered, tmp_path, words, says) -> None:
    code, out, err = entered(*words, "--limit", "4", "--out", tmp_path / "out")
    assert (code, out) == (1, "") and err.startswith("lvlm-fix: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "out").exists()
