"""The KV cache of a prompt whose tokens were chosen: it remembers which, and carries the negative branches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lvlm_fix.branches import Branch, in_images, pad_left, stacked_layer, stacked_sinks
from lvlm_fix.decoding import Slots
from lvlm_fix.errors import PromptError, UnsupportedModelError
from lvlm_fix.packed_layer import PackedLayer

NAMES = ("cache", "past_key_values")
"""What transformers calls a KV cache: from 5.24 on, and before."""


def cache_name(generator: Any) -> str:
    """What a generating model's forward pass calls the KV cache that it takes and returns.

    Raises:
        UnsupportedModelError: it takes none.
    """
    # Its class's, for what somebody put over it may take just anything.
    parameters = inspect.signature(type(generator).forward).parameters
    for name in NAMES:
        if name in parameters:
            return name
    raise UnsupportedModelError(
        f"{type(generator).__name__} takes no KV cache that lvlm-fix knows: it assumes that transformers calls it "
        f"{' or '.join(NAMES)}"
    )


class BranchedCache(Cache):
    """The branches of a batch, stacked along the batch dimension, in one KV cache.

    Row `b * rows + r` is branch `b` of row `r`: the positive branch first, then one for each contrasting method.
    So every decoding step is one forward pass, and the weights are read once for all branches.
    `generate` meets an ordinary cache of `rows` rows: beams are reordered in all branches alike.

    A branch that is often not needed is kept `apart`, in a cache of its own: it may fall behind, by the tokens
    `waiting` (rows, W), and catches up in one pass when it is asked.
    """

    def __init__(
        self,
        branches: list[Branch],
        full_length: int,
        methods: frozenset[Any],
        name: str,
        apart: Sequence[Branch] = (),
        *,
        all_pictured: bool,
    ) -> None:
        """Stack branches of equal row count; shorter ones are padded on the left.

        Args:
            branches: the positive branch first.
            full_length: columns of the prompt, padding included, before image tokens were chosen.
            methods: under which it was made, and must go on.
            name: what the model's forward pass calls it.
            apart: branches that are not stacked.
            all_pictured: whether every row has a picture.
        """
        width = max(branch.real.shape[1] for branch in branches)
        layers = [list(branch.cache.layers) for branch in branches]
        super().__init__(layers=[stacked_layer(list(parts), width) for parts in zip(*layers, strict=True)])
        self.branches, self.full_length, self.width = len(branches), full_length, width
        self.is_attached = False
        self.mask = torch.cat([pad_left(branch.real, width, dim=1) for branch in branches])
        self.image_mask = torch.cat([pad_left(branch.image_mask, width, dim=1) for branch in branches])
        self.next_position = torch.cat([branch.next_position for branch in branches])
        self.unpadded = all(branch.unpadded and branch.real.shape[1] == width for branch in branches)
        self.slides = any(getattr(layer, "is_sliding", False) for layer in self.layers)
        found = sorted({layer for branch in branches for layer in branch.sinks})
        stacked = {layer: stacked_sinks(branches, layer, width) for layer in found}
        self.sinks = in_images(stacked, self.image_mask)
        self._slots: dict[Any, tuple[int, Slots]] = {}
        self.methods, self.name = methods, name
        self.apart = [
            BranchedCache([branch], full_length, methods, name, all_pictured=all_pictured) for branch in apart
        ]
        self.waiting: Tensor | None = None
        self.all_pictured = all_pictured

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, tokens may be added: only a model with the methods on knows what they must attend to."""
        self.is_attached = True
        try:
            yield
        finally:
            self.is_attached = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_attached:
            raise PromptError(
                "past_key_values was made under attach, and the methods have been taken off since: attach the same "
                "ones again, or start a new prompt"
            )
        # One new token attends to packed keys as they are, see `MethodAttention`.
        kwargs["dequantize"] = key_states.shape[2] > 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def slots(self, layer: int, key: Tensor, sinks: Tensor | None) -> Slots:
        """What a step must know of a layer's keys (R, K, T, D), made when the layer's order of keys changes."""
        held = self.layers[layer]
        packed = held if isinstance(held, PackedLayer) else None
        groups = 0 if packed is None else len(packed.groups)
        # Layers that hold all columns and no sinks are told the same.
        place = key.device if packed is None and sinks is None else layer
        known, slots = self._slots.get(place, (-1, None))
        if slots is None or known != groups:
            slots = self._new_slots(key, sinks, None if packed is None else packed.columns)
            self._slots[place] = groups, slots
        return slots

    def _new_slots(self, key: Tensor, sinks: Tensor | None, columns: Tensor | None) -> Slots:
        real, image = self.real(0).to(key.device), self.image_mask.to(key.device)
        wide = self.get_seq_length()
        image = _pad_right(image, wide)
        sinks = None if sinks is None else _pad_right(sinks.to(key.device), wide)
        if columns is not None:
            filled, index = columns >= 0, columns.clamp_min(0)
            real, image = real.gather(1, index) & filled, image.gather(1, index) & filled
            sinks = None if sinks is None else sinks.gather(1, index) & filled
        return Slots(real, image, sinks, key.dtype)

    def pictured(self, rows: int) -> Tensor | None:
        """Which of the rows (rows,) have pictures; None where all have."""
        return None if self.all_pictured else self.image_mask[:rows].any(1)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values, before they are packed."""
        return cast(Any, self.layers[0]).keys.dtype

    def wait(self, input_ids: Tensor) -> None:
        """Fall behind by further tokens (rows, Q)."""
        self.waiting = input_ids if self.waiting is None else torch.cat([self.waiting, input_ids], dim=1)

    def waited(self) -> Tensor:
        """The tokens (rows, W) that this branch is behind by, to be passed on now."""
        assert self.waiting is not None
        waiting, self.waiting = self.waiting, None
        return waiting

    def generated(self) -> int:
        """Number of tokens cached after the prompt."""
        return self.get_seq_length() - self.width

    def step_inputs(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and positions of new tokens, for all branches."""
        ids, done = torch.cat([input_ids] * self.branches), self.generated()
        steps = torch.arange(done, done + input_ids.shape[1], device=ids.device)
        positions = self.next_position[:, None] + steps
        return ids, positions

    def real(self, new: int) -> Tensor:
        """(rows of all branches, T) bool: cached columns and `new` further ones that are no padding."""
        after = self.generated() + new
        return torch.cat([self.mask, self.mask.new_ones(len(self.mask), after)], dim=1)

    def continue_inputs(self, input_ids: Tensor, since_prompt: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the next turn of a conversation, whose columns count as prompt from now on.

        Args:
            input_ids: (rows, Q) tokens that are not cached yet.
            since_prompt: (rows, T) mask of all tokens after the prompt, these Q included; rows that ended early
                hold padding in the middle.
        """
        since = since_prompt.bool().repeat(self.branches, 1)
        steps = (since.long().cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        positions = self.next_position[:, None] + steps
        self._slots.clear()
        self.mask = torch.cat([self.mask, since], dim=1)
        self.full_length += since.shape[1]
        self.next_position = self.next_position + since.sum(1)
        self.width, self.unpadded = self.mask.shape[1], bool(self.mask.all())
        return input_ids.repeat(self.branches, 1), positions

    def _select(self, rows: Tensor) -> None:
        self._slots.clear()
        self.mask, self.image_mask = self.mask[rows], self.image_mask[rows]
        self.next_position = self.next_position[rows]
        self.waiting = None if self.waiting is None else self.waiting[rows]
        self.sinks = {layer: sinks[rows.to(sinks.device)] for layer, sinks in self.sinks.items()}

    def _all_branches(self, rows: Tensor) -> Tensor:
        """Indices in the stack of the same rows in every branch; `rows` are indices, or a bool (rows,) mask."""
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        count = len(self.mask) // self.branches
        return torch.cat([rows.to(self.mask.device) + branch * count for branch in range(self.branches)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = self._all_branches(beam_idx)
        super().reorder_cache(cast(torch.LongTensor, rows))
        self._select(rows)
        for other in self.apart:
            other.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = self._all_branches(indices)
        super().batch_select_indices(rows)
        self._select(rows)
        for other in self.apart:
            other.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(repeats))
        for other in self.apart:
            other.batch_repeat_interleave(repeats)

    def crop(self, *args: int, **kwargs: int) -> None:
        raise NotImplementedError(
            "assisted decoding drops cached tokens by their place in the unpruned prompt, which methods change: "
            "generate without assistant_model or prompt_lookup_num_tokens under attach"
        )


class OutOfSight(Cache):
    """Stands in for a KV cache that the operator keeps: hands new keys and values on as they are."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return 1, 0


class Collecting(OutOfSight):
    """One that also remembers what it handed on, in the order of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states


def _pad_right(mask: Tensor, width: int) -> Tensor:
    """Columns that came after the prompt are neither image nor sinks."""
    return torch.nn.functional.pad(mask, (0, width - mask.shape[1]), value=False)
