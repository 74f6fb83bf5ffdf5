"""Tokens of ZipVL's KV cache that are packed together (arXiv 2410.08584), and so share their channels' ranges.

Letters: R rows of the batch, H key heads, K slots, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lvlm_fix.kernels.pack import pack
from lvlm_fix.kernels.packing import take
from lvlm_fix.quantization import QuantizedTensor

# The place of an empty slot. Places count from the end of the prompt, so padding on the left moves none.
EMPTY = torch.iinfo(torch.int32).min
NAMES = ("packed", "scale", "zero_point", "channel_scale")
"""The tensors of a `QuantizedTensor`; the last may be None."""


@dataclass(frozen=True, eq=False)
class PackedGroup:
    """Tokens of one precision, (R, H, K, D), K may be 0; `places` (R, 1, K, 1) int32 are columns minus T, or EMPTY.

    Ranges are a row's own, so its tokens come back the same whatever rows are beside it.
    """

    keys: QuantizedTensor
    values: QuantizedTensor
    places: Tensor

    @classmethod
    def pack(
        cls, keys: Tensor, values: Tensor, chosen: Tensor, bits: Sequence[int], first: int
    ) -> list[PackedGroup]:
        """One group of `bits` each for G masks of the first tokens: all their sizes take one wait for the device.

        Args:
            keys, values: (R, H, N, D).
            chosen: (G, R, M) bool, M up to N, the tokens of each group; in a row with fewer than another, empty slots
                go first.
            bits: of each group.
            first: place of the first token, which the others' follow.
        """
        running = chosen.cumsum(-1)
        counts = running[..., -1].tolist() if chosen.shape[-1] else [[0]] * len(chosen)
        return [cls._pack(keys, values, *group, first) for group in zip(running, counts, bits, strict=True)]

    @classmethod
    def _pack(
        cls, keys: Tensor, values: Tensor, running: Tensor, counts: list[int], bits: int, first: int
    ) -> PackedGroup:
        """The group of `counts` tokens a row, of which `running` (R, M) were in the columns up to each."""
        rows, width = len(keys), max(counts)
        if not width:
            return cls.of_none(keys, bits)
        # A slot's token stands where as many have been counted as slots up to it.
        number, empty = torch.arange(1, width + 1, device=keys.device).expand(rows, -1), None
        if min(counts) < width:
            own = running[:, -1:]
            number = number - (width - own)
            empty = number <= 0
            # A copy of the row's last token moves no minimum and no maximum.
            number = torch.where(empty, own, number)
        index = torch.searchsorted(running, number.contiguous(), out_int32=True)
        if rows == 1:
            keys, values = (x.index_select(2, index[0]) for x in (keys, values))
        else:
            keys, values = take(keys, index), take(values, index)
        if min(counts) == 0:
            # Rows without tokens hold zeros: padding may be NaN, which an attention weight of zero would not silence.
            without = running[:, -1, None, None, None] == 0
            keys, values = keys.masked_fill(without, 0), values.masked_fill(without, 0)
        places = index + first
        places = places if empty is None else places.masked_fill(empty, EMPTY)
        packed_keys, packed_values = pack(keys, values, bits)
        return cls(packed_keys, packed_values, places[:, None, :, None])

    @classmethod
    def of_none(cls, like: Tensor, bits: int) -> PackedGroup:
        """A group without slots, of keys and values (R, H, ?, D) in the dtype of `like`."""
        rows, heads, _, width = like.shape
        codes = like.new_empty(rows, heads, 0, -(-width * bits // 8), dtype=torch.uint8)
        channels, tokens = like.new_empty(rows, heads, 0, width), like.new_empty(rows, heads, 0, 1)
        keys = QuantizedTensor(codes, channels, channels, bits, width)
        values = QuantizedTensor(codes, tokens, tokens, bits, width, channels)
        return cls(keys, values, like.new_empty(rows, 1, 0, 1, dtype=torch.int32))

    @classmethod
    def each(cls, change: Callable[..., Tensor], *groups: PackedGroup) -> PackedGroup:
        """`change`, of rows or of device, made to the tensors of the same name in all groups."""
        keys = _each(change, *(group.keys for group in groups))
        values = _each(change, *(group.values for group in groups))
        return cls(keys, values, change(*(group.places for group in groups)))

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds, slots in dimension 2; a whole group's ranges have one there."""
        parts = [getattr(part, name) for part in (self.keys, self.values) for name in NAMES]
        return [tensor for tensor in (*parts, self.places) if tensor is not None]


def _each(change: Callable[..., Tensor], *parts: QuantizedTensor) -> QuantizedTensor:
    """`change` made to the tensors that have the same name in all `parts`."""
    tensors = {name: [getattr(part, name) for part in parts] for name in NAMES}
    changed: dict[str, Any] = {name: change(*held) for name, held in tensors.items() if held[0] is not None}
    return replace(parts[0], **changed)
