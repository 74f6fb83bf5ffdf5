"""Branches of a batch, each prefilled by itself, and how they come to stand in one KV cache."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lvlm_fix.growing_layer import GrowingLayer
from lvlm_fix.packed_layer import PackedLayer


@dataclass
class Branch:
    """A prefilled branch of R rows and T columns: its cache, and what later steps must know of its prompt.

    Attributes:
        cache: keys and values of its T columns.
        real: (R, T) bool, columns that are no padding.
        next_position: (R,) position of the token after the prompt.
        image_mask: (R, T) bool, image tokens.
        sinks: by decoder layer, (R, T) bool sink tokens; only layers that have some.
        unpadded: whether `real` is known to be True everywhere.
    """

    cache: Cache
    real: Tensor
    next_position: Tensor
    image_mask: Tensor
    sinks: dict[int, Tensor] = field(default_factory=dict)
    unpadded: bool = False


def stacked_layer(parts: list[Any], width: int) -> Any:
    """One layer of all branches, of which the longest has `width` columns."""
    layer = parts[0]
    if len(parts) > 1 and isinstance(layer, PackedLayer):
        return PackedLayer.stack(parts)
    if len(parts) > 1:
        layer = copy(layer)  # the first may be in a cache of the caller's
        held = max(part.keys.shape[2] for part in parts)
        layer.keys = torch.cat([pad_left(part.keys, held, dim=2) for part in parts])
        layer.values = torch.cat([pad_left(part.values, held, dim=2) for part in parts])
        if layer.is_sliding:  # it holds the newest columns alone, and counts all
            layer.cumulative_length = width
    # Of transformers' own kinds only the one without a window: others decide by themselves what they hold.
    return GrowingLayer.over(layer) if type(layer) is DynamicLayer else layer


def stacked_sinks(branches: list[Branch], layer: int, width: int) -> Tensor:
    """Sinks (rows of all branches, width) of a layer that has some in at least one branch."""
    found = [branch.sinks.get(layer) for branch in branches]
    # Layers may be on several devices, and the masks of the prompt on yet another.
    place = next(sinks.device for sinks in found if sinks is not None)
    masks = [
        torch.zeros_like(branch.real, device=place) if sinks is None else sinks
        for branch, sinks in zip(branches, found, strict=True)
    ]
    return torch.cat([pad_left(mask, width, dim=1) for mask in masks])


def in_images(sinks: dict[int, Tensor], image_mask: Tensor) -> dict[int, Tensor]:
    """Those layers' sinks (R, T) of which some are in an image: VAR leaves other layers alone."""
    found = [(mask & image_mask.to(mask.device)).any().to(image_mask.device) for mask in sinks.values()]
    told = torch.stack(found).tolist() if found else []
    return {layer: mask for (layer, mask), is_told in zip(sinks.items(), told, strict=True) if is_told}


def pad_left(tensor: Tensor, width: int, dim: int) -> Tensor:
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
