"""Strings in, answers and reports out."""

from __future__ import annotations

import pytest
from transformers import TextIteratorStreamer

from lvlm_fix import DAMRO, LVLM, VTCCLS, Answer, PictureError, PromptError, attach

pytestmark = pytest.mark.filterwarnings("ignore:damro with vtc_cls")

FIX = (VTCCLS(keep=40, start_layer=0), DAMRO(alpha=1.0, topk=7))
DESCRIBE, FORK = "Describe the image.", "Is there a fork in the image?"


@pytest.fixture(scope="module")
def lvlm(embedded):
    return LVLM(*embedded)


@pytest.fixture(scope="module")
def pictures(sample_pictures):
    return [sample_pictures[name] for name in ("kitchen", "street", "office")]


@pytest.mark.parametrize("fix", [(), FIX], ids=["plain", "fixed"])
def test_an_answer_is_what_generate_says(lvlm, embedded, pictures, fix):
    model, processor = embedded
    answer = lvlm.ask(pictures[0], DESCRIBE, fix=fix)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": DESCRIBE}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    attached = attach(model, *fix) if fix else None
    new = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    if attached is not None:
        attached.detach()
    assert isinstance(answer, Answer)
    assert str(answer) == answer.text == processor.decode(new[0], skip_special_tokens=True).strip()
    assert answer.tokens == new.shape[1] > 5
    assert answer.seconds > 0
    assert set(answer.report) == {method.name for method in fix}


def test_methods_are_off_again_after_a_question(lvlm, pictures):
    plain = lvlm.ask(pictures[0])
    assert lvlm.ask(pictures[0], fix=FIX).text != plain.text
    assert "forward" not in vars(lvlm.model)
    assert lvlm.ask(pictures[0]).text == plain.text
    with pytest.raises(ValueError, match="start_layer"):
        lvlm.ask(pictures[0], fix=[VTCCLS(start_layer=99)])
    assert lvlm.ask(pictures[0]).text == plain.text


@pytest.mark.parametrize("fix", [(), FIX], ids=["plain", "fixed"])
def test_a_batch_says_what_its_questions_say_alone(lvlm, pictures, fix):
    questions = [DESCRIBE, FORK, "Is there a bus in the image?"]
    together = lvlm.ask(pictures, questions, fix=fix)
    alone = [lvlm.ask(one, asked, fix=fix) for one, asked in zip(pictures, questions, strict=True)]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.report for answer in together] == [answer.report for answer in alone]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


def test_one_question_of_all_pictures_and_all_questions_of_one_picture(lvlm, pictures):
    same = lvlm.ask(pictures, FORK)
    assert [answer.text for answer in same] == [lvlm.ask(one, FORK).text for one in pictures]
    several = lvlm.ask(pictures[0], [DESCRIBE, FORK])
    assert [answer.text for answer in several] == [lvlm.ask(pictures[0], q).text for q in (DESCRIBE, FORK)]
    assert isinstance(lvlm.ask([pictures[0]], FORK), list)
    assert isinstance(lvlm.ask(pictures[0], [FORK]), list)


def test_a_tuple_is_several_pictures_of_one_question(lvlm, pictures):
    kitchen, street, office = pictures
    both = lvlm.ask((kitchen, street), DESCRIBE, fix=FIX)
    assert isinstance(both, Answer)
    mixed = lvlm.ask([office, (kitchen, street), kitchen], DESCRIBE, fix=FIX)
    assert mixed[1].text == both.text
    own = {name: lvlm.ask(name_of, FORK, fix=FIX).report for name, name_of in enumerate(pictures)}
    for method in ("vtc_cls", "damro"):
        entries = [own[index][method][0] for index in range(3)]
        assert len({str(entry) for entry in entries}) == 3
        assert both.report[method] == [entries[0], entries[1]]
        assert [answer.report[method] for answer in mixed] == [[entries[2]], entries[:2], [entries[0]]]


def test_several_answers_a_question_keep_their_pictures_report(lvlm, pictures):
    single = [lvlm.ask(one, DESCRIBE, fix=FIX, num_beams=2) for one in pictures[:2]]
    answers = lvlm.ask(pictures[:2], DESCRIBE, fix=FIX, num_beams=2, num_return_sequences=2)
    assert [answers[0].text, answers[2].text] == [answer.text for answer in single]
    for index, answer in enumerate(answers):
        assert answer.report == single[index // 2].report


def test_options_of_generate_are_passed_on(lvlm, embedded, pictures):
    streamer = TextIteratorStreamer(embedded[1].tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = lvlm.ask(pictures[0], fix=FIX, max_new_tokens=3, streamer=streamer)
    assert answer.tokens == 3
    assert "".join(streamer).strip() == answer.text
    whole = lvlm.ask(pictures[0], fix=FIX, max_new_tokens=3, return_dict_in_generate=True)
    assert whole.text == answer.text


def test_pictures_may_be_paths(lvlm, pictures, tmp_path):
    path = tmp_path / "kitchen.png"
    pictures[0].save(path)
    expected = lvlm.ask(pictures[0]).text
    assert lvlm.ask(path).text == lvlm.ask(str(path)).text == lvlm.ask(path.read_bytes()).text == expected


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(lvlm, pictures, question):
    with pytest.raises(PromptError, match="the question is empty"):
        lvlm.ask(pictures[0], question)
    with pytest.raises(PromptError, match="the question is empty"):
        lvlm.ask(pictures[:2], [FORK, question])


def test_a_question_with_a_placeholder_is_refused(lvlm, pictures):
    with pytest.raises(PromptError, match="the question holds <image>: leave it out"):
        lvlm.ask(pictures[0], "<image>\nDescribe the image.")


@pytest.mark.parametrize(
    ("count", "questions", "message"),
    [
        (2, [FORK], "2 images and 1 questions"),
        (2, [FORK] * 3, "2 images and 3 questions"),
        (0, FORK, "0 images and 0 questions"),
        (1, [], "1 images and 0 questions"),
    ],
)
def test_lists_of_unequal_length_are_refused(lvlm, pictures, count, questions, message):
    with pytest.raises(PromptError, match=message):
        lvlm.ask(pictures[:count], questions)


def test_a_picture_that_cannot_be_read_is_refused(lvlm, tmp_path):
    with pytest.raises(PictureError, match=r"nowhere\.png"):
        lvlm.ask(tmp_path / "nowhere.png")
