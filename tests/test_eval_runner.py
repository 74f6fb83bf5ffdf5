"""Runs of a benchmark: resumed, shared by processes, described by a manifest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lvlm_fix import DAMRO, LVLM, VTCCLS
from lvlm_fix.evals import tasks
from lvlm_fix.evals.records import DataError, read_json
from lvlm_fix.evals.results import Appender, read_rows
from lvlm_fix.evals.runner import batches, run
from lvlm_fix.evals.settings import Decoding, Setting

OBJECTS = {1: ["cat", "dog", "car"], 2: ["bus", "dog"], 3: ["cat", "bench"]}
FIX = (VTCCLS(keep=40, start_layer=0),)
FREE = ("seconds", "memory")  # of a results line: the only parts that two runs may differ in
SHORT = Decoding(max_new_tokens=3)


def noise_picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((144, 144))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Three pictures with COCO annotations."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    names = sorted({name for objects in OBJECTS.values() for name in objects})
    for number in OBJECTS:
        noise_picture(number).save(folder / "images" / f"{number}.png")
    instances = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in OBJECTS],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
        "annotations": [
            {"image_id": number, "category_id": names.index(name)}
            for number, own in OBJECTS.items()
            for name in own
        ],
    }
    captions = {"annotations": [{"image_id": number, "caption": "A person."} for number in OBJECTS]}
    (folder / "instances_own.json").write_text(json.dumps(instances))
    (folder / "captions_own.json").write_text(json.dumps(captions))
    questions = [
        {
            "question_id": 10 * number + k,
            "image": f"{number}.png",
            "text": f"Is there a {name} in the image?",
            "label": label,
        }
        for number, own in OBJECTS.items()
        for k, (name, label) in enumerate([(own[0], "yes"), ("sheep", "no")])
    ]
    for split in ("random", "popular"):
        (folder / f"pope_{split}.json").write_text("".join(json.dumps(one) + "\n" for one in questions))
    return folder


@pytest.fixture(scope="module")
def lvlm(random_llava) -> LVLM:
    return LVLM(*random_llava)


@pytest.fixture(scope="module")
def pope(scenes) -> tasks.Pope:
    return tasks.pope(questions=[scenes / "pope_random.json"], images=scenes / "images")


@pytest.fixture(scope="module")
def whole(lvlm, pope, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run(pope, lvlm, [FIX], out, decoding=SHORT, batch_size=4, progress=False)
    return out


def lines(out: Path) -> dict[str, list[dict]]:
    """Each results file's lines without what is measured."""
    return {
        path.name: [
            {key: value for key, value in json.loads(line).items() if key not in FREE}
            for line in path.read_text().splitlines()
        ]
        for path in sorted(out.glob("results-*.jsonl"))
    }


def metrics(out: Path) -> list:
    summary = read_json(out / "summary.json")
    return [[setting["splits"] for setting in summary["settings"]], summary["comparisons"]]


def test_a_run_compares_with_the_plain_model_and_describes_itself(whole, pope) -> None:
    summary, manifest = read_json(whole / "summary.json"), read_json(whole / "manifest.json")
    assert [setting["name"] for setting in summary["settings"]] == ["none", "vtc_cls(keep=40,start_layer=0)"]
    assert summary["settings"][0]["tokens_per_second"] > 0 and summary["settings"][0]["peak_memory_bytes"] > 0
    assert {
        "model",
        "dtype",
        "device",
        "chat_template",
        "prompts",
        "decoding",
        "data",
        "versions",
        "command",
    } <= manifest.keys()
    assert manifest["prompts"]["example"].startswith("USER: <image>\nIs there a cat")
    assert manifest["settings"][1]["methods"] == [{"method": "vtc_cls", "keep": 40, "start_layer": 0}]
    for rows in lines(whole).values():
        assert sorted(row["id"] for row in rows) == sorted(item.id for item in pope.items)


def test_the_manifest_holds_what_was_measured(whole, pope, lvlm, tmp_path) -> None:
    summary, measured = read_json(whole / "summary.json"), read_json(whole / "manifest.json")["measured"]
    assert measured["settings"].keys() == {setting["name"] for setting in summary["settings"]}
    for setting in summary["settings"]:
        own = measured["settings"][setting["name"]]
        assert own == {name: setting[name] for name in own}
        assert {"compute_seconds", "tokens_per_second", "peak_memory_bytes"} <= own.keys()
    answering = sum(own["compute_seconds"] for own in measured["settings"].values())
    assert answering <= measured["wall_seconds"]
    assert (measured["new_lines"], measured["processes"]) == (2 * len(pope.items), 1)
    assert measured["started"] <= measured["finished"]
    # A start that has nothing to do leaves it alone; one that went on says how much it did.
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    run(pope, lvlm, [FIX], out, decoding=SHORT, batch_size=4, progress=False)
    assert read_json(out / "manifest.json")["measured"] == measured
    path = out / "results-none.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    run(pope, lvlm, [FIX], out, decoding=SHORT, batch_size=4, progress=False)
    assert read_json(out / "manifest.json")["measured"]["new_lines"] == 2


