"""Whose attention goes where: VAR's masks and parameters, as the attention kernels take them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lvlm_fix._tensors import require, require_bool, require_unit_range, sizes

__all__ = ["Redistribution"]


@dataclass(frozen=True, eq=False)
class Redistribution:
    """Whose attention goes where: VAR's masks and parameters for one layer.

    Args:
        image_mask, sink_mask: (B, T) bool, image tokens, and sinks of the image and of the text.
        first_query: int or (B,) tensor, position in 0..T of the first query that may be changed (left padding
            counts, so padded items differ); T and beyond change none.
        rho: least non-sink share of the image's attention, 0..1.
        min_image_attention: least attention to the image, 0..1.
        p: fraction of every sink's weight that is moved, 0..1.

    Raises:
        ValueError: masks differ in shape or are not bool, or a parameter is out of range.

    Source: VAR, arXiv 2503.03321, eq. 3 and 4.

    >>> mask = torch.tensor([[True, False]])
    >>> Redistribution(mask, mask, first_query=1, rho=0.5, min_image_attention=0.2, p=0.6).p
    0.6
    """

    image_mask: Tensor
    sink_mask: Tensor
    first_query: int | Tensor
    rho: float
    min_image_attention: float
    p: float

    def __post_init__(self) -> None:
        n = sizes(image_mask=(self.image_mask, "B T"), sink_mask=(self.sink_mask, "B T"))
        require_bool(image_mask=self.image_mask, sink_mask=self.sink_mask)
        require_unit_range(rho=self.rho, min_image_attention=self.min_image_attention, p=self.p)
        count = self.first_query.numel() if isinstance(self.first_query, Tensor) else 1
        require(count in (1, n["B"]), f"first_query must be an int or have {n['B']} elements, got {count}")

    def first_queries(self) -> Tensor:
        """`first_query` as a tensor of one element or B, on the masks' device."""
        device = self.image_mask.device
        if isinstance(self.first_query, Tensor):
            # Kernels step from element to element: a column of a matrix or an expanded number is copied.
            return self.first_query.to(device).reshape(-1).contiguous()
        # Filled on the device: copying a number there would wait for it.
        return torch.full((1,), self.first_query, device=device)
