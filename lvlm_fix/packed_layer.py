"""ZipVL's KV cache (arXiv 2410.08584): important tokens at 4 bits, the rest at 2, the newest as they are.

Letters: R rows of the batch, H key heads, T prompt columns, K slots of a group, S slots in all, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from lvlm_fix._tensors import require, require_bool, sizes
from lvlm_fix.packed_bytes import Share, bytes_a_slot, bytes_by_row
from lvlm_fix.packed_group import EMPTY, PackedGroup
from lvlm_fix.packed_tail import TailRoom, unread
from lvlm_fix.quantization import QuantizedTensor, dequantize_kv

__all__ = ["PackedGroup", "PackedLayer"]

# Generated tokens are packed this many at a time. A group has its own key ranges, two numbers a channel: over 64
# tokens they add half a bit to a 4-bit code. Fewer would cost more; with more, tokens wait longer at full size.
GROUP = 64


class PackedLayer(CacheLayerMixin):
    """One decoder layer's keys and values: prompt tokens packed in two precisions, newest tokens as they are.

    A layer for `transformers.Cache(layers=[...])`: `compress` makes one from a prefilled cache, the constructor
    an empty one. `keys`, `values` and `places` hold the newest tokens alone (the tail). `groups` holds the
    important tokens, the rest, then one group for every 64 tokens appended. The tokens of the last `update` are
    always in the tail, in their order: its queries must not see what the ranges of a group tell of later tokens.
    A token that is appended alone is written into memory ahead of it, as others will follow; the tail is views of
    that, and whoever puts other tensors there need not know of it.

    `update` returns S slots, often fewer than the `get_seq_length()` tokens seen and in another order: positions
    have gone into the keys (RoPE), so only the attention mask needs `columns` to know what a slot is. The packed
    part is dequantised anew each time; to keep the result would undo the saving. Who attends by
    `kernels.quantized_decode`, which reads `packed` and the tail, asks `update` not to dequantise.

    Source: ZipVL, arXiv 2410.08584, mixed-precision KV cache.

    >>> keys, values = torch.randn(2, 1, 4, 600, 64)
    >>> important, real = torch.arange(600)[None] < 180, torch.ones(1, 600, dtype=torch.bool)
    >>> layer = PackedLayer.compress(keys, values, important, real)
    >>> now, _ = layer.update(torch.randn(1, 4, 1, 64), torch.randn(1, 4, 1, 64))
    >>> now.shape, layer.columns[0, -1].item(), layer.nbytes < layer.full_nbytes / 3
    (torch.Size([1, 4, 601, 64]), 600, True)
    """

    is_sliding = False
    keys: Tensor
    values: Tensor
    places: Tensor
    groups: list[PackedGroup]
    appended: int
    grouped: int
    _room: TailRoom | None = None

    def __init__(self, *, bits: int = 4, low_bits: int = 2, window: int = 32) -> None:
        require({bits, low_bits} <= {2, 4, 8}, f"bits and low_bits must be 2, 4 or 8, got {bits}, {low_bits}")
        require(window >= 1, f"window must be at least 1 token, got {window}")
        super().__init__()
        self.bits, self.low_bits, self.window = bits, low_bits, window
        self.reset()

    @classmethod
    def compress(
        cls,
        keys: Tensor,
        values: Tensor,
        important: Tensor,
        real: Tensor,
        *,
        bits: int = 4,
        low_bits: int = 2,
        window: int = 32,
        evict: bool = False,
    ) -> PackedLayer:
        """Pack the keys and values of a prefilled prompt, (R, H, T, D) each.

        Args:
            important: (R, T) bool, the tokens that get `bits`, as generated ones do; others get `low_bits`.
            real: (R, T) bool, False = padding, which is not packed.
            bits, low_bits: 2, 4 or 8.
            window: how many of the newest tokens stay as they are, important or not; at least 1.
            evict: drop the tokens that are not important.

        Raises:
            ValueError: shapes or dtypes do not fit, a mask is not bool, or a number is out of range.
        """
        masks = {"important": (important, "R T"), "real": (real, "R T")}
        sizes(keys=(keys, "R H T D"), values=(values, "R H T D"), **masks)
        require_bool(important=important, real=real)
        same = keys.is_floating_point() and keys.dtype == values.dtype
        require(same, f"keys and values must share a float dtype, got {keys.dtype} and {values.dtype}")
        layer = cls(bits=bits, low_bits=low_bits, window=window)
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.prompt = keys.shape[2]
        places = torch.arange(-layer.prompt, 0, dtype=torch.int32, device=real.device)
        places = torch.where(real, places, EMPTY)[:, None, :, None]
        layer.keys, layer.values, layer.places = keys, values, places
        old = layer.prompt - window
        layer._shorten(old)
        if old > 0:
            others = torch.zeros_like(real) if evict else real > important
            chosen = torch.stack([important & real, others])[..., :old]
            layer.groups = PackedGroup.pack(keys, values, chosen, (bits, low_bits), -layer.prompt)
        return layer

    @classmethod
    def stack(cls, layers: Sequence[PackedLayer]) -> PackedLayer:
        """The rows of all layers in one, as if every prompt had been left-padded to the longest.

        Raises:
            ValueError: there is no layer, one is empty, or they differ in more than rows and prompt length.
        """
        filled = len(layers) > 0 and all(layer.is_initialized for layer in layers)
        require(filled, "layers to stack must be at least one and hold tokens: compress their prompts first")
        kinds = {
            (x.bits, x.low_bits, x.window, x.appended, x.grouped, *x.keys.shape[1::2], x.dtype)
            for x in layers
        }
        names = "(bits, low_bits, window, tokens appended, of those packed, heads, head width, dtype)"
        require(len(kinds) == 1, f"layers to stack must have the same {names}, got {sorted(map(str, kinds))}")
        deepest = max(len(layer.groups) for layer in layers)
        layers = [layer._with_groups(deepest) for layer in layers]
        stacked = copy(layers[0])
        stacked.prompt = max(layer.prompt for layer in layers)
        stacked._each(_cat_rows, *layers)
        return stacked

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, dequantize: bool = True, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens (R, H, Q, D); all keys and values, (R, H, S, D) each, in the order of `columns`.

        With `dequantize=False` and something packed they are not made: two tensors of that shape are NaN and take no
        memory.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # What earlier calls appended is packed 64 at a time, all that was older than the window by then. A count of
        # the tail's columns would not do: a short prompt's tail is narrower alone than beside a longer prompt.
        for due in range(self.grouped + GROUP, self.appended + 1, GROUP):
            columns = self.keys.shape[2]
            count = max(columns - self.window - (self.appended - due), 0)
            chosen = (self.places[:, 0, :count, 0] != EMPTY)[None]
            self.groups += PackedGroup.pack(
                self.keys, self.values, chosen, [self.bits], self.appended - columns
            )
            self._shorten(count)
            self.grouped = due
        self._append(key_states, value_states)
        if not self.groups:
            return self.keys, self.values
        if not dequantize:
            shape = (*key_states.shape[:2], self.slots, key_states.shape[3])
            nothing = unread(key_states.dtype, key_states.device).expand(shape)
            return nothing, nothing
        packed_keys = [dequantize_kv(keys) for keys, _ in self.packed]
        packed_values = [dequantize_kv(values) for _, values in self.packed]
        return torch.cat([*packed_keys, self.keys], dim=2), torch.cat([*packed_values, self.values], dim=2)

    @property
    def packed(self) -> list[tuple[QuantizedTensor, QuantizedTensor]]:
        """Keys and values of each group, in the order of `columns`, which ends with the tail."""
        return [(group.keys, group.values) for group in self.groups]

    @property
    def slots(self) -> int:
        """S, how many tokens and empty slots it holds."""
        return self.keys.shape[2] + sum(group.places.shape[2] for group in self.groups)

    @property
    def columns(self) -> Tensor:
        """(R, S) long, what each slot is: 0..T-1 in the prompt, then appended tokens, -1 = an empty slot."""
        places = torch.cat([*(group.places for group in self.groups), self.places], dim=2)[:, 0, :, 0].long()
        return torch.where(places == EMPTY, -1, places + self.prompt)

    @property
    def nbytes(self) -> int:
        """Bytes held: packed codes, scales, zero points, channel scales, tail with its room, and columns."""
        packed = [tensor for group in self.groups for tensor in group.tensors]
        return sum(tensor.nbytes for tensor in (*self._tail(), *packed))

    def nbytes_by_row(self) -> Tensor:
        """(R,) long, bytes that each row's own tokens take: those that the row would hold alone, without padding."""
        return bytes_by_row(self.shares())

    def shares(self) -> list[Share]:
        """What `nbytes_by_row` counts, to be counted later, whatever the layer holds by then."""
        tail = self._tail()
        shares = [Share(self.places, bytes_a_slot(tail), room=tail[0].shape[2] - self.keys.shape[2])]
        for group in self.groups:
            # Ranges of a whole group are one slot wide, and none where it holds no token of the row.
            whole = [x for x in group.tensors if x.shape[2] != group.places.shape[2]]
            each = bytes_a_slot(group.tensors) - bytes_a_slot(whole)
            shares.append(Share(group.places, each, bytes_a_slot(whole)))
        return shares

    @property
    def full_nbytes(self) -> int:
        """Bytes of a cache that holds every column seen as it was."""
        rows, heads, _, width = self.keys.shape
        return 2 * rows * heads * self.get_seq_length() * width * self.keys.itemsize

    # What transformers' Cache asks of a layer. Lengths are those of all columns seen, held or not.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.places = self.places.new_empty(len(key_states), 1, 0, 1, device=self.device)
        self._room = None

    def get_seq_length(self) -> int:
        return self.prompt + self.appended

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = torch.empty(0, 0, 0, 0)
        self.places = torch.empty(0, 1, 0, 1, dtype=torch.int32)
        self.groups, self.prompt, self.appended, self.grouped, self.is_initialized = [], 0, 0, 0, False
        self._room = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor[beam_idx.to(tensor.device)])

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("packed tokens cannot be taken back: generate without assisted decoding")

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Put tokens (R, H, Q, D) behind the tail."""
        before, self.appended = self.appended, self.appended + keys.shape[2]
        tail = self.keys, self.values, self.places
        if keys.shape[2] == 1 and not (torch.is_grad_enabled() and keys.requires_grad):
            if self._room is None or not self._room.takes_one_behind(self.keys):
                self._room = TailRoom(*tail, before)
            self.keys, self.values, self.places = self._room.append(keys, values)
            return
        # Turns are rare, and what gradients are taken of must not be written over.
        self._room = None
        places = torch.arange(before, self.appended, dtype=torch.int32, device=keys.device)
        new = keys, values, places[:, None].expand(len(keys), 1, -1, 1)
        both = zip(tail, new, strict=True)
        self.keys, self.values, self.places = (torch.cat(pair, dim=2) for pair in both)

    def _tail(self) -> Sequence[Tensor]:
        """What holds the tail: its tensors, or the memory that they are views of."""
        room = self._room
        return (
            room.tensors
            if room is not None and room.shows(self.keys)
            else (self.keys, self.values, self.places)
        )

    def _with_groups(self, count: int) -> PackedLayer:
        """The same with so many groups: a prompt that fits the window has none, which become empty ones in front."""
        missing = count - len(self.groups)
        if not missing:
            return self
        precisions = (self.bits, self.low_bits)[:missing]
        filled = copy(self)
        filled.groups = [*(PackedGroup.of_none(self.keys, bits) for bits in precisions), *self.groups]
        return filled

    def _shorten(self, count: int) -> None:
        """Take the oldest `count` tokens off the tail."""
        self._room = None
        tail = self.keys, self.values, self.places
        # Clones: slices would keep the memory of what was cut off.
        self.keys, self.values, self.places = (x[:, :, max(count, 0) :].clone() for x in tail)

    def _each(self, change: Callable[..., Tensor], *layers: PackedLayer) -> None:
        if self.is_initialized:
            layers, self._room = layers or (self,), None
            self.keys, self.values, self.places = map(change, *((x.keys, x.values, x.places) for x in layers))
            parts = zip(*(layer.groups for layer in layers), strict=True)
            self.groups = [PackedGroup.each(change, *groups) for groups in parts]


def _cat_rows(*tensors: Tensor) -> Tensor:
    """Tensors (R, ?, K, ?) along their rows; those of fewer slots get empty ones on the left."""
    width, empty = max(x.shape[2] for x in tensors), EMPTY if tensors[0].dtype == torch.int32 else 0
    return torch.cat([pad(x, (0, 0, width - x.shape[2], 0), value=empty) for x in tensors])
