"""Run with TRITON_INTERPRET=1, by tests/test_fused_visual_attention.py: both kernels against the float64 oracle.

torch fills new memory with NaN here, so that a row that no program writes is seen.
"""

import pytest
import torch
from on_device import GPU, TOLERANCE

from lvlm_fix import functional
from lvlm_fix.kernels import Redistribution
from lvlm_fix.kernels.fused.launch import capability, is_hopper
from lvlm_fix.kernels.fused.visual_attention import visual_prefill
from lvlm_fix.kernels.fused.visual_decode import visual_decode

VAR = {"rho": 0.3, "min_image_attention": 0.1, "p": 0.6}
# 40 multiprocessors split even these keys over several programs.
KERNELS = {
    "prefill": visual_prefill,
    "prefill on Hopper": lambda *inputs: visual_prefill(*inputs, hopper=True),
    "decode": lambda *inputs: visual_decode(*inputs, multiprocessors=40),
}
both_dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def inputs(batch, heads, shared, queries, tokens, width, dtype=torch.float32):
    query = torch.randn(batch, heads, queries, width)
    key, value = torch.randn(2, batch, shared, tokens, width).unbind()
    return query.to(dtype), key.to(dtype), value.to(dtype)


def spans(tokens, *ranges):
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    for begin, end in ranges:
        mask[:, begin:end] = True
    return mask


def drawn(batch, tokens, share):
    return torch.rand(batch, tokens) < share


def assert_agrees(
    kernel, query, key, value, image, sink, first_query, causal=True, key_mask=None, scale=None, **changed
):
    if GPU and kernel == "prefill on Hopper" and not is_hopper(capability(query)):
        pytest.skip("this GPU has not the shared memory of a Hopper")
    parameters = VAR | changed
    given = Redistribution(image, sink, first_query, **parameters)
    out = KERNELS[kernel](query, key, value, given, causal, key_mask, scale)
    reference = functional.visual_attention(
        query.double(), key.double(), value.double(), image, sink,
        first_query=first_query, causal=causal, key_mask=key_mask, scale=scale, **parameters,
    )  # fmt: skip
    assert out.dtype == query.dtype
    assert out.shape == query.shape
    assert out.isfinite().all()
    size = reference.norm()
    assert (out.double() - reference).norm() <= TOLERANCE[query.dtype] * (size if size > 0 else 1)
    return out


@both_dtypes
@pytest.mark.parametrize("kernel", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("image", "sink"),
    [
        pytest.param([(5, 130)], [(0, 1), (9, 10), (77, 79)], id="image in the middle"),
        pytest.param([(0, 100)], [(0, 2), (70, 71)], id="image at the start"),
        pytest.param([(51, 141)], [(0, 1), (140, 141)], id="image at the end"),
        pytest.param([(5, 60), (70, 130)], [(0, 1), (50, 52), (66, 67)], id="two images"),
        pytest.param([(5, 130)], [(0, 141)], id="all tokens sinks"),
        pytest.param([(5, 130)], [(5, 130)], id="all image tokens sinks"),
        pytest.param([(5, 130)], [(0, 1)], id="text sinks only"),
        pytest.param([(5, 130)], [], id="no sinks"),
        pytest.param([], [(0, 1)], id="no image"),
        pytest.param([(0, 141)], [(0, 1), (40, 44)], id="all tokens image"),
    ],
)
def test_wherever_image_and_sinks_are(kernel, dtype, image, sink):
    some = inputs(1, 2, 1, 35 if kernel == "prefill" else 1, 141, 32, dtype)
    assert_agrees(kernel, *some, spans(141, *image), spans(141, *sink), first_query=120)


# Tiles of 128 and of 64 rows and blocks of 64 keys: odd sizes that end inside each.
@pytest.mark.parametrize("kernel", ["prefill", "prefill on Hopper"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "tokens", "width", "first"), [(203, 203, 64, 131), (70, 203, 128, 0), (131, 140, 256, 139)]
)
def test_tiles_of_changed_and_plain_rows_meet(kernel, causal, queries, tokens, width, first):
    some = inputs(1, 1, 1, queries, tokens, width, torch.float16)
    image, sink = spans(tokens, (5, 120)), spans(tokens, (0, 1), (9, 30))
    assert_agrees(kernel, *some, image, sink, first_query=first, causal=causal)


