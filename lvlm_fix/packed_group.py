"""Tokens of ZipVL's KV cache that are packed together (arXiv 2410.08584), and so share their channels' ranges.

Letters: R rows of the batch, H key heads, K slots, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
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
    def pack(cls, keys: Tensor, values: Tensor, places: Tensor, bits: int) -> PackedGroup:
        """Pack the tokens whose place in `places` (R, 1, N, 1) is not EMPTY, N at least 1; empty slots go first."""
        chosen = places != EMPTY
        counts = chosen.sum(2, keepdim=True)
        width = int(counts.max())
        # False sorts first, and tokens stay in their order. With no token at all, one zero is packed, since a range
        # needs something, and cut off again.
        order = chosen.byte().argsort(dim=2, stable=True)[:, :, -max(width, 1) :]
        filled = torch.arange(-order.shape[2], 0, device=order.device)[:, None] >= -counts
        # A copy of the row's last token moves no minimum and no maximum. Rows without tokens hold zeros: padding
        # may be NaN, which an attention weight of zero would not silence.
        order = torch.where(filled, order, order[:, :, -1:])
        keys, values = (take(x, order[:, 0, :, 0]).masked_fill(counts == 0, 0) for x in (keys, values))
        places = places.take_along_dim(order, dim=2).masked_fill(~filled, EMPTY)
        packed_keys, packed_values = pack(keys, values, bits)
        group = cls(packed_keys, packed_values, places)
        return group if width else cls.each(lambda x: x[:, :, :0].clone(), group)

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
