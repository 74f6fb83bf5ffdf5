"""Decode attention straight from the packed KV cache (ZipVL, arXiv 2410.08584) on CUDA.

With codes u, v of keys and values, key ranges (s_d, z_d) by channel, value ranges (s_t, z_t) by token, c_d by channel,

    q . k_t = (q . z)  +  sum_d (q_d s_d) u_td,        o_d = c_d ( sum_t w_t z_t  +  sum_t (w_t s_t) v_td ),

so codes are unpacked in registers and go into the tensor cores as they are: they are whole numbers below 256, which
float16 holds exactly. The query, times s, is not exact: it is divided by its largest element and given as a sum of
two float16, which together hold 22 bits. The weights, times s_t, are treated alike; for half-precision outputs one
float16 is enough of them. So float32 needs no product slower than float16's, and bfloat16 loses nothing.

`_split` runs one span of one group's tokens a program, all queries that share a key head at once, and leaves the
largest logit, sums of weights and weighted values; VAR (arXiv 2503.03321) needs them by class, as in
`fused/visual_attention.py`: everything, image tokens that are no sinks, and sinks. `_combine` runs one query a
program: it adds the tail, which is not packed, merges the spans, and applies VAR's gate. Groups are many (64 generated
tokens each), so a launch is not made for each of them but for each number of bits: where a span's tensors lie is told
by a table of addresses, made anew only when the addresses change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.redistribution import Redistribution
from lvlm_fix.quantization import QuantizedTensor

LOG2_E = 1.4426950408889634
# Rows of a program: the fewest that tensor cores multiply. More queries are further programs.
ROWS = 16
# Tokens of the tail, or spans, that `_combine` takes at once.
TAIL_BLOCK = 32
SPAN_BLOCK = 16
# A program's span: long enough to outweigh its sums, and so many that each processor has some to choose from.
LONGEST_SPAN, PROGRAMS_A_PROCESSOR = 1024, 4
# What kind of token a slot holds, as bits of one byte.
VISIBLE, RECEIVER, SINK, IMAGE_SINK = (tl.constexpr(bit) for bit in (1, 2, 4, 8))
# Columns of the table of spans: seven addresses, then the group's tokens, where the span begins and ends, and the
# slot of the group's first token.
COLUMNS = tl.constexpr(11)
# Numbers a span leaves a query: the largest logit, and the sums of the weights of four classes.
NUMBERS = tl.constexpr(5)


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


@triton.jit
def _split(
    query,
    kinds,
    table,
    numbers,
    partial,
    first_span,
    spans,
    slots,
    rows,
    scale,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BYTES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    MOVED: tl.constexpr,
    PRECISE: tl.constexpr,
):
    span, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    PER_BYTE: tl.constexpr = 8 // BITS
    MIDDLE: tl.constexpr = (2**BITS - 1) / 2
    CHANNELS: tl.constexpr = BYTES * PER_BYTE
    USED: tl.constexpr = (WIDTH + PER_BYTE - 1) // PER_BYTE
    channel, byte = tl.arange(0, CHANNELS), tl.arange(0, BYTES)
    there = channel < WIDTH
    work = table + span * COLUMNS
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
            classes = tl.load(kinds + (head // KEY_HEADS) * slots + slot + token, inside, 0).to(tl.int32)
            seen = (classes & VISIBLE) != 0
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
            part = tl.where(((classes & RECEIVER) != 0)[None, :], weights, 0.0)
            received = received * kept + tl.sum(part, axis=1)
            low_receivers = low_receivers * kept + tl.sum(part * z[None, :], axis=1)
            acc_receivers = _weighted(acc_receivers * kept[:, None], part, s, codes, PRECISE)
            part = tl.where(((classes & IMAGE_SINK) != 0)[None, :], weights, 0.0)
            image_sunk = image_sunk * kept + tl.sum(part, axis=1)
            part = tl.where(((classes & SINK) != 0)[None, :], weights, 0.0)
            sunk = sunk * kept + tl.sum(part, axis=1)
            low_sinks = low_sinks * kept + tl.sum(part * z[None, :], axis=1)
            acc_sinks = _weighted(acc_sinks * kept[:, None], part, s, codes, PRECISE)

    channel_scale = tl.load(_aligned(work, 6, kind) + place, there, 0.0).to(tl.float32)[None, :]
    item = (head * rows + row) * spans + first_span + span
    tl.store(numbers + item * NUMBERS, largest, row < rows)
    tl.store(numbers + item * NUMBERS + 1, total, row < rows)
    ACCUMULATORS: tl.constexpr = 3 if MOVED else 1
    at = (item * (ACCUMULATORS * WIDTH))[:, None] + channel[None, :]
    there = (row < rows)[:, None] & there[None, :]
    tl.store(partial + at, (acc + low[:, None]) * channel_scale, there)
    if MOVED:
        tl.store(numbers + item * NUMBERS + 2, received, row < rows)
        tl.store(numbers + item * NUMBERS + 3, sunk, row < rows)
        tl.store(numbers + item * NUMBERS + 4, image_sunk, row < rows)
        tl.store(partial + at + WIDTH, (acc_receivers + low_receivers[:, None]) * channel_scale, there)
        tl.store(partial + at + 2 * WIDTH, (acc_sinks + low_sinks[:, None]) * channel_scale, there)


@triton.jit
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
    tail,
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
        place = numbers + (row * spans + span) * NUMBERS
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
            classes = tl.load(kinds + item * slots + slot, seen, 0).to(tl.int32)
            seen = (classes & VISIBLE) != 0
        at = (head * tail + token)[:, None] * WIDTH + channel[None, :]
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
            part = tl.where((classes & RECEIVER) != 0, weights, 0.0)
            received = received * kept + tl.sum(part, axis=0)
            acc_receivers = acc_receivers * kept + tl.sum(part[:, None] * v, axis=0)
            part = tl.where((classes & IMAGE_SINK) != 0, weights, 0.0)
            image_sunk = image_sunk * kept + tl.sum(part, axis=0)
            part = tl.where((classes & SINK) != 0, weights, 0.0)
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


def configuration(width: int, bits: int, moved: bool, precise: bool) -> dict[str, int]:
    """Block sizes of `_split` for a head size and a number of bits, with VAR's two further accumulators or without.

    Unpacked codes of a block's keys or values are BLOCK x CHANNELS float16: 8,192 of them are 32 registers a thread of
    4 warps, beside accumulators of 16 x CHANNELS float32. VAR's accumulators, or weights as two float16 for float32
    (`precise`), take the room of half of that. Wider heads get 8 warps. Products are at least 16 deep.
    """
    per_byte = 8 // bits
    byte_count = max(triton.next_power_of_2(triton.cdiv(width, per_byte)), 16 // per_byte)
    channels = byte_count * per_byte
    room = 4096 if moved or precise else 8192
    return {
        "BYTES": byte_count,
        "BLOCK": max(32, min(64, room // channels)),
        "num_warps": 4 if channels <= 128 else 8,
    }


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# Two tables a layer of a deep model, several times over.
@lru_cache(maxsize=1024)
def _table(groups: tuple[tuple[int, ...], ...], span: int, device: torch.device) -> Tensor:
    """One line a span, of COLUMNS numbers: the same addresses and sizes make the same table."""
    lines = [
        (*addresses, tokens, begin, min(begin + span, tokens), slot)
        for *addresses, tokens, slot in groups
        for begin in range(0, tokens, span)
    ]
    return torch.tensor(lines, dtype=torch.long, device=device)


def _tensors(keys: QuantizedTensor, values: QuantizedTensor) -> list[Tensor]:
    """The tensors of a group in the order of the table, contiguous and aligned."""
    channel_scale = values.channel_scale
    if channel_scale is None:
        channel_scale = torch.ones_like(keys.scale)
    parts = (keys.packed, keys.scale, keys.zero_point, values.packed, values.scale, values.zero_point)
    tensors = [x.contiguous() for x in (*parts, channel_scale)]
    return [x.clone() if x.data_ptr() % 16 else x for x in tensors]


def _kinds(
    key_mask: Tensor | None, given: Redistribution | None, rows: int, slots: int, query: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The classes of all slots (R, S) uint8, and the first slot (R,) of a query that may be changed."""
    if given is None:
        return None if key_mask is None else key_mask.contiguous().view(torch.uint8), None
    if key_mask is None:
        key_mask = torch.ones(rows, slots, dtype=torch.bool, device=query.device)
    image, sink = given.image_mask & key_mask, given.sink_mask & key_mask
    kinds = VISIBLE.value * key_mask + RECEIVER.value * (image & ~sink)
    kinds = kinds + SINK.value * sink + IMAGE_SINK.value * (image & sink)
    start = torch.where((image & sink).any(-1), given.first_queries().to(torch.long), slots)
    return kinds.to(torch.uint8), start.contiguous()


