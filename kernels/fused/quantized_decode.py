"""Decode attention straight from the packed KV cache (ZipVL, arXiv 2410.08584) on CUDA.

With codes u, v of keys and values, key ranges (s_d, z_d) by channel, value ranges (s_t, z_t) by token, c_d by channel,

    q . k_t = (q . z)  +  sum_d (q_d s_d) u_td,        o_d = c_d ( sum_t w_t z_t  +  sum_t (w_t s_t) v_td ),

so codes are unpacked in registers and go into the tensor cores as they are: they are whole numbers below 256, which
float16 holds exactly. The query, times s, is not exact: it is divided by its largest element and given as a sum of
two float16, which together hold 22 bits. The weights, times s_t, are treated alike; for half-precision outputs one
float16 is enough of them. So float32 needs no product slower than float16's, and bfloat16 loses nothing.

`quantized_spans` runs one span of one group's tokens a program, all queries that share a key head at once, and leaves
the largest logit, sums of weights and weighted values; VAR (arXiv 2503.03321) needs them by class, as in
`fused/visual_attention.py`: everything, image tokens that are no sinks, and sinks. `quantized_merge` runs one query a
program: it adds the tail, which is not packed, merges the spans, and applies VAR's gate. Groups are many (64 generated
tokens each), so a launch is not made for each of them but for each number of bits: where a span's tensors lie is told
by a table of addresses, made anew only when the addresses change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from lvlm_fix.kernels.fused.launch import LOG2_E
from lvlm_fix.kernels.fused.quantized_merge import SPAN_BLOCK, TAIL_BLOCK, _combine
from lvlm_fix.kernels.fused.quantized_slots import NUMBERS, group_tensors, slot_kinds, span_table
from lvlm_fix.kernels.fused.quantized_spans import ROWS, _split, configuration
from lvlm_fix.kernels.redistribution import Redistribution
from lvlm_fix.quantization import QuantizedTensor

# A program's span: long enough to outweigh its sums, and so many that each processor has some to choose from.
LONGEST_SPAN, PROGRAMS_A_PROCESSOR = 1024, 4


def span_length(tokens: int, heads: int, processors: int, block: int) -> int:
    """Tokens of a span, whole blocks: those of one launch, of all rows' key heads, make enough programs for a GPU."""
    own = triton.cdiv(tokens * heads, PROGRAMS_A_PROCESSOR * processors)
    return min(triton.cdiv(own, block) * block, LONGEST_SPAN)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _lines(
    groups: Sequence[tuple[QuantizedTensor, QuantizedTensor]],
) -> tuple[dict[int, list[tuple[int, ...]]], int, list[list[Tensor]]]:
    """Groups by their bits, as the table of spans takes them; all their slots; tensors that must live until the end."""
    slot, held = 0, []
    by_bits: dict[int, list[tuple[int, ...]]] = {}
    for keys, values in groups:
        tokens = keys.packed.shape[2]
        if tokens:
            tensors, addresses = group_tensors(keys, values)
            held.append(tensors)
            by_bits.setdefault(keys.bits, []).append((*addresses, tokens, slot))
        slot += tokens
    return by_bits, slot, held


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
    rows, precise = heads // shared * queries, query.dtype == torch.float32
    by_bits, packed, held = _lines(groups)
    slots = packed + tail
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        kinds, start = slot_kinds(key_mask, redistribution, batch, slots, query.device)
        moved = redistribution is not None
        work = []
        for bits, lines in by_bits.items():
            tile = configuration(width, bits, moved, precise)
            own = sum(tokens for *_, tokens, _ in lines)
            span = span_length(own, batch * shared, _processors(query.device), tile["BLOCK"])
            work.append((bits, tile, span_table(tuple(lines), span, query.device)))
        spans = sum(len(table) for *_, table in work)
        numbers = query.new_empty(batch * shared * rows, spans, NUMBERS.value, dtype=torch.float32)
        partial = query.new_empty(batch * shared * rows, spans, 3 if moved else 1, width, dtype=torch.float32)
        scale = LOG2_E * (width**-0.5 if scale is None else scale)
        flags = {"KEY_HEADS": shared, "WIDTH": width, "MASKED": kinds is not None, "MOVED": moved}
        first_span = 0
        for bits, tile, table in work:
            _split[(len(table), batch * shared, triton.cdiv(rows, ROWS))](
                query, kinds, table, numbers, partial, first_span, spans, slots, rows, scale,
                BITS=bits, ROWS=ROWS, PRECISE=precise, **tile, **flags,
            )  # fmt: skip
            first_span += len(table)
        out = torch.empty_like(query)
        gate = (0.0, 0.0, 0.0)
        if redistribution is not None:
            gate = (redistribution.rho, redistribution.min_image_attention, redistribution.p)
        _combine[(batch * heads * queries,)](
            query, tail_key, tail_value, kinds, start, numbers, partial, out,
            spans, slots, tail, rows, queries, scale, *(float(number) for number in gate),
            CHANNELS=triton.next_power_of_2(width), SPAN_BLOCK=SPAN_BLOCK, TAIL_BLOCK=TAIL_BLOCK,
            num_warps=4, **flags,
        )  # fmt: skip
    # Not before: what was copied to be aligned must not be given to anybody else until the launches are queued.
    del held
    return out
