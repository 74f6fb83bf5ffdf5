"""DAMRO's equations (arXiv 2410.04514): golden vectors, and what must always hold."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from lvlm_fix._tensors import wide
from lvlm_fix.functional import cls_scores, contrast_logits, outlier_tokens

GOLDEN = Path(__file__).parents[1].parent / "shared" / "golden"
always = settings(derandomize=True, max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
HALVES = [torch.float16, torch.bfloat16]


def golden(case):
    if not (GOLDEN / "damro.safetensors").exists():
        pytest.skip("the golden vectors are not beside this checkout (shared/golden)")
    tensors = load_file(GOLDEN / "damro.safetensors")
    parameters = json.loads((GOLDEN / "damro.json").read_text())
    assert len(parameters) == 4
    mine = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{case}.")}
    return mine, parameters[case]


def normal(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def projections(seed, dtype=torch.float64, tokens=10, width=12):
    return normal(seed, 2, tokens, width).to(dtype), normal(seed + 1, 2, tokens, width).to(dtype)


@pytest.mark.parametrize("case", range(4))
def test_cls_scores_and_outliers_agree_with_the_reference(case):
    tensors, parameters = golden(case)
    scores = cls_scores(tensors["query"], tensors["key"], num_heads=1)
    torch.testing.assert_close(scores, tensors["cls_attention"], rtol=0, atol=1e-5)
    assert torch.equal(outlier_tokens(scores, parameters["topk"]), tensors["outliers"])


@pytest.mark.parametrize("case", range(4))
def test_contrasted_logits_agree_with_the_reference(case):
    tensors, parameters = golden(case)
    ours = contrast_logits(
        tensors["logits"], tensors["negative_logits"], parameters["alpha"], parameters["beta"]
    )
    torch.testing.assert_close(ours, tensors["contrasted"], rtol=0, atol=1e-5)  # infinities must match too


@pytest.mark.parametrize("num_heads", [1, 2, 3, 12])
def test_cls_scores_are_the_cls_row_of_full_attention(num_heads):
    query, key = projections(0)
    per_head = [
        (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)[:, 0, 1:]
        for q, k in zip(query.chunk(num_heads, -1), key.chunk(num_heads, -1), strict=True)
    ]
    expected = torch.stack(per_head).mean(0)
    torch.testing.assert_close(cls_scores(query, key, num_heads), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
def test_sums_are_wide_whatever_comes_in(dtype):
    x = torch.tensor([0, 1], dtype=dtype)
    assert wide(x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert wide(x).tolist() == [0, 1]


def test_cls_row_alone_gives_the_same_scores():
    query, key = projections(1)
    assert torch.equal(cls_scores(query[:, :1], key, 4), cls_scores(query, key, 4))


def test_no_square_of_the_tokens_is_ever_made():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    query, key = projections(2, tokens=200, width=8)
    with Largest() as largest:
        cls_scores(query, key, 2)
    assert 0 < largest.elements <= key.numel() < 200 * 200


@always
@given(seed=seeds, num_heads=st.sampled_from([1, 2, 4]))
def test_permuting_heads_keeps_scores_and_permuting_tokens_moves_them(seed, num_heads):
    query, key = projections(seed)
    scores = cls_scores(query, key, num_heads)
    assert (scores > 0).all() and (scores.sum(-1) < 1).all()
    blocks = torch.arange(12).view(num_heads, -1).flip(0).flatten()
    torch.testing.assert_close(cls_scores(query[..., blocks], key[..., blocks], num_heads), scores)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    moved = torch.cat([key[:, :1], key[:, 1:][:, order]], 1)
    torch.testing.assert_close(cls_scores(query, moved, num_heads), scores[:, order])


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_scores_accumulate_in_float32(dtype):
    query, key = projections(3, dtype, tokens=577, width=64)
    scores = cls_scores(query, key, 4)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores.double(), cls_scores(query.double(), key.double(), 4), rtol=1e-5, atol=0
    )


@always
@given(seed=seeds, k=st.integers(1, 9))
def test_outliers_are_the_highest_scores_in_order(seed, k):
    scores = normal(seed, 3, 9)
    found = scores.gather(1, outlier_tokens(scores, k))
    assert torch.equal(found, scores.sort(-1, descending=True).values[:, :k])


def test_of_equal_outliers_the_earlier_comes_first():
    assert outlier_tokens(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 4).tolist() == [[1, 2, 4, 0]]


@always
@given(seed=seeds, beta=st.floats(0.01, 1))
def test_alpha_zero_only_cuts_and_the_cut_is_on_the_positive_branch(seed, beta):
    logits, negative = normal(seed, 2, 30, scale=2), normal(seed + 1, 2, 30, scale=2)
    contrasted = contrast_logits(logits, negative, 0.0, beta)
    plausible = contrasted.isfinite()
    assert torch.equal(contrasted[plausible], logits[plausible])
    probability = logits.softmax(-1)
    relative = probability / probability.amax(-1, keepdim=True)
    clear = (relative - beta).abs() > 1e-9  # rounding may decide the rest
    assert torch.equal(plausible[clear], (relative >= beta)[clear])
    assert plausible.gather(1, logits.argmax(-1, keepdim=True)).all()
    assert torch.equal(contrast_logits(logits, negative, 1.7, beta).isfinite(), plausible)


@always
@given(seed=seeds, alpha=st.floats(0, 3), shift=st.floats(-20, 20))
def test_a_constant_on_the_negative_branch_shifts_every_logit_alike(seed, alpha, shift):
    logits, negative = normal(seed, 2, 30), normal(seed + 1, 2, 30)
    plain = contrast_logits(logits, negative, alpha, 0.1)
    shifted = contrast_logits(logits, negative + shift, alpha, 0.1)
    torch.testing.assert_close(shifted, plain - alpha * shift, rtol=1e-12, atol=1e-10)


def test_contrast_moves_away_from_the_negative_branch():
    logits, negative = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    assert contrast_logits(logits, negative, 2.0, 0.1).tolist() == [[-2.0, 0.0]]


def test_beta_zero_cuts_nothing_and_beta_one_keeps_the_maximum():
    logits, negative = normal(4, 1, 30, scale=30), normal(5, 1, 30)
    assert contrast_logits(logits, negative, 0.5, 0.0).isfinite().all()
    assert contrast_logits(logits, negative, 0.5, 1.0).isfinite().nonzero().tolist() == [
        [0, int(logits.argmax())]
    ]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_forbidden_tokens_stay_forbidden_without_nan(beta):
    logits, negative = torch.tensor([[1.0, -math.inf, 0.9]]), torch.tensor([[0.0, -math.inf, 0.0]])
    assert contrast_logits(logits, negative, 1.0, beta).isneginf().tolist() == [[False, True, False]]
    forbidden = torch.full((1, 3), -math.inf)
    assert contrast_logits(forbidden, forbidden, 1.0, beta).isneginf().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_contrast_is_the_wide_one_rounded(dtype):
    logits, negative = normal(6, 2, 500, scale=4).to(dtype), normal(7, 2, 500, scale=4).to(dtype)
    ours = contrast_logits(logits, negative, 1.5, 0.1)
    assert ours.dtype == dtype
    wide = contrast_logits(logits.double(), negative.double(), 1.5, 0.1)
    torch.testing.assert_close(ours.double(), wide, rtol=0.501 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cls_scores(x[0], x, 1), r"query must have shape \(B=2, Q, C=12\), got \(5, 12\)"),
        (lambda x: cls_scores(x[..., :6], x, 1), r"query must have shape"),
        (lambda x: cls_scores(x[:, :3], x, 1), r"query must have 1 or 5 tokens, got 3"),
        (lambda x: cls_scores(x[:, :1], x[:, :1], 1), r"at least one image token"),
        (lambda x: cls_scores(x, x, 5), r"num_heads=5 must divide width 12"),
        (lambda x: cls_scores(x, x, 0), r"num_heads=0 must divide width 12"),
        (lambda x: outlier_tokens(x, 1), r"scores must have shape \(B, N\)"),
        (lambda x: outlier_tokens(x[0], 13), r"k must lie in 1..12, got 13"),
        (lambda x: outlier_tokens(x[0], 0), r"k must lie in 1..12, got 0"),
        (lambda x: contrast_logits(x, x[0], 1, 0.1), r"must share a shape"),
        (lambda x: contrast_logits(x, x, -1, 0.1), r"alpha must not be negative"),
        (lambda x: contrast_logits(x, x, 1, 1.1), r"beta must lie in 0..1, got 1.1"),
    ],
)
def test_errors_say_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 5, 12))
