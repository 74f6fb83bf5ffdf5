"""A KV cache layer with room ahead: a new token's key is written behind the others, not copied together with them.

transformers' `DynamicLayer` makes all keys and values anew for each token, at a cost that grows with the prompt and
with the rows of the batch, DAMRO's branches among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 32
"""Columns allocated ahead: so all are copied once in 32 tokens. More would save little and take memory."""


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are views of what is allocated.

    Whoever puts other tensors there, as reordering of beams does, need not know of it: the next `update` makes room
    for those.
    """

    _room: tuple[Tensor, Tensor] | None = None
    _shown: Tensor | None = None

    @classmethod
    def over(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer that goes on from another, which stays as it is."""
        growing = cls()
        vars(growing).update(vars(layer))
        return growing

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens (R, H, Q, D); all keys and values, (R, H, T, D) each."""
        held = self.get_seq_length()
        if not held or (torch.is_grad_enabled() and key_states.requires_grad):
            # What gradients are taken of must not be written over.
            return super().update(key_states, value_states, *args, **kwargs)
        after = held + key_states.shape[2]
        room = self._room
        if room is None or not self._fits(after, room[0]):
            assert self.keys is not None and self.values is not None
            room = self._room = with_room(self.keys, after + ROOM), with_room(self.values, after + ROOM)
        keys, values = room
        keys.narrow(2, held, after - held).copy_(key_states)
        values.narrow(2, held, after - held).copy_(value_states)
        self.keys = self._shown = keys.narrow(2, 0, after)
        self.values = values.narrow(2, 0, after)
        return self.keys, self.values

    def _fits(self, columns: int, room: Tensor) -> bool:
        """Whether `room`, in which the keys at hand must be, has so many columns and may be written to."""
        if self.keys is not self._shown or columns > room.shape[2]:
            return False
        return may_be_written(room)

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        held = (self.keys, self.values) if self._room is None or self.keys is not self._shown else self._room
        return sum(x.nbytes for x in held if x is not None)


def fill(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Let an empty `DynamicLayer` hold these tensors (R, H, T, D) themselves; `update` would copy them."""
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    layer.dtype, layer.device = keys.dtype, keys.device  # a dtype of its own it has up to transformers 5.17


def may_be_written(room: Tensor) -> bool:
    """Whether torch lets anybody write to it: outside of inference mode, not to what was made in it."""
    return torch.is_inference_mode_enabled() or not room.is_inference()


def with_room(held: Tensor, columns: int) -> Tensor:
    """A copy of keys (R, H, N, D) as the first of `columns`, N or more."""
    rows, heads, count, width = held.shape
    room = held.new_empty(rows, heads, columns, width)
    room[:, :, :count] = held
    return room
