"""Triton's sparse_prefill in the interpreter, against attention in float64; started by `test_fused_sparse_prefill.py`.

The reference is the oracle of `visual_attention` with nothing to redistribute, run over each item's important tokens.
"""

import pytest
import torch
from on_device import GPU, TOLERANCE

from lvlm_fix import functional
from lvlm_fix.kernels.fused.sparse_prefill import fused_sparse_prefill


def reference(query, key, value, important, scale=None):
    out = torch.zeros(query.shape, dtype=torch.float64)
    idle = {"rho": 0.0, "min_image_attention": 0.0, "p": 0.0, "first_query": 0}
    for item, listed in enumerate(important):
        q, k, v = (x[item : item + 1, :, listed].double() for x in (query, key, value))
        nothing = torch.zeros(1, q.shape[2], dtype=torch.bool)
        out[item, :, listed] = functional.visual_attention(q, k, v, nothing, nothing, scale=scale, **idle)[0]
    return out


def assert_agrees(query, key, value, important, scale=None):
    out = fused_sparse_prefill(query, key, value, important, scale=scale)
    expected = reference(query, key, value, important, scale)
    size = expected.norm()
    assert out.dtype == query.dtype and out.shape == query.shape
    assert out.isfinite().all()
    assert not out.transpose(1, 2)[~important].any()
    assert (out.double() - expected).norm() <= TOLERANCE[query.dtype] * (size if size > 0 else 1)
    return out


def inputs(batch, heads, key_heads, tokens, width, dtype=torch.float32):
    query = torch.randn(batch, heads, tokens, width)
    key, value = torch.randn(2, batch, key_heads, tokens, width).unbind()
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("dtype", "heads", "key_heads", "tokens", "width", "share"),
    [
        (torch.float32, 1, 1, 1, 32, 1.0),
        (torch.float32, 2, 1, 77, 40, 0.5),
        (torch.float16, 4, 2, 201, 64, 0.7),
        (torch.float16, 1, 1, 97, 256, 0.9),
        (torch.float32, 1, 1, 75, 256, 0.9),
        (torch.float16, 1, 1, 300, 128, 1.0),
    ],
    ids=["one token", "odd sizes", "groups of heads", "wide heads", "float32 wide heads", "all important"],
)
def test_rows_agree_with_attention_among_the_important(dtype, heads, key_heads, tokens, width, share):
    important = torch.rand(2, tokens) < share
    assert_agrees(*inputs(2, heads, key_heads, tokens, width, dtype), important)


def test_items_differ_in_number_from_none_to_all():
    important = torch.arange(70) < torch.tensor([[0], [1], [33], [70]])
    assert_agrees(*inputs(4, 2, 2, 70, 32), important)


@pytest.mark.parametrize("span", [(0, 40), (60, 100), (99, 100)], ids=["start", "end", "the last one"])
def test_important_tokens_at_one_end(span):
    important = torch.zeros(1, 100, dtype=torch.bool)
    important[:, slice(*span)] = True
    assert_agrees(*inputs(1, 2, 1, 100, 64, torch.float16), important)


def test_what_unimportant_tokens_hold_does_not_matter():
    query, key, value = inputs(1, 2, 2, 90, 32)
    important = torch.rand(1, 90) < 0.5
    important[:, 0] = False
    before = assert_agrees(query, key, value, important)
    for x in (query, key, value):
        x[:, :, ~important[0]] = torch.nan
    assert torch.equal(before, fused_sparse_prefill(query, key, value, important))


def test_huge_logits_leave_one_weight_of_one():
    # Powers of two, so that float32 holds the logits exactly.
    query, key, value = inputs(1, 1, 1, 40, 32)
    query.zero_(), key.zero_()
    query[..., 0], key[0, 0, :, 0] = 1024, torch.arange(-20, 20) * 4.0
    important = torch.rand(1, 40) < 0.5
    out = assert_agrees(query, key, value, important, scale=1.0)
    # On a GPU a float32 is multiplied as the sum of two tf32, which keep 22 of its 24 bits.
    expected = value[0, 0, important[0]]
    torch.testing.assert_close(out[0, 0, important[0]], expected, rtol=2**-20 if GPU else 0, atol=0)


def test_strided_inputs():
    query, key, value = (torch.randn(2, 90, heads, 64).transpose(1, 2)[:, :, :77] for heads in (4, 2, 2))
    assert_agrees(query, key.mT.contiguous().mT, value, torch.rand(2, 77) < 0.6, scale=0.3)
