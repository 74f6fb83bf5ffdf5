"""CHAIR: the published script's numbers, and the place of every mention."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_fix.evals.chair import Caption, hallucinated, mentioned, read_captions, score_captions
from lvlm_fix.evals.coco import read_objects
from lvlm_fix.evals.records import DataError, Faults
from lvlm_fix.evals.vocabulary import CATEGORY_OF, WORDS

CHAIR = Path(__file__).parents[1].parent / "shared" / "data" / "chair"
needs_fixtures = pytest.mark.skipif(
    not CHAIR.is_dir(), reason="no ../shared/data/chair beside the repository"
)

INSTANCES = {
    "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (7, 8, 9)],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"image_id": 7, "category_id": 18},
        {"image_id": 7, "category_id": 18},
        {"image_id": 8, "category_id": 1},
    ],
}
REFERENCES = {
    "images": [],
    "annotations": [
        {"image_id": 7, "caption": "A puppy next to a bike."},
        {"image_id": 8, "caption": "A woman with two hot dogs."},
    ],
}


@needs_fixtures
@pytest.mark.parametrize("model", ["llava-1.5_greedy", "llava-1.5_ours", "instructblip_greedy"])
def test_published_captions_score_as_the_published_script_scores_them(model: str) -> None:
    expected = json.loads((CHAIR / "expected.json").read_text())[model]
    captions = read_captions(CHAIR / f"{model}.jsonl")
    truth = read_objects([CHAIR / "coco_objects.json.gz"], {caption.image_id for caption in captions})
    score = score_captions(captions, truth).as_dict()
    assert {name: round(score[name], 2) for name in expected} == expected
    assert score["captions"] == 500


@needs_fixtures
def test_vocabulary_is_the_published_one() -> None:
    published = {}
    for line in (CHAIR / "synonyms.txt").read_text().splitlines():
        if line.strip():
            names = [name.strip().lower() for name in line.split(",")]
            published[names[0]] = set(names)
    assert {category: {category, *words} for category, words in WORDS.items()} == published
    assert list(WORDS) == list(published)


def test_no_word_stands_for_two_categories() -> None:
    assert len(WORDS) == 80
    assert len(CATEGORY_OF) == sum(1 + len(words) for words in WORDS.values())


JOINED = {
    "table=dining table": "dining table=dining table",
    "rackets=tennis racket": "tennis rackets=tennis racket",
    "ball=sports ball": "sports ball=sports ball",
}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A hot dog.", ["hot dog=hot dog"]),
        ("Two hot dogs and a dog", ["hot dogs=hot dog", "dog=dog"]),
        ("a Teddy Bear", ["Teddy Bear=teddy bear"]),
        ("a baby elephant and a baby", ["baby elephant=elephant", "baby=person"]),
        ("an adult animal", []),
        ("a train on train tracks", ["train=train"]),
        ("a passenger train with a passenger", ["passenger train=train", "passenger=person"]),
        ("a passenger jet", ["passenger jet=airplane"]),
        ("the home plate", []),
        ("a bow tie", ["bow tie=tie"]),
        ("a toilet seat", ["toilet seat=toilet"]),
        ("the seat of the toilet", ["toilet=toilet"]),
        ("a seat near the urinal", ["seat=chair", "urinal=toilet"]),
        ("glasses, wine glasses, a wine glass", ["wine glasses=wine glass", "wine glass=wine glass"]),
        ("a stop sign, a traffic light", ["stop sign=stop sign", "traffic light=traffic light"]),
        ("the dining table", ["table=dining table"]),
        ("tennis rackets, sports ball", ["rackets=tennis racket", "ball=sports ball"]),
        (
            "men, women, people and children",
            ["men=person", "women=person", "people=person", "children=person"],
        ),
        ("knives, geese and mice", ["knives=knife", "geese=bird", "mice=mouse"]),
        ("ponies on benches", ["ponies=horse", "benches=bench"]),
        ("calves, pocketknives", ["calves=cow", "pocketknives=knife"]),
        ("skis and scissors", ["skis=skis", "scissors=scissors"]),
        ("the man's chair", ["man=person", "chair=chair"]),
        ("a horse-drawn cart", []),
        ("a chair.\nA couch!(bed)", ["chair=chair", "couch=couch", "bed=bed"]),
        ("a lamp", []),
        ("", []),
    ],
)
@pytest.mark.parametrize("rule", ["reference", "english"])
def test_mentions_of_both_rules(caption: str, expected: list[str], rule: str) -> None:
    if rule == "english":  # which joins the phrases that the script does not
        expected = [JOINED.get(mention, mention) for mention in expected]
    assert [f"{mention.word}={mention.category}" for mention in mentioned(caption, rule)] == expected


@pytest.mark.parametrize(
    ("caption", "reference", "english"),
    [
        ("a bus and two buses", ["buses"], ["bus", "buses"]),
        ("ties and canoes", [], ["ties", "canoes"]),
        ("a slice of cheesecake", [], ["cheesecake"]),
        ("an iPhone", [], ["iPhone"]),
        ("cups/mugs", [], ["cups"]),
        ("by the chair.A couch", ["couch"], ["chair", "couch"]),
        ("a stove top oven", ["stove", "oven"], ["stove top oven"]),
        ("three collies", [], ["collies"]),
    ],
)
def test_reference_keeps_the_slips_of_the_script_and_english_mends_them(
    caption: str, reference: list[str], english: list[str]
) -> None:
    assert [mention.word for mention in mentioned(caption)] == reference
    assert [mention.word for mention in mentioned(caption, "english")] == english


words = st.sampled_from(
    [*CATEGORY_OF, "the", "bus", "ties", "baby", "o'clock", "İ", "\n", "...", "’s", "/", "'s"]
)
captions = st.lists(words, max_size=12).map(" ".join) | st.text(max_size=60)


@given(captions, st.sampled_from(["reference", "english"]))
@settings(deadline=None)
def test_places_are_of_the_caption_as_it_is_written(caption: str, rule: str) -> None:
    end = 0
    for mention in mentioned(caption, rule):
        assert end <= mention.start < mention.end
        assert caption[mention.start : mention.end] == mention.word
        end = mention.end


@given(captions)
@settings(deadline=None)
def test_perfect_captions_hallucinate_nothing_and_recall_all(caption: str) -> None:
    truth = {mention.category for mention in mentioned(caption)}
    score = score_captions([Caption("1", caption)], {"1": truth})
    assert (score.chair_s, score.chair_i) == (0, 0)
    assert score.recall == (100 if truth else 0)
    assert hallucinated(caption, truth) == []
    assert hallucinated(caption, []) == mentioned(caption)


@given(st.lists(st.tuples(captions, st.sets(st.sampled_from([*WORDS]), max_size=4)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_order_of_captions_does_not_change_the_score(rows: list[tuple[str, set[str]]]) -> None:
    truth = {str(number): objects for number, (_, objects) in enumerate(rows)}
    written = [Caption(str(number), caption) for number, (caption, _) in enumerate(rows)]
    shuffled = random.Random(5).sample(written, len(written))
    assert score_captions(shuffled, truth).as_dict() == score_captions(written, truth).as_dict()


def test_small_case_by_hand() -> None:
    written = [
        Caption("1", "A dog on a chair, and a dog."),  # dog, chair, dog: one of three is wrong
        Caption("2", "A man reads a book."),  # nothing wrong, the clock is missed
    ]
    score = score_captions(written, {"1": {"dog", "bed"}, "2": {"person", "book", "clock"}})
    assert score.chair_s == 50
    assert score.chair_i == 20
    assert score.recall == 60
    assert score.f1 == pytest.approx(2 * 80 * 60 / 140)
    assert score.average_length == 8  # ten tokens and six, punctuation among them
    assert [[mention[:2] for mention in marked.hallucinated] for marked in score.marked] == [
        [("chair", "chair")],
        [],
    ]


def test_truth_may_be_named_by_any_word_of_the_metric() -> None:
    assert hallucinated("A puppy on a sofa", ["dog", "Couch", "lamp"]) == []


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match='give "reference" or "english"'):
        mentioned("a dog", "loose")  # type: ignore[arg-type]


def coco_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "instances_val.json").write_text(json.dumps(INSTANCES))
    (folder / "captions_val.json.gz").write_bytes(gzip.compress(json.dumps(REFERENCES).encode()))
    return folder


def test_true_objects_of_a_folder_are_instances_and_reference_captions_together(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "coco")
    assert read_objects([folder]) == {"7": {"dog", "bicycle"}, "8": {"person", "hot dog"}, "9": set()}
    assert read_objects([folder], wanted={"8"}) == {"8": {"person", "hot dog"}}
    assert read_objects([folder / "instances_val.json"])["7"] == {"dog"}


def test_several_sources_of_true_objects_add_up(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text('{"7": ["Sofa"], "10": ["cat"]}')
    truth = read_objects([coco_folder(tmp_path / "coco"), tmp_path / "more.json"])
    assert truth["7"] == {"dog", "bicycle", "couch"}
    assert truth["10"] == {"cat"}


def test_a_folder_without_reference_captions_is_refused(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "coco")
    (folder / "captions_val.json.gz").unlink()
    with pytest.raises(DataError, match=f"{folder}: holds no captions_\\*.json"):
        read_objects([folder])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"7": ["dog", "lamp"]}', ", image 7: CHAIR knows no object 'lamp'; use a COCO category"),
        ('{"7": "dog"}', ", image 7: is not a list of object names; give one"),
        ('{"7": ["dog"],\n "8": ]}', r", line 2, column 7: not valid JSON \(Expecting value\)"),
        ('{"7": ["dog"], "7": ["cat"]}', ': the key "7" is given twice'),
        ("[]", ": is not a JSON object; give COCO annotations or a table of objects"),
        ('{"annotations": [], "categories": []}', ': has no list "images"; give COCO annotations'),
        ('{"annotations": [{"image_id": 7}]}', r', annotations\[0\]: has no "caption"; add it'),
        (
            json.dumps({**INSTANCES, "annotations": [{"image_id": 70, "category_id": 1}]}),
            r", annotations\[0\]: image 70 is not under images; add it there",
        ),
        (
            json.dumps({**INSTANCES, "annotations": [{"image_id": 7, "category_id": 3}]}),
            r", annotations\[0\]: category 3 is not under categories; add it there",
        ),
    ],
)
def test_bad_objects_are_refused_with_file_and_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{path}{message}"):
        read_objects([path])


def test_an_unknown_object_can_be_skipped_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    path.write_text('{"7": ["dog", "lamp"], "8": 3}')
    faults = Faults(skip=True)
    assert read_objects([path], faults=faults) == {"7": {"dog"}}
    assert faults.count == 2


def test_a_caption_of_an_unknown_image_is_refused_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image_id": 7, "caption": "A dog."}\n{"image_id": 77, "caption": "A cat."}\n')
    with pytest.raises(DataError, match=f"{path}, line 2: image 77 has no ground truth; add its objects"):
        score_captions(read_captions(path), {"7": ["dog"]})
    faults = Faults(skip=True)
    assert score_captions(read_captions(path), {"7": ["dog"]}, faults=faults).captions == 1
    assert faults.count == 1


def test_no_caption_is_no_score(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no caption"):
        read_captions(tmp_path / "captions.jsonl")
    with pytest.raises(DataError, match="no caption has ground truth"):
        score_captions([], {})
