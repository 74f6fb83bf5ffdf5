"""VAR's equations (arXiv 2503.03321): golden vectors of the reference code, and what must always hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvlm_fix.functional import image_centric_heads, redistribute, sink_tokens, visual_attention

GOLDEN = Path(__file__).parents[1].parent / "shared" / "golden"
always = settings(derandomize=True, max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
fractions = st.floats(0, 1)
HALVES = [torch.float16, torch.bfloat16]


# --- against the reference code -----------------------------------------------------------------------------


@dataclass
class Golden:
    hidden_states: Tensor
    attention: Tensor
    sinks: Tensor
    image: Tensor
    gate: Tensor
    redistributed: Tensor
    first_query: int
    parameters: dict


@pytest.fixture(params=range(8))
def golden(request):
    if not (GOLDEN / "var.safetensors").exists():
        pytest.skip("the golden vectors are not beside this checkout (shared/golden)")
    tensors = load_file(GOLDEN / "var.safetensors")
    cases = json.loads((GOLDEN / "var.json").read_text())
    assert len(cases) == 8
    t = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{request.param}.")}
    case = cases[request.param]
    position = torch.arange(t["attention"].shape[-1])[None]
    end = case["image_start"] + case["image_length"]
    return Golden(
        hidden_states=t["hidden_states"],
        attention=t["attention"],
        sinks=torch.isin(position, t["sink_indices"]),
        image=(position >= case["image_start"]) & (position < end),
        gate=t["image_centric"],
        redistributed=t["redistributed"],
        first_query=end if case["phase"] == "prefill" else 0,
        # The reference's rho bounds the sink share, and its p (here `keep`) is what sinks keep.
        parameters={
            "rho": 1 - case["rho"],
            "min_image_attention": case["min_image_attention"],
            "p": 1 - case["keep"],
            "sink_dims": case["sink_dims"],
            "tau": case["tau"],
        },
    )


def test_sink_tokens_agree_with_the_reference(golden):
    found = sink_tokens(golden.hidden_states, golden.parameters["sink_dims"], golden.parameters["tau"])
    assert torch.equal(found, golden.sinks)


def test_image_centric_heads_agree_with_the_reference(golden):
    rho, least = golden.parameters["rho"], golden.parameters["min_image_attention"]
    gate = image_centric_heads(golden.attention, golden.image, golden.sinks, rho, least)
    gate[:, :, : golden.first_query] = False
    assert torch.equal(gate, golden.gate)


def test_redistributed_weights_agree_with_the_reference(golden):
    p = golden.parameters["p"]
    ours = redistribute(golden.attention, golden.image, golden.sinks, golden.gate, p)
    torch.testing.assert_close(ours, golden.redistributed, rtol=0, atol=1e-5)


def test_attention_with_var_inside_agrees_with_the_reference(golden):
    # Query i is the unit vector i and picks component i of the keys, the log weights of row i: the softmax
    # gives those weights back. One-hot values show them in the output.
    queries, tokens = golden.attention.shape[-2:]
    query = torch.eye(queries, tokens).expand(1, 8, -1, -1)
    key = torch.zeros(1, 8, tokens, tokens)
    key[..., :queries] = golden.attention.clamp_min(1e-30).log().mT
    value = torch.eye(tokens).expand(1, 8, -1, -1)
    parameters = {name: golden.parameters[name] for name in ("rho", "min_image_attention", "p")}
    ours = visual_attention(
        query, key, value, golden.image, golden.sinks, first_query=golden.first_query, scale=1.0, **parameters
    )
    torch.testing.assert_close(ours, golden.redistributed, rtol=0, atol=1e-5)


# --- what must always hold ----------------------------------------------------------------------------------


@dataclass
class Case:
    attention: Tensor
    image: Tensor
    sinks: Tensor
    gate: Tensor


def case(seed, batch=2, heads=3, queries=4, tokens=12, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    attention = (2 * torch.randn(batch, heads, queries, tokens, generator=g, dtype=torch.float64)).softmax(-1)
    position = torch.arange(tokens)[None]
    image = ((position >= 3) & (position < 9)).expand(batch, -1)
    sinks = torch.rand(batch, tokens, generator=g) < 0.35
    sinks[:, [0, 4]] = True  # a text sink and an image sink
    sinks[:, 5] = False  # and somebody to give to
    gate = torch.rand(batch, heads, queries, generator=g) < 0.5
    return Case(attention.to(dtype), image, sinks, gate)


@always
@given(seed=seeds, p=fractions)
def test_rows_still_sum_to_one_and_nothing_outside_the_gate_changes(seed, p):
    c = case(seed)
    out = redistribute(c.attention, c.image, c.sinks, c.gate, p)
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]), rtol=0, atol=1e-12)
    assert (out >= 0).all()
    assert torch.equal(out[~c.gate], c.attention[~c.gate])


@always
@given(seed=seeds, p=st.floats(0.01, 1))
def test_sinks_lose_p_receivers_gain_in_proportion_and_other_text_stays(seed, p):
    c = case(seed)
    gate = torch.ones_like(c.gate)
    out = redistribute(c.attention, c.image, c.sinks, gate, p)
    sink = c.sinks[:, None, None].expand_as(out)
    receiver = (c.image & ~c.sinks)[:, None, None].expand_as(out)
    torch.testing.assert_close(out[sink], (1 - p) * c.attention[sink])
    assert torch.equal(out[~sink & ~receiver], c.attention[~sink & ~receiver])
    gain = (out / c.attention).masked_fill(~receiver, 0).amax(-1, keepdim=True)
    assert (gain > 1).all()
    torch.testing.assert_close(out[receiver], (gain * c.attention)[receiver])


@always
@given(seed=seeds)
def test_moving_nothing_is_identity(seed):
    c = case(seed)
    out = redistribute(c.attention, c.image, c.sinks, torch.ones_like(c.gate), 0.0)
    assert torch.equal(out, c.attention) and out.data_ptr() != c.attention.data_ptr()


@pytest.mark.parametrize("p", [0.6, 1.0])
def test_rows_with_nobody_to_give_to_and_empty_rows_stay_as_they_are(p):
    c = case(0)
    gate = torch.ones_like(c.gate)
    c.attention[0, 0, 0].masked_fill_(c.image[0] & ~c.sinks[0], 0)
    c.attention[1, 2, 3] = 0
    out = redistribute(c.attention, c.image, c.sinks, gate, p)
    assert torch.equal(out[0, 0, 0], c.attention[0, 0, 0]) and (out[1, 2, 3] == 0).all()
    assert not torch.equal(out[0, 0, 1], c.attention[0, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_receiver_with_hardly_any_weight_takes_all_without_overflow(dtype):
    attention = torch.tensor([[[[0.5, 0.5, 0.0]]]], dtype=dtype)
    attention[..., 2] = 1e-7 if dtype == torch.float16 else 1e-39
    image, sinks = torch.tensor([[False, False, True]]), torch.tensor([[True, False, False]])
    out = redistribute(attention, image, sinks, torch.tensor([[[True]]]), 1.0)
    assert out.tolist() == [[[[0.0, 0.5, 0.5]]]]


@always
@given(seed=seeds, low=fractions, high=fractions, least=fractions)
def test_raising_a_threshold_only_shrinks_the_gate(seed, low, high, least):
    c = case(seed)
    low, high = sorted([low, high])
    loose = image_centric_heads(c.attention, c.image, c.sinks, low, least)
    strict = image_centric_heads(c.attention, c.image, c.sinks, high, least)
    assert (strict <= loose).all()
    loose = image_centric_heads(c.attention, c.image, c.sinks, least, low)
    strict = image_centric_heads(c.attention, c.image, c.sinks, least, high)
    assert (strict <= loose).all()


@always
@given(seed=seeds)
def test_the_ends_of_the_thresholds_are_exact(seed):
    c = case(seed, dtype=torch.float32)
    assert image_centric_heads(c.attention, c.image, c.sinks, 0.0, 0.0).all()
    assert not image_centric_heads(c.attention, c.image, c.sinks, 1.0, 0.0).any()
    without = c.attention.masked_fill((c.image & c.sinks)[:, None, None], 0)
    assert image_centric_heads(without, c.image, c.sinks, 1.0, 0.0).all()
    blind = c.attention.masked_fill(c.image[:, None, None], 0)
    assert not image_centric_heads(blind, c.image, c.sinks, 0.0, 0.0).any()


def test_the_gate_takes_shares_that_just_reach_the_thresholds():
    attention = torch.tensor([[[[0.5, 0.125, 0.125, 0.25]]]])
    image, sinks = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    assert image_centric_heads(attention, image, sinks, 0.5, 0.25).all()
    assert not image_centric_heads(attention, image, sinks, 0.501, 0.25).any()
    assert not image_centric_heads(attention, image, sinks, 0.5, 0.251).any()


def test_only_batch_items_without_an_image_sink_are_left_alone():
    c = case(1)
    c.sinks[1] &= ~c.image[1]
    assert c.sinks[1].any()
    gate = image_centric_heads(c.attention, c.image, c.sinks, 0.0, 0.0)
    assert gate[0].all() and not gate[1].any()
    out = redistribute(c.attention, c.image, c.sinks, gate, 0.6)
    assert torch.equal(out[1], c.attention[1]) and not torch.equal(out[0], c.attention[0])


@always
@given(seed=seeds, p=fractions, rho=fractions)
def test_permuting_heads_or_tokens_permutes_the_results(seed, p, rho):
    c = case(seed)
    g = torch.Generator().manual_seed(seed)
    heads, tokens = torch.randperm(3, generator=g), torch.randperm(12, generator=g)
    gate = image_centric_heads(c.attention, c.image, c.sinks, rho, 0.2)
    out = redistribute(c.attention, c.image, c.sinks, gate, p)
    moved = c.attention[:, heads][..., tokens]
    image, sinks = c.image[:, tokens], c.sinks[:, tokens]
    moved_gate = image_centric_heads(moved, image, sinks, rho, 0.2)
    assert torch.equal(moved_gate, gate[:, heads])
    torch.testing.assert_close(
        redistribute(moved, image, sinks, moved_gate, p), out[:, heads][..., tokens], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_weights_are_the_wide_ones_rounded(dtype):
    c = case(2, tokens=600, queries=20, dtype=dtype)
    c.image = torch.arange(600).expand(2, -1) < 576  # sums over many small weights
    wide = c.attention.double()
    gate = image_centric_heads(c.attention, c.image, c.sinks, 0.64, 0.9)
    assert torch.equal(gate, image_centric_heads(wide, c.image, c.sinks, 0.64, 0.9))
    assert gate.any() and not gate.all()
    out = redistribute(c.attention, c.image, c.sinks, gate, 0.6)
    assert out.dtype == dtype
    exact = redistribute(wide, c.image, c.sinks, gate, 0.6)
    torch.testing.assert_close(out.double(), exact, rtol=0.501 * torch.finfo(dtype).eps, atol=6e-8)


# --- sink tokens --------------------------------------------------------------------------------------------


def test_a_token_exactly_at_tau_is_no_sink():
    x = torch.ones(1, 1, 4)
    assert not sink_tokens(x, [2], tau=1.0).any() and sink_tokens(x, [2], tau=0.999).all()


def test_only_sink_dimensions_count_and_one_of_them_is_enough():
    x = torch.full((1, 3, 64), 0.1)
    x[0, 0, 7] = -50
    x[0, 1, 8] = 50
    assert sink_tokens(x, [7, 30], tau=5).tolist() == [[True, False, False]]
    assert sink_tokens(x, torch.tensor([8, 7]), tau=5).tolist() == [[True, True, False]]
    assert not sink_tokens(torch.zeros(1, 1, 64), [7], tau=5).any()


@always
@given(seed=seeds, power=st.integers(-20, 20), tau=st.floats(0.1, 2))
def test_sinks_do_not_depend_on_a_tokens_scale_and_move_with_the_token(seed, power, tau):
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = sink_tokens(x, [3, 5], tau)
    assert torch.equal(sink_tokens(x * 2.0**power, [3, 5], tau), found)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sink_tokens(x[:, order], [3, 5], tau), found[:, order])


@pytest.mark.parametrize("dtype", HALVES)
def test_sinks_of_half_precision_states_are_found_in_float32(dtype):
    x = torch.randn(2, 50, 4096, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[:, :5, 11] = 3000  # its square is beyond float16
    assert sink_tokens(x, [11], tau=20).sum(-1).tolist() == [5, 5]
    assert torch.equal(sink_tokens(x, [11], tau=20), sink_tokens(x.double(), [11], tau=20))


# --- attention with VAR inside ------------------------------------------------------------------------------

VAR = {"rho": 0.3, "min_image_attention": 0.2, "p": 0.6}


def attend(*tensors: Tensor, **options: Any) -> Tensor:
    return visual_attention(*tensors, **{**VAR, **options})


def inputs(seed, batch=2, heads=4, shared=2, queries=5, tokens=12, width=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, width, generator=g, dtype=torch.float64)
    key = torch.randn(batch, shared, tokens, width, generator=g, dtype=torch.float64)
    value = torch.randn(batch, shared, tokens, width, generator=g, dtype=torch.float64)
    c = case(seed, batch=batch, tokens=tokens)
    return query.to(dtype), key.to(dtype), value.to(dtype), c.image, c.sinks


def one_by_one(query, key, value, image, sinks, first_query, key_mask, causal, rho, min_image_attention, p):
    """The same in plain Python, a weight at a time."""
    (batch, heads, queries, width), (shared, tokens) = query.shape, key.shape[1:3]
    out = torch.zeros_like(query)
    for b in range(batch):
        real = [t for t in range(tokens) if key_mask[b, t]]
        image_tokens = [t for t in real if image[b, t]]
        receivers = [t for t in image_tokens if not sinks[b, t]]
        sink_list = [t for t in real if sinks[b, t]]
        for h in range(heads):
            kv = h * shared // heads
            for i in range(queries):
                position = tokens - queries + i
                seen = [t for t in real if t <= position or not causal]
                raw = {t: float((query[b, h, i] @ key[b, kv, t] / width**0.5).exp()) for t in seen}
                w = {t: raw.get(t, 0.0) / sum(raw.values()) if raw else 0.0 for t in range(tokens)}
                on_image, on_receivers = sum(w[t] for t in image_tokens), sum(w[t] for t in receivers)
                if (
                    position >= first_query[b]
                    and len(receivers) < len(image_tokens)
                    and on_image >= min_image_attention
                    and on_receivers >= rho * on_image
                    and on_receivers > 0
                ):
                    budget = p * sum(w[t] for t in sink_list)
                    w |= {t: (1 - p) * w[t] for t in sink_list}
                    w |= {t: w[t] + budget * w[t] / on_receivers for t in receivers}
                out[b, h, i] = sum(w[t] * value[b, kv, t] for t in range(tokens))
    return out


@settings(always, max_examples=12)
@given(
    seed=seeds, causal=st.booleans(), sizes=st.tuples(st.sampled_from([1, 5, 12]), st.sampled_from([1, 2, 4]))
)
def test_visual_attention_is_what_the_plain_loops_compute(seed, causal, sizes):
    queries, shared = sizes
    q, k, v, image, sinks = inputs(seed, queries=queries, shared=shared)
    key_mask = torch.arange(12)[None] >= torch.tensor([[0], [3]])
    first = torch.tensor([8, 9])
    ours = attend(q, k, v, image, sinks, first_query=first, key_mask=key_mask, causal=causal)
    expected = one_by_one(q, k, v, image, sinks, [8, 9], key_mask, causal, **VAR)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_with_nothing_moved_it_is_plain_attention():
    q, k, v, image, sinks = inputs(4, queries=12)
    plain = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    still = attend(q, k, v, image, sinks, first_query=0, p=0.0)
    torch.testing.assert_close(still, plain)
    assert not torch.allclose(attend(q, k, v, image, sinks, first_query=0), plain)


def test_queries_before_the_first_one_are_plain_attention():
    q, k, v, image, sinks = inputs(5, queries=12)
    plain = attend(q, k, v, image, sinks, first_query=12)
    torch.testing.assert_close(plain, scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    for b, first in enumerate([9, 10]):
        out = attend(q, k, v, image, sinks, first_query=torch.tensor([9, 10]))
        assert torch.equal(out[b, :, :first], plain[b, :, :first])
        assert not torch.equal(out[b, :, first:], plain[b, :, first:])
        alone = attend(q, k, v, image, sinks, first_query=first)
        assert torch.equal(out[b], alone[b])


def test_decoding_one_query_gives_the_last_row_of_the_prefill():
    q, k, v, image, sinks = inputs(6, queries=12)
    whole = attend(q, k, v, image, sinks, first_query=9)
    last = attend(q[:, :, -1:], k, v, image, sinks, first_query=9)
    torch.testing.assert_close(last, whole[:, :, -1:])


def test_left_padding_changes_no_real_row_and_leaves_the_padding_zero():
    q, k, v, image, sinks = inputs(7, batch=1, queries=12)
    pad = 4

    def padded(x, dim):  # with ones: in the masks, padding that looks like image and like sinks
        shape = list(x.shape)
        shape[dim] = pad
        return torch.cat([torch.ones(shape, dtype=x.dtype), x], dim)

    bare = attend(q, k, v, image, sinks, first_query=9)
    out = attend(
        padded(q, 2), padded(k, 2), padded(v, 2), padded(image, 1), padded(sinks, 1),
        first_query=9 + pad, key_mask=torch.arange(12 + pad)[None] >= pad
    )  # fmt: skip
    torch.testing.assert_close(out[:, :, pad:], bare)
    assert (out[:, :, :pad] == 0).all()


def test_an_image_sink_that_is_hidden_does_not_count():
    q, k, v, image, sinks = inputs(9, batch=1)
    sinks = torch.arange(12)[None] == 4
    hidden = torch.arange(12)[None] != 4
    sinks[:, 0] = True
    out, plain = (attend(q, k, v, image, sinks, first_query=f, key_mask=hidden) for f in (0, 12))
    assert torch.equal(out, plain)
    sinks[:, 5] = True
    assert not torch.equal(attend(q, k, v, image, sinks, first_query=0, key_mask=hidden), plain)


@always
@given(seed=seeds)
def test_shared_heads_are_repeated_in_blocks_and_permuting_heads_permutes_rows(seed):
    q, k, v, image, sinks = inputs(seed)
    out = attend(q, k, v, image, sinks, first_query=9)
    full = attend(q, k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]], image, sinks, first_query=9)
    torch.testing.assert_close(out, full)
    swapped = attend(q[:, [2, 3, 0, 1]], k.flip(1), v.flip(1), image, sinks, first_query=9)
    torch.testing.assert_close(swapped, out[:, [2, 3, 0, 1]])


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_attention_is_the_wide_one_rounded(dtype):
    args = inputs(8, queries=12, dtype=dtype)
    out = attend(*args, first_query=9)
    wide = attend(*(x.double() for x in args[:3]), *args[3:], first_query=9)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wide, rtol=0.501 * torch.finfo(dtype).eps, atol=1e-6)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: sink_tokens(c.attention[0, 0], [0], 1), r"hidden_states must have shape \(B, T, C\)"),
        (lambda c: sink_tokens(c.attention[0], [], 1), r"sink_dims must name dimensions in 0..11, got \[\]"),
        (lambda c: sink_tokens(c.attention[0], [12], 1), r"sink_dims must name dimensions in 0..11"),
        (lambda c: sink_tokens(c.attention[0], [-1], 1), r"sink_dims must name dimensions in 0..11"),
        (lambda c: sink_tokens(c.attention[0], [1], 0), r"tau must be positive, got 0"),
        (
            lambda c: image_centric_heads(c.attention, c.image[:, 1:], c.sinks, 0.5, 0.2),
            r"image_mask must have shape \(B=2, T=12\), got \(2, 11\)",
        ),
        (
            lambda c: image_centric_heads(c.attention, c.image, c.sinks.long(), 0.5, 0.2),
            r"sink_mask must be bool, got torch.int64",
        ),
        (lambda c: image_centric_heads(c.attention, c.image, c.sinks, 1.5, 0.2), r"rho must lie in 0..1"),
        (
            lambda c: image_centric_heads(c.attention, c.image, c.sinks, 0.5, -0.2),
            r"min_image_attention must lie in 0..1, got -0.2",
        ),
        (
            lambda c: redistribute(c.attention, c.image, c.sinks, c.gate[:, :, :1], 0.6),
            r"gate must have shape \(B=2, H=3, Q=4\), got \(2, 3, 1\)",
        ),
        (lambda c: redistribute(c.attention, c.image, c.sinks, c.gate, 60), r"p must lie in 0..1, got 60"),
    ],
)
def test_errors_say_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(case(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": 3}, r"3 key heads do not divide 4 query heads"),
        ({"queries": 13}, r"more queries \(13\) than positions \(12\)"),
        ({"first_query": torch.tensor([1, 2, 3])}, r"first_query must be an int or have 2 elements"),
        ({"key_mask": torch.ones(2, 11, dtype=torch.bool)}, r"key_mask must have shape \(B=2, T=12\)"),
        ({"key_mask": torch.ones(2, 12)}, r"key_mask must be bool"),
    ],
)
def test_attention_errors_say_what_does_not_fit(changes, message):
    sizes = {k: changes[k] for k in ("shared", "queries") if k in changes}
    options = {"first_query": 9} | {k: changes[k] for k in ("first_query", "key_mask") if k in changes}
    with pytest.raises(ValueError, match=message):
        attend(*inputs(0, **sizes), **options)