def fused_quantized_decode(
    query: Tensor,
    groups: Sequence[tuple[QuantizedTensor, QuantizedTensor]],
    tail_key: Tensor,
    tail_value: Tensor,
    key_mask: Tensor | None,
    redistribution: Redistribution | None,
    scale: float | None,
) -> Tensor:
    """`kernels.quantized_decode` by Triton, inputs unchecked."""
    query, tail_key, tail_value = query.contiguous(), tail_key.contiguous(), tail_value.contiguous()
    batch, heads, queries, width = query.shape
    shared, tail = tail_key.shape[1:3]
    rows = heads // shared * queries
    device = query.device
    slot, held = 0, []
    by_bits: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for keys, values in groups:
        tensors = _tensors(keys, values)
        held.append(tensors)
        tokens = keys.shape[2]
        if tokens:
            addresses = [x.data_ptr() for x in tensors]
            by_bits.setdefault((keys.bits, values.bits), []).append((*addresses, tokens, slot))
        slot += tokens
    slots = slot + tail
    programs = PROGRAMS_A_PROCESSOR * _processors(device)
    longest = triton.next_power_of_2(triton.cdiv(slots * batch * shared, programs))
    kinds, start = _kinds(key_mask, redistribution, batch, slots, query)
    moved = redistribution is not None
    work = []
    for (bits, _), lines in by_bits.items():
        tile = configuration(width, bits, moved, query.dtype == torch.float32)
        table = _table(tuple(lines), min(max(longest, tile["BLOCK"]), LONGEST_SPAN), device)
        work.append((bits, tile, table))
    spans = sum(len(table) for *_, table in work)
    numbers = query.new_empty(batch * shared * rows, spans, NUMBERS.value, dtype=torch.float32)
    partial = query.new_empty(batch * shared * rows, spans, 3 if moved else 1, width, dtype=torch.float32)
    scale = LOG2_E * (width**-0.5 if scale is None else scale)
    flags = {"KEY_HEADS": shared, "WIDTH": width, "MASKED": kinds is not None, "MOVED": moved}
    first_span = 0
    for bits, tile, table in work:
        _split[(len(table), batch * shared, triton.cdiv(rows, ROWS))](
            query,
            kinds,
            table,
            numbers,
            partial,
            first_span,
            spans,
            slots,
            rows,
            scale,
            BITS=bits,
            ROWS=ROWS,
            PRECISE=query.dtype == torch.float32,
            **tile,
            **flags,
        )
        first_span += len(table)
    out = torch.empty_like(query)
    gate = (0.0, 0.0, 0.0)
    if redistribution is not None:
        gate = (redistribution.rho, redistribution.min_image_attention, redistribution.p)
    _combine[(batch * heads * queries,)](
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
        tail,
        rows,
        queries,
        scale,
        *(float(number) for number in gate),
        CHANNELS=triton.next_power_of_2(width),
        SPAN_BLOCK=SPAN_BLOCK,
        TAIL_BLOCK=TAIL_BLOCK,
        num_warps=4,
        **flags,
    )
    return out
