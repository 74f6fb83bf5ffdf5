"""ZipVL's cache in whole models after the prefill: long answers, further turns of many words, beams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slow import largest_difference
from test_attach_equality import (
    CONTRAST,
    MOVE,
    PACK,
    PRUNE,
    SHORT,
    TOLERANCE,
    in_float64,
    run,
    worst_difference,
)

from lvlm_fix import DAMRO, VAR, ZipVL, attach
from lvlm_fix.decoding import Slots
from lvlm_fix.encoding import REPEATS_PICTURES
from lvlm_fix.packed_layer import GROUP

pytestmark = [
    pytest.mark.filterwarnings("ignore:damro with vtc_cls"),
    pytest.mark.filterwarnings("ignore::lvlm_fix.PremiseWarning"),
]

EVERYTHING = DAMRO(beta=0.0)
# Its branch is asked in turns only, and has all words of the answer to catch up with.
SPARED = DAMRO(beta=0.0, gate=0.0)
TURN, LATER = 100, 25


@pytest.fixture
def double(random_llava):
    """The model of random weights in float64, and its processor."""
    torch.set_default_dtype(torch.float64)
    yield in_float64(random_llava[0]), random_llava[1]
    torch.set_default_dtype(torch.float32)


def words(count, rows, seed=0):
    return torch.randint(5, 100, (rows, count), generator=torch.Generator().manual_seed(seed))


def turn(model, fix, inputs, answer, question):
    """Logits (rows, Q, V) of a second turn, in one pass, after an answer (rows, A) word by word."""
    with attach(model, *fix), torch.inference_mode():
        cache = model(**inputs).past_key_values
        for place in range(answer.shape[1]):
            model(input_ids=answer[:, place : place + 1], past_key_values=cache)
        return model(input_ids=question, past_key_values=cache).logits


@pytest.mark.parametrize(
    "fix",
    [
        (ZipVL(),),
        (ZipVL(window=8), MOVE),
        (ZipVL(), EVERYTHING),
        (ZipVL(), SPARED),
        (ZipVL(), EVERYTHING, replace(PRUNE, keep=10)),
    ],
    ids=["zipvl", "var", "damro", "gated damro", "pruned damro"],
)
@pytest.mark.parametrize("rows", ["one picture", "a row with no picture"])
def test_a_later_word_changes_no_earlier_logit(double, fix, rows, sample_pictures, ask):
    model, processor = double
    batch = [([sample_pictures["kitchen"]], SHORT), ([], "Is it?")]
    inputs = ask(processor, *batch[: 1 if rows == "one picture" else 2]).to(torch.float64)
    question = words(TURN, len(inputs["input_ids"]))
    other, answer = question.clone(), words(3, len(question), seed=2)
    other[:, LATER:] = words(TURN - LATER, len(question), seed=1)
    ours, theirs = (turn(model, fix, inputs, answer, some) for some in (question, other))
    assert torch.equal(ours[:, :LATER], theirs[:, :LATER])
    assert (ours - theirs)[:, LATER:-1].abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize(
    "fix, answered",
    [((ZipVL(),), 3), ((PACK, MOVE), 3), ((PACK,), GROUP + 1)],
    ids=["zipvl", "var", "long answer"],
)
def test_a_rows_turn_is_the_same_alone(double, fix, answered, sample_pictures, ask, record_property):
    model, processor = double
    batch = [([sample_pictures["kitchen"]], SHORT), ([], "Is it?")]
    inputs = ask(processor, *batch).to(torch.float64)
    said = words(answered, 2, seed=2), words(TURN, 2)
    together = turn(model, fix, inputs, *said)
    for row, own in enumerate(batch):
        one = ask(processor, own).to(torch.float64)
        alone = turn(model, fix, one, *(part[row : row + 1] for part in said))
        difference = (alone[0] - together[row]).abs().max().item()
        record_property("largest difference", difference)
        assert difference < 1e-9


@torch.inference_mode()
@pytest.mark.parametrize(
    "fix, rows",
    [
        ((PACK,), [0]),
        ((replace(PACK, window=40),), [0, 1]),
        ((replace(PACK, evict=True), MOVE, PRUNE), [0]),
        ((PACK, PRUNE, CONTRAST), [0, 2]),
    ],
    ids=["zipvl", "text beside", "evict var", "damro"],
)
def test_a_long_answer_equals_the_slow_way(double, fix, rows, sample_pictures, ask, record_property):
    """The 65th word is the first that meets packed words of the answer."""
    kitchen, street = sample_pictures["kitchen"], sample_pictures["street"]
    batch = [([kitchen], SHORT), ([], "Is it?"), ([street], "Is there a fork in the image?")]
    batch = [batch[row] for row in rows]
    assert worst_difference(*double, fix, batch, ask, record_property, steps=GROUP + 6) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize(
    "nothing, options",
    [
        # Past 64 words, where there is a group of none.
        ((), {"num_beams": 3, "max_new_tokens": GROUP + 2}),
        ((), {"num_beams": 4, "num_return_sequences": 2}),
        ((DAMRO(alpha=0, beta=0),), {"num_beams": 3}),
        ((DAMRO(alpha=0, beta=0),), {"max_new_tokens": GROUP + 2}),
    ],
    ids=["beams", "several returned", "damro, beams", "damro, greedy"],
)
def test_a_window_that_covers_everything_packs_nothing(random_llava, nothing, options, sample_pictures, ask):
    model, processor = random_llava
    kitchen, street = sample_pictures["kitchen"], sample_pictures["street"]
    # Older transformers give a prompt's second picture to its first beam.
    pictures = [street] if REPEATS_PICTURES else [street, kitchen]
    inputs = ask(processor, ([kitchen], SHORT), (pictures, SHORT), ([], "Is it?"))
    asked = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True} | options
    asked["min_new_tokens"] = asked["max_new_tokens"]
    plain = run(model, (), inputs, **asked)
    fixed = run(model, (ZipVL(tau=1, window=1000), *nothing), inputs, **asked)
    assert torch.equal(fixed.sequences, plain.sequences)
    for ours, theirs in zip(fixed.logits, plain.logits, strict=True):
        assert largest_difference(ours, theirs) < TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("beside", [(ZipVL(tau=1, window=1000),), (VAR(sink_dims=(39, 20), tau=9.0),)])
def test_a_branch_catches_up_by_many_words(random_llava, beside, sample_pictures, ask):
    """It is asked at the first words, then not for 70, then again; what it holds is what a stacked one holds."""
    model, processor = random_llava
    inputs = ask(processor, ([sample_pictures["kitchen"]], SHORT))
    asked = [0, 1, 2, 73, 74, 75]

    class Scheduled(DAMRO):
        def unsure(self, logits):
            return torch.full((len(logits),), len(said) in asked)

    found = []
    for contrast in (DAMRO(alpha=1.0, beta=0.0), Scheduled(alpha=1.0, beta=0.0, gate=0.5)):
        said = []
        with attach(model, contrast, PRUNE, *beside):
            output = model(**inputs)
            for word in words(76, 1).split(1, dim=1):
                said.append(output.logits[:, -1])
                output = model(input_ids=word, past_key_values=output.past_key_values)
        found.append(said)
    for step in asked:
        assert (found[0][step] - found[1][step]).abs().max() < TOLERANCE
    assert (found[0][50] - found[1][50]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("jump", [1, 128, 129, 700])
def test_masks_are_as_wide_as_the_keys_after_any_jump(jump):
    real, image, sinks = torch.rand(3, 2, 10) < 0.5
    slots = Slots(real, image, sinks, torch.float32)
    for mask, made, later in zip(
        slots.cut(10 + jump), (real, image, sinks), (True, False, False), strict=True
    ):
        assert torch.equal(mask, torch.cat([made, torch.full((2, jump), later)], dim=1))
