"""The tokens of a mask side by side: what is left when the others are dropped."""

from collections.abc import Iterator

import torch
from torch import Tensor


def packed(mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Positions of the True tokens of `mask` (B, T) in raster order, `length` slots a row, and which slots are filled.

    Slots past a row's count name its other tokens, each once: a scatter to all slots never writes twice.

    >>> packed(torch.tensor([[False, True, False, True], [False, False, True, False]]), length=2)
    (tensor([[1, 3],
            [2, 0]]), tensor([[ True,  True],
            [ True, False]]))
    """
    index = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :length]
    return index, mask.gather(1, index)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` (B, N) of x (B, H, T, D): (B, H, N, D). A `gather` would walk each number of each token."""
    if x.is_contiguous():
        items, heads, tokens, width = x.shape
        first = torch.arange(0, items * heads * tokens, tokens, device=x.device).view(items, heads, 1)
        rows = (first + index[:, None]).view(-1)
        return x.view(-1, width).index_select(0, rows).view(items, heads, -1, width)
    item = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[item, index].transpose(1, 2)


def spans(total: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover 0..total."""
    return (slice(begin, min(begin + step, total)) for begin in range(0, total, step))