def test_settings_take_turns_after_each_has_answered_once_for_nothing(
    pope, lvlm, tmp_path, monkeypatch
) -> None:
    calls = []
    ask = LVLM.ask

    def listening(self, image, question, fix=(), max_new_tokens=64, **rest):
        calls.append((bool(fix), len(question), max_new_tokens))
        return ask(self, image, question, fix, max_new_tokens, **rest)

    monkeypatch.setattr(LVLM, "ask", listening)
    run(pope, lvlm, [FIX], tmp_path, decoding=SHORT, batch_size=2, progress=False)
    trial, warm, timed = calls[:2], calls[2:4], calls[4:]
    assert [call[1:] for call in trial] == [(1, 1)] * 2
    assert warm == [(False, 2, 2), (True, 2, 2)]
    assert timed == [(fixed, 2, 3) for fixed in (False, True, True, False, False, True)]


def test_premises_are_warned_of_once_and_not_a_batch(pope, random_llava, tmp_path, recwarn) -> None:
    run(pope, LVLM(*random_llava), ["damro"], tmp_path, decoding=SHORT, batch_size=1, progress=False)
    told = [str(one.message) for one in recwarn if "premise" in str(one.message)]
    assert len(told) == len(set(told)) <= 1


def test_answers_are_those_of_asking_one_by_one(whole, pope, lvlm) -> None:
    rows = read_rows(whole, Setting.of(FIX).slug)
    for item in pope.items:
        assert rows[0, item.id]["answer"] == lvlm.ask(item.path, item.question, FIX, 3).text


@settings(max_examples=12, deadline=None)
@given(cut=st.integers(0, 5_000), torn=st.sampled_from([b"", b'{"id": "random/', b"\0\0\0", b"\xff"]))
def test_a_run_goes_on_wherever_its_file_was_cut(whole, pope, lvlm, tmp_path_factory, cut, torn) -> None:
    out = tmp_path_factory.mktemp("cut") / "out"
    shutil.copytree(whole, out)
    path = sorted(out.glob("results-*.jsonl"))[cut % 2]
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)] + (torn if cut % (len(data) + 1) < len(data) else b""))
    (out / "summary.json").unlink()
    run(pope, lvlm, [FIX], out, decoding=SHORT, batch_size=4, progress=False)
    assert lines(out) == lines(whole)
    assert metrics(out) == metrics(whole)


