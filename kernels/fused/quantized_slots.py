"""What the kernels of `quantized_decode` are told: what a slot holds, and where the tensors of each span lie."""

from __future__ import annotations

import torch
from torch import Tensor

from lvlm_fix.kernels.redistribution import Redistribution
from lvlm_fix.quantization import QuantizedTensor

# What kind of token a slot holds, as bits of one byte.
VISIBLE, RECEIVER, SINK, IMAGE_SINK = 1, 2, 4, 8
# Columns of the table of spans: seven addresses, then the group's tokens, where the span begins and ends, the slot of
# the group's first token, and its number of bits.
COLUMNS = 12
# Numbers a span leaves a query: the largest logit, and the sums of the weights of four classes.
NUMBERS = 5


def slot_kinds(
    key_mask: Tensor | None, given: Redistribution | None, rows: int, slots: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The kinds of all slots (R, S) uint8, and the first slot (R,) of a query that may be changed."""
    if given is None:
        return None if key_mask is None else key_mask.contiguous().view(torch.uint8), None
    if key_mask is None:
        key_mask = torch.ones(rows, slots, dtype=torch.bool, device=device)
    image, sink = given.image_mask & key_mask, given.sink_mask & key_mask
    kinds = VISIBLE * key_mask + RECEIVER * (image & ~sink)
    kinds = kinds + SINK * sink + IMAGE_SINK * (image & sink)
    start = torch.where((image & sink).any(-1), given.first_queries().to(torch.long), slots)
    return kinds.to(torch.uint8), start.contiguous()


def group_tensors(keys: QuantizedTensor, values: QuantizedTensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors of a group in the order of the table, contiguous and aligned, and their addresses."""
    channel_scale = values.channel_scale
    if channel_scale is None:
        channel_scale = torch.ones_like(keys.scale)
    parts = (keys.packed, keys.scale, keys.zero_point, values.packed, values.scale, values.zero_point)
    tensors = [x.contiguous() for x in (*parts, channel_scale)]
    tensors = [x.clone() if x.data_ptr() % 16 else x for x in tensors]
    return tensors, tuple(x.data_ptr() for x in tensors)


def span_table(groups: list[tuple[int, ...]], span: int, device: torch.device) -> Tensor:
    """One line a span of `span` tokens, of COLUMNS numbers.

    A group is its seven addresses, its number of tokens, the slot of its first, and its number of bits.
    """
    lines = [
        (*addresses, tokens, begin, min(begin + span, tokens), slot, bits)
        for *addresses, tokens, slot, bits in groups
        for begin in range(0, tokens, span)
    ]
    return torch.tensor(lines, dtype=torch.long, device=device)
