"""Attention over one span of a packed group's tokens a program (ZipVL, arXiv 2410.08584; VAR, arXiv 2503.03321).

The derivation is in `quantized_decode`; `quantized_merge` puts the spans together. All queries that share a key head
are rows of one program, so that a code is unpacked once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lvlm_fix.kernels.fused.launch import padded_width

# Rows of a program: the fewest that tensor cores multiply. More queries are further programs.
ROWS = 16


def configuration(width: int, moved: bool, precise: bool) -> dict[str, int]:
    """Block sizes of `_split` for a head size, with VAR's two further accumulators or without.

    Unpacked codes of a block's keys or values are BLOCK x CHANNELS float16: 8,192 of them are 32 registers a thread of
    4 warps, beside accumulators of 16 x CHANNELS float32. VAR's accumulators, or weights as two float16 for float32
    (`precise`), take the room of half of that. Wider heads get 8 warps, float32 from half the width on. Products are at
    least 16 deep.
    """
    channels = padded_width(width)
    room = 4096 if moved or precise else 8192
    return {
        "CHANNELS": channels,
        "BLOCK": max(32, min(64, room // channels)),
        "num_warps": 4 if channels <= (64 if precise else 128) else 8,
    }


# Kernels ask these functions and not for the constants of `quantized_slots`: at every launch, Triton compares each
# constant of a module that a kernel reads with what it was, for a microsecond or two of the host.
@triton.jit
def visible(kinds):
    return (kinds & 1) != 0


@triton.jit
def receives(kinds):
    return (kinds & 2) != 0


@triton.jit
def is_sink(kinds):
    return (kinds & 4) != 0


@triton.jit
def is_image_sink(kinds):
    return (kinds & 8) != 0


@triton.jit
def line_of(table, span):
    return table + span * 12


@triton.jit
def numbers_of(numbers, item):
    return numbers + item * 5


@triton.jit
def _aligned(work, place: tl.constexpr, kind: tl.constexpr):
    """The address in a column of the table; the launcher has seen to its alignment."""
    return tl.multiple_of(tl.load(work + place).to(tl.pointer_type(kind)), 16)


@triton.jit
def _unpack(packed, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Codes (TOKENS, CHANNELS) float16 of bytes (TOKENS, bytes), first code in the lowest bits."""
    if BITS == 8:
        codes = packed
    elif BITS == 4:
        codes = tl.join(packed & 15, packed >> 4)
    else:
        # join puts its second argument last: code 2 j + i is the i-th of the outer join and the j-th of the inner.
        even = tl.join(packed & 3, (packed >> 4) & 3)
        codes = tl.join(even, tl.join((packed >> 2) & 3, packed >> 6))
    return codes.reshape(TOKENS, CHANNELS).to(tl.float16)


@triton.jit
def _halves(x):
    """Rows divided by their largest size, as a sum of two float16, and that size."""
    largest = tl.max(tl.abs(x), axis=1)
    largest = tl.where(largest > 0, largest, 1.0)
    x = x / largest[:, None]
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16), largest


@triton.jit
def _weighted(acc, weights, scale, codes, PRECISE: tl.constexpr):
    """acc plus the values' codes, weighted."""
    high, low, largest = _halves(weights * scale[None, :])
    part = tl.dot(high, codes)
    if PRECISE:
        part += tl.dot(low, codes)
    return acc + part * largest[:, None]


