"""Triton's probe_scores in the interpreter, against the float64 oracle; started by `test_fused_probe_scores.py`."""

import pytest
import torch

from lvlm_fix import functional
from lvlm_fix.kernels.fused.probe_scores import fused_probe_scores


def error(out, reference):
    size = reference.norm()
    return float((out.double() - reference).norm() / (size if size > 0 else 1))


def assert_agrees(query, key, positions, key_mask=None, scale=None):
    found = fused_probe_scores(query, key, positions.expand(len(query), -1), scale, key_mask)
    wide = query.double(), key.double()
    for one, other in zip(found, functional.probe_importance(*wide, positions, scale, key_mask), strict=True):
        assert one.dtype == torch.float32
        assert one.isfinite().all()
        assert error(one, other) <= 1e-5
    return found


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("dtype", "heads", "key_heads", "probes", "tokens", "width"),
    [
        (torch.float32, 1, 1, 1, 1, 32),
        (torch.float32, 2, 1, 5, 37, 40),
        (torch.float16, 4, 2, 20, 131, 64),
        (torch.float16, 1, 1, 3, 65, 256),
        (torch.float32, 2, 2, 3, 33, 128),
    ],
    ids=["one token", "odd sizes", "groups of heads", "wide heads", "float32"],
)
def test_sums_agree_with_the_oracle(dtype, heads, key_heads, probes, tokens, width):
    query, key = torch.randn(2, heads, probes, width), torch.randn(2, key_heads, tokens, width)
    assert_agrees(query.to(dtype), key.to(dtype), torch.randint(0, tokens, (2, probes)))


def test_left_padding_and_a_row_of_nothing_but_padding():
    query, key = torch.randn(3, 2, 6, 32), torch.randn(3, 2, 50, 32)
    key_mask = torch.arange(50) >= torch.tensor([[0], [20], [50]])
    positions = torch.tensor([0, 5, 19, 20, 48, 49])
    scores, normalised = assert_agrees(query.half(), key.half(), positions, key_mask)
    assert not scores[~key_mask].any()
    assert not normalised[~key_mask].any()


def test_what_hidden_tokens_hold_does_not_matter():
    query, key = torch.randn(1, 2, 6, 32), torch.randn(1, 2, 50, 32)
    key_mask = torch.rand(1, 50) < 0.5
    positions = torch.randint(0, 50, (6,))
    before = assert_agrees(query, key, positions, key_mask)
    key[:, :, ~key_mask[0]] = torch.nan
    after = fused_probe_scores(query, key, positions[None], None, key_mask)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_huge_logits_leave_one_weight_of_one():
    # Powers of two, so that float32 holds the logits (up to 2^17, and more than 88 apart) exactly.
    query, key = torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 40, 32)
    query[..., 0], key[0, 0, :, 0] = 1024, torch.arange(-20, 20) * 4.0
    scores, _ = assert_agrees(query, key, torch.tensor([39, 39]), scale=1.0)
    assert scores[0, 39] == 2


def test_all_probes_on_the_first_token_look_at_it_alone():
    query, key = torch.randn(1, 2, 4, 32), torch.randn(1, 2, 600, 32)
    scores, normalised = assert_agrees(query, key, torch.zeros(4, dtype=torch.long))
    assert scores[0, 0] == 4 and normalised[0, 0] == 1
    assert not scores[0, 1:].any()


def test_keys_beyond_one_span_are_merged():
    query, key = torch.randn(1, 1, 130, 32) * 4, torch.randn(1, 1, 1100, 32)
    scores, _ = assert_agrees(query, key, torch.randint(0, 1100, (130,)))
    torch.testing.assert_close(scores.sum(), torch.tensor(130.0))


def test_strided_inputs_and_the_same_bits_again():
    key = torch.randn(2, 90, 2, 64).transpose(1, 2)[:, :, :77]
    query = torch.randn(2, 9, 4, 64).transpose(1, 2)
    positions = torch.randint(0, 77, (2, 9))
    first = assert_agrees(query, key, positions, scale=0.3)
    again = fused_probe_scores(query, key, positions, 0.3)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_elements_of_a_head_need_not_lie_side_by_side():
    query, key = torch.randn(1, 2, 32, 3).mT, torch.randn(1, 2, 32, 21).mT
    assert_agrees(query, key, torch.tensor([4, 20, 11]))
