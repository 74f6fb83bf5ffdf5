"""Intervals and tests of the evaluation."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_fix.evals.chair import ChairScore
from lvlm_fix.evals.clipscore import ClipScoredChair
from lvlm_fix.evals.pope import PopeScore
from lvlm_fix.evals.statistics import Bootstrap, holm, mcnemar, ratio
from lvlm_fix.evals.tasks import Chair, Item, Pope


def accuracy(counts):
    return {"accuracy": ratio(counts[..., 0], counts[..., 1])}


def table(*settings_right: list[float], questions: float = 1) -> np.ndarray:
    """Counts of right answers and questions: (settings, 1 split, images, 2)."""
    return np.array([[[[right, questions] for right in images]] for images in settings_right])


@pytest.fixture(scope="module")
def item(tmp_path_factory) -> Item:
    path = tmp_path_factory.mktemp("pictures") / "1.png"
    path.touch()
    return Item("1", "1.png", path, "Is there a dog in the image?", "random", "yes")


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), min_size=4, max_size=4))
def test_pope_metrics_are_those_of_the_score(item, counts) -> None:
    score = PopeScore(*counts)
    metrics = Pope((item,)).metrics(np.array([*counts, 0], dtype=float))
    for name, value in metrics.items():
        assert value == pytest.approx(getattr(score, name)), name


@settings(deadline=None)
@given(st.lists(st.integers(0, 500), min_size=7, max_size=7))
def test_chair_metrics_are_those_of_the_score(item, counts) -> None:
    mentions, true = max(counts[2:4]), max(counts[4:6])
    counts = [max(counts[:2]), min(counts[:2]), mentions, min(counts[2:4]), true, min(counts[4:6]), counts[6]]
    expected = ChairScore(*counts).as_dict()
    for name, value in Chair((item,)).metrics(np.array(counts, dtype=float)).items():
        assert value == pytest.approx(expected[name]), name


def test_the_interval_of_a_share_is_the_textbook_one() -> None:
    right = [1.0] * 300 + [0.0] * 100
    found = Bootstrap(table(right), accuracy).estimate("accuracy", 0, 0)
    error = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found.value == 0.75
    assert (found.low, found.high) == pytest.approx((0.75 - error, 0.75 + error), abs=0.005)


def test_repeating_the_questions_of_an_image_does_not_narrow_the_interval() -> None:
    right = [1.0, 0.0] * 20
    once = Bootstrap(table(right), accuracy).estimate("accuracy", 0, 0)
    six_times = Bootstrap(table([6 * one for one in right], questions=6), accuracy).estimate("accuracy", 0, 0)
    assert (six_times.low, six_times.high) == (once.low, once.high)


def test_the_mean_of_splits_weighs_them_alike() -> None:
    counts = np.array([[[[1.0, 1.0]], [[0.0, 9.0]]]])
    assert Bootstrap(counts, accuracy).estimate("accuracy", 0, None).value == 0.5


def test_equal_settings_do_not_differ() -> None:
    found = Bootstrap(table([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]), accuracy).difference("accuracy", 1, 0, 0)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_pairing_finds_what_two_intervals_would_not() -> None:
    plain = [float(number % 2) for number in range(60)]
    better = [1.0 if number < 12 else right for number, right in enumerate(plain)]
    boot = Bootstrap(table(plain, better), accuracy)
    assert boot.estimate("accuracy", 0, 0).high > boot.estimate("accuracy", 1, 0).low
    found = boot.difference("accuracy", 1, 0, 0)
    assert found.value == pytest.approx(0.1) and found.low > 0 and found.p <= 0.05


def test_three_images_cannot_be_significant() -> None:
    found = Bootstrap(table([0.0] * 3, [1.0] * 3), accuracy).difference("accuracy", 1, 0, 0)
    assert found.p == 0.25


def cured(clip: bool = False) -> Bootstrap:
    """Of 100 captions, plain and under a method that cures five, harms none and lengthens forty others."""
    plain = np.array([[1, number < 20, 4, number < 20, 3, 2, 10] for number in range(100)], dtype=float)
    method = plain.copy()
    method[:5, 1] = method[:5, 3] = 0
    method[30:70, 6] += 1
    both = np.stack([plain, method])[:, None]
    if clip:
        scores = np.random.default_rng(0).uniform(0.5, 1.2, (2, 1, 100, 1))
        both = np.concatenate([both, scores, np.zeros_like(scores)], axis=-1)
    metrics = ClipScoredChair.metrics if clip else Chair.metrics
    return Bootstrap(both, lambda counts: metrics(object.__new__(ClipScoredChair), counts))


@pytest.mark.parametrize("clip", [False, True])
def test_only_images_that_change_the_metric_count_as_pairs(clip) -> None:
    boot = cured(clip)
    for metric in ("CHAIRs", "CHAIRi"):
        found = boot.difference(metric, 1, 0, 0)
        assert found.p == boot.difference(metric, 1, 0, None).p == mcnemar([True] * 5, [False] * 5) == 0.0625
    assert boot.difference("average_length", 1, 0, 0).p < 0.001
    assert boot.difference("recall", 1, 0, 0).p == 1


def test_columns_of_clipscore_change_no_other_test() -> None:
    without, with_them = cured(), cured(clip=True)
    for metric in without.values:
        assert with_them.difference(metric, 1, 0, 0) == without.difference(metric, 1, 0, 0)
    assert with_them.difference("clipscore", 1, 0, 0).p > 2.0**-90


def test_bootstrap_p_is_uniform_enough_where_nothing_differs() -> None:
    chance = np.random.default_rng(5)
    significant = 0
    for _ in range(200):
        one, other = chance.integers(0, 2, (2, 80)).astype(float)
        boot = Bootstrap(table(list(one), list(other)), accuracy, resamples=400)
        significant += boot.difference("accuracy", 1, 0, 0).p < 0.05
    assert 2 <= significant <= 22  # of 200, at 5 %


def test_bootstrap_is_the_same_every_time_and_whatever_the_block(monkeypatch) -> None:
    right = [1.0, 0.0, 0.0, 1.0, 1.0]
    whole = Bootstrap(table(right), accuracy, resamples=50).estimate("accuracy", 0, 0)
    monkeypatch.setattr("lvlm_fix.evals.statistics._BLOCK", 20)
    assert Bootstrap(table(right), accuracy, resamples=50).estimate("accuracy", 0, 0) == whole


def test_bootstrap_refuses_no_images() -> None:
    with pytest.raises(ValueError, match="images"):
        Bootstrap(np.zeros((1, 1, 0, 2)), accuracy)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_is_the_binomial_test_of_changed_answers(pairs) -> None:
    won = sum(one and not other for one, other in pairs)
    changed = sum(one != other for one, other in pairs)
    as_rare = sum(
        comb(changed, k) for k in range(changed + 1) if abs(2 * k - changed) >= abs(2 * won - changed)
    )
    expected = float(Fraction(as_rare, 2**changed))
    assert mcnemar([one for one, _ in pairs], [other for _, other in pairs]) == pytest.approx(expected)


def test_mcnemar_takes_thousands_of_questions() -> None:
    assert mcnemar([True] * 3000 + [False] * 3000, [False] * 3000 + [True] * 3000) == 1
    assert mcnemar([True] * 5000, [False] * 5000) == 0.0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_keeps_the_order_and_is_no_stricter_than_bonferroni(probabilities) -> None:
    corrected = holm(probabilities)
    ranked = [q for _, q in sorted(zip(probabilities, corrected, strict=True))]
    assert ranked == sorted(ranked)
    for p, q in zip(probabilities, corrected, strict=True):
        assert p <= q <= max(p, min(1, len(probabilities) * p))
    assert min(corrected) == min(1, len(probabilities) * min(probabilities))


def test_holm_is_the_step_down_procedure() -> None:
    assert holm([0.005, 0.04, 0.03, 0.01]) == pytest.approx([0.02, 0.06, 0.06, 0.03])
