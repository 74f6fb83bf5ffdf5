"""Prefill attention among the important tokens (ZipVL, arXiv 2410.08584), the slow way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvlm_fix._tensors import require, require_bool, sizes
from lvlm_fix.redistribution import visual_attention

if TYPE_CHECKING:
    from lvlm_fix.kernels import Redistribution

__all__ = ["sparse_prefill"]


def sparse_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    important: Tensor,
    *,
    redistribution: Redistribution | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Item by item: list the important tokens, attend among them, put the rows back; (B, H, T, D).

    Rows of the other tokens are zeros. VAR's gate and redistribution run on what is left.

    Args:
        query: (B, H, T, D).
        key, value: (B, K, T, D), K dividing H.
        important: (B, T) bool.
        redistribution: VAR's masks and parameters, positions as in the whole prompt; None for plain attention.
        key_mask: (B, T) bool, True = a real token; hidden ones are never important. None for all.
        scale: factor on the dot products; None for D^-0.5.

    Returns:
        (B, H, T, D) in the dtype of `query`.

    Raises:
        ValueError: shapes do not fit, there is not one query per token, or masks are not bool.

    Source: ZipVL, arXiv 2410.08584, token-level sparse attention in the prefill; VAR, arXiv 2503.03321, eq. 3 and 4.

    >>> x, v = torch.zeros(1, 1, 3, 1), torch.arange(3.0).view(1, 1, 3, 1)
    >>> sparse_prefill(x, x, v, torch.tensor([[True, False, True]])).flatten()
    tensor([0., 0., 1.])
    """
    key_mask = torch.ones_like(important, dtype=torch.bool) if key_mask is None else key_mask
    n = sizes(
        query=(query, "B H T D"),
        key=(key, "B K T D"),
        value=(value, "B K T D"),
        important=(important, "B T"),
        key_mask=(key_mask, "B T"),
    )
    require_bool(important=important, key_mask=key_mask)
    require(n["T"] > 0, "there must be at least one token")
    out = torch.zeros_like(query)
    for item, chosen in enumerate(important & key_mask):
        if not chosen.any():
            continue
        q, k, v = (x[item : item + 1, :, chosen] for x in (query, key, value))
        masks, parameters = _of_the_chosen(redistribution, item, chosen)
        out[item, :, chosen] = visual_attention(q, k, v, *masks, scale=scale, **parameters)[0]
    return out


def _of_the_chosen(
    given: Redistribution | None, item: int, chosen: Tensor
) -> tuple[list[Tensor], dict[str, Any]]:
    """The item's masks and VAR's parameters, told by places among the chosen tokens."""
    if given is None:
        nothing = torch.zeros(1, int(chosen.sum()), dtype=torch.bool, device=chosen.device)
        return [nothing] * 2, {"rho": 0.0, "min_image_attention": 0.0, "p": 0.0, "first_query": 0}
    first = int(torch.as_tensor(given.first_query).expand(len(given.image_mask))[item])
    masks = [mask[item : item + 1, chosen] for mask in (given.image_mask, given.sink_mask)]
    numbers: dict[str, Any] = {
        "rho": given.rho,
        "min_image_attention": given.min_image_attention,
        "p": given.p,
    }
    return masks, numbers | {"first_query": int(chosen[:first].sum())}
