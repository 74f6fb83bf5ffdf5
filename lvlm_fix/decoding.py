"""Attention of one new token, with all that does not change from token to token kept in the cache.

A step of a small model is bound by the number of operations, one of a large model by the host waiting for the device:
so masks are cut instead of made, and nothing is asked of the device. Letters: R rows, H heads, K key heads, T keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lvlm_fix.kernels import Redistribution, quantized_decode
from lvlm_fix.kernels.changed_rows import HALVES
from lvlm_fix.kernels.dispatch import note
from lvlm_fix.kernels.fused.launch import fits_attention, fits_head
from lvlm_fix.kernels.visual_attention import redistributed_attention

if TYPE_CHECKING:
    from lvlm_fix.packed_layer import PackedLayer

ROOM = 128
"""Keys that masks are written ahead of."""

WORD = 16
"""Elements to whose multiple the rows of a mask are filled up."""


def hiding(real: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its logits (R, 1, 1, T) so that keys that are not `real` (R, T) are not seen.

    Of bool masks torch makes such numbers in every layer, and on a GPU a copy of rows that are no whole words.
    """
    rows, keys = real.shape
    bias = torch.zeros(rows, 1, 1, -(-keys // WORD) * WORD, dtype=dtype, device=real.device)[..., :keys]
    return bias.masked_fill_(~real[:, None, None], -torch.inf)


class Slots:
    """What decoding must know of the keys of one layer; keys that come after it was made are real text."""

    def __init__(self, real: Tensor, image: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> None:
        """Keep the masks (R, T), bool, of the keys at hand.

        Args:
            real: keys that are neither padding nor empty slots.
            image: image tokens.
            sinks: sink tokens; None where the layer has none.
            dtype: of the attention weights.
        """
        self.dtype = dtype
        # By layer, what steady methods move in it; its masks are those of the step that it was first asked in.
        self.settled: dict[int, Redistribution | None] = {}
        # Asked once a layer: without hidden keys attention needs no mask in all the steps that follow.
        self.hides = not bool(real.all())
        self._write(real, image, sinks)

    def _write(self, real: Tensor, image: Tensor, sinks: Tensor | None) -> None:
        self.real, self.image = pad(real, (0, ROOM), value=True), pad(image, (0, ROOM), value=False)
        self.sinks = None if sinks is None else pad(sinks, (0, ROOM), value=False)
        self.bias = self.columns = self.exchange = None
        self._given: tuple[Redistribution, Redistribution] | None = None
        self._kinds: tuple[Redistribution | None, tuple[Tensor | None, Tensor | None]] | None = None
        if self.hides:
            self.bias = hiding(self.real, self.dtype)
        if self.sinks is not None:
            shown, sunk = self.image & self.real, self.sinks & self.real
            columns = torch.stack([shown & ~sunk, sunk, shown], dim=1)
            # Rows without an image sink are left alone, text sinks included: nothing in them can be moved.
            columns = (columns & (shown & sunk).any(-1)[:, None, None]).to(self.dtype)
            # What sinks lose and image tokens that are no sinks gain, (R, 2, T); sums are products with the others.
            self.exchange = columns[:, :2].flip(1) * columns.new_tensor([-1, 1])[:, None]
            self.columns = columns.mT.contiguous()

    def reach(self, keys: int) -> None:
        """Have masks of at least `keys` keys."""
        while keys > self.real.shape[1]:
            self._write(self.real, self.image, self.sinks)

    def cut(self, keys: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The masks (R, keys) of the first `keys` keys: real, image and sinks."""
        self.reach(keys)
        sinks = None if self.sinks is None else self.sinks[:, :keys]
        return self.real[:, :keys], self.image[:, :keys], sinks

    def given(self, moved: Redistribution) -> Redistribution:
        """`moved` between all keys that masks are written for, for kernels that stop at the last key."""
        if self._given is None or self._given[0] is not moved:
            assert self.sinks is not None
            self._given = moved, replace(moved, image_mask=self.image, sink_mask=self.sinks)
        return self._given[1]

    def kinds(self, moved: Redistribution | None) -> tuple[Tensor | None, Tensor | None]:
        """What `quantized_decode`'s kernels are told, `slot_kinds`, of all keys that masks are written for."""
        if self._kinds is None or self._kinds[0] is not moved:
            from lvlm_fix.kernels.fused.quantized_slots import slot_kinds

            wide = None if moved is None else self.given(moved)
            mask = self.real if self.hides else None
            rows, keys = self.real.shape
            self._kinds = moved, slot_kinds(mask, wide, rows, keys, self.real.device)
        return self._kinds[1]


def attend(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots, moved: Redistribution | None, scale: float | None
) -> Tensor:
    """Attention (R, H, 1, D) of one query row a head, (R, H, 1, D), over keys (R, K, T, D) that fit `slots`.

    `moved` says how much is moved, `slots` between which keys: VAR, arXiv 2503.03321, eq. 3 and 4, as
    `functional.visual_attention` has them.
    """
    keys, shared = key.shape[2], key.shape[1]
    slots.reach(keys)
    if moved is not None and slots.sinks is not None and (fits_attention(query) or key.dtype in HALVES):
        return _by_kernel(query, key, value, slots, moved, scale)
    bias = None if slots.bias is None else slots.bias[..., :keys]
    # Heads that share keys become rows of one head, and each key is read once.
    folded = query if query.shape[1] == shared else query.unflatten(1, (shared, -1)).flatten(2, 3)
    if moved is None or slots.columns is None or slots.exchange is None:
        out = scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scale)
        return out if folded is query else out.reshape(query.shape)
    logits = folded * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
    if bias is not None:
        logits += bias
    weights = logits.softmax(-1)
    by_head = weights.flatten(1, 2)
    sums = by_head @ slots.columns[:, :keys]
    to_receivers, to_image = sums[..., :1], sums[..., 2:]
    # Below the smallest normal number there is nobody to give to: the share would overflow.
    least = (moved.rho * to_image).clamp_min(torch.finfo(weights.dtype).tiny)
    gate = (to_image >= moved.min_image_attention) & (to_receivers >= least)
    # 1 of what the sinks lose, and of what the image gains what sinks hold for each unit that receivers hold.
    share = torch.where(gate, sums[..., :2] / to_receivers, 0)
    change = share @ slots.exchange[..., :keys]
    # Adding the changed part keeps rows that nothing happens to bit for bit.
    by_head = torch.addcmul(by_head, by_head, change, value=moved.p)
    return (by_head.view_as(weights) @ value).reshape(query.shape)


def attend_packed(
    query: Tensor,
    packed: PackedLayer,
    slots: Slots,
    moved: Redistribution | None,
    scale: float | None,
) -> Tensor:
    """The same over keys that are packed, by their codes; `moved` between the keys that `slots` names."""
    keys = packed.slots
    slots.reach(keys)
    inputs = query, packed.packed, packed.keys, packed.values
    if fits_head(query):
        from lvlm_fix.kernels.fused.quantized_decode import decode_by_kinds

        note("quantized_decode", "triton")
        return decode_by_kinds(*inputs, *slots.kinds(moved), moved, scale)
    real, image, sinks = slots.cut(keys)
    cut = None if moved is None else replace(moved, image_mask=image, sink_mask=sinks)
    return quantized_decode(*inputs, real if slots.hides else None, redistribution=cut, scale=scale)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots, moved: Redistribution, scale: float | None
) -> Tensor:
    """The same where kernels do it better: a GPU does all in one pass, and halves are not widened as a whole."""
    if fits_attention(query):
        from lvlm_fix.kernels.fused.visual_front import fused_attention

        note("visual_attention", "triton")
        real = slots.real if slots.hides else None
        return fused_attention(query, key, value, slots.given(moved), False, real, scale)
    note("visual_attention", "torch")
    real, image, sinks = slots.cut(key.shape[2])
    cut = replace(moved, image_mask=image, sink_mask=sinks)
    return redistributed_attention(query, key, value, cut, False, real if slots.hides else None, scale)
