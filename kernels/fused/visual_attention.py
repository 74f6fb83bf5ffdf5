"""Flash attention with VAR's redistribution inside (arXiv 2503.03321), for many queries at once.

A changed row is `sum_t c_t w_t v_t`: c = 1 - p on sinks, 1 + p * s_sink / s_receivers on image tokens that are no
sinks (the receivers), 1 elsewhere; w is the softmax and s are its sums by class. What c is, is only known when the
whole row has been seen. So the online softmax keeps apart what is scaled apart:

    others = sum of w_t v_t,  received = sum of w_t v_t over receivers,  s_sink, s_image_sink, s_receivers,

all unnormalised and relative to the running maximum. After the last key the gate is known, and the sinks, which
are few, are visited again from a list of their places and join `others` with their final factor:

    out = (others + (1 - p) * sinks + (1 + p * s_sink / s_receivers) * received) / s.

Rows before the first query that may change, which in a prompt are nearly all, need one accumulator only. Both kinds
of tiles are in one launch, so that neither waits for the other: tiles of changed rows are half as high or less, so
that their two accumulators are no larger than the one of plain tiles. A tile without rows of its kind ends at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.fused.launch import cdiv, padded_width, with_near_elements
from lvlm_fix.kernels.fused.visual_common import (
    BOOST,
    DOT,
    SINKS,
    Launch,
    as_bytes,
    changes,
    kinds,
    load_rows,
    logits_of,
    numbers_of,
)
from lvlm_fix.kernels.redistribution import Redistribution

__all__ = ["prefill_configuration", "visual_prefill"]


def prefill_configuration(width: int, itemsize: int, hopper: bool) -> Launch:
    """Tile sizes for heads of `width` elements of `itemsize` bytes.

    Halves: 128 rows x 128 columns of float32 over 256 threads are 64 registers each, and leave room for logits and
    queries; wider heads get fewer keys a block, or lower tiles. Hopper has 227 KiB of shared memory for longer
    pipelines, and its products read their operands from there; elsewhere all stays below the 99 KiB of the smallest
    Ampere and Ada chips. float32 takes three products and twice the registers. The ahead-of-time tests see that
    nothing spills, padded prompts included, at the sizes they try and with the Triton they run on.
    """
    block = padded_width(width)
    if itemsize == 4:
        return Launch(32, 16, 32, 8, 1)
    if block <= 64:
        return Launch(128, 64, 64 if hopper else 32, 4, 3)
    if block <= 128:
        return Launch(128, 32, 64, 8, 3 if hopper else 2)
    return Launch(128, 32, 32, 8, 2) if hopper else Launch(64, 32, 32, 8, 2)


def visual_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: Redistribution,
    causal: bool = True,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    *,
    hopper: bool = False,
) -> Tensor:
    """Arguments and result of `redistributed_attention`; never waits for the device."""
    batch, heads, queries, width = query.shape
    shared, tokens = key.shape[1:3]
    query, key, value = with_near_elements(query), with_near_elements(key), with_near_elements(value)
    out = torch.empty_like(query)
    image, sink = as_bytes(given.image_mask), as_bytes(given.sink_mask)
    seen = as_bytes(key_mask) if key_mask is not None else sink
    first = given.first_queries()
    start, count = torch.empty(2, batch, dtype=torch.int32, device=query.device).unbind()
    sinks = torch.empty(batch, tokens, dtype=torch.int32, device=query.device)
    masked = key_mask is not None
    _find_sinks[(batch,)](
        image, sink, seen, first, start, count, sinks,
        image.stride(0), sink.stride(0), seen.stride(0), 0 if len(first) == 1 else 1, tokens,
        MASKED=masked, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    tile = prefill_configuration(width, query.element_size(), hopper)
    changed_tiles, plain_tiles = cdiv(queries, tile.changed), cdiv(queries, tile.rows)
    _visual_prefill[(changed_tiles + plain_tiles, heads, batch)](
        query, key, value, out, image, sink, seen, start, count, sinks,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        image.stride(0), sink.stride(0), seen.stride(0),
        heads // shared, queries, tokens, changed_tiles,
        *numbers_of(given, width, scale),
        CAUSAL=causal and queries > 1, MASKED=masked, WIDTH=width, BLOCK_D=padded_width(width),
        BLOCK_M=tile.rows, CHANGED_M=tile.changed, BLOCK_N=tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["image_b", "sink_b", "seen_b", "tokens"])
def _find_sinks(
    image, sink, seen, first_query, start, count, sinks,
    image_b, sink_b, seen_b, first_b, tokens,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one batch item: where its sinks are, and the first position that may change (`tokens`: none)."""
    item = tl.program_id(0)
    found = 0
    image_sinks = 0
    for begin in range(0, tokens, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < tokens
        is_sink = tl.load(sink + item * sink_b + at, mask=inside, other=0) != 0
        is_image = tl.load(image + item * image_b + at, mask=inside, other=0) != 0
        if MASKED:
            is_sink &= tl.load(seen + item * seen_b + at, mask=inside, other=0) != 0
        rank = tl.cumsum(is_sink.to(tl.int32), 0)
        tl.store(sinks + item * tokens + found + rank - 1, at, mask=is_sink)
        found += tl.sum(is_sink.to(tl.int32))
        image_sinks += tl.sum((is_sink & is_image).to(tl.int32))
    tl.store(count + item, found)
    first = tl.load(first_query + item * first_b).to(tl.int32)
    tl.store(start + item, tl.where(image_sinks > 0, first, tokens))


@triton.jit(do_not_specialize=["image_b", "sink_b", "seen_b", "tokens", "queries", "changed_tiles"])
def _visual_prefill(
    query, key, value, out, image, sink, seen, start, count, sinks,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, out_b, out_h, out_t,
    image_b, sink_b, seen_b,
    group, queries, tokens, changed_tiles,
    scale, rho, min_image_attention, p,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, CHANGED_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one head; the last rows, which have the most keys to see, come first."""
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    query += item * query_b + tl.cast(head, tl.int64) * query_h
    key += item * key_b + tl.cast(head // group, tl.int64) * key_h
    value += item * value_b + tl.cast(head // group, tl.int64) * value_h
    out += item * out_b + tl.cast(head, tl.int64) * out_h
    image += item * image_b
    sink += item * sink_b
    seen += item * seen_b
    first_changed = tl.load(start + item) - (tokens - queries)
    if tile < changed_tiles:
        begin = (changed_tiles - 1 - tile) * CHANGED_M
        if tl.minimum(begin + CHANGED_M, queries) > first_changed:
            _changed_tile(
                query, key, value, out, image, sink, seen, sinks + item * tokens, tl.load(count + item),
                query_t, key_t, value_t, out_t, begin, first_changed, queries, tokens,
                scale, rho, min_image_attention, p,
                CAUSAL, MASKED, WIDTH, BLOCK_D, CHANGED_M, BLOCK_N,
            )  # fmt: skip
    else:
        begin = (tl.num_programs(0) - 1 - tile) * BLOCK_M
        if begin < first_changed:
            _plain_tile(
                query, key, value, out, seen, query_t, key_t, value_t, out_t,
                begin, first_changed, queries, tokens, scale,
                CAUSAL, MASKED, WIDTH, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _plain_tile(
    query, key, value, out, seen, query_t, key_t, value_t, out_t,
    begin, first_changed, queries, tokens, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = begin + tl.arange(0, BLOCK_M)
    position = tokens - queries + rows
    q = load_rows(query, query_t, begin, queries, WIDTH, BLOCK_D, BLOCK_M, True)
    others = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Blocks of keys that every row sees need no comparison.
    end = tokens
    if CAUSAL:
        end = tl.minimum(tokens, tokens - queries + begin + BLOCK_M)
        whole = (tokens - queries + begin + 1) // BLOCK_N * BLOCK_N
    else:
        whole = tokens // BLOCK_N * BLOCK_N
    if MASKED:
        whole = 0
    else:
        for at in range(0, whole, BLOCK_N):
            others, highest, total = _plain_step(
                others, highest, total, q, key, value, seen, key_t, value_t, at, position, tokens, scale,
                CAUSAL, MASKED, WIDTH, BLOCK_D, BLOCK_N, False,
            )  # fmt: skip
    for at in range(whole, end, BLOCK_N):
        others, highest, total = _plain_step(
            others, highest, total, q, key, value, seen, key_t, value_t, at, position, tokens, scale,
            CAUSAL, MASKED, WIDTH, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    total = tl.where(total == 0, 1, total)
    d = tl.arange(0, BLOCK_D)
    place = out + rows.to(tl.int64)[:, None] * out_t + d[None, :]
    mine = ((rows < queries) & (rows < first_changed))[:, None] & (d < WIDTH)[None, :]
    tl.store(place, (others / total[:, None]).to(out.dtype.element_ty), mask=mine)


@triton.jit
def _plain_step(
    others, highest, total, q, key, value, seen, key_t, value_t, at, position, tokens, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    k = load_rows(key, key_t, at, tokens, WIDTH, BLOCK_D, BLOCK_N, CHECKED)
    logits = logits_of(q, k, scale)
    if CHECKED:
        token = at + tl.arange(0, BLOCK_N)
        visible = token < tokens
        if MASKED:
            visible &= tl.load(seen + token, mask=visible, other=0) != 0
        may = visible[None, :]
        if CAUSAL:
            may = may & (token[None, :] <= position[:, None])
        logits = tl.where(may, logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    # A row that has seen nothing yet has no maximum to be relative to.
    relative_to = tl.where(higher == float("-inf"), 0, higher) if CHECKED else higher
    weights = tl.exp2(logits - relative_to[:, None])
    fade = tl.exp2(highest - relative_to)
    v = load_rows(value, value_t, at, tokens, WIDTH, BLOCK_D, BLOCK_N, CHECKED)
    others = tl.dot(weights.to(v.dtype), v, others * fade[:, None], input_precision=DOT)
    return others, higher, total * fade + tl.sum(weights, 1)


@triton.jit
def _changed_tile(
    query, key, value, out, image, sink, seen, sinks, count, query_t, key_t, value_t, out_t,
    begin, first_changed, queries, tokens, scale, rho, min_image_attention, p,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = begin + tl.arange(0, BLOCK_M)
    position = tokens - queries + rows
    q = load_rows(query, query_t, begin, queries, WIDTH, BLOCK_D, BLOCK_M, True)
    others = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    received = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    to_receivers = tl.zeros((BLOCK_M,), tl.float32)
    to_image_sinks = tl.zeros((BLOCK_M,), tl.float32)
    to_sinks = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.minimum(tokens, tokens - queries + begin + BLOCK_M) if CAUSAL else tokens
    for at in range(0, end, BLOCK_N):
        k = load_rows(key, key_t, at, tokens, WIDTH, BLOCK_D, BLOCK_N, True)
        token = at + tl.arange(0, BLOCK_N)
        visible, is_image, is_sink = kinds(image, sink, seen, token, tokens, MASKED)
        may = visible[None, :]
        if CAUSAL:
            may = may & (token[None, :] <= position[:, None])
        logits = tl.where(may, logits_of(q, k, scale), float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        relative_to = tl.where(higher == float("-inf"), 0, higher)
        weights = tl.exp2(logits - relative_to[:, None])
        fade = tl.exp2(highest - relative_to)
        highest = higher
        sunk = tl.where(is_sink[None, :], weights, 0)
        given = tl.where((is_image & ~is_sink)[None, :], weights, 0)
        total = total * fade + tl.sum(weights, 1)
        to_sinks = to_sinks * fade + tl.sum(sunk, 1)
        to_image_sinks = to_image_sinks * fade + tl.sum(tl.where(is_image[None, :], sunk, 0), 1)
        to_receivers = to_receivers * fade + tl.sum(given, 1)
        plain = tl.where((is_image | is_sink)[None, :], 0, weights)
        v = load_rows(value, value_t, at, tokens, WIDTH, BLOCK_D, BLOCK_N, True)
        others = tl.dot(plain.to(v.dtype), v, others * fade[:, None], input_precision=DOT)
        boosted = (given * BOOST).to(v.dtype)
        received = tl.dot(boosted, v, received * fade[:, None], input_precision=DOT)

    may_change = rows >= first_changed
    kept, gain = changes(
        may_change, total, to_receivers, to_image_sinks, to_sinks, rho, min_image_attention, p
    )
    others += received * ((1 + gain) / BOOST)[:, None]
    relative_to = tl.where(highest == float("-inf"), 0, highest)
    d = tl.arange(0, BLOCK_D)
    for at in range(0, count, SINKS):
        listed = at + tl.arange(0, SINKS) < count
        token = tl.load(sinks + at + tl.arange(0, SINKS), mask=listed, other=0)
        full = listed[:, None] & (d < WIDTH)[None, :]
        k = tl.load(key + token.to(tl.int64)[:, None] * key_t + d[None, :], mask=full, other=0.0)
        v = tl.load(value + token.to(tl.int64)[:, None] * value_t + d[None, :], mask=full, other=0.0)
        may = listed[None, :]
        if CAUSAL:
            may = may & (token[None, :] <= position[:, None])
        weights = tl.exp2(tl.where(may, logits_of(q, k, scale), float("-inf")) - relative_to[:, None])
        others = tl.dot((weights * kept[:, None]).to(v.dtype), v, others, input_precision=DOT)
    total = tl.where(total == 0, 1, total)
    place = out + rows.to(tl.int64)[:, None] * out_t + d[None, :]
    mine = ((rows < queries) & may_change)[:, None] & (d < WIDTH)[None, :]
    tl.store(place, (others / total[:, None]).to(out.dtype.element_ty), mask=mine)
