"""POPE scoring: the official rule to the letter, and no line of input lost in silence."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_fix.evals.pope import (
    PopeScore,
    is_unparsed,
    mean_of,
    parse_answer,
    score_answers,
    score_files,
)
from lvlm_fix.evals.records import DataError, Faults

POPE = Path(__file__).parents[1].parent / "shared" / "data" / "pope"
needs_fixtures = pytest.mark.skipif(not POPE.is_dir(), reason="no ../shared/data/pope beside the repository")

QUESTIONS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a car in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there a cat in the image?", "label": "yes"},
    {"question_id": 4, "image": "b.jpg", "text": "Is there a bus in the image?", "label": "no"},
]
ANSWERS = [{"question_id": number, "answer": answer} for number, answer in enumerate(["Yes"] * 3 + ["No"], 1)]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "questions.json", QUESTIONS)


@needs_fixtures
@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_official_splits_score_exactly_as_the_official_script(split: str) -> None:
    expected = json.loads((POPE / "answers_expected.json").read_text())[split]
    score = score_files(POPE / f"coco_pope_{split}.json", POPE / f"answers_{split}.jsonl").as_dict()
    assert {name: score[name] for name in expected} == expected
    assert score["questions"] == 3000


@needs_fixtures
def test_answers_to_another_split_are_refused() -> None:
    with pytest.raises(DataError, match=r"answers_popular.jsonl, line 2: question 2 is another at .*line 2"):
        score_files(POPE / "coco_pope_random.json", POPE / "answers_popular.jsonl")


@pytest.mark.parametrize(
    ("answer", "taken_for", "unparsed"),
    [
        ("Yes", "yes", False),
        ("yes, there is.", "yes", False),
        ("YES!", "yes", False),
        ("No", "no", False),
        ("no.", "no", False),
        ("No, there is no dog", "no", False),
        ("There is not one", "no", False),
        ("I see a dog, no, two", "no", False),  # the comma goes, the word stays
        ("There isn't a dog", "yes", True),
        ("NO", "yes", True),
        ("No!", "yes", True),  # cut at spaces only, so this word is "No!"
        ("no\nit is not here", "no", False),
        ("no\nit is absent", "yes", True),
        ("A dog. No cat", "yes", True),  # the second sentence does not count
        (". no", "yes", True),
        ("nothing here", "yes", True),
        ("eyes", "yes", True),
        ("", "yes", True),
    ],
)
def test_answers_are_taken_as_the_official_rule_takes_them(
    answer: str, taken_for: str, unparsed: bool
) -> None:
    assert parse_answer(answer) == taken_for
    assert is_unparsed(answer) is unparsed


def test_small_case_by_hand(questions: Path, tmp_path: Path) -> None:
    score = score_files(questions, write(tmp_path / "answers.jsonl", ANSWERS))
    assert score == PopeScore(TP=2, FP=1, TN=1, FN=0)
    assert score.accuracy == 0.75
    assert score.precision == pytest.approx(2 / 3)
    assert score.recall == 1
    assert score.f1 == pytest.approx(0.8)
    assert score.yes_ratio == 0.75


def test_ratios_over_nothing_are_zero() -> None:
    score = score_answers(["no", "no"], ["No", "No"])
    assert (score.accuracy, score.precision, score.recall, score.f1, score.yes_ratio) == (1, 0, 0, 0, 0)
    assert PopeScore(0, 0, 0, 0).accuracy == 0


def test_mean_is_over_splits_and_not_over_questions() -> None:
    splits = [PopeScore(TP=3, FP=0, TN=3, FN=0), PopeScore(TP=0, FP=1, TN=0, FN=0)]
    assert mean_of(splits)["accuracy"] == 0.5


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.text(max_size=30)), min_size=1), st.randoms())
@settings(max_examples=50, deadline=None)
def test_order_of_lines_does_not_change_the_score(pairs: list[tuple[str, str]], chance) -> None:
    asked = [{"question_id": i, "text": f"q{i}", "label": label} for i, (label, _) in enumerate(pairs)]
    said = [{"question_id": i, "answer": answer} for i, (_, answer) in enumerate(pairs)]
    expected = score_answers([label for label, _ in pairs], [answer for _, answer in pairs])
    chance.shuffle(asked)
    chance.shuffle(said)
    with tempfile.TemporaryDirectory() as folder:
        score = score_files(write(Path(folder, "q"), asked), write(Path(folder, "a"), said))
    assert score == expected
    assert score.questions == len(pairs)


BAD_LINES = {
    "malformed": (
        b'{"question_id": 2, "answer": "Yes"',
        "not valid JSON .* at column 35.*; correct the line",
    ),
    "an array": (b"[1, 2]", r"holds \[1, 2\]; give one JSON object a line"),
    "no id": (b'{"answer": "Yes"}', 'has no "question_id"; add it'),
    "no answer": (b'{"question_id": 2}', 'has no "answer"; add it'),
    "null answer": (b'{"question_id": 2, "answer": null}', '"answer" is null; give a string'),
    "true for an id": (b'{"question_id": true, "answer": "No"}', '"question_id" is True; give an integer'),
    "twice": (
        b'{"question_id": 1, "answer": "No"}',
        "answers question 1 for the second time; keep one answer",
    ),
    "unknown": (b'{"question_id": 9, "answer": "No"}', "question 9, which .*questions.json does not ask"),
    "key twice": (b'{"question_id": 2, "answer": "No", "answer": "Yes"}', 'the key "answer" is given twice'),
    "latin-1": (b'{"question_id": 2, "answer": "caf\xe9"}', r"not UTF-8 \(byte 0xE9 at offset 69\)"),
    "endless number": (b'{"question_id": ' + b"1" * 5000 + b"}", "number too long"),
    "endless depth": (b"[" * 100_000, "nested too deep"),
    "other question": (
        b'{"question_id": 2, "question": "Is there a tie in the image?", "answer": "No"}',
        "question 2 is another at .*questions.json, line 2; check the pair",
    ),
}


@pytest.fixture(params=BAD_LINES)
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    line, message = BAD_LINES[request.param]
    path = tmp_path / "answers.jsonl"
    good = [json.dumps(answer).encode() for answer in ANSWERS]
    path.write_bytes(b"\n".join([good[0], line, *good[2:]]))
    return path, message


def test_a_bad_line_is_refused_with_file_and_line(bad: tuple[Path, str], questions: Path) -> None:
    path, message = bad
    with pytest.raises(DataError, match=message) as error:
        score_files(questions, path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(error.value)


def test_a_bad_line_can_be_skipped_and_is_counted(bad: tuple[Path, str], questions: Path) -> None:
    path, _ = bad
    faults = Faults(skip=True)
    score = score_files(questions, path, faults=faults)
    assert faults.count == 1
    assert faults.messages[0].startswith(f"{path}, line 2: ")
    assert score == PopeScore(TP=2, FP=0, TN=1, FN=0, unanswered=1)


def test_a_question_without_answer_is_refused_or_counted(questions: Path, tmp_path: Path) -> None:
    answers = write(tmp_path / "answers.jsonl", ANSWERS[:3])
    with pytest.raises(
        DataError, match=f"{questions}, line 4: question 4 has no answer in {answers}; add it"
    ):
        score_files(questions, answers)
    assert score_files(questions, answers, faults=Faults(skip=True)).unanswered == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**QUESTIONS[1], "label": "maybe"}, 'line 2: "label" is \'maybe\'; give "yes" or "no"'),
        ({**QUESTIONS[1], "question_id": 1}, "line 2: question 1 was asked before, at .*line 1; keep one"),
        ({"question_id": 2, "text": "?"}, 'line 2: has no "label"; add it'),
    ],
)
def test_a_bad_question_is_refused_with_file_and_line(row: dict, message: str, tmp_path: Path) -> None:
    asked = write(tmp_path / "questions.json", [QUESTIONS[0], row, *QUESTIONS[2:]])
    with pytest.raises(DataError, match=message):
        score_files(asked, write(tmp_path / "answers.jsonl", ANSWERS))


def test_strict_refuses_an_answer_that_says_neither(questions: Path, tmp_path: Path) -> None:
    said = [*ANSWERS[:2], {"question_id": 3, "answer": "A cat sits there."}, ANSWERS[3]]
    answers = write(tmp_path / "answers.jsonl", said)
    assert score_files(questions, answers).unparsed == 1
    with pytest.raises(DataError, match=f"{answers}, line 3: the answer says neither yes nor no"):
        score_files(questions, answers, rule="strict")
    faults = Faults(skip=True)
    assert score_files(questions, answers, rule="strict", faults=faults).questions == 3
    assert faults.count == 1


def test_gzip_and_a_byte_order_mark_and_blank_lines_read_alike(questions: Path, tmp_path: Path) -> None:
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in ANSWERS)
    (tmp_path / "answers.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert score_files(questions, tmp_path / "answers.jsonl.gz") == PopeScore(2, 1, 1, 0)


def test_a_file_that_cannot_be_read_to_its_end_is_refused_even_when_skipping(
    questions: Path, tmp_path: Path
) -> None:
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ANSWERS).encode())
    spoilt = bytearray(packed)
    spoilt[20] ^= 0xFF
    cases = {
        "short.jsonl.gz": (packed[:-9], f"gzip ends early, at offset {len(packed) - 9}; make or copy"),
        "spoilt.jsonl.gz": (bytes(spoilt), r"damaged gzip \(.*\) in the part at offset 0; make or copy"),
        "plain.jsonl.gz": (b"{}", "is not gzip in spite of its name"),
        "wide.jsonl": (json.dumps(ANSWERS[0]).encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
        "empty.jsonl": (b"", "answers none of the questions"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{path}: {message}"):
            score_files(questions, path, faults=Faults(skip=True))
