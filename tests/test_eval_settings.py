"""What a run compares and what it holds fixed."""

from __future__ import annotations

import pytest
import torch

from lvlm_fix.evals.manifest import first_difference
from lvlm_fix.evals.settings import Decoding, parse_settings


def test_sampling_draws_from_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf]]).repeat(4000, 1)
    prompts = [str(number) for number in range(4000)]
    (chance,) = Decoding(do_sample=True, temperature=2.0).generation(0, prompts)["logits_processor"]
    drawn = torch.bincount(chance(None, logits).argmax(-1), minlength=4) / 4000
    assert drawn.tolist() == pytest.approx((logits[0] / 2).softmax(-1).tolist(), abs=0.03)
    assert drawn[3] == 0


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 2, "do_sample": True},
        {"seeds": (0, 1)},
        {"temperature": 0.5},
        {"temperature": 0.0, "do_sample": True},
        {"max_new_tokens": 0},
        {"seeds": (1, 1), "do_sample": True},
    ],
)
def test_decoding_that_makes_no_sense_is_refused(given) -> None:
    with pytest.raises(ValueError):
        Decoding(**given)


def test_a_seed_means_nothing_without_sampling_and_is_always_told() -> None:
    assert Decoding(seeds=(5,)) == Decoding()
    assert Decoding(seeds=(5,)).as_dict()["seeds"] == [0]
    assert Decoding(seeds=(5, 6), do_sample=True).as_dict()["seeds"] == [5, 6]


def test_settings_begin_with_plain_and_have_files_of_their_own() -> None:
    chosen = parse_settings(["damro(alpha=1.0)", "damro(alpha=10)", "none", "damro(topk=1)"])
    assert chosen[0].name == "none"
    assert len({setting.slug for setting in chosen}) == len(chosen) == 4
    with pytest.raises(ValueError, match="the same"):
        parse_settings(["damro", "damro(alpha=0.5)"])


def test_where_a_run_was_started_from_does_not_matter() -> None:
    there = {"command": ["a"], "model": {"name": "x", "sha256": "1"}, "decoding": {"num_beams": 1}}
    assert first_difference(there, there | {"command": ["b"], "model": {"name": "y", "sha256": "1"}}) is None
    assert (
        first_difference(there, there | {"decoding": {"num_beams": 2}})
        == "decoding.num_beams is 1 there and 2 here"
    )
