"""Column sums of a few probe rows' attention (ZipVL, arXiv 2410.08584), never all weights at once.

With logits s_rt of row r (a head's probe) and column t, the sums are

    score_t = 1/H * sum_r exp(s_rt - m_r) / l_r,    m_r = max_t s_rt,    l_r = sum_t exp(s_rt - m_r).

A column needs every row's m and l first, so keys are read twice: `_row_statistics` finds m and l for spans of
keys side by side, `_merge_statistics` puts the spans together, `_column_sums` adds up the rows of the heads that
share a key head, and `_finish` adds up the key heads. No atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.fused.launch import LOG2_E, cdiv, padded_width, precision, within_reach

# Keys a program of the first pass reads: 640 tokens of 32 heads then fill half an H100, 2,900 tokens all of it.
SPAN = 512
# Tokens or rows of a program that only adds up.
BLOCK_SUM = 128


@triton.jit
def _load_rows(
    query, place, position, item, first_head, row, rows, PROBES, stride_b, stride_h, stride_p, WIDTH
):
    """Query rows [row, place]: row r is probe r % PROBES of the r // PROBES-th head that shares the key head."""
    probe = row % PROBES
    head = first_head + row // PROBES
    offset = item * stride_b + head.to(tl.int64) * stride_h + probe * stride_p
    inside = row < rows
    q = tl.load(query + offset[:, None] + place[None, :], inside[:, None] & (place[None, :] < WIDTH), 0.0)
    return q, tl.load(position + item * PROBES + probe, inside, -1)


@triton.jit
def _logits(
    q, k, stands, column, tokens, key_mask, item, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Logits in units of log 2, -inf where a probe that stands at `stands` cannot see the column."""
    logits = tl.dot(q, k, input_precision=PRECISION) * scale
    visible = column[None, :] <= stands[:, None]
    if MASKED:
        visible &= tl.load(key_mask + item * tokens + column, column < tokens, 0)[None, :] != 0
    return tl.where(visible, logits, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "PROBES"])
def _row_statistics(
    query,
    key,
    position,
    key_mask,
    maximum,
    total,
    query_b,
    query_h,
    query_p,
    key_b,
    key_h,
    key_t,
    scale,
    tokens,
    key_heads,
    group,
    PROBES,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    span, block = tl.program_id(0), tl.program_id(1)
    item = (tl.program_id(2) // key_heads).to(tl.int64)
    key_head = (tl.program_id(2) % key_heads).to(tl.int64)
    rows = group * PROBES
    row = block * BLOCK_P + tl.arange(0, BLOCK_P)
    place = tl.arange(0, PADDED)
    q, stands = _load_rows(
        query, place, position, item, key_head * group, row, rows, PROBES, query_b, query_h, query_p, WIDTH
    )
    key += item * key_b + key_head * key_h
    m = tl.full([BLOCK_P], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_P], tl.float32)  # noqa: E741
    # No row of the block sees past its furthest probe.
    end = tl.minimum((span + 1) * SPAN, tl.max(stands, 0) + 1)
    for start in range(span * SPAN, end, BLOCK_T):
        column = start + tl.arange(0, BLOCK_T)
        there = (column[None, :] < tokens) & (place[:, None] < WIDTH)
        k = tl.load(key + column[None, :] * key_t + place[:, None], there, 0.0)
        logits = _logits(q, k, stands, column, tokens, key_mask, item, scale, MASKED, PRECISION)
        larger = tl.maximum(m, tl.max(logits, 1))
        # A row that has seen nothing yet would be -inf - -inf.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        l = l * tl.exp2(m - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)  # noqa: E741
        m = larger
    slot = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + span) * rows + row
    tl.store(maximum + slot, m, row < rows)
    tl.store(total + slot, l, row < rows)


@triton.jit(do_not_specialize=["spans", "rows"])
def _merge_statistics(maximum, total, row_maximum, row_inverse, spans, rows, BLOCK_SUM: tl.constexpr):
    """m and 1 / l of every row; +inf and 0 for a row that sees nothing, so that its weights are 0."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_SUM + tl.arange(0, BLOCK_SUM)
    inside = row < rows
    m = tl.full([BLOCK_SUM], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_SUM], tl.float32)  # noqa: E741
    for span in range(spans):
        slot = (head * spans + span) * rows + row
        part = tl.load(maximum + slot, inside, float("-inf"))
        larger = tl.maximum(m, part)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        l = l * tl.exp2(m - shift) + tl.load(total + slot, inside, 0.0) * tl.exp2(part - shift)  # noqa: E741
        m = larger
    blind = l == 0
    tl.store(row_maximum + head * rows + row, tl.where(blind, float("inf"), m), inside)
    tl.store(row_inverse + head * rows + row, tl.where(blind, 0.0, 1 / tl.where(blind, 1.0, l)), inside)


