"""The spans of a packed cache and its unpacked tail put together, one query a program, and VAR's gate.

The derivation is in `quantized_decode`; `quantized_spans` leaves a span's largest logit, sums and weighted values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lvlm_fix.kernels.fused.quantized_spans import is_image_sink, is_sink, numbers_of, receives, visible

# Tokens of the tail, or spans, that are taken at once.
TAIL_BLOCK = 32
SPAN_BLOCK = 16


@triton.jit(do_not_specialize=["spans", "slots", "kinds_row", "tail", "columns", "rows", "queries"])
def _combine(
    query,
    tail_key,
    tail_value,
    kinds,
    start,
    numbers,
    partial,
    out,
    spans,
    slots,
    kinds_row,
    tail,
    columns,
    rows,
    queries,
    scale,
    rho,
    min_image_attention,
    p,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPAN_BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    MOVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = row // rows
    item = head // KEY_HEADS
    own = (slots - queries + (row % rows) % queries).to(tl.int32)
    channel = tl.arange(0, CHANNELS)
    there = channel < WIDTH
    q = tl.load(query + row * WIDTH + channel, there, 0.0).to(tl.float32) * scale
    # Sums start below every logit but not at -inf: -inf - -inf is not a number.
    largest = -3.0e38
    total, received, sunk, image_sunk = 0.0, 0.0, 0.0, 0.0
    acc = tl.zeros((CHANNELS,), tl.float32)
    acc_receivers, acc_sinks = acc, acc
    ACCUMULATORS: tl.constexpr = 3 if MOVED else 1

    for begin in range(0, spans, SPAN_BLOCK):
        span = begin + tl.arange(0, SPAN_BLOCK)
        place = numbers_of(numbers, row * spans + span)
        logits = tl.load(place, span < spans, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=0))
        kept, weights = tl.exp2(largest - new), tl.exp2(logits - new)
        largest = new
        total = total * kept + tl.sum(weights * tl.load(place + 1, span < spans, 0.0), axis=0)
        at = ((row * spans + span) * (ACCUMULATORS * WIDTH))[:, None] + channel[None, :]
        inside = (span < spans)[:, None] & there[None, :]
        acc = acc * kept + tl.sum(weights[:, None] * tl.load(partial + at, inside, 0.0), axis=0)
        if MOVED:
            received = received * kept + tl.sum(weights * tl.load(place + 2, span < spans, 0.0), axis=0)
            sunk = sunk * kept + tl.sum(weights * tl.load(place + 3, span < spans, 0.0), axis=0)
            image_sunk = image_sunk * kept + tl.sum(weights * tl.load(place + 4, span < spans, 0.0), axis=0)
            part = tl.load(partial + at + WIDTH, inside, 0.0)
            acc_receivers = acc_receivers * kept + tl.sum(weights[:, None] * part, axis=0)
            part = tl.load(partial + at + 2 * WIDTH, inside, 0.0)
            acc_sinks = acc_sinks * kept + tl.sum(weights[:, None] * part, axis=0)

    for begin in range(0, tail, TAIL_BLOCK):
        token = begin + tl.arange(0, TAIL_BLOCK)
        slot = slots - tail + token
        seen = (token < tail) & (slot <= own)
        if MASKED:
            classes = tl.load(kinds + item * kinds_row + slot, seen, 0).to(tl.int32)
            seen = visible(classes)
        at = (head * columns + token)[:, None] * WIDTH + channel[None, :]
        # What is not seen may be padding that is not a number, so it is not read.
        inside = seen[:, None] & there[None, :]
        k = tl.load(tail_key + at, inside, 0.0).to(tl.float32)
        v = tl.load(tail_value + at, inside, 0.0).to(tl.float32)
        logits = tl.where(seen, tl.sum(k * q[None, :], axis=1), float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=0))
        kept, weights = tl.exp2(largest - new), tl.exp2(logits - new)
        largest = new
        total = total * kept + tl.sum(weights, axis=0)
        acc = acc * kept + tl.sum(weights[:, None] * v, axis=0)
        if MOVED:
            part = tl.where(receives(classes), weights, 0.0)
            received = received * kept + tl.sum(part, axis=0)
            acc_receivers = acc_receivers * kept + tl.sum(part[:, None] * v, axis=0)
            part = tl.where(is_image_sink(classes), weights, 0.0)
            image_sunk = image_sunk * kept + tl.sum(part, axis=0)
            part = tl.where(is_sink(classes), weights, 0.0)
            sunk = sunk * kept + tl.sum(part, axis=0)
            acc_sinks = acc_sinks * kept + tl.sum(part[:, None] * v, axis=0)

    whole = tl.where(total > 0, total, 1.0)
    if MOVED:
        received, sunk, image_sunk = received / whole, sunk / whole, image_sunk / whole
        to_image = received + image_sunk
        gate = (to_image >= min_image_attention) & (received >= rho * to_image)
        # Below the smallest normal number there is nobody to give to.
        gate &= (received >= 1.1754943508222875e-38) & (own >= tl.load(start + item))
        gain = tl.where(gate, p * sunk / tl.where(gate, received, 1.0), 0.0)
        acc += gain * acc_receivers - tl.where(gate, p, 0.0) * acc_sinks
    tl.store(out + row * WIDTH + channel, (acc / whole).to(out.dtype.element_ty), there)
