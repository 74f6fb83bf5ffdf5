"""Prompts as tensors: where the image tokens stand, and the same prompt with fewer of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm_fix.encoding import Encoded
from lvlm_fix.errors import PromptError


@dataclass(frozen=True)
class Layout:
    """Where the images stand in a batch of prompts with R rows of L tokens.

    `visible` (R, L) bool are the tokens that are no padding; `spans[i]` is the row and the columns (N_i,) of image i,
    images in reading order.
    """

    visible: Tensor
    spans: list[tuple[int, Tensor]]


@dataclass(frozen=True)
class Prompt:
    """A batch of R prompts of L columns with its images in place.

    Attributes:
        embeddings: (R, L, C).
        is_image: (R, L) bool, image tokens.
        where: which columns each image takes.
        images: the images, in reading order.
        positions: (P, R, L) positions that tokens keep when others are dropped; None to count anew.
        rest: further arguments of the forward pass.
    """

    embeddings: Tensor
    is_image: Tensor
    where: Layout
    images: list[Encoded]
    positions: Tensor | None
    rest: dict[str, Any]

    @property
    def caching(self) -> bool:
        """Whether keys and values are to be kept for later steps."""
        return self.rest.get("use_cache") is not False

    @property
    def all_pictured(self) -> bool:
        """Whether every row has a picture."""
        return len({row for row, _ in self.where.spans}) == len(self.embeddings)


@dataclass(frozen=True)
class Prefill:
    """A left-padded batch of R embedded prompts of T tokens.

    Attributes:
        embeddings: (R, T, C).
        mask: (R, T) bool, tokens that are no padding.
        positions: (R, T), or (P, R, T) where the model has several kinds of position.
        columns: (R, T) columns of the whole prompt that the tokens come from.
        next_position: (R,) position of the first token after the prompt.
        unpadded: whether there is no padding.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    columns: Tensor
    next_position: Tensor
    unpadded: bool


def layout(is_image: Tensor, attention_mask: Tensor | None, lengths: list[int]) -> Layout:
    """Find the images, whose numbers of tokens are `lengths` in reading order, among the placeholders (R, L), bool.

    Raises:
        PromptError: the placeholders of a prompt do not match the pictures.
    """
    visible = torch.ones_like(is_image, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_image = is_image & visible
    spans: list[tuple[int, Tensor]] = []
    remaining = list(lengths)
    found = is_image.nonzero()[:, 1]
    own = [len(found)] if len(is_image) == 1 else is_image.sum(1).tolist()
    for row, columns in enumerate(found.split(own)):
        while len(columns):
            if not remaining or remaining[0] > len(columns):
                raise PromptError(_mismatch(int(is_image.sum()), lengths))
            count = remaining.pop(0)
            spans.append((row, columns[:count]))
            columns = columns[count:]
    if remaining:
        raise PromptError(_mismatch(int(is_image.sum()), lengths))
    return Layout(visible, spans)


def _mismatch(placeholders: int, lengths: list[int]) -> str:
    return (
        f"the prompts hold {placeholders} image tokens but {len(lengths)} pictures give {sum(lengths)}: "
        "put one <image> in the prompt for each picture, and let the processor expand it"
    )


def kept_columns(where: Layout, kept: list[Tensor | None]) -> Tensor:
    """Tokens (R, L) bool that stay when of image i only the tokens `kept[i]` do; None keeps all of them."""
    stays = where.visible.clone()
    for (row, columns), indices in zip(where.spans, kept, strict=True):
        if indices is not None:
            # To put a number there by index would copy it to the device each time.
            stays[row].index_fill_(0, columns, False)
            stays[row].index_fill_(0, columns[indices.to(columns.device)], True)
    return stays


def pack(embeddings: Tensor, stays: Tensor, positions: Tensor | None = None) -> Prefill:
    """Drop the tokens that do not stay, (R, L, C) to (R, T, C), left-padded.

    Positions are counted anew; given as (P, R, L), tokens keep them, and what follows goes on after the highest
    of the whole prompt.
    """
    counts = stays.sum(1)
    lengths = counts.tolist()
    width = max(lengths)
    unpadded = min(lengths) == width
    columns = stays.long().argsort(dim=1, stable=True)[
        :, -width:
    ]  # False sorts first: what stays is packed right
    mask = torch.arange(width, device=stays.device)[None] >= (width - counts)[:, None]
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    packed = embeddings[rows, columns]
    if not unpadded:
        packed = packed * mask[..., None].to(embeddings.dtype)
    if positions is None:
        return Prefill(packed, mask, (mask.long().cumsum(1) - 1).clamp(min=0), columns, counts, unpadded)
    own = positions.gather(2, columns.expand(len(positions), -1, -1))
    return Prefill(packed, mask, own, columns, positions.amax((0, 2)) + 1, unpadded)
