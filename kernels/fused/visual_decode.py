"""Decoding with VAR's redistribution inside (arXiv 2503.03321): few queries, the keys split over programs.

One row a head is bound by reading keys and values once; one program a head would leave most of a GPU idle. So
each program takes a run of the keys and all query heads that share them, and writes what the whole row is made of,
unnormalised and relative to its own maximum m: the weighted values of sinks, receivers and others, and the
sums s, s_receivers, s_image_sink, s_sink. Sums to different maxima add up after a factor exp(m_i - max m). With all
runs together the gate is known, and the row is

    out = (others + (1 - p) * sinks + (1 + p * s_sink / s_receivers) * received) / s.

One row has room for three accumulators, so here sinks need no second visit. Whether an item has an image sink at
all (without one nothing changes) each program says of its own run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.fused.launch import cdiv, next_power_of_2, padded_width, with_near_elements
from lvlm_fix.kernels.fused.visual_common import (
    BOOST,
    DOT,
    as_bytes,
    changes,
    kinds,
    load_rows,
    logits_of,
    numbers_of,
)
from lvlm_fix.kernels.redistribution import Redistribution

__all__ = ["decode_configuration", "run_length", "visual_decode"]

# tl.dot takes no fewer rows.
ROWS = 16
# Of each row and run: its maximum, the sums of all, receivers, image sinks and sinks, and how many image sinks it has.
NUMBERS = tl.constexpr(6)
# Runs that one reducing program adds up.
MOST_RUNS = 64
# Warps of that program: MOST_RUNS rows of the widest head are 64 registers each.
COMBINING_WARPS = 8


class Decoding(NamedTuple):
    """Keys of a block, warps, pipeline stages, and programs that a multiprocessor of sm_80 or sm_90 holds at once."""

    keys: int
    warps: int
    stages: int
    resident: int


def decode_configuration(width: int, itemsize: int) -> Decoding:
    """Tiles for heads of `width` elements of `itemsize` bytes: 48 KiB of keys and values on their way.

    That leaves room for more than one program on a multiprocessor, and stays below the 99 KiB of shared memory of
    the smallest Ampere and Ada chips. Every warp holds all rows of the query, so wide heads and float32 take twice
    the warps. How many programs fit is counted in registers and shared memory, see the ahead-of-time test: with more
    than fit, the last of them would run alone at the end.
    """
    block = padded_width(width)
    if itemsize == 4:
        return Decoding(32, 8, 2, 1)
    if block <= 128:
        return Decoding(32, 4, 4, 4 if block <= 64 else 3)
    return Decoding(32, 8, 3, 1)


def run_length(tokens: int, programs: int, places: int, keys: int) -> int:
    """Keys a program takes, whole blocks of `keys`, so that `programs` times the runs fill the GPU's `places`."""
    runs = min(MOST_RUNS, max(1, places // programs))
    return max(2, cdiv(cdiv(tokens, runs), keys)) * keys


def visual_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: Redistribution,
    causal: bool = True,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    *,
    multiprocessors: int = 1,
) -> Tensor:
    """Arguments and result of `redistributed_attention`, for few queries; never waits for the device."""
    batch, heads, queries, width = query.shape
    shared, tokens = key.shape[1:3]
    group = heads // shared
    query, key, value = with_near_elements(query), with_near_elements(key), with_near_elements(value)
    # In the order that the layer's next product wants.
    out = torch.empty(batch, queries, heads, width, dtype=query.dtype, device=query.device).transpose(1, 2)
    image, sink = as_bytes(given.image_mask), as_bytes(given.sink_mask)
    seen = as_bytes(key_mask) if key_mask is not None else sink
    first = given.first_queries()
    tile = decode_configuration(width, query.element_size())
    row_tiles = cdiv(group * queries, ROWS)
    length = run_length(tokens, batch * shared * row_tiles, tile.resident * multiprocessors, tile.keys)
    runs = cdiv(tokens, length)
    # Of each row and run: weighted values of others, receivers and sinks; behind all those, NUMBERS numbers of each.
    size = batch * heads * queries * runs * (3 * width + NUMBERS.value)
    partial = torch.empty(size, dtype=torch.float32, device=query.device)
    block_d = padded_width(width)
    scale, *gate = numbers_of(given, width, scale)
    _visual_decode[(runs, shared * row_tiles, batch)](
        query, key, value, image, sink, seen, partial,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        image.stride(0), sink.stride(0), seen.stride(0),
        shared, group, queries, tokens, length, scale,
        CAUSAL=causal and queries > 1, MASKED=key_mask is not None,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=ROWS, BLOCK_N=tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _combine[(heads * queries, batch)](
        partial, first, out, 0 if len(first) == 1 else 1, queries, tokens, runs, *gate,
        WIDTH=width, BLOCK_D=block_d, BLOCK_R=max(2, next_power_of_2(runs)), num_warps=COMBINING_WARPS,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["image_b", "sink_b", "seen_b", "tokens", "queries", "length"])
def _visual_decode(
    query, key, value, image, sink, seen, partial,
    query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t, image_b, sink_b, seen_b,
    shared, group, queries, tokens, length, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One run of keys for BLOCK_M of the rows (query heads x queries) that share them."""
    run, runs, item = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    key_head, row_tile = tl.program_id(1) % shared, tl.program_id(1) // shared
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < group * queries
    head, asking = key_head * group + row // queries, row % queries
    position = tokens - queries + asking
    d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (d < WIDTH)[None, :]
    place = query + item * query_b + head.to(tl.int64) * query_h + asking.to(tl.int64) * query_t
    q = tl.load(place[:, None] + d[None, :], mask=inside, other=0.0)
    key += item * key_b + tl.cast(key_head, tl.int64) * key_h
    value += item * value_b + tl.cast(key_head, tl.int64) * value_h
    image += item * image_b
    sink += item * sink_b
    seen += item * seen_b

    others = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    received = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sinks = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    to_receivers = tl.zeros((BLOCK_M,), tl.float32)
    to_image_sinks = tl.zeros((BLOCK_M,), tl.float32)
    to_sinks = tl.zeros((BLOCK_M,), tl.float32)
    found = 0
    for at in range(run * length, tl.minimum((run + 1) * length, tokens), BLOCK_N):
        k = load_rows(key, key_t, at, tokens, WIDTH, BLOCK_D, BLOCK_N, True)
        token = at + tl.arange(0, BLOCK_N)
        visible, is_image, is_sink = kinds(image, sink, seen, token, tokens, MASKED)
        found += tl.sum((is_image & is_sink).to(tl.int32))
        may = visible[None, :]
        if CAUSAL:
            may = may & (token[None, :] <= position[:, None])
        logits = tl.where(may, logits_of(q, k, scale), float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen nothing yet has no maximum to be relative to.
        relative_to = tl.where(higher == float("-inf"), 0, higher)
        weights = tl.exp2(logits - relative_to[:, None])
        fade = tl.exp2(highest - relative_to)
        highest = higher
        sunk = tl.where(is_sink[None, :], weights, 0)
        given = tl.where((is_image & ~is_sink)[None, :], weights, 0)
        plain = tl.where((is_image | is_sink)[None, :], 0, weights)
        total = total * fade + tl.sum(weights, 1)
        to_receivers = to_receivers * fade + tl.sum(given, 1)
        to_sinks = to_sinks * fade + tl.sum(sunk, 1)
        to_image_sinks = to_image_sinks * fade + tl.sum(tl.where(is_image[None, :], sunk, 0), 1)
        v = load_rows(value, value_t, at, tokens, WIDTH, BLOCK_D, BLOCK_N, True)
        others = tl.dot(plain.to(v.dtype), v, others * fade[:, None], input_precision=DOT)
        received = tl.dot((given * BOOST).to(v.dtype), v, received * fade[:, None], input_precision=DOT)
        sinks = tl.dot(sunk.to(v.dtype), v, sinks * fade[:, None], input_precision=DOT)

    # Rows in the order (item, head, query), which is that of both tensors.
    line = (item * shared * group + head) * queries + asking
    place = partial + ((line * runs + run) * 3 * WIDTH)[:, None] + d[None, :]
    tl.store(place, others, mask=inside)
    tl.store(place + WIDTH, received * (1 / BOOST), mask=inside)
    tl.store(place + 2 * WIDTH, sinks, mask=inside)
    lines = tl.num_programs(2).to(tl.int64) * shared * group * queries
    place = partial + lines * runs * 3 * WIDTH + line * NUMBERS * runs + run
    tl.store(place, highest, mask=real)
    tl.store(place + runs, total, mask=real)
    tl.store(place + 2 * runs, to_receivers, mask=real)
    tl.store(place + 3 * runs, to_image_sinks, mask=real)
    tl.store(place + 4 * runs, to_sinks, mask=real)
    tl.store(place + 5 * runs, tl.full((BLOCK_M,), 0.0, tl.float32) + found, mask=real)


@triton.jit(do_not_specialize=["queries", "tokens", "runs"])
def _combine(
    partial, first_query, out, first_b, queries, tokens, runs, rho, min_image_attention, p,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One row: its runs to one maximum, the gate, the factors of its classes."""
    heads = tl.num_programs(0) // queries
    head, asking = tl.program_id(0) // queries, tl.program_id(0) % queries
    item = tl.program_id(1).to(tl.int64)
    run, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    real = run < runs
    line = (item * heads + head) * queries + asking
    lines = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
    place = partial + lines * runs * 3 * WIDTH + line * NUMBERS * runs + run
    highest = tl.load(place, mask=real, other=float("-inf"))
    top = tl.max(highest, 0)
    factor = tl.exp2(highest - tl.where(top == float("-inf"), 0, top))
    total = tl.sum(factor * tl.load(place + runs, mask=real, other=0.0), 0)
    to_receivers = tl.sum(factor * tl.load(place + 2 * runs, mask=real, other=0.0), 0)
    to_image_sinks = tl.sum(factor * tl.load(place + 3 * runs, mask=real, other=0.0), 0)
    to_sinks = tl.sum(factor * tl.load(place + 4 * runs, mask=real, other=0.0), 0)
    found = tl.sum(tl.load(place + 5 * runs, mask=real, other=0.0), 0)
    first = tl.load(first_query + item * first_b)
    may_change = (found > 0) & (tokens - queries + asking >= first)
    kept, gain = changes(
        may_change, total, to_receivers, to_image_sinks, to_sinks, rho, min_image_attention, p
    )
    inside = real[:, None] & (d < WIDTH)[None, :]
    place = partial + ((line * runs + run) * 3 * WIDTH)[:, None] + d[None, :]
    row = tl.load(place, mask=inside, other=0.0)
    row += (1 + gain) * tl.load(place + WIDTH, mask=inside, other=0.0)
    row += kept * tl.load(place + 2 * WIDTH, mask=inside, other=0.0)
    row = tl.sum(row * factor[:, None], 0) / tl.where(total == 0, 1, total)
    place = out + ((item * queries + asking) * heads + head) * WIDTH + d
    tl.store(place, row.to(out.dtype.element_ty), mask=d < WIDTH)
