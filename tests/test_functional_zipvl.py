"""ZipVL's equations (arXiv 2410.08584): no reference code is public; loops and properties test them."""

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_fix.functional import dequantize_kv, important_tokens, probe_importance, quantize_kv

always = settings(derandomize=True, max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
HALVES = [torch.float16, torch.bfloat16]


# --- probes -------------------------------------------------------------------------------------------------


def probes(seed, dtype=torch.float64, heads=4, shared=2, tokens=14, count=5, width=8):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, count, width, generator=g, dtype=torch.float64).to(dtype)
    key = torch.randn(2, shared, tokens, width, generator=g, dtype=torch.float64).to(dtype)
    positions = torch.stack([torch.randperm(tokens, generator=g)[:count] for _ in range(2)])
    return query, key, positions


def one_by_one(query, key, positions, key_mask):
    """The same in plain Python, a weight at a time."""
    (batch, heads, _, width), (shared, tokens) = query.shape, key.shape[1:3]
    scores, seen_by = torch.zeros(batch, tokens, dtype=torch.float64), torch.zeros(batch, tokens)
    for b in range(batch):
        for i, position in enumerate(positions[b].tolist()):
            if not key_mask[b, position]:
                continue
            seen = [t for t in range(position + 1) if key_mask[b, t]]
            for t in seen:
                seen_by[b, t] += 1
            for h in range(heads):
                raw = [math.exp(query[b, h, i] @ key[b, h * shared // heads, t] / width**0.5) for t in seen]
                for t, weight in zip(seen, raw, strict=True):
                    scores[b, t] += weight / sum(raw) / heads
    return scores, torch.where(seen_by > 0, scores / seen_by, 0)


@always
@given(seed=seeds, shared=st.sampled_from([1, 2, 4]))
def test_probe_scores_are_what_the_plain_loops_compute(seed, shared):
    query, key, positions = probes(seed, shared=shared)
    token = torch.arange(14)[None]
    key_mask = (token >= torch.tensor([[0], [4]])) & (token < torch.tensor([[10], [14]]))
    ours = probe_importance(query, key, positions, key_mask=key_mask)
    torch.testing.assert_close(ours, one_by_one(query, key, positions, key_mask), rtol=1e-10, atol=1e-12)


@always
@given(seed=seeds)
def test_scores_add_up_to_the_number_of_probes_and_unseen_tokens_get_none(seed):
    query, key, positions = probes(seed)
    scores, normalised = probe_importance(query, key, positions)
    torch.testing.assert_close(scores.sum(-1), torch.full((2,), 5.0, dtype=torch.float64))
    unseen = torch.arange(14) > positions.amax(-1, keepdim=True)
    for part in (scores, normalised):
        assert (part[unseen] == 0).all() and (part[~unseen] > 0).all()
    key[unseen[:, None].expand(-1, 2, -1)] = 1000
    torch.testing.assert_close(probe_importance(query, key, positions), (scores, normalised))


@always
@given(seed=seeds)
def test_permuting_heads_or_probes_changes_no_score(seed):
    query, key, positions = probes(seed)
    expected = probe_importance(query, key, positions)
    swapped = probe_importance(query[:, [2, 3, 0, 1]], key.flip(1), positions)
    torch.testing.assert_close(swapped, expected)
    torch.testing.assert_close(probe_importance(query.flip(2), key, positions.flip(1)), expected)


@always
@given(seed=seeds)
def test_permuting_visible_tokens_permutes_scores(seed):
    query, key, _ = probes(seed)
    last = torch.full((5,), 13)  # every probe sees all tokens
    order = torch.randperm(14, generator=torch.Generator().manual_seed(seed))
    scores, normalised = probe_importance(query, key, last)
    moved, moved_normalised = probe_importance(query, key[:, :, order], last)
    torch.testing.assert_close(moved, scores[:, order])
    torch.testing.assert_close(moved_normalised, normalised[:, order])


def test_normalising_takes_the_advantage_of_early_tokens_away():
    # Tokens 0 to 3 are alike; then one stands out, but only the last two probes can see it.
    query, key = torch.ones(1, 1, 6, 1), torch.tensor([0.0, 0, 0, 0, 1, 0]).view(1, 1, 6, 1)
    scores, normalised = probe_importance(query, key, torch.arange(6))
    assert scores.argmax() == 0 and scores[0, 4] < scores[0, 1]
    assert normalised[0, 4] > normalised[0, 1]


def test_positions_shared_by_the_batch_and_an_explicit_scale():
    query, key, positions = probes(1)
    shared = positions[0]
    expected = probe_importance(query, key, shared.expand(2, -1))
    torch.testing.assert_close(probe_importance(query, key, shared, scale=8**-0.5), expected)
    torch.testing.assert_close(probe_importance(query, key, shared.int()), expected)
    assert not torch.allclose(probe_importance(query, key, shared, scale=1.0)[0], expected[0])


def test_left_padding_moves_the_scores_and_padded_probes_count_for_nothing():
    query, key, positions = probes(2)
    bare = probe_importance(query, key, positions)
    junk = torch.full((2, 2, 3, 8), 9.0, dtype=torch.float64)
    query = torch.cat([query, torch.ones(2, 4, 1, 8, dtype=torch.float64)], 2)
    positions = torch.cat([positions + 3, torch.tensor([[1], [2]])], 1)
    padded = probe_importance(
        query, torch.cat([junk, key], 2), positions, key_mask=torch.arange(17)[None].expand(2, -1) >= 3
    )
    for ours, expected in zip(padded, bare, strict=True):
        torch.testing.assert_close(ours[:, 3:], expected)
        assert (ours[:, :3] == 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_probes_accumulate_in_float32(dtype):
    query, key, positions = probes(3, dtype, tokens=600, count=128)
    ours = probe_importance(query, key, positions)
    assert {x.dtype for x in ours} == {torch.float32}
    wide = probe_importance(query.double(), key.double(), positions)
    torch.testing.assert_close([x.double() for x in ours], list(wide), rtol=1e-5, atol=1e-8)


# --- important tokens ---------------------------------------------------------------------------------------

whole_scores = st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any)


@always
@given(numbers=whole_scores, tau=st.integers(1, 63).map(lambda n: n / 64), seed=seeds)
def test_as_few_tokens_as_reach_tau_and_the_best_by_normalised_score(numbers, tau, seed):
    scores = torch.tensor([numbers], dtype=torch.float32)
    normalised = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    kept = important_tokens(scores, normalised, tau)
    ordered, goal = sorted(numbers, reverse=True), Fraction(tau) * sum(numbers)
    p = next(p for p in range(1, len(numbers) + 1) if sum(ordered[:p]) >= goal)
    assert kept.dtype == torch.bool and kept.sum() == p
    assert kept.all() or normalised[kept].min() >= normalised[~kept].max()


@always
@given(seed=seeds, low=st.floats(0.001, 1), high=st.floats(0.001, 1))
def test_raising_tau_only_adds_tokens(seed, low, high):
    low, high = sorted([low, high])
    g = torch.Generator().manual_seed(seed)
    scores, normalised = torch.rand(3, 40, generator=g).pow(4), torch.rand(3, 40, generator=g)
    fewer, more = (important_tokens(scores, normalised, tau) for tau in (low, high))
    assert (fewer <= more).all() and fewer.any(-1).all()


@always
@given(seed=seeds, tau=st.floats(0.001, 1))
def test_permuting_tokens_permutes_the_choice(seed, tau):
    g = torch.Generator().manual_seed(seed)
    scores, normalised = torch.rand(2, 30, generator=g, dtype=torch.float64), torch.rand(2, 30, generator=g)
    order = torch.randperm(30, generator=g)
    moved = important_tokens(scores[:, order], normalised[:, order], tau)
    assert torch.equal(moved, important_tokens(scores, normalised, tau)[:, order])


@always
@given(seed=seeds, tokens=st.integers(1, 200), power=st.floats(0.5, 40))
def test_tau_one_keeps_all(seed, tokens, power):
    g = torch.Generator().manual_seed(seed)
    scores, normalised = torch.rand(2, 3, tokens, generator=g).pow(power).unbind()
    assert important_tokens(scores, normalised, 1.0).all()


def test_tau_one_keeps_tokens_whose_scores_are_lost_beside_the_others():
    scores = torch.full((1, 5000), 1e-12)
    scores[0, 0], scores[0, 1] = 1000, 0
    assert important_tokens(scores, scores, 1.0).all()


def test_many_small_scores_are_not_lost_to_rounding():
    scores = torch.full(
        (1, 5001), 1e-9
    )  # next to 1 each is below float32's resolution; together they are not
    scores[0, 0] = 1
    budget = 1 - 1e-6 / (1 + 5e-6)  # what may go: a thousand of them
    assert abs(int(important_tokens(scores, scores, budget).sum()) - 4001) <= 3


def test_a_row_without_scores_keeps_all_and_others_are_not_touched_by_it():
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [8.0, 1.0, 1.0, 1.0]])
    assert important_tokens(scores, scores, 0.5).tolist() == [[True] * 4, [True, False, False, False]]


def test_of_equal_tokens_the_earlier_are_kept_and_at_least_one():
    assert important_tokens(torch.ones(1, 4), torch.ones(1, 4), 0.5).tolist() == [[True, True, False, False]]
    assert important_tokens(torch.ones(1, 4), torch.ones(1, 4), 1e-12).tolist() == [
        [True, False, False, False]
    ]


# --- packed keys and values ---------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def values(seed, *shape, dtype=torch.float32, size=1.0):
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def worst(x, q):
    """The error that is promised: half a step, and the rounding to the dtype."""
    info = torch.finfo(x.dtype)
    step = q.scale.double() if q.channel_scale is None else q.scale.double() * q.channel_scale.double()
    roundings = 0.5 if q.channel_scale is None else 3
    arithmetic = 4 if x.dtype in (torch.float32, torch.float64) else 1  # is done in float32 at least
    largest = x.double().abs() + step
    return step / 2 * (1 + 1e-6) + arithmetic * roundings * info.eps * largest + info.tiny * info.eps


@settings(always, max_examples=60)
@given(
    seed=seeds,
    bits=st.sampled_from([2, 4, 8]),
    dim=st.sampled_from([-1, -2, 1, (1, -1), (-2, -1)]),
    dtype=st.sampled_from(DTYPES),
    width=st.integers(1, 9),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
)
def test_the_round_trip_is_off_by_half_a_step_at_most(seed, bits, dim, dtype, width, size, offset):
    x = (values(seed, 2, 3, 5, width, size=size) + offset * size).to(dtype)
    q = quantize_kv(x, bits, dim)
    out = dequantize_kv(q)
    assert out.dtype == q.dtype == dtype and out.shape == q.shape == x.shape
    assert q.packed.dtype == torch.uint8 and q.packed.shape == (2, 3, 5, math.ceil(width * bits / 8))
    assert ((out.double() - x.double()).abs() <= worst(x, q)).all()


@settings(always, max_examples=40)
@given(
    seed=seeds,
    bits=st.sampled_from([2, 4, 8]),
    dim=st.sampled_from([-1, (1, -1)]),
    dtype=st.sampled_from(DTYPES),
    width=st.integers(1, 9),
)
def test_the_round_trip_with_normalised_channels_is_off_by_half_a_step_at_most(seed, bits, dim, dtype, width):
    x = values(seed, 2, 3, 5, width) * torch.tensor([1.0, 50, 0, 1e-2, 3, 7, 1, 1, 1])[:width]
    x = x.to(dtype)
    q = quantize_kv(x, bits, dim, channel_normalize=True)
    assert q.channel_scale is not None and q.channel_scale.shape == (2, 3, 1, width)
    assert ((dequantize_kv(q).double() - x.double()).abs() <= worst(x, q)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_survives_packing(bits, dtype):
    levels = 2**bits
    codes = torch.stack([torch.arange(levels), torch.arange(levels).flip(0)])
    x = torch.cat([codes, codes[:, :1]], 1).to(dtype)  # one more than fills the last byte
    q = quantize_kv(x, bits, dim=-1)
    assert torch.equal(dequantize_kv(q), x)
    assert (q.packed[0, 0] & (levels - 1), q.packed[1, 0] & (levels - 1)) == (0, levels - 1)


@pytest.mark.parametrize("value", [0.0, -0.1, 3.3, 1e-7, 6e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, -2])
def test_constant_groups_come_back_exactly(value, dtype, dim):
    x = torch.full((1, 2, 3, 5), value, dtype=dtype)
    x[:, 1] *= 0.5
    q = quantize_kv(x, 2, dim)
    assert torch.equal(dequantize_kv(q), x) and (q.scale > 0).all()


def test_the_smallest_float16_differences_are_not_lost():
    x = torch.tensor([0.0, 2.0**-24, 2.0**-24], dtype=torch.float16)  # their step is below float16's smallest
    assert torch.equal(dequantize_kv(quantize_kv(x, 2, -1)), x)


@pytest.mark.parametrize(("dim", "groups"), [(-2, 2 * 3 * 50), (-1, 2 * 3 * 40), ((1, -1), 2 * 40)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nbytes_counts_codes_scales_and_zero_points(dim, groups, bits, dtype):
    x = values(0, 2, 3, 40, 50, dtype=dtype)
    packed = 2 * 3 * 40 * math.ceil(50 * bits / 8)
    q = quantize_kv(x, bits, dim)
    assert q.nbytes == packed + 2 * groups * dtype.itemsize
    held = sum(t.untyped_storage().nbytes() for t in vars(q).values() if isinstance(t, torch.Tensor))
    assert held == q.nbytes
    if dim != -2:
        normalised = quantize_kv(x, bits, dim, channel_normalize=True)
        assert normalised.nbytes == q.nbytes + 2 * 3 * 50 * dtype.itemsize


def test_more_bits_are_closer_and_larger():
    x = values(1, 1, 2, 64, 32)
    found = [quantize_kv(x, bits, -2) for bits in (2, 4, 8)]
    errors = [(dequantize_kv(q) - x).abs().mean() for q in found]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0
    assert found[0].nbytes < found[1].nbytes < found[2].nbytes < x.nbytes


@pytest.mark.parametrize(("dim", "group"), [(-2, (0, 1, slice(None), 3)), (-1, (0, 1, 2, slice(None)))])
def test_a_group_has_its_own_scale(dim, group):
    x = values(2, 2, 3, 5, 7)
    loud = x.clone()
    loud[group] *= 1000
    same = torch.ones_like(x, dtype=torch.bool)
    same[group] = False
    before, after = (dequantize_kv(quantize_kv(t, 4, dim)) for t in (x, loud))
    assert torch.equal(before[same], after[same])
    torch.testing.assert_close(after[group], 1000 * before[group], rtol=1e-4, atol=1e-2)


def test_one_loud_channel_costs_the_others_less_when_channels_are_normalised():
    x = values(3, 1, 1, 64, 16)
    x[..., 5] *= 100
    quiet = torch.arange(16) != 5
    plain, normalised = (dequantize_kv(quantize_kv(x, 4, -1, channel_normalize=c)) for c in (False, True))
    assert (normalised - x)[..., quiet].abs().mean() < 0.5 * (plain - x)[..., quiet].abs().mean()


@always
@given(seed=seeds)
def test_permuting_heads_and_tokens_permutes_the_round_trip(seed):
    x = values(seed, 1, 3, 6, 5)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for dim, normalise in [(-2, False), (-1, False), (-1, True)]:
        out = dequantize_kv(quantize_kv(x, 4, dim, channel_normalize=normalise))
        moved = x.flip(1)[:, :, order]
        moved = dequantize_kv(quantize_kv(moved, 4, dim, channel_normalize=normalise))
        assert torch.equal(moved, out.flip(1)[:, :, order])


def test_a_quantized_tensor_cannot_be_changed():
    q = quantize_kv(torch.ones(2, 2), 4, -1)
    with pytest.raises(FrozenInstanceError):
        q.bits = 8  # type: ignore[misc]


# --- errors -------------------------------------------------------------------------------------------------

X = torch.ones(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probe_importance(X[0], X, torch.arange(3)), r"query must have shape \(B, H, P, D\)"),
        (lambda: probe_importance(X, X[..., :4], torch.arange(3)), r"key must have shape \(B=2, K, T, D=8\)"),
        (lambda: probe_importance(X, X[:, :3], torch.arange(3)), r"3 key heads do not divide 4 query heads"),
        (lambda: probe_importance(X, X, torch.arange(2)), r"positions must have shape \(B=2, P=3\)"),
        (lambda: probe_importance(X, X, torch.arange(1, 4)), r"positions must be integers in 0..2"),
        (lambda: probe_importance(X, X, torch.arange(-1, 2)), r"positions must be integers in 0..2"),
        (lambda: probe_importance(X, X, torch.zeros(3)), r"positions must be integers in 0..2"),
        (
            lambda: probe_importance(X, X, torch.arange(3), key_mask=torch.ones(2, 4, dtype=torch.bool)),
            r"key_mask must have shape \(B=2, T=3\), got \(2, 4\)",
        ),
        (
            lambda: probe_importance(X, X, torch.arange(3), key_mask=torch.ones(2, 3)),
            r"key_mask must be bool, got torch.float32",
        ),
        (lambda: important_tokens(X[0, 0], X[0, 0, :2], 0.5), r"normalised must have shape \(B=3, T=8\)"),
        (lambda: important_tokens(X[0, 0], X[0, 0], 0.0), r"tau must lie above 0 and not above 1, got 0.0"),
        (lambda: important_tokens(X[0, 0], X[0, 0], 97.5), r"tau must lie above 0 and not above 1, got 97.5"),
        (lambda: quantize_kv(X, 3, -1), r"bits must be 2, 4 or 8, got 3"),
        (lambda: quantize_kv(X.long(), 4, -1), r"x must be a float tensor with elements, got torch.int64"),
        (lambda: quantize_kv(X[:, :, :0], 4, -1), r"got torch.float32 of shape \(2, 4, 0, 8\)"),
        (
            lambda: quantize_kv(X, 4, 4),
            r"dim must name different dimensions of a 4-dimensional tensor, got 4",
        ),
        (lambda: quantize_kv(X, 4, (3, -1)), r"dim must name different dimensions"),
        (lambda: quantize_kv(X, 4, ()), r"dim must name different dimensions"),
        (lambda: quantize_kv(X, 4, -2, channel_normalize=True), r"channel_normalize needs per-token groups"),
        (
            lambda: quantize_kv(X, 4, (-2, -1), channel_normalize=True),
            r"needs per-token groups such as dim=-1",
        ),
    ],
)
def test_errors_say_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