@both_dtypes
@pytest.mark.parametrize(
    ("kernel", "queries"), [("prefill", 64), ("prefill", 9), ("decode", 3), ("decode", 1)]
)
def test_left_padded_items_with_their_own_first_query(kernel, dtype, queries):
    some = inputs(3, 4, 2, queries, 64, 40, dtype)
    real = torch.cat([spans(64, (0, 64)), spans(64, (20, 64)), spans(64, (41, 64))])
    image = torch.cat([spans(64, (2, 50)), spans(64, (22, 55)), spans(64, (43, 60))])
    sink = torch.cat([spans(64, (0, 1), (9, 10)), spans(64, (10, 26)), spans(64, (41, 42))])
    first = torch.tensor([[50, 7], [55, 7], [60, 7]])
    # A column of a matrix, and one number for all.
    for first_query in (first[:, 0].clone(), first[:, 0], torch.tensor(55).expand(3)):
        assert_agrees(kernel, *some, image, sink, first_query, key_mask=real)


@both_dtypes
@pytest.mark.parametrize(("kernel", "queries"), [("prefill", 40), ("decode", 3)])
def test_a_query_that_sees_nothing_gives_zeros(kernel, dtype, queries):
    some = inputs(2, 2, 1, queries, 40, 32, dtype)
    image, sink = drawn(2, 40, 0.7), drawn(2, 40, 0.3)
    image[1, 39] = sink[1, 39] = True
    real = torch.cat([spans(40), spans(40, (39, 40))])
    out = assert_agrees(kernel, *some, image, sink, first_query=0, key_mask=real)
    assert not out[0].any()
    assert not out[1, :, : queries - 1].any()


@both_dtypes
@pytest.mark.parametrize(("kernel", "queries"), [("prefill", 50), ("decode", 1)])
def test_huge_logits(kernel, dtype, queries):
    query, key, value = inputs(1, 4, 4, queries, 50, 64, dtype)
    image, sink = spans(50, (4, 45)), spans(50, (0, 1), (10, 13))
    # One sink of each kind draws a head's whole attention: nobody is left to give to where it is alone.
    key[:, 0, 0] = key[:, 1, 11] = 100.0
    query[:, :2] = query[:, :2].abs() + 1
    assert_agrees(kernel, query, key, value, image, sink, first_query=0)


@both_dtypes
@pytest.mark.parametrize("kernel", ["prefill", "decode"])
def test_receivers_far_below_the_sinks_keep_their_digits(kernel, dtype):
    # Weights of e^-15 of the maximum are float16's subnormal numbers; they are given 1 / share times as much.
    query, key, value = inputs(1, 1, 1, 4, 60, 32, dtype)
    query[..., 0], key[..., 0], key[:, :, 3, 0] = 6.0, -8.0, 6.0
    given = {"rho": 0.0, "min_image_attention": 0.0}
    assert_agrees(kernel, query, key, value, spans(60, (2, 50)), spans(60, (3, 4)), first_query=0, **given)


@both_dtypes
@pytest.mark.parametrize("kernel", ["prefill", "decode"])
def test_one_token(kernel, dtype):
    some = inputs(1, 2, 1, 1, 1, 32, dtype)
    out = assert_agrees(kernel, *some, spans(1, (0, 1)), spans(1, (0, 1)), first_query=0)
    torch.testing.assert_close(out, some[2].expand(1, 2, 1, 32))


@pytest.mark.parametrize(("kernel", "queries"), [("prefill", 20), ("decode", 20), ("decode", 1)])
def test_keys_may_be_slices_of_a_longer_cache(kernel, queries):
    # 8 query heads a key head and 20 queries are ten tiles of rows when decoding.
    _, key, value = inputs(2, 16, 2, 1, 90, 32)
    query = torch.randn(2, queries, 16, 32).transpose(1, 2)
    image, sink = spans(60, (3, 50)).expand(2, 60), drawn(2, 120, 0.1)[:, ::2]
    assert_agrees(kernel, query, key[:, :, :60], value[:, :, :60], image, sink, first_query=50, scale=0.3)


def test_sinks_far_apart_are_all_found():
    # The list of sinks is made 1,024 tokens at a time.
    some = inputs(1, 1, 1, 20, 1100, 32)
    image, sink = spans(1100, (5, 1060)), spans(1100, (0, 2), (1000, 1003), (1030, 1033))
    assert_agrees("prefill", *some, image, sink, first_query=1090)
