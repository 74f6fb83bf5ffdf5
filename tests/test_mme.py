"""MME's counting of questions and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvlm_fix.evals.mme import mme
from lvlm_fix.evals.records import DataError
from lvlm_fix.evals.settings import Setting
from lvlm_fix.evals.summary import summarize


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two subsets of two pictures, the second in the release's other layout."""
    places = [
        (tmp_path / "existence",) * 2,
        (tmp_path / "count/questions_answers_YN", tmp_path / "count/images"),
    ]
    for texts, pictures in places:
        for place in (texts, pictures):
            place.mkdir(parents=True, exist_ok=True)
        for name in ("a", "b"):
            Image.new("RGB", (4, 4)).save(pictures / f"{name}.jpg")
            (texts / f"{name}.txt").write_text(
                "Is there a cat in this image? Please answer yes or no.\tYes\n"
                "Is there a dog in this image? Please answer yes or no.\tNo\n"
            )
    return tmp_path


def test_accuracy_plus_wants_both_questions_of_a_picture(folder) -> None:
    task = mme(folder, ["existence", "count"])
    said = {"existence/a/1": "Yes", "existence/a/2": "No.", "existence/b/1": "yes", "existence/b/2": "Yes"}
    rows = {}
    for item in task.items:
        answer = said.get(item.id, "maybe")
        rows[0, item.id] = {
            "id": item.id, "seed": 0, "split": item.split, "image": item.image,
            "answer": answer, **task.judge(item, answer),
        }  # fmt: skip
    (setting,) = summarize(task, [Setting("none")], [rows], resamples=10)["settings"]
    values = {
        name: {key: one["value"] for key, one in own.items()} for name, own in setting["splits"].items()
    }
    assert values["existence"] == {"accuracy": 75, "accuracy+": 50, "score": 125}
    assert values["count"] == {"accuracy": 0, "accuracy+": 0, "score": 0}
    assert values["mean"]["score"] == 62.5
    assert setting["counts"]["count"]["unparsed"] == 4
    assert np.isfinite(list(values["mean"].values())).all()


def test_limit_counts_pictures(folder) -> None:
    assert [item.id for item in mme(folder, ["count"], limit=1).items] == ["count/a/1", "count/a/2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it?\tYes\n", "1 questions"),
        ("Is it?\tYes\nIs it not? No\n", "line 2"),
        ("Is it?\tYes\n\nIs it not?\tmaybe\n", "line 3"),
    ],
)
def test_faulty_texts_are_named_with_the_line(folder, text, message) -> None:
    (folder / "existence" / "b.txt").write_text(text)
    with pytest.raises(DataError, match=rf"b\.txt.*{message}"):
        mme(folder, ["existence"])


def test_missing_pictures_and_subsets_are_named(folder) -> None:
    (folder / "existence" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.txt.*no picture"):
        mme(folder, ["existence"])
    with pytest.raises(DataError, match="color"):
        mme(folder, ["color"])
