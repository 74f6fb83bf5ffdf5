"""`lvlm-fix score` and `lvlm-fix build` as a shell sees them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lvlm_fix.commands.build import app as build_app
from lvlm_fix.commands.score import app as score_app
from lvlm_fix.evals.records import DataError

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_fixtures = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")
INSTANCES = {
    "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(4)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "airplane"}],
    "annotations": [{"image_id": number, "category_id": 1 + number % 3} for number in range(4)],
}


def invoke(app, *arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two questions and answers, two captions and their objects."""
    (tmp_path / "q.json").write_text(
        '{"question_id": 1, "text": "Is there a cat in the image?", "label": "yes"}\n'
        '{"question_id": 2, "text": "Is there a dog in the image?", "label": "no"}\n'
    )
    (tmp_path / "a.jsonl").write_text(
        '{"question_id": 1, "answer": "Yes"}\n{"question_id": 2, "answer": "A dog."}\n'
    )
    (tmp_path / "c.jsonl").write_text(
        '{"image_id": 1, "caption": "A cat on a bus."}\n{"image_id": 2, "caption": "A dog on a couch."}\n'
    )
    (tmp_path / "o.json").write_text('{"1": ["cat", "couch"], "2": ["cat", "couch"]}')
    return tmp_path


@needs_fixtures
def test_pope_prints_the_official_numbers_as_json() -> None:
    pairs = []
    for split in ("random", "popular", "adversarial"):
        pairs += ["--questions", DATA / "pope" / f"coco_pope_{split}.json"]
        pairs += ["--answers", DATA / "pope" / f"answers_{split}.jsonl"]
    result = invoke(score_app, "pope", *pairs, "--json")
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    expected = json.loads((DATA / "pope" / "answers_expected.json").read_text())
    for split, numbers in expected.items():
        assert printed["splits"][f"coco_pope_{split}"].items() >= numbers.items()
    assert printed["mean"]["f1"] == pytest.approx(sum(split["f1"] for split in expected.values()) / 3)
    assert printed["skipped"] == 0


@needs_fixtures
def test_chair_prints_the_published_numbers_as_json() -> None:
    files = ["--captions", DATA / "chair" / "llava-1.5_greedy.jsonl"]
    result = invoke(
        score_app, "chair", *files, "--objects", DATA / "chair" / "coco_objects.json.gz", "--json"
    )
    expected = json.loads((DATA / "chair" / "expected.json").read_text())["llava-1.5_greedy"]
    printed = json.loads(result.stdout)
    assert {name: round(printed[name], 2) for name in expected} == expected
    assert "details" not in printed


def test_pope_table_shows_ratios_and_counts(files: Path) -> None:
    result = invoke(score_app, "pope", "--questions", files / "q.json", "--answers", files / "a.jsonl")
    assert result.exit_code == 0
    shown = {
        line.split()[0]: line.split()[-1] for line in result.stdout.splitlines() if len(line.split()) > 1
    }
    assert shown["accuracy"] == "50.00%"
    assert shown["f1"] == "66.67%"
    assert (shown["TP"], shown["FP"], shown["unparsed"]) == ("1", "1", "1")
    assert "mean" not in shown


def test_pope_names_splits_apart_that_share_their_questions(files: Path) -> None:
    (files / "b.jsonl").write_text((files / "a.jsonl").read_text().replace("A dog.", "No."))
    pairs = ["--questions", files / "q.json", "--answers", files / "a.jsonl"]
    pairs += ["--questions", files / "q.json", "--answers", files / "b.jsonl"]
    printed = json.loads(invoke(score_app, "pope", *pairs, "--json").stdout)
    accuracy = {name: split["accuracy"] for name, split in printed["splits"].items()}
    assert accuracy == {"q / a": 0.5, "q / b": 1.0}
    assert printed["mean"]["accuracy"] == 0.75


def test_pope_wants_questions_and_answers_in_pairs(files: Path) -> None:
    result = invoke(
        score_app,
        "pope",
        "--questions",
        files / "q.json",
        "--questions",
        files / "q.json",
        "--answers",
        "a.jsonl",
    )
    assert result.exit_code == 2
    assert "give them in pairs" in " ".join(result.stderr.replace("│", " ").split())


def test_strict_refuses_and_skip_bad_counts(files: Path) -> None:
    command = ["pope", "--questions", files / "q.json", "--answers", files / "a.jsonl", "--rule", "strict"]
    result = invoke(score_app, *command)
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith(f"{files / 'a.jsonl'}, line 2: the answer says neither")
    assert result.stdout == ""
    printed = json.loads(invoke(score_app, *command, "--skip-bad", "--json").stdout)
    assert printed["skipped"] == 1
    assert printed["problems"][0].startswith(f"{files / 'a.jsonl'}, line 2")
    assert printed["splits"]["q"]["unanswered"] == 1
    assert "skipped 1 faulty records, the first: " in invoke(score_app, *command, "--skip-bad").stdout


def test_chair_details_say_which_words_are_hallucinated_and_where(files: Path) -> None:
    command = ["chair", "--captions", files / "c.jsonl", "--objects", files / "o.json", "--details"]
    printed = json.loads(invoke(score_app, *command, "--json").stdout)
    assert printed["CHAIRs"] == 50
    assert printed["details"] == [
        {"image_id": "1", "caption": "A cat on a bus.", "hallucinated": []},
        {
            "image_id": "2",
            "caption": "A dog on a couch.",
            "hallucinated": [{"word": "dog", "category": "dog", "start": 2, "end": 5}],
        },
    ]
    assert ["2", "dog", "dog", "2-5"] in [
        line.split() for line in invoke(score_app, *command).stdout.splitlines()
    ]


