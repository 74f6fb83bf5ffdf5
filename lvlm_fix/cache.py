"""The KV cache of a prompt whose tokens were chosen: it remembers which, and carries the negative branches."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class BranchedCache(Cache):
    """The branches of a batch, stacked along the batch dimension, in one KV cache.

    Row `b * rows + r` is branch `b` of row `r`: the positive branch first, then one for each contrasting method.
    So every decoding step is one forward pass, and the weights are read once for all branches.
    `generate` meets an ordinary cache of `rows` rows: beams are reordered in all branches alike.
    """

    def __init__(self, branches: list[Cache], masks: list[Tensor], full_length: int) -> None:
        """Stack branches.

        Args:
            branches: filled caches of equal row count; shorter ones are padded on the left.
            masks: per branch, (rows, T_b) bool, which of its cached tokens are real.
            full_length: columns of the prompt, padding included, before image tokens were chosen.
        """
        super().__init__(layers=branches[0].layers)
        self.branches, self.full_length = len(branches), full_length
        width = max(mask.shape[1] for mask in masks)
        self.mask = torch.cat([_pad_left(mask, width, dim=1) for mask in masks])
        self.width = width
        self.lengths = self.mask.sum(1)
        self.unpadded = bool(self.mask.all())
        if self.branches > 1:
            layers: list[list[Any]] = [list(branch.layers) for branch in branches]
            for layer, parts in zip(layers[0], zip(*layers, strict=True), strict=True):
                keys, values = [part.keys for part in parts], [part.values for part in parts]
                layer.keys = torch.cat([_pad_left(key, width, dim=2) for key in keys])
                layer.values = torch.cat([_pad_left(value, width, dim=2) for value in values])

    def generated(self) -> int:
        """Number of tokens cached after the prompt."""
        return self.get_seq_length() - self.width

    def step_inputs(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids, attention mask (None where nothing is padded) and positions of new tokens, for all branches."""
        ids, done = input_ids.repeat(self.branches, 1), self.generated()
        steps = torch.arange(done, done + input_ids.shape[1], device=ids.device)
        positions = self.lengths[:, None] + steps
        mask = None
        if not self.unpadded:
            mask = torch.cat(
                [self.mask, self.mask.new_ones(len(ids), done + input_ids.shape[1])], dim=1
            ).long()
        return ids, mask, positions

    def continue_inputs(self, input_ids: Tensor, since_prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the next turn of a conversation, whose columns count as prompt from now on.

        Args:
            input_ids: (rows, Q) tokens that are not cached yet.
            since_prompt: (rows, T) mask of all tokens after the prompt, these Q included; rows that ended early
                hold padding in the middle.
        """
        since = since_prompt.bool().repeat(self.branches, 1)
        self.mask = torch.cat([self.mask, since], dim=1)
        self.full_length += since.shape[1]
        self.width, self.lengths, self.unpadded = self.mask.shape[1], self.mask.sum(1), bool(self.mask.all())
        positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return input_ids.repeat(self.branches, 1), self.mask.long(), positions

    def _select(self, rows: Tensor) -> None:
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]

    def _all_branches(self, rows: Tensor) -> Tensor:
        count = len(self.mask) // self.branches
        return torch.cat([rows.to(self.mask.device) + branch * count for branch in range(self.branches)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = self._all_branches(beam_idx)
        super().reorder_cache(cast(torch.LongTensor, rows))
        self._select(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = self._all_branches(indices)
        super().batch_select_indices(rows)
        self._select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(repeats))

    def crop(self, *args: int, **kwargs: int) -> None:
        raise NotImplementedError(
            "assisted decoding drops cached tokens by their place in the unpruned prompt, which methods change: "
            "generate without assistant_model or prompt_lookup_num_tokens under attach"
        )


def _pad_left(tensor: Tensor, width: int, dim: int) -> Tensor:
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
