"""VTC-CLS's selection (arXiv 2412.05819): golden vectors, and what must always hold."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lvlm_fix.functional import select_by_cls

GOLDEN = Path(__file__).parents[1].parent / "shared" / "golden"
always = settings(derandomize=True, max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
LAYERS, TOKENS = 6, 11


def layer_scores(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(LAYERS, 2, TOKENS, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("case", range(4))
def test_kept_tokens_agree_with_the_reference(case):
    if not (GOLDEN / "vtc_cls.safetensors").exists():
        pytest.skip("the golden vectors are not beside this checkout (shared/golden)")
    tensors = load_file(GOLDEN / "vtc_cls.safetensors")
    parameters = json.loads((GOLDEN / "vtc_cls.json").read_text())
    assert len(parameters) == 4
    start, keep = parameters[case]["start_layer"], parameters[case]["keep"]
    scores = tensors[f"{case}.attentions"][:, :, :, 0, 1:].mean(2)
    assert select_by_cls(scores, keep, start).tolist() == [tensors[f"{case}.keep"].tolist()]
    # Only the order of scores shows in the indices: grow one token's score until it passes another's.
    kept = tensors[f"{case}.keep"]
    score = tensors[f"{case}.score"].clone()
    weakest = kept[score[kept].argmin()]
    score[kept] = -1
    best_left, gap = int(score.argmax()), float(tensors[f"{case}.score"][weakest] - score.max())
    for change, swapped in [(gap - 1e-5, False), (gap + 1e-5, True)]:
        nudged = scores.clone()
        nudged[-2, 0, best_left] += change
        assert (best_left in select_by_cls(nudged, keep, start)[0].tolist()) is swapped


@always
@given(seed=seeds, keep=st.integers(1, TOKENS), start=st.integers(0, LAYERS - 2))
def test_kept_tokens_are_the_highest_sums_in_raster_order(seed, keep, start):
    layers = layer_scores(seed)
    kept = select_by_cls(layers, keep, start)
    assert kept.shape == (2, keep) and (kept.diff(dim=-1) > 0).all()
    sums = sum(layers[layer] for layer in range(start, LAYERS - 1))
    chosen = torch.zeros_like(sums, dtype=torch.bool).scatter(1, kept, True)
    for row in range(2):
        rest = sums[row][~chosen[row]]
        assert rest.numel() == 0 or sums[row][chosen[row]].min() > rest.max()


@always
@given(seed=seeds, start=st.integers(0, LAYERS - 2))
def test_the_last_layer_and_those_before_the_start_do_not_count(seed, start):
    layers = layer_scores(seed)
    changed = layers.clone()
    changed[-1] = 100 * layer_scores(seed + 1)[-1]
    changed[:start] = 100 * layer_scores(seed + 1)[:start]
    assert torch.equal(select_by_cls(changed, 4, start), select_by_cls(layers, 4, start))
    lonely = layers.clone()  # while each layer in between does
    lonely[start, :, 3] += 100
    assert (select_by_cls(lonely, 1, start) == 3).all()


@pytest.mark.parametrize("start", range(LAYERS - 1))
def test_a_negative_start_counts_from_the_end(start):
    layers = layer_scores(7)
    assert torch.equal(select_by_cls(layers, 4, start - LAYERS), select_by_cls(layers, 4, start))


@always
@given(seed=seeds, keep=st.integers(1, TOKENS))
def test_permuting_tokens_permutes_the_choice_and_keeping_more_only_adds(seed, keep):
    layers = layer_scores(seed)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    kept, moved = select_by_cls(layers, keep, 1), select_by_cls(layers[..., order], keep, 1)
    assert torch.equal(order[moved].sort(-1).values, kept)
    fewer = select_by_cls(layers, max(1, keep - 1), 1)
    assert all(set(a) <= set(b) for a, b in zip(fewer.tolist(), kept.tolist(), strict=True))


def test_of_equal_scores_the_earlier_token_is_kept():
    assert select_by_cls(torch.ones(3, 1, 5), 2, 0).tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers_are_summed_in_float32(dtype):
    # 24 layers of 1 and a token that leads by less than a half-precision sum of 23 could show.
    layers = torch.ones(24, 1, 3, dtype=dtype)
    layers[3, 0, 2] += torch.finfo(dtype).eps
    assert (layers[:-1].sum(0, dtype=torch.float64).to(dtype) == 23).all()
    assert select_by_cls(layers, 1, 0).tolist() == [[2]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: select_by_cls(x[0], 1, 0), r"layer_scores must have shape \(L, B, N\), got \(2, 11\)"),
        (lambda x: select_by_cls(x, 0, 0), r"keep must lie in 1..11, got 0"),
        (lambda x: select_by_cls(x, 12, 0), r"keep must lie in 1..11, got 12"),
        (lambda x: select_by_cls(x, 1, 5), r"start_layer must name a layer before the last of 6, got 5"),
        (lambda x: select_by_cls(x, 1, -1), r"start_layer must name a layer before the last of 6, got -1"),
        (lambda x: select_by_cls(x, 1, -7), r"start_layer must name a layer before the last of 6, got -7"),
    ],
)
def test_errors_say_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(layer_scores(0))
