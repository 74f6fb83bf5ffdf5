"""Prefill attention among the important tokens only (ZipVL, arXiv 2410.08584).

The tokens are moved side by side, in raster order, so that plain causal attention is causal among them; items
with fewer are filled up at the end, where no real query looks. With m of n tokens important the work is m^2 / n^2.
On CUDA, Triton reads the tokens from where they stand: see `lvlm_fix.kernels.fused.sparse_prefill`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lvlm_fix._tensors import require, require_bool, sizes
from lvlm_fix.kernels.dispatch import attention_sizes, note, require_one_device
from lvlm_fix.kernels.fused.launch import fits_attention
from lvlm_fix.kernels.packing import packed, take
from lvlm_fix.kernels.visual_attention import Redistribution, plain_attention, visual_attention

__all__ = ["sparse_prefill"]


@torch.no_grad()
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
    """Causal attention of the important tokens to the important tokens; rows of the others are zeros.

    The others pass by the residual. VAR's gate and redistribution, if given, run on what is left: an item none
    of whose important tokens is an image sink is left alone. No gradient flows.

    Args:
        query: (B, H, T, D), float16, bfloat16, float32 or float64.
        key, value: (B, K, T, D), K dividing H, in the dtype of `query`.
        important: (B, T) bool, as `functional.important_tokens` gives them; items may differ in number.
        redistribution: VAR's masks and parameters, positions as in the whole prompt; None for plain attention.
        key_mask: (B, T) bool, True = a real token; hidden ones are never important. None for all.
        scale: factor on the dot products; None for D^-0.5.

    Returns:
        (B, H, T, D) in the dtype of `query`.

    Raises:
        ValueError: shapes or dtypes differ, there is not one query per token, or masks are not bool.

    On CUDA one kernel gathers as it attends, but for float32 heads wider than 128, and with a redistribution: then
    torch copies the important tokens side by side, and `visual_attention` runs among them.

    Source: ZipVL, arXiv 2410.08584, token-level sparse attention in the prefill.

    >>> x, v = torch.zeros(1, 1, 4, 2), torch.arange(8.0).view(1, 1, 4, 2)
    >>> sparse_prefill(x, x, v, torch.tensor([[True, False, True, False]]))
    tensor([[[[0., 1.],
              [0., 0.],
              [2., 3.],
              [0., 0.]]]])
    """
    n = attention_sizes(query, key, value, key_mask)
    require(n["Q"] == n["T"], f"query must have one row per token ({n['T']}), got {n['Q']}")
    sizes(key=(key, "B K T D"), important=(important, "B T"))
    require_bool(important=important)
    if redistribution is not None:
        sizes(key=(key, "B K T D"), image_mask=(redistribution.image_mask, "B T"))

    require_one_device(query=query, important=important)
    important = important if key_mask is None else important & key_mask
    if fits_attention(query) and redistribution is None:
        from lvlm_fix.kernels.fused.sparse_prefill import fused_sparse_prefill

        note("sparse_prefill", "triton")
        return fused_sparse_prefill(query, key, value, important, scale=scale)
    note("sparse_prefill", "torch")
    index, filled = packed(important, int(important.sum(-1).max()))
    q, k, v = take(query, index), take(key, index), take(value, index)
    if redistribution is None:
        among = plain_attention(q, k, v, scale=scale)
    else:
        # Copied also on CUDA: the kernel that redistributes reads its keys in a row. What ran among them is noted
        # under its own name, "visual_attention", and the copies are torch's: hence "torch" above.
        among = visual_attention(
            q, k, v, scale=scale, **vars(_among(redistribution, important, index, filled))
        )
    out = query.new_zeros(n["B"], n["T"], n["H"], n["D"])
    item = torch.arange(n["B"], device=query.device)[:, None]
    out[item, index] = among.transpose(1, 2).masked_fill(~filled[:, :, None, None], 0)
    return out.transpose(1, 2)


def _among(given: Redistribution, important: Tensor, index: Tensor, filled: Tensor) -> Redistribution:
    """The same redistribution, told by places among the important tokens."""
    position = torch.arange(important.shape[1], device=important.device)
    first_query = (important & (position < given.first_queries()[:, None])).sum(-1)
    image_mask, sink_mask = (mask.gather(1, index) & filled for mask in (given.image_mask, given.sink_mask))
    return replace(given, image_mask=image_mask, sink_mask=sink_mask, first_query=first_query)