@triton.jit(do_not_specialize=["kinds_row", "first_span", "spans", "rows"])
def _split(
    query, kinds, table, numbers, partial, first_span, spans, kinds_row, rows, scale,
    KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    BITS: tl.constexpr, OTHER_BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, MOVED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """A span of tokens at one of two numbers of bits: a launch of its own would cost the host more than the GPU."""
    if OTHER_BITS == BITS:
        _attend(
            query, kinds, table, numbers, partial, first_span, spans, kinds_row, rows, scale,
            KEY_HEADS, WIDTH, CHANNELS, BITS, BLOCK, ROWS, MASKED, MOVED, PRECISE,
        )  # fmt: skip
    else:
        if tl.load(line_of(table, tl.program_id(0)) + 11) == BITS:
            _attend(
                query, kinds, table, numbers, partial, first_span, spans, kinds_row, rows, scale,
                KEY_HEADS, WIDTH, CHANNELS, BITS, BLOCK, ROWS, MASKED, MOVED, PRECISE,
            )  # fmt: skip
        else:
            _attend(
                query, kinds, table, numbers, partial, first_span, spans, kinds_row, rows, scale,
                KEY_HEADS, WIDTH, CHANNELS, OTHER_BITS, BLOCK, ROWS, MASKED, MOVED, PRECISE,
            )  # fmt: skip


@triton.jit
def _attend(
    query, kinds, table, numbers, partial, first_span, spans, kinds_row, rows, scale,
    KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, MOVED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    span, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    PER_BYTE: tl.constexpr = 8 // BITS
    MIDDLE: tl.constexpr = (2**BITS - 1) / 2
    BYTES: tl.constexpr = CHANNELS // PER_BYTE
    USED: tl.constexpr = (WIDTH + PER_BYTE - 1) // PER_BYTE
    channel, byte = tl.arange(0, CHANNELS), tl.arange(0, BYTES)
    there = channel < WIDTH
    work = line_of(table, span)
    kind: tl.constexpr = query.dtype.element_ty
    key_codes, value_codes = _aligned(work, 0, tl.uint8), _aligned(work, 3, tl.uint8)
    value_scale, value_low = _aligned(work, 4, kind), _aligned(work, 5, kind)
    tokens, begin, end, slot = (
        tl.load(work + 7),
        tl.load(work + 8).to(tl.int32),
        tl.load(work + 9).to(tl.int32),
        tl.load(work + 10),
    )
    place = head * WIDTH + channel
    key_scale = tl.load(_aligned(work, 1, kind) + place, there, 0.0).to(tl.float32)
    key_low = tl.load(_aligned(work, 2, kind) + place, there, 0.0).to(tl.float32)

    at = (head * rows + row)[:, None] * WIDTH + channel[None, :]
    q = tl.load(query + at, (row < rows)[:, None] & there[None, :], 0.0).to(tl.float32) * scale
    offset = tl.sum(q * key_low[None, :], axis=1)
    q_high, q_low, q_size = _halves(q * key_scale[None, :])

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc, low = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS,), tl.float32)
    if MOVED:
        received, sunk, image_sunk = total, total, total
        acc_receivers, low_receivers, acc_sinks, low_sinks = acc, low, acc, low
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        code_at = (head * tokens + token)[:, None] * USED + byte[None, :]
        within = inside[:, None] & (byte < USED)[None, :]
        codes = _unpack(tl.load(key_codes + code_at, within, 0), BITS, BLOCK, CHANNELS)
        logits = tl.dot(q_high, codes.trans()) + tl.dot(q_low, codes.trans())
        logits = logits * q_size[:, None] + offset[:, None]
        seen = inside
        if MASKED:
            classes = tl.load(kinds + (head // KEY_HEADS) * kinds_row + slot + token, inside, 0).to(tl.int32)
            seen = visible(classes)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=1))
        # Where nothing has been seen yet, -inf - -inf is not a number.
        base = tl.where(new == float("-inf"), 0.0, new)
        kept = tl.exp2(largest - base)
        weights = tl.exp2(logits - base[:, None])
        largest = new

        # Values' codes count from the middle, which float16 holds too: the mean of thousands of values is near zero,
        # and it would be the difference of two large sums if they counted from the minimum.
        codes = _unpack(tl.load(value_codes + code_at, within, 0), BITS, BLOCK, CHANNELS) - MIDDLE
        s = tl.load(value_scale + head * tokens + token, inside, 0.0).to(tl.float32)
        z = tl.load(value_low + head * tokens + token, inside, 0.0).to(tl.float32) + MIDDLE * s
        total = total * kept + tl.sum(weights, axis=1)
        low = low * kept + tl.sum(weights * z[None, :], axis=1)
        acc = _weighted(acc * kept[:, None], weights, s, codes, PRECISE)
        if MOVED:
            part = tl.where(receives(classes)[None, :], weights, 0.0)
            received = received * kept + tl.sum(part, axis=1)
            low_receivers = low_receivers * kept + tl.sum(part * z[None, :], axis=1)
            acc_receivers = _weighted(acc_receivers * kept[:, None], part, s, codes, PRECISE)
            part = tl.where(is_image_sink(classes)[None, :], weights, 0.0)
            image_sunk = image_sunk * kept + tl.sum(part, axis=1)
            part = tl.where(is_sink(classes)[None, :], weights, 0.0)
            sunk = sunk * kept + tl.sum(part, axis=1)
            low_sinks = low_sinks * kept + tl.sum(part * z[None, :], axis=1)
            acc_sinks = _weighted(acc_sinks * kept[:, None], part, s, codes, PRECISE)

    channel_scale = tl.load(_aligned(work, 6, kind) + place, there, 0.0).to(tl.float32)[None, :]
    item = (head * rows + row) * spans + first_span + span
    mine = numbers_of(numbers, item)
    tl.store(mine, largest, row < rows)
    tl.store(mine + 1, total, row < rows)
    ACCUMULATORS: tl.constexpr = 3 if MOVED else 1
    at = (item * (ACCUMULATORS * WIDTH))[:, None] + channel[None, :]
    there = (row < rows)[:, None] & there[None, :]
    tl.store(partial + at, (acc + low[:, None]) * channel_scale, there)
    if MOVED:
        tl.store(mine + 2, received, row < rows)
        tl.store(mine + 3, sunk, row < rows)
        tl.store(mine + 4, image_sunk, row < rows)
        tl.store(partial + at + WIDTH, (acc_receivers + low_receivers[:, None]) * channel_scale, there)
        tl.store(partial + at + 2 * WIDTH, (acc_sinks + low_sinks[:, None]) * channel_scale, there)
