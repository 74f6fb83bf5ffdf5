"""Building POPE: balanced, true to the annotations, hard where it should be, and the same for one seed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_fix.evals.build_pope import Statistics, build_pope, read_statistics
from lvlm_fix.evals.coco import Annotations, read_instances
from lvlm_fix.evals.records import DataError, write_lines
from lvlm_fix.evals.vocabulary import CATEGORIES

POPE = Path(__file__).parents[1].parent / "shared" / "data" / "pope"
needs_fixtures = pytest.mark.skipif(not POPE.is_dir(), reason="no ../shared/data/pope beside the repository")
SPLITS = ["random", "popular", "adversarial"]


def scenes(*images: str) -> Annotations:
    """Annotations from "dog cat" strings, one an image."""
    return Annotations(
        {str(number): f"{number}.jpg" for number in range(len(images))},
        {str(number): tuple(sorted(set(objects.split()))) for number, objects in enumerate(images)},
    )


def asked(rows: list[dict], label: str) -> list[str]:
    """The objects of the questions with this label."""
    found = []
    for row in rows:
        match = re.fullmatch(r"Is there an? (.*) in the image\?", row["text"])
        assert match
        if row["label"] == label:
            found.append(match[1])
    return found


@needs_fixtures
def test_questions_read_as_the_official_ones() -> None:
    official = {}
    for split in SPLITS:
        for line in (POPE / f"coco_pope_{split}.json").read_text().splitlines():
            row = json.loads(line)
            official[row["text"]] = list(row)
    assert official.pop("Is there an traffic light in the image?")  # misprinted once
    halves = Annotations({"1": "1.jpg", "2": "2.jpg"}, {"1": CATEGORIES[:40], "2": CATEGORIES[40:]})
    ours = {row["text"]: list(row) for row in build_pope(halves, "random", seed=0, per_image=40)}
    assert official == {text: ours.get(text) for text in official}
    assert len(ours) == 80


def test_popular_asks_the_most_frequent_absent_objects() -> None:
    rooms = scenes(*["cat dog"] * 3, *["bus tree"] * 4, "oven apple")
    rows = build_pope(rooms, "popular", seed=0, per_image=2)
    assert asked(rows[:4], "no") == ["bus", "tree"]
    assert asked(rows[12:16], "no") == ["cat", "dog"]  # three images each, the ovens and apples one
    assert asked(rows[-4:], "no") == ["bus", "tree"]  # equal counts go by alphabet


def test_adversarial_asks_what_is_most_often_seen_with_the_object_just_asked() -> None:
    rooms = scenes("cat", "cat oven", "cat oven", "cat dog", "dog apple", "dog apple", "bus tree")
    rows = build_pope(rooms, "adversarial", seed=1, per_image=1)
    assert (asked(rows[:2], "yes"), asked(rows[:2], "no")) == (["cat"], ["oven"])
    partners = {"cat": ["oven", "dog"], "dog": ["apple", "cat"], "oven": ["cat"], "apple": ["dog"]}
    for yes, no in zip(rows[2:-2:2], rows[3:-2:2], strict=True):
        there = rooms.objects[yes["image"].removesuffix(".jpg")]
        hard = [name for name in partners[asked([yes], "yes")[0]] if name not in there]
        assert asked([no], "no") == hard[:1] or not hard


def test_statistics_of_other_scenes_decide_what_is_hard(tmp_path: Path) -> None:
    rooms = scenes("cat", "cat oven", "cat oven", "bus apple")
    kitchens = Statistics.of(scenes(*["cat apple"] * 3, "cat oven"))
    own = build_pope(rooms, "adversarial", seed=0, per_image=1)
    told = build_pope(rooms, "adversarial", seed=0, per_image=1, statistics=kitchens)
    assert (asked(own[:2], "no"), asked(told[:2], "no")) == (["oven"], ["apple"])

    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({"frequency": kitchens.frequency, "cooccurrence": kitchens.cooccurrence}))
    assert build_pope(rooms, "adversarial", seed=0, per_image=1, statistics=counts) == told
    assert asked(build_pope(rooms, "popular", 0, per_image=1, statistics=counts)[:2], "no") == ["apple"]


def test_statistics_count_images_and_not_instances(tmp_path: Path) -> None:
    chairs = [{"image_id": 1, "category_id": 62}] * 10 + [{"image_id": 1, "category_id": 67}]
    path = tmp_path / "instances.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "1.jpg"}],
                "categories": [{"id": 62, "name": "chair"}, {"id": 67, "name": "dining table"}],
                "annotations": chairs,
            }
        )
    )
    counts = read_statistics(path)
    assert counts.frequency == {"chair": 1, "dining table": 1}
    assert counts.cooccurrence == {"chair": {"dining table": 1}, "dining table": {"chair": 1}}
    assert read_instances(path).objects == {"1": ("chair", "dining table")}


@given(
    st.lists(st.sets(st.sampled_from(CATEGORIES[:12]), max_size=8), min_size=1, max_size=8),
    st.sampled_from(SPLITS),
    st.integers(1, 3),
    st.integers(0, 5),
)
@settings(deadline=None)
def test_questions_are_balanced_true_and_never_repeated(
    images: list[set[str]], split: str, per_image: int, seed: int
) -> None:
    rooms = Annotations(
        {str(number): f"{number}.jpg" for number in range(len(images) + 1)},
        {str(number): tuple(sorted(found)) for number, found in enumerate([*images, set(CATEGORIES[:12])])},
    )
    everything = Statistics(dict.fromkeys(CATEGORIES, 1), {})
    rows = build_pope(rooms, split, seed, None, per_image, everything)  # type: ignore[arg-type]
    assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
    fit = [image for image, found in rooms.objects.items() if len(found) >= per_image]
    assert len(rows) == 2 * per_image * len(fit)
    for image in fit:
        mine = [row for row in rows if row["image"] == f"{image}.jpg"]
        present, absent = asked(mine, "yes"), asked(mine, "no")
        assert len(present) == len(absent) == per_image
        assert len({*present, *absent}) == 2 * per_image
        assert set(present) <= set(rooms.objects[image])
        assert not set(absent) & set(rooms.objects[image])


def test_one_seed_gives_one_file_and_another_seed_another() -> None:
    rooms = scenes(*["cat dog bus tree"] * 20, *["oven apple car"] * 20)
    for split in SPLITS:
        assert build_pope(rooms, split, seed=4, images=10) == build_pope(rooms, split, seed=4, images=10)
        assert build_pope(rooms, split, seed=4, images=10) != build_pope(rooms, split, seed=5, images=10)


def test_splits_of_one_seed_share_images_and_present_objects() -> None:
    rooms = scenes(*["cat dog bus tree"] * 20, *["oven apple car"] * 20)
    built = [build_pope(rooms, split, seed=4, images=10) for split in SPLITS]
    present = [[row for row in rows if row["label"] == "yes"] for rows in built]
    assert present[0] == present[1] == present[2]
    assert len({row["image"] for row in present[0]}) == 10


def test_impossible_requests_are_refused_with_the_reason() -> None:
    rooms = scenes("cat dog", "cat", "bus dog")
    with pytest.raises(ValueError, match="2 of 3 images show at least 2 objects, too few for 3; ask"):
        build_pope(rooms, "random", seed=0, images=3, per_image=2)
    with pytest.raises(ValueError, match=r"0.jpg lacks only 1 known objects; ask for fewer per image"):
        build_pope(scenes("cat dog", "cat bus"), "popular", seed=0, per_image=2)
    with pytest.raises(ValueError, match='give "random", "popular" or "adversarial"'):
        build_pope(rooms, "hard", seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count from 1"):
        build_pope(rooms, "random", seed=0, per_image=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"frequency": {"cat": -1}, "cooccurrence": {}}', r", .frequency.: the count of 'cat' is -1"),
        ('{"frequency": {}, "cooccurrence": {"cat": {"dog": "2"}}}', r", .cooccurrence. of 'cat': the count"),
        ('{"frequency": {}, "cooccurrence": []}', ': "cooccurrence" is not an object of objects'),
        ('{"frequency": {}}', ': holds neither COCO annotations nor "frequency" and "cooccurrence"'),
        ("3", ": holds neither"),
    ],
)
def test_bad_statistics_are_refused_with_file_and_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"^{path}{message}"):
        build_pope(scenes("cat", "dog"), "popular", seed=0, per_image=1, statistics=path)


def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    write_lines(path, [{"question_id": 1}])

    def rows():
        yield {"question_id": 2}
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_lines(path, rows())
    assert path.read_text() == '{"question_id": 1}\n'
    assert list(tmp_path.iterdir()) == [path]
