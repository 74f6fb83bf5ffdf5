"""A cache layer with room ahead holds what transformers' own would hold, whatever is done to it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from lvlm_fix.growing_layer import ROOM, GrowingLayer

changes = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 2, ROOM, ROOM + 5])),
    st.tuples(st.just("reorder_cache"), st.sampled_from([(0, 0), (1, 0)])),
    st.tuples(st.just("batch_select_indices"), st.sampled_from([(1, 0), (1, 1)])),
    st.tuples(st.just("crop"), st.sampled_from([-1, -2])),
)


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, and values of another width, of two rows and three heads."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, count, 8, generator=drawn), torch.randn(2, 3, count, 4, generator=drawn)


def prompt(columns: int) -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(*tokens(columns))
    return layer


def equal(layer: DynamicLayer, other: DynamicLayer) -> bool:
    return torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


@given(st.lists(changes, max_size=12))
def test_it_holds_what_a_dynamic_layer_holds(steps):
    plain, growing = prompt(7), GrowingLayer.over(prompt(7))
    for seed, (change, how) in enumerate(steps):
        if change == "update":
            shown = growing.update(*tokens(how, seed))
            plain.update(*tokens(how, seed))
            assert shown[0] is growing.keys and shown[1] is growing.values
        else:
            for layer in (plain, growing):
                getattr(layer, change)(torch.tensor(how) if isinstance(how, tuple) else how)
        assert equal(plain, growing)
        assert growing.get_seq_length() == plain.get_seq_length()


def test_columns_are_copied_once_in_so_many_tokens():
    growing, places = GrowingLayer.over(prompt(7)), []
    for seed in range(2 * (ROOM + 1)):
        growing.update(*tokens(1, seed))
        places.append(growing.keys.data_ptr())
    changes = sum(a != b for a, b in itertools.pairwise(places))
    assert changes == 1
    assert growing.nbytes == (7 + 2 * (ROOM + 1)) * 2 * 3 * (8 + 4) * 4


def test_neither_the_layer_it_goes_on_from_nor_what_was_shown_changes():
    before = prompt(7)
    growing = GrowingLayer.over(before)
    first = growing.update(*tokens(1))[0]
    kept = first.clone()
    growing.update(*tokens(3, seed=1))
    assert torch.equal(first, kept)
    assert equal(before, prompt(7))


def test_what_was_made_in_inference_mode_goes_on_outside_of_it():
    with torch.inference_mode():
        growing = GrowingLayer.over(prompt(7))
        growing.update(*tokens(1))
    growing.update(*tokens(1, seed=1))
    assert growing.get_seq_length() == 9


def test_gradients_pass_through_as_they_do_through_a_dynamic_layer():
    found = []
    for layer in (prompt(7), GrowingLayer.over(prompt(7))):
        layer.update(*tokens(1))
        key, value = (x.requires_grad_() for x in tokens(1, seed=1))
        layer.update(key, value)[0].square().sum().backward()
        layer.update(*tokens(1, seed=2))
        found.append(key.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("start", [None, 7])
def test_an_emptied_layer_can_be_filled_again(start):
    growing = GrowingLayer() if start is None else GrowingLayer.over(prompt(start))
    growing.reset()
    growing.update(*tokens(2))
    growing.update(*tokens(1, seed=1))
    plain = prompt(2)
    plain.update(*tokens(1, seed=1))
    assert torch.equal(growing.keys[:, :, -3:], plain.keys)