def test_a_run_goes_on_in_fewer_processes(whole, pope, lvlm, tmp_path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "results-none.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    for rank, part in ((1, [*rows[3:], b'{"id"']), (2, rows[:1])):
        (out / f"results-none.rank{rank}.jsonl").write_bytes(b"".join(part))
    run(pope, lvlm, [FIX], out, decoding=SHORT, batch_size=4, progress=False)
    assert lines(out) == lines(whole)


def test_a_silent_process_is_not_waited_for_for_ever(pope, lvlm, tmp_path, monkeypatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(TimeoutError, match="2 of 6 items of none"):
        run(pope, lvlm, out=tmp_path, decoding=SHORT, batch_size=4, progress=False, patience=0.3)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TimeoutError, match="rank 0"):
        run(pope, lvlm, out=tmp_path / "other", decoding=SHORT, progress=False, patience=0.3)


def test_a_finished_run_is_not_done_again(whole, pope, lvlm) -> None:
    before = {path: path.read_bytes() for path in whole.glob("results-*.jsonl")}
    run(pope, lvlm, [FIX], whole, decoding=SHORT, batch_size=4, progress=False)
    assert {path: path.read_bytes() for path in whole.glob("results-*.jsonl")} == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"decoding": Decoding(max_new_tokens=4)}, "decoding.max_new_tokens is 3 there and 4 here"),
        ({"batch_size": 5}, "batch_size"),
        ({"settings": [[DAMRO()]]}, "settings"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(whole, pope, lvlm, change, key) -> None:
    before = lines(whole)
    given = {"settings": [FIX], "decoding": SHORT, "batch_size": 4} | change
    with pytest.raises(ValueError, match=key):
        run(pope, lvlm, out=whole, progress=False, **given)
    assert lines(whole) == before


def test_changed_weights_and_pictures_are_another_run(whole, scenes, pope, lvlm, tmp_path) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    noise_picture(9).save(tmp_path / "scenes" / "images" / "1.png")
    other = tasks.pope(
        questions=[tmp_path / "scenes" / "pope_random.json"], images=tmp_path / "scenes" / "images"
    )
    with pytest.raises(ValueError, match=r"data\.images"):
        run(other, lvlm, [FIX], whole, decoding=SHORT, batch_size=4, progress=False)
    bias = lvlm.model.model.multi_modal_projector.linear_1.bias.data
    bias += 1
    try:
        with pytest.raises(ValueError, match=r"model\.sha256"):
            run(pope, lvlm, [FIX], whole, decoding=SHORT, batch_size=4, progress=False)
    finally:
        bias -= 1


def test_results_without_a_manifest_are_refused(whole, pope, lvlm, tmp_path) -> None:
    shutil.copy(whole / "results-none.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        run(pope, lvlm, out=tmp_path, decoding=SHORT, progress=False)


def test_a_whole_line_that_is_no_result_is_an_error_with_its_number(whole, tmp_path) -> None:
    path = shutil.copy(whole / "results-none.jsonl", tmp_path)
    Path(path).write_text("[]\n" + Path(path).read_text())
    with pytest.raises(DataError, match="line 1"):
        read_rows(tmp_path, "none")


def test_two_runs_cannot_write_one_file(tmp_path) -> None:
    with Appender(tmp_path / "results-none.jsonl"), pytest.raises(OSError, match="another run"):
        Appender(tmp_path / "results-none.jsonl")


def test_lines_that_another_run_wrote_meanwhile_are_not_doubled(
    whole, pope, lvlm, tmp_path, monkeypatch
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    path = out / "results-none.jsonl"
    full = path.read_bytes()
    path.write_bytes(b"")

    class Late(Appender):
        def __init__(self, opened: Path) -> None:
            opened.write_bytes(full)  # the other run, just before it let go of the file
            super().__init__(opened)

    monkeypatch.setattr("lvlm_fix.evals.runner.Appender", Late)
    run(pope, lvlm, [FIX], out, decoding=SHORT, batch_size=4, progress=False)
    assert path.read_bytes() == full


def test_another_run_is_refused_before_the_model_is_loaded(whole, pope) -> None:
    with pytest.raises(ValueError, match="batch_size is 4 there and 5 here"):
        run(pope, "no/such/model", [FIX], whole, decoding=SHORT, batch_size=5, progress=False)


def test_a_file_is_no_place_for_results(pope, tmp_path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match="out is a file, and a run needs a folder"):
        run(pope, "no/such/model", out=tmp_path / "out", decoding=SHORT, progress=False)


def test_a_setting_that_does_not_suit_the_model_leaves_nothing_behind(pope, lvlm, tmp_path) -> None:
    with pytest.raises(ValueError, match="start_layer"):
        run(pope, lvlm, [[VTCCLS(start_layer=-4)]], tmp_path / "out", decoding=SHORT, progress=False)
    assert not (tmp_path / "out").exists()


def test_splits_that_ask_the_same_are_asked_once(scenes, lvlm, tmp_path) -> None:
    both = tasks.pope(
        questions=[scenes / "pope_random.json", scenes / "pope_popular.json"], images=scenes / "images"
    )
    summary = run(both, lvlm, out=tmp_path, decoding=SHORT, progress=False)
    assert summary["items"] == 12 and summary["settings"][0]["answers"] == 6
    assert summary["settings"][0]["splits"]["random"] == summary["settings"][0]["splits"]["popular"]


def test_batches_hold_everything_once_and_questions_of_a_picture_together(pope) -> None:
    parts = batches(pope.items, 2)
    assert sorted(item.id for part in parts for ask in part for item in ask.items) == sorted(
        i.id for i in pope.items
    )
    assert all(len({ask.items[0].image for ask in part}) == 1 for part in parts)
    lengths = [max(len(ask.items[0].question) for ask in part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)


def test_sampling_depends_on_the_seed_and_not_on_the_batch(pope, lvlm, tmp_path) -> None:
    sampling = Decoding(max_new_tokens=3, do_sample=True, temperature=2.0, seeds=(0, 1))
    answers = []
    for size in (1, 4):
        out = tmp_path / str(size)
        summary = run(pope, lvlm, out=out, decoding=sampling, batch_size=size, progress=False)
        answers.append({key: row["answer"] for key, row in read_rows(out, "none").items()})
    assert answers[0] == answers[1]
    assert [answers[0][0, item.id] for item in pope.items] != [answers[0][1, item.id] for item in pope.items]
    assert len(summary["settings"][0]["splits"]["random"]["accuracy"]["by_seed"]) == 2


def test_chair_marks_words_and_reads_buses(scenes, lvlm, tmp_path) -> None:
    task = tasks.chair(scenes / "images", scenes)
    assert task.truth == {
        "1": {"cat", "dog", "car", "person"},
        "2": {"bus", "dog", "person"},
        "3": {"cat", "bench", "person"},
    }
    marked = task.judge(task.items[0], "A bus and a dog.")
    assert [word["category"] for word in marked["hallucinated"]] == ["bus"]
    summary = run(task, lvlm, [FIX], tmp_path, decoding=SHORT, progress=False)
    assert summary["settings"][0]["splits"]["all"]["CHAIRs"].keys() >= {"value", "low", "high"}
    assert {entry["metric"] for entry in summary["comparisons"]} == set(task.better)


def test_a_limit_that_breaks_the_balance_is_told_of(scenes, recwarn) -> None:
    asked = {"questions": [scenes / "pope_random.json"], "images": scenes / "images"}
    assert len(tasks.pope(**asked, limit=4).items) == 4 and not recwarn
    with pytest.warns(
        UserWarning, match="of the first 3 questions of random 2 are to be answered yes and 1 no"
    ):
        assert len(tasks.pope(**asked, limit=3).items) == 3


def test_missing_pictures_and_nothing_to_ask_are_errors(scenes, tmp_path) -> None:
    with pytest.raises(OSError, match=r"1\.png"):
        tasks.pope(questions=[scenes / "pope_random.json"], images=tmp_path)
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(ValueError, match="nothing to ask"):
        tasks.pope(questions=[tmp_path / "empty.json"], images=scenes / "images")


@pytest.fixture(scope="module")
def saved(random_llava, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in random_llava:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(saved, scenes) -> list[str]:
    return [
        "pope", "--model", str(saved),
        "--questions", str(scenes / "pope_random.json"), "--images", str(scenes / "images"),
        "--fix", "vtc_cls(keep=40,start_layer=0)", "--max-new-tokens", "3", "--batch-size", "1",
    ]  # fmt: skip


def test_the_command_prints_one_json_object_or_a_table_with_verdicts(arguments, tmp_path) -> None:
    from lvlm_fix.commands.evaluate import app

    first = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--json"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout) == read_json(tmp_path / "summary.json")
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert "accuracy" in again.stdout and "no significant difference" in again.stdout


def start(arguments: list[str], out: Path, **variables: str) -> subprocess.Popen:
    program = "from lvlm_fix.commands.evaluate import app; app()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", program, *arguments, "--out", str(out), "--json"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def expected(saved, scenes, tmp_path_factory) -> Path:
    """What the command makes in one process."""
    out = tmp_path_factory.mktemp("expected")
    task = tasks.pope(questions=[scenes / "pope_random.json"], images=scenes / "images")
    run(task, saved, ["vtc_cls(keep=40,start_layer=0)"], out, decoding=SHORT, batch_size=1, progress=False)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_run_and_merge_to_the_same(arguments, expected, tmp_path, world) -> None:
    ranks = [
        start(arguments, tmp_path, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=280) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, outputs
    assert [bool(printed) for printed, _ in outputs] == [True] + [False] * (world - 1)
    assert lines(tmp_path) == lines(expected)
    assert metrics(tmp_path) == metrics(expected)


@pytest.mark.slow
def test_a_killed_run_goes_on_without_loss_or_doubles(arguments, expected, saved, scenes, tmp_path) -> None:
    for number in range(5):  # on a busy machine a run may be over before it is killed
        out = tmp_path / str(number)
        process = start(arguments, out)
        first = out / "results-none.jsonl"
        while process.poll() is None and not (first.exists() and first.read_bytes()):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not (out / "summary.json").exists():
            break
    assert first.read_bytes() and not (out / "summary.json").exists()
    task = tasks.pope(questions=[scenes / "pope_random.json"], images=scenes / "images")
    run(
        task,
        saved,
        ["vtc_cls(keep=40,start_layer=0)"],
        out,
        decoding=SHORT,
        batch_size=1,
        progress=False,
    )
    assert lines(out) == lines(expected)
    assert metrics(out) == metrics(expected)
