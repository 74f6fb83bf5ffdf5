"""A forward pass of the decoder under the methods: what its layers are told, and what they leave for the next."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lvlm_fix.methods.base import Told


@dataclass
class Pass:
    """One forward pass of the decoder under the methods: a prefill of one branch, or a step of all of them.

    `real` and `image_mask` (R, L) bool are over the logical columns of the prompt and all that came after;
    `first_query` (R,). `sinks` holds, by layer, what the prefill found; a prefill fills it, a step reads it.
    `unpadded` is True only where `real` is known to hide nothing. Of several prefills in one forward pass, `prefix`
    (R, S) are the columns of the first one whose keys and values stand for a later one's own first S.
    """

    real: Tensor
    image_mask: Tensor
    first_query: Tensor
    cache: Cache | None
    prefill: bool
    sinks: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    layers_seen: int = 0
    unpadded: bool = False
    told: dict[str, list[tuple[int, dict[str, Told]]]] = field(default_factory=dict)
    prefix: Tensor | None = None

    @property
    def computed(self) -> int:
        """Columns of a prefill that go through the model."""
        return self.real.shape[1] - (0 if self.prefix is None else self.prefix.shape[1])


RUNNING: ContextVar[Pass | Sequence[Pass] | None] = ContextVar("lvlm_fix_pass", default=None)
"""Several: prefills of as many branches, whose columns stand one branch after the other."""


def made_by_the_pass(*args: Any, **kwargs: Any) -> Any:
    """A mask function: under a pass the masks are its own, so that none of T x T elements is made."""
    return NotImplemented if RUNNING.get() is None else None


def first_query(image_mask: Tensor) -> Tensor:
    """Column (R,) after the last image token of each row of (R, T); T where there is none."""
    width = image_mask.shape[1]
    after = torch.arange(1, width + 1, device=image_mask.device) * image_mask
    last = after.amax(1)
    return torch.where(last > 0, last, width)
