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
tokens each), so a launch is not made for each of them but for those of 4 and 2 bits, and for those of 8: where a span's
tensors lie is told by a table of addresses. All that does not change from token to token is found once for the same
groups (`_plan`): each small question costs the host as much as a launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvlm_fix.kernels.dispatch import Groups, once_for_groups
from lvlm_fix.kernels.fused.launch import LOG2_E, cdiv, multiprocessors, next_power_of_2, on_device_of
from lvlm_fix.kernels.fused.quantized_merge import SPAN_BLOCK, TAIL_BLOCK, _combine
from lvlm_fix.kernels.fused.quantized_slots import NUMBERS, group_tensors, slot_kinds, span_table
from lvlm_fix.kernels.fused.quantized_spans import ROWS, _split, configuration
from lvlm_fix.kernels.redistribution import Redistribution

# A program's span: long enough to outweigh its sums, and so many that each processor has some to choose from.
LONGEST_SPAN, PROGRAMS_A_PROCESSOR = 1024, 4
# Numbers of bits that are read by one launch, of halves and of float32. Others would spill registers.
SHARED_LAUNCHES, PRECISE_LAUNCHES = ((4, 2), (8,)), ((4,), (2,), (8,))


def span_length(tokens: int, heads: int, processors: int, block: int) -> int:
    """Tokens of a span, whole blocks: those of one launch, of all rows' key heads, make enough programs for a GPU."""
    own = cdiv(tokens * heads, PROGRAMS_A_PROCESSOR * processors)
    return min(cdiv(own, block) * block, LONGEST_SPAN)


@dataclass(frozen=True)
class Plan:
    """How packed groups are read.

    Attributes:
        slots: of all groups.
        spans: of all launches.
        launches: of each the first of its spans, its table of them, how many they are, and the kernel's constants.
        held: tensors whose addresses are in the tables.
    """

    slots: int
    spans: int
    launches: list[tuple[int, Tensor, int, dict[str, int]]]
    held: list[list[Tensor]]


@once_for_groups
def _plan(groups: Groups, width: int, moved: bool, precise: bool) -> Plan:
    """How the groups are read, in as few launches as there can be."""
    slots, held = 0, []
    by_bits: dict[int, list[tuple[int, ...]]] = {}
    for keys, values in groups:
        tokens = keys.packed.shape[2]
        if tokens:
            tensors, addresses = group_tensors(keys, values)
            held.append(tensors)
            by_bits.setdefault(keys.bits, []).append((*addresses, tokens, slots, keys.bits))
        slots += tokens
    spans, launches = 0, []
    tile = configuration(width, moved, precise)
    for kinds in PRECISE_LAUNCHES if precise else SHARED_LAUNCHES:
        lines = [line for bits in kinds for line in by_bits.get(bits, [])]
        if not lines:
            continue
        bits, other = lines[0][-1], lines[-1][-1]
        codes = held[0][0]
        processors = multiprocessors(codes.device) if codes.is_cuda else 1
        heads, tokens = codes.shape[0] * codes.shape[1], sum(tokens for *_, tokens, _, _ in lines)
        table = span_table(lines, span_length(tokens, heads, processors, tile["BLOCK"]), codes.device)
        launches.append((spans, table, len(table), {"BITS": bits, "OTHER_BITS": other, **tile}))
        spans += len(table)
    return Plan(slots, spans, launches, held)


def fused_quantized_decode(
    query: Tensor,
    groups: Groups,
    tail_key: Tensor,
    tail_value: Tensor,
    key_mask: Tensor | None,
    redistribution: Redistribution | None,
    scale: float | None,
) -> Tensor:
    """`kernels.quantized_decode` by Triton, inputs unchecked."""
    slots = tail_key.shape[2] + sum(keys.packed.shape[2] for keys, _ in groups)
    kinds, start = slot_kinds(key_mask, redistribution, len(query), slots, query.device)
    return decode_by_kinds(query, groups, tail_key, tail_value, kinds, start, redistribution, scale)


def decode_by_kinds(
    query: Tensor,
    groups: Groups,
    tail_key: Tensor,
    tail_value: Tensor,
    kinds: Tensor | None,
    start: Tensor | None,
    redistribution: Redistribution | None,
    scale: float | None,
) -> Tensor:
    """The same by `slot_kinds`, of at least as many slots; of `redistribution` only the numbers are read."""
    query = query.contiguous()
    batch, heads, queries, width = query.shape
    tail_key, tail_value, columns = _in_columns(tail_key, tail_value)
    shared, tail = tail_key.shape[1:3]
    rows, moved = heads // shared * queries, redistribution is not None
    precise = query.dtype == torch.float32
    scale = LOG2_E * (width**-0.5 if scale is None else scale)
    kinds_row = 0 if kinds is None else kinds.stride(0)
    flags = {"KEY_HEADS": shared, "WIDTH": width, "MASKED": kinds is not None, "MOVED": moved}
    with on_device_of(query):
        # Tables, and what was copied to be aligned, must not be given to anybody else until the launches are queued.
        plan = _plan(groups, width, moved, precise)
        spans, out = plan.spans, torch.empty_like(query)
        size = batch * shared * rows, spans
        numbers = query.new_empty(*size, NUMBERS, dtype=torch.float32)
        partial = query.new_empty(*size, 3 if moved else 1, width, dtype=torch.float32)
        for first_span, table, count, constants in plan.launches:
            _split[(count, batch * shared, cdiv(rows, ROWS))](
                query, kinds, table, numbers, partial, first_span, spans, kinds_row, rows, scale,
                ROWS=ROWS, PRECISE=precise, **constants, **flags,
            )  # fmt: skip
        gate = (0.0, 0.0, 0.0)
        if redistribution is not None:
            gate = (redistribution.rho, redistribution.min_image_attention, redistribution.p)
        _combine[(batch * heads * queries,)](
            query, tail_key, tail_value, kinds, start, numbers, partial, out,
            spans, plan.slots + tail, kinds_row, tail, columns, rows, queries, scale, *map(float, gate),
            CHANNELS=next_power_of_2(width), SPAN_BLOCK=SPAN_BLOCK, TAIL_BLOCK=TAIL_BLOCK, num_warps=4, **flags,
        )  # fmt: skip
    return out


def _in_columns(tail_key: Tensor, tail_value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values (R, K, N, D) as the first N of the columns of a contiguous tensor, and its number of columns."""
    columns = tail_key.stride(1) // tail_key.shape[3]
    if all(_is_first_of(x, columns) for x in (tail_key, tail_value)):
        return tail_key, tail_value, columns
    return tail_key.contiguous(), tail_value.contiguous(), tail_key.shape[2]


def _is_first_of(x: Tensor, columns: int) -> bool:
    _, heads, _, width = x.shape
    # A stride is as it is also where there is but one row or head, which nobody goes beyond.
    return x.stride() == (heads * columns * width, columns * width, width, 1)
