"""The torch paths of the kernels' fronts, against the float64 oracles of `lvlm_fix.functional`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from lvlm_fix import functional
from lvlm_fix.kernels import Redistribution, last_used, probe_scores, sparse_prefill, visual_attention

always = settings(derandomize=True, max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
dtypes = st.sampled_from(list(TOLERANCE))
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])
VAR = {"rho": 0.3, "min_image_attention": 0.1, "p": 0.6}


def attention_inputs(batch, heads, shared, queries, tokens, width, dtype=torch.float32, loud=1.0):
    """Query, key, value; `loud` scales the logits."""
    query = torch.randn(batch, heads, queries, width) * loud
    key, value = torch.randn(2, batch, shared, tokens, width).unbind()
    return query.to(dtype), key.to(dtype), value.to(dtype)


def spans(tokens, *ranges):
    """Mask (1, T) that is True on the half-open ranges."""
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    for begin, end in ranges:
        mask[:, begin:end] = True
    return mask


def drawn(batch, tokens, share):
    return torch.rand(batch, tokens) < share


def error(out: Tensor, reference: Tensor) -> float:
    size = reference.double().norm()
    return float((out.double() - reference.double()).norm() / (size if size > 0 else 1))


def assert_agrees(query, key, value, image, sink, **parameters):
    out = visual_attention(query, key, value, image, sink, **parameters)
    wide = [x.double() for x in (query, key, value)]
    reference = functional.visual_attention(*wide, image, sink, **parameters)
    assert out.dtype == query.dtype
    assert out.shape == query.shape
    assert out.isfinite().all()
    assert error(out, reference) <= TOLERANCE[query.dtype]
    return out, reference


# --- visual_attention ---------------------------------------------------------------------------------------


@always
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 3),
    group=st.sampled_from([1, 2, 8]),
    shared=st.sampled_from([1, 2]),
    width=st.sampled_from([32, 40, 64, 128, 256]),
    tokens=st.integers(1, 70),
    rows=st.sampled_from([1, 3, 17, 70]),
    causal=st.booleans(),
    masked=st.booleans(),
    p=st.sampled_from([0.0, 0.6, 1.0]),
    rho=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_visual_attention_agrees_with_its_oracle(
    seed, dtype, batch, group, shared, width, tokens, rows, causal, masked, p, rho
):
    torch.manual_seed(seed)
    rows = min(rows, tokens)
    inputs = attention_inputs(batch, group * shared, shared, rows, tokens, width, dtype)
    image, sink = drawn(batch, tokens, 0.6), drawn(batch, tokens, 0.2)
    key_mask = drawn(batch, tokens, 0.8) if masked else None
    first_query = torch.randint(0, tokens + 1, (batch,))
    parameters = VAR | {"p": p, "rho": rho}
    assert_agrees(
        *inputs, image, sink, first_query=first_query, causal=causal, key_mask=key_mask, **parameters
    )


@every_dtype
@pytest.mark.parametrize("queries", [1, 3, 301], ids="Q={}".format)
@pytest.mark.parametrize(
    ("image", "sink"),
    [
        pytest.param([(5, 250)], [(0, 1), (9, 10), (77, 79)], id="image in the middle"),
        pytest.param([(0, 200)], [(0, 2), (150, 151)], id="image at the start"),
        pytest.param([(101, 301)], [(0, 1), (300, 301)], id="image at the end"),
        pytest.param([(5, 100), (120, 260)], [(0, 1), (50, 52), (110, 111)], id="two images"),
        pytest.param([(5, 250)], [(0, 301)], id="all tokens sinks"),
        pytest.param([(5, 250)], [(5, 250)], id="all image tokens sinks"),
        pytest.param([(5, 250)], [(0, 1)], id="text sinks only"),
        pytest.param([(5, 250)], [], id="no sinks"),
        pytest.param([], [(0, 1)], id="no image"),
        pytest.param([(0, 301)], [(0, 1), (40, 44)], id="all tokens image"),
    ],
)
def test_visual_attention_wherever_image_and_sinks_are(dtype, queries, image, sink):
    inputs = attention_inputs(1, 4, 2, queries, 301, 64, dtype)
    assert_agrees(*inputs, spans(301, *image), spans(301, *sink), first_query=250, **VAR)


@every_dtype
@pytest.mark.parametrize("queries", [1, 3, 64])
def test_padded_items_with_their_own_first_query(dtype, queries):
    inputs = attention_inputs(3, 4, 2, queries, 64, 32, dtype)
    real = torch.cat([spans(64, (0, 64)), spans(64, (20, 64)), spans(64, (41, 64))])
    image = torch.cat([spans(64, (2, 50)), spans(64, (22, 55)), spans(64, (43, 60))])
    sink = torch.cat([spans(64, (0, 1), (9, 10)), spans(64, (10, 26)), spans(64, (41, 42))])
    first_query = torch.tensor([50, 55, 60])
    assert_agrees(*inputs, image, sink, key_mask=real, first_query=first_query, **VAR)


@every_dtype
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("sinks", [0.0, 0.3])
def test_a_query_that_sees_nothing_gives_zeros(dtype, queries, sinks):
    inputs = attention_inputs(2, 4, 2, queries, 40, 32, dtype)
    image, sink = drawn(2, 40, 0.7), drawn(2, 40, sinks)
    image[1, 39] = sink[1, 39] = sinks > 0
    real = torch.cat([spans(40), spans(40, (39, 40))])
    out, _ = assert_agrees(*inputs, image, sink, key_mask=real, first_query=0, **VAR)
    assert not out[0].any()
    assert not out[1, :, : queries - 1].any()


@every_dtype
@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_huge_logits(dtype, queries, rho):
    query, key, value = attention_inputs(1, 4, 4, queries, 50, 64, dtype)
    image, sink = spans(50, (4, 45)), spans(50, (0, 1), (10, 13))
    # One sink of each kind draws a head's whole attention: nobody is left to give to where it is alone.
    key[:, 0, 0] = key[:, 1, 11] = 100.0
    query[:, :2] = query[:, :2].abs() + 1
    out, _ = assert_agrees(query, key, value, image, sink, first_query=0, **VAR | {"rho": 0.3})
    assert out.isfinite().all()
    assert (
        visual_attention(query, key, value, image, sink, first_query=0, **VAR | {"rho": rho}).isfinite().all()
    )


@every_dtype
def test_one_token(dtype):
    inputs = attention_inputs(1, 2, 1, 1, 1, 32, dtype)
    for image, sink in [(spans(1), spans(1)), (spans(1, (0, 1)), spans(1, (0, 1)))]:
        out, _ = assert_agrees(*inputs, image, sink, first_query=0, **VAR)
        torch.testing.assert_close(out, inputs[2].expand(1, 2, 1, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("queries", [1, 3000])
@pytest.mark.parametrize("padded", [0, 700])
def test_a_long_prompt(dtype, queries, padded):
    # The oracle is shown the last rows only: it makes every weight.
    query, key, value = attention_inputs(1, 4, 2, queries, 3000, 32, dtype)
    image, sink = spans(3000, (padded + 5, 2960)), spans(3000, (padded, padded + 1), (1500, 1508))
    parameters = VAR | {"first_query": 2960, "key_mask": spans(3000, (padded, 3000))}
    out = visual_attention(query, key, value, image, sink, **parameters)
    tail = [query.double()[:, :, -60:], key.double(), value.double()]
    reference = functional.visual_attention(*tail, image, sink, **parameters)
    assert error(out[:, :, -60:], reference) <= TOLERANCE[dtype]
    if queries > 1:
        rows = slice(padded, padded + 300)
        k, v = (x.double()[:, :, rows].repeat_interleave(2, dim=1) for x in (key, value))
        plain = scaled_dot_product_attention(query.double()[:, :, rows], k, v, is_causal=True)
        assert error(out[:, :, rows], plain) <= TOLERANCE[dtype]
        assert not out[:, :, :padded].any()


def test_many_rows_after_the_image_never_need_all_their_weights_at_once():
    # 24 heads x 1500 rows x 1600 tokens of float32 would be 220 MiB; a limit below that is not hit.
    inputs = attention_inputs(1, 24, 24, 1500, 1600, 32)
    image, sink = spans(1600, (5, 100)), spans(1600, (0, 1), (50, 52))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        out = visual_attention(*inputs, image, sink, first_query=100, **VAR)
    assert 0 < largest <= 2**24
    tail = [inputs[0].double()[:, :4, -20:], *(x.double()[:, :4] for x in inputs[1:])]
    reference = functional.visual_attention(*tail, image, sink, first_query=100, **VAR)
    assert error(out[:, :4, -20:], reference) <= 1e-5


def test_rows_before_the_first_query_are_those_of_plain_attention_bit_for_bit():
    inputs = attention_inputs(1, 4, 2, 60, 60, 32)
    image, sink = spans(60, (5, 50)), spans(60, (0, 1), (9, 12))
    out = visual_attention(*inputs, image, sink, first_query=50, **VAR)
    plain = visual_attention(*inputs, image, spans(60), first_query=50, **VAR)
    assert torch.equal(out[:, :, :50], plain[:, :, :50])
    assert not torch.equal(out[:, :, 50:], plain[:, :, 50:])


@pytest.mark.parametrize("queries", [1, 60])
def test_inputs_are_left_alone(queries):
    inputs = attention_inputs(2, 4, 2, queries, 60, 32, torch.bfloat16)
    masks = [drawn(2, 60, 0.6), drawn(2, 60, 0.1), drawn(2, 60, 0.9)]
    before = [x.clone() for x in (*inputs, *masks)]
    visual_attention(*inputs, masks[0], masks[1], first_query=0, key_mask=masks[2], **VAR)
    assert all(torch.equal(x, y) for x, y in zip((*inputs, *masks), before, strict=True))


def test_keys_may_be_slices_of_a_longer_cache():
    _, key, value = attention_inputs(2, 4, 2, 1, 90, 32)
    query = torch.randn(2, 1, 4, 32).transpose(1, 2)
    image, sink = drawn(2, 60, 0.6), drawn(2, 60, 0.1)
    for dtype in TOLERANCE:
        inputs = query.to(dtype), key.to(dtype)[:, :, :60], value.to(dtype)[:, :, :60]
        assert_agrees(*inputs, image, sink, first_query=50, scale=0.3, **VAR)


def test_what_does_not_fit_is_said_in_a_sentence():
    query, key, value = attention_inputs(2, 4, 2, 5, 9, 32)
    image, sink = drawn(2, 9, 0.5), drawn(2, 9, 0.5)

    def message(*inputs, **changes):
        with pytest.raises(ValueError) as caught:
            visual_attention(*inputs, **VAR | {"first_query": 0} | changes)
        return str(caught.value)

    assert "value must have shape" in message(query, key, value[:, :, 1:], image, sink)
    assert "2 key heads do not divide 3 query heads" in message(query[:, :3], key, value, image, sink)
    assert "share one floating dtype" in message(query, key.half(), value, image, sink)
    assert "more queries (9) than positions (8)" in message(
        query.expand(2, 4, 5, 32).repeat(1, 1, 2, 1)[:, :, :9],
        key[:, :, :8],
        value[:, :, :8],
        image[:, :8],
        sink[:, :8],
    )
    assert "image_mask must have shape" in message(query, key, value, image[:, 1:], sink)
    assert "sink_mask must be bool" in message(query, key, value, image, sink.int())
    assert "key_mask must be bool" in message(query, key, value, image, sink, key_mask=sink.int())
    assert "rho must lie in 0..1" in message(query, key, value, image, sink, rho=1.5)
    assert "first_query must be an int or have 2 elements" in message(
        query, key, value, image, sink, first_query=torch.zeros(3)
    )


# --- sparse_prefill -----------------------------------------------------------------------------------------


@always
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 3),
    group=st.sampled_from([1, 2, 8]),
    tokens=st.integers(1, 60),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    masked=st.booleans(),
    cured=st.booleans(),
)
def test_sparse_prefill_agrees_with_a_loop(seed, dtype, batch, group, tokens, share, masked, cured):
    torch.manual_seed(seed)
    inputs = attention_inputs(batch, 2 * group, 2, tokens, tokens, 32, dtype)
    important = drawn(batch, tokens, share)
    key_mask = drawn(batch, tokens, 0.7) if masked else None
    redistribution = None
    if cured:
        first_query = torch.randint(0, tokens + 1, (batch,))
        redistribution = Redistribution(
            drawn(batch, tokens, 0.6), drawn(batch, tokens, 0.2), first_query, **VAR
        )
    out = sparse_prefill(*inputs, important, redistribution=redistribution, key_mask=key_mask)
    attending = important if key_mask is None else important & key_mask
    assert out.dtype == dtype
    wide = [x.double() for x in inputs]
    options = {"redistribution": redistribution, "key_mask": key_mask}
    assert error(out, functional.sparse_prefill(*wide, important, **options)) <= TOLERANCE[dtype]
    assert not out.transpose(1, 2)[~attending].any()


@every_dtype
def test_all_important_is_plain_causal_attention(dtype):
    query, key, value = attention_inputs(2, 4, 4, 50, 50, 64, dtype)
    out = sparse_prefill(query, key, value, torch.ones(2, 50, dtype=torch.bool))
    plain = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert error(out, plain) <= TOLERANCE[dtype]


def test_all_important_with_redistribution_is_visual_attention():
    inputs = attention_inputs(2, 4, 2, 50, 50, 32)
    image, sink = drawn(2, 50, 0.6), drawn(2, 50, 0.2)
    given = Redistribution(image, sink, first_query=20, **VAR)
    out = sparse_prefill(*inputs, torch.ones_like(image), redistribution=given)
    torch.testing.assert_close(out, visual_attention(*inputs, image, sink, first_query=20, **VAR))


def test_what_unimportant_tokens_hold_does_not_matter():
    query, key, value = attention_inputs(2, 4, 2, 50, 50, 32)
    important, image, sink = drawn(2, 50, 0.5), drawn(2, 50, 0.7), drawn(2, 50, 0.2)
    given = Redistribution(image, sink, first_query=5, **VAR)
    changed = [x.transpose(1, 2).masked_fill(~important[..., None, None], 1e4) for x in (query, key, value)]
    other = replace(given, image_mask=image ^ ~important, sink_mask=sink | ~important)
    out = sparse_prefill(query, key, value, important, redistribution=given)
    assert torch.equal(
        out, sparse_prefill(*(x.transpose(1, 2) for x in changed), important, redistribution=other)
    )


def test_sparse_prefill_says_what_does_not_fit():
    query, key, value = attention_inputs(1, 2, 1, 9, 9, 32)
    with pytest.raises(ValueError, match="one row per token"):
        sparse_prefill(query[:, :, 1:], key, value, drawn(1, 9, 0.5))
    with pytest.raises(ValueError, match="important must have shape"):
        sparse_prefill(query, key, value, drawn(1, 8, 0.5))
    with pytest.raises(ValueError, match="important must be bool"):
        sparse_prefill(query, key, value, torch.ones(1, 9))
    with pytest.raises(ValueError, match="image_mask must have shape"):
        given = Redistribution(drawn(1, 8, 0.5), drawn(1, 8, 0.5), first_query=0, **VAR)
        sparse_prefill(query, key, value, drawn(1, 9, 0.5), redistribution=given)


# --- probe_scores -------------------------------------------------------------------------------------------


@always
@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(1, 3),
    group=st.sampled_from([1, 2, 8]),
    width=st.sampled_from([32, 64, 256]),
    tokens=st.integers(1, 90),
    probes=st.integers(1, 20),
    shared_positions=st.booleans(),
    masked=st.booleans(),
    loud=st.sampled_from([1.0, 8.0]),
)
def test_probe_scores_agree_with_their_oracle(
    seed, dtype, batch, group, width, tokens, probes, shared_positions, masked, loud
):
    torch.manual_seed(seed)
    query, key, _ = attention_inputs(batch, 2 * group, 2, probes, tokens, width, dtype, loud)
    positions = torch.randint(0, tokens, (probes,) if shared_positions else (batch, probes))
    key_mask = drawn(batch, tokens, 0.7) if masked else None
    found = probe_scores(query, key, positions, key_mask=key_mask)
    expected = functional.probe_importance(query.double(), key.double(), positions, key_mask=key_mask)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.promote_types(dtype, torch.float32)
        # Softmax and sums are wide whatever the inputs are.
        assert error(one, other) <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_probe_scores_over_a_long_prompt(dtype):
    query, key, _ = attention_inputs(1, 32, 4, 128, 3000, 32, dtype)
    positions = torch.cat([torch.arange(2936, 3000), torch.randint(0, 2936, (64,))])
    found = probe_scores(query, key, positions)
    expected = functional.probe_importance(query.double(), key.double(), positions)
    assert error(found[0], expected[0]) <= 1e-5
    assert error(found[1], expected[1]) <= 1e-5


def test_probe_scores_say_what_does_not_fit():
    query, key, _ = attention_inputs(1, 2, 1, 3, 9, 32)
    with pytest.raises(ValueError, match=r"positions must be integers in 0\.\.8"):
        probe_scores(query, key, torch.tensor([1, 2, 9]))
    with pytest.raises(ValueError, match=r"positions must be integers in 0\.\.8"):
        probe_scores(query, key, torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="positions must have shape"):
        probe_scores(query, key, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="key_mask must be bool"):
        probe_scores(query, key, torch.tensor([1, 2, 3]), key_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="share one floating dtype"):
        probe_scores(query, key.half(), torch.tensor([1, 2, 3]))


def test_each_front_says_what_it_ran():
    query, key, value = attention_inputs(1, 2, 1, 9, 9, 32)
    mask = drawn(1, 9, 0.5)
    visual_attention(query, key, value, mask, mask, first_query=0, **VAR)
    sparse_prefill(query, key, value, mask)
    probe_scores(query, key, torch.arange(9))
    ran = last_used()
    assert {ran[name] for name in ("visual_attention", "sparse_prefill", "probe_scores")} == {"torch"}
    ran.clear()
    assert last_used()