@triton.jit(do_not_specialize=["tokens", "PROBES"])
def _column_sums(
    query,
    key,
    position,
    key_mask,
    row_maximum,
    row_inverse,
    sums,
    query_b,
    query_h,
    query_p,
    key_b,
    key_h,
    key_t,
    scale,
    tokens,
    key_heads,
    group,
    PROBES,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = (tl.program_id(1) // key_heads).to(tl.int64)
    key_head = (tl.program_id(1) % key_heads).to(tl.int64)
    rows = group * PROBES
    column = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.arange(0, PADDED)
    there = (column[None, :] < tokens) & (place[:, None] < WIDTH)
    key += item * key_b + key_head * key_h
    k = tl.load(key + column[None, :] * key_t + place[:, None], there, 0.0)
    summed = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, rows, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        q, stands = _load_rows(
            query,
            place,
            position,
            item,
            key_head * group,
            row,
            rows,
            PROBES,
            query_b,
            query_h,
            query_p,
            WIDTH,
        )
        slot = tl.program_id(1).to(tl.int64) * rows + row
        m = tl.load(row_maximum + slot, row < rows, float("inf"))
        inverse = tl.load(row_inverse + slot, row < rows, 0.0)
        logits = _logits(q, k, stands, column, tokens, key_mask, item, scale, MASKED, PRECISION)
        summed += tl.sum(tl.exp2(logits - m[:, None]) * inverse[:, None], 0)
    tl.store(sums + tl.program_id(1).to(tl.int64) * tokens + column, summed, column < tokens)


@triton.jit(do_not_specialize=["tokens", "PROBES"])
def _finish(
    sums,
    position,
    key_mask,
    scores,
    normalised,
    tokens,
    key_heads,
    heads,
    PROBES,
    PADDED_PROBES: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The mean over heads, and that divided by how many probes see the token."""
    item = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_SUM + tl.arange(0, BLOCK_SUM)
    inside = column < tokens
    score = tl.zeros([BLOCK_SUM], tl.float32)
    for key_head in range(key_heads):
        score += tl.load(sums + (item * key_heads + key_head) * tokens + column, inside, 0.0)
    score /= heads
    seen = tl.zeros([BLOCK_SUM], tl.int32)
    for start in range(0, PROBES, PADDED_PROBES):
        probe = start + tl.arange(0, PADDED_PROBES)
        stands = tl.load(position + item * PROBES + probe, probe < PROBES, -1)
        seen += tl.sum((stands[:, None] >= column[None, :]).to(tl.int32), 0)
    if MASKED:
        seen = tl.where(tl.load(key_mask + item * tokens + column, inside, 0) != 0, seen, 0)
    tl.store(scores + item * tokens + column, score, inside)
    tl.store(normalised + item * tokens + column, score / tl.maximum(seen, 1), inside)


def configuration(padded: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages of the two passes, by head size filled up and dtype.

    A row block of 128 is one head's usual probes, so that keys are read once a pass. At a head size of 256 it would
    spill on sm_80, and three stages would not fit in its 163 KiB. float32 is multiplied as three products of its
    split halves: small blocks keep their parts in registers.
    """
    if dtype == torch.float32:
        rows, tokens = (32, 64) if padded <= 128 else (16, 32)
        return {"BLOCK_P": rows, "BLOCK_T": tokens, "num_warps": 8, "num_stages": 2}
    if padded > 128:
        return {"BLOCK_P": 64, "BLOCK_T": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_P": 128, "BLOCK_T": 64, "num_warps": 8, "num_stages": 3}


def fused_probe_scores(
    query: Tensor, key: Tensor, positions: Tensor, scale: float | None = None, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`lvlm_fix.kernels.probe_scores` by Triton, inputs unchecked; `positions` is (B, P).

    Takes float16, bfloat16 and float32, and heads up to 256 wide.
    """
    batch, heads, probes, width = query.shape
    key_heads, tokens = key.shape[1:3]
    group = heads // key_heads
    rows = group * probes
    query, key = within_reach(query), within_reach(key)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        # A probe at -1 sees nothing, and so counts for nothing.
        positions = positions.masked_fill(~key_mask.gather(1, positions.long()), -1)
    positions = positions.to(torch.int32).contiguous()
    spans = cdiv(tokens, SPAN)
    of_spans = query.new_empty(2, batch * key_heads, spans, rows, dtype=torch.float32)
    of_rows = query.new_empty(2, batch * key_heads, rows, dtype=torch.float32)
    sums = query.new_empty(batch * key_heads, tokens, dtype=torch.float32)
    scores, normalised = query.new_empty(2, batch, tokens, dtype=torch.float32).unbind()

    padded = padded_width(width)
    chosen = configuration(padded, query.dtype)
    masked = {"MASKED": key_mask is not None}
    passes = {"WIDTH": width, "PADDED": padded, "PRECISION": precision(query.dtype), **masked, **chosen}
    inputs = query, key, positions, key_mask
    sizes = *query.stride()[:3], *key.stride()[:3], LOG2_E * (width**-0.5 if scale is None else scale)
    counts = tokens, key_heads, group, probes
    with torch.cuda.device_of(query):
        grid = spans, cdiv(rows, chosen["BLOCK_P"]), batch * key_heads
        _row_statistics[grid](*inputs, *of_spans, *sizes, *counts, SPAN, **passes)
        merging = cdiv(rows, BLOCK_SUM), batch * key_heads
        _merge_statistics[merging](*of_spans, *of_rows, spans, rows, BLOCK_SUM)
        by_column = cdiv(tokens, chosen["BLOCK_T"]), batch * key_heads
        _column_sums[by_column](*inputs, *of_rows, sums, *sizes, *counts, **passes)
        ending = cdiv(tokens, BLOCK_SUM), batch
        _finish[ending](
            sums,
            positions,
            key_mask,
            scores,
            normalised,
            tokens,
            key_heads,
            heads,
            probes,
            32,
            BLOCK_SUM,
            **masked,
        )
    return scores, normalised