def test_chair_english_rule_sees_the_bus(files: Path) -> None:
    command = ["chair", "--captions", files / "c.jsonl", "--objects", files / "o.json", "--json"]
    assert json.loads(invoke(score_app, *command, "--rule", "english").stdout)["CHAIRs"] == 100


def test_a_missing_file_is_an_os_error(files: Path) -> None:
    result = invoke(score_app, "chair", "--captions", files / "none.jsonl", "--objects", files / "o.json")
    assert isinstance(result.exception, FileNotFoundError)
    assert result.stdout == ""


def test_build_writes_questions_that_score_reads(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    out = tmp_path / "pope.json"
    command = ["pope", "--annotations", tmp_path / "instances.json", "--out", out, "--per-image", 1]
    result = invoke(build_app, *command, "--split", "adversarial", "--seed", 3)
    assert result.exit_code == 0
    assert result.stdout == f"{out}: 8 questions about 4 images\n"
    told = json.loads(invoke(build_app, *command, "--split", "adversarial", "--seed", 3, "--json").stdout)
    assert told == {"out": str(out), "split": "adversarial", "questions": 8, "images": 4}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(
            json.dumps({"question_id": row["question_id"], "answer": row["label"]}) + "\n" for row in rows
        )
    )
    scored = json.loads(invoke(score_app, "pope", "--questions", out, "--answers", answers, "--json").stdout)
    assert scored["splits"]["pope"]["accuracy"] == 1
    assert "Is there an airplane in the image?" in [row["text"] for row in rows]


def test_build_refuses_bad_annotations_and_writes_nothing(tmp_path: Path) -> None:
    broken = {**INSTANCES, "annotations": [{"image_id": 0, "category_id": 4}]}
    (tmp_path / "instances.json").write_text(json.dumps(broken))
    command = ["pope", "--annotations", tmp_path / "instances.json", "--out", tmp_path / "pope.json"]
    result = invoke(build_app, *command, "--split", "random")
    assert isinstance(result.exception, DataError)
    assert "annotations[0]: category 4 is not under categories; add it there" in str(result.exception)
    assert not (tmp_path / "pope.json").exists()


def test_scoring_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, lvlm_fix.commands.score, lvlm_fix.commands.build, lvlm_fix.evals.build_pope\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_scoring_takes_no_longer_than_promised(tmp_path: Path) -> None:
    """3,000 POPE answers in a second and 5,000 long captions in ten, of one core; a tenth of that is usual."""
    asked, said = tmp_path / "q.json", tmp_path / "a.jsonl"
    lines = [{"question_id": n, "text": "Is there a dog in the image?", "label": "yes"} for n in range(3000)]
    asked.write_text("".join(json.dumps(one) + "\n" for one in lines))
    lines = [
        {"question_id": n, "answer": "Yes, there is a dog in the image, near a bench."} for n in range(3000)
    ]
    said.write_text("".join(json.dumps(one) + "\n" for one in lines))
    caption = (
        "The image shows two dogs beside a parking meter and a fire hydrant; a hot dog lies on a bench. " * 10
    )
    captions, objects = tmp_path / "c.jsonl", tmp_path / "o.json"
    lines = [{"image_id": n, "caption": f"{n}: {caption}"} for n in range(5000)]
    captions.write_text("".join(json.dumps(one) + "\n" for one in lines))
    objects.write_text(json.dumps({str(n): ["dog", "bench"] for n in range(5000)}))
    pope = ("pope", "--questions", asked, "--answers", said)
    chair = ("chair", "--captions", captions, "--objects", objects)
    few = tmp_path / "few.jsonl"
    few.write_text(captions.read_text()[: captions.read_text().index("\n") + 1])
    invoke(score_app, *pope), invoke(score_app, "chair", "--captions", few, "--objects", objects)  # start-up
    for words, seconds in ((pope, 1), (chair, 10)):
        started = time.process_time()
        assert invoke(score_app, *words).exit_code == 0
        assert time.process_time() - started < seconds


def test_the_rule_stands_below_the_table(files: Path) -> None:
    words = ("chair", "--captions", files / "c.jsonl", "--objects", files / "o.json")
    assert invoke(score_app, *words).stdout.endswith("objects found by the reference rule\n")
    english = invoke(score_app, *words, "--rule", "english").stdout
    assert english.endswith("objects found by the english rule\n")
    assert "rule" not in invoke(score_app, *words, "--json").stdout


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_or_without_its_mark(files: Path, encoding: str) -> None:
    for name in ("c.jsonl", "o.json"):
        wrong = Path(shutil.copytree(files, files / f"{name}-{encoding}", ignore=lambda *_: ["q.json"]))
        (wrong / name).write_bytes((files / name).read_text().encode(encoding))
        result = invoke(score_app, "chair", "--captions", wrong / "c.jsonl", "--objects", wrong / "o.json")
        assert str(result.exception) == f"{wrong / name}: is UTF-16, not UTF-8; save it as UTF-8"
        shutil.rmtree(wrong)


def test_questions_cannot_be_written_where_there_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    words = ("pope", "--annotations", tmp_path / "instances.json", "--split", "random", "--out")
    missing = invoke(build_app, *words, tmp_path / "nowhere" / "x.json")
    assert str(missing.exception) == (
        f"cannot write {tmp_path / 'nowhere' / 'x.json'}: there is no folder {tmp_path / 'nowhere'}; make it first"
    )
    assert "it is a folder; name a file in it" in str(invoke(build_app, *words, tmp_path).exception)
