"""Attention with VAR's redistribution inside (arXiv 2503.03321), at about the cost of plain attention.

A changed row is a rescaling of its weights w, column by column:

    out = sum_t c_t w_t v_t,    c_t = 1 - p             on sinks,
                                c_t = 1 + budget / s    on image tokens that are no sinks,
                                c_t = 1                 elsewhere,
    budget = p * (weight on sinks),    s = weight on image tokens that are no sinks.

Only rows after the image, of batch items with an image sink, are ever changed. So all rows run through torch's
fused attention, and the few last ones are then computed again with their weights at hand, a block at a time.
On CUDA one Triton kernel does both (`fused`).
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvlm_fix._tensors import sizes
from lvlm_fix.kernels.changed_rows import BLOCK, HALVES, changed_rows, visible
from lvlm_fix.kernels.decode_in_runs import decode_in_runs
from lvlm_fix.kernels.dispatch import attention_sizes, note, require_one_device
from lvlm_fix.kernels.fused.launch import fits_attention
from lvlm_fix.kernels.packing import spans
from lvlm_fix.kernels.redistribution import Redistribution

__all__ = ["Redistribution", "visual_attention"]


@torch.no_grad()
def visual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_mask: Tensor,
    sink_mask: Tensor,
    *,
    rho: float,
    min_image_attention: float,
    p: float,
    first_query: int | Tensor,
    causal: bool = True,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention with VAR inside, the fast way; same arguments and result as `functional.visual_attention`.

    The Q queries are the last Q of the T positions. Key and value heads are shared by H / K query heads each.
    Tokens that `key_mask` hides count neither as image nor as sinks. A query with nothing to attend to gives
    zeros. Without image sinks this is plain attention. No gradient flows.

    Args:
        query: (B, H, Q, D), float16, bfloat16, float32 or float64.
        key, value: (B, K, T, D), K dividing H, in the dtype of `query`.
        image_mask, sink_mask, rho, min_image_attention, p, first_query: see `Redistribution`.
        causal: whether a query sees only positions up to its own.
        key_mask: (B, T) bool, True = may be attended to; None for all.
        scale: factor on the dot products; None for D^-0.5.

    Returns:
        (B, H, Q, D) in the dtype of `query`; softmax and sums run in float32 at least.

    Raises:
        ValueError: shapes or dtypes differ, Q > T, masks are not bool, or a parameter is out of range.

    On CUDA, float32 heads wider than 128, and any wider than 256, run on torch's path.

    Source: VAR, arXiv 2503.03321, eq. 3 and 4.

    >>> q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    >>> image, sink = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    >>> visual_attention(q, k, v, image, sink, rho=0.5, min_image_attention=0.2, p=0.6, first_query=3)
    tensor([[[[0.1000, 0.1000, 0.5500, 0.2500]]]])
    """
    attention_sizes(query, key, value, key_mask)
    sizes(key=(key, "B K T D"), image_mask=(image_mask, "B T"), sink_mask=(sink_mask, "B T"))
    given = Redistribution(image_mask, sink_mask, first_query, rho, min_image_attention, p)
    require_one_device(query=query, image_mask=image_mask, sink_mask=sink_mask)
    if fits_attention(query):
        from lvlm_fix.kernels.fused.visual_front import fused_attention

        note("visual_attention", "triton")
        return fused_attention(query, key, value, given, causal, key_mask, scale)
    note("visual_attention", "torch")
    return redistributed_attention(query, key, value, given, causal, key_mask, scale)


def redistributed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: Redistribution,
    causal: bool = True,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`visual_attention` on torch alone, inputs unchecked."""
    queries, tokens = query.shape[2], key.shape[2]
    image, sink = given.image_mask, given.sink_mask
    if key_mask is not None:
        image, sink = image & key_mask, sink & key_mask
    start = torch.where((image & sink).any(-1), given.first_queries(), tokens)  # an item without sinks: never
    facts = start.min()[None] if key_mask is None else torch.stack([start.min(), key_mask.all().to(start)])
    first, *unmasked = facts.tolist()  # the one wait for the device
    if unmasked == [1]:
        key_mask = None
    unchanged = min(max(first - (tokens - queries), 0), queries)
    if unchanged == queries:
        return plain_attention(query, key, value, causal, key_mask, scale)
    rows = query[:, :, unchanged:]
    if query.dtype in HALVES and query.device.type == "cpu" and queries == 1:
        changed = decode_in_runs(rows, key, value, image, sink, start, given, key_mask, scale)
    else:
        changed = changed_rows(rows, key, value, image, sink, start, given, causal, key_mask, scale)
    if unchanged == 0:
        return changed
    # Running all rows and replacing the last is one call with no mask; leaving them out would need a copy.
    out = plain_attention(query, key, value, causal, key_mask, scale)
    out[:, :, unchanged:] = changed
    return out


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = True,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the last Q of T positions, (B, H, Q, D), with no mask of Q x T; blind rows are zero."""
    queries, tokens, shared = query.shape[2], key.shape[2], key.shape[1]
    causal = causal and queries > 1
    if queries == 1 and query.shape[1] > shared:
        # One row a head: heads that share keys become rows of one head, and each key is read once.
        folded = query.unflatten(1, (shared, -1)).flatten(2, 3)
        return plain_attention(folded, key, value, False, key_mask, scale).flatten(1, 2)[:, :, None]
    gqa = query.shape[1] > shared
    if key_mask is None and (not causal or queries == tokens):
        return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=gqa)
    out = torch.empty_like(query)
    # Blocks of rows against the keys up to the block's end: half the work of one full mask, and never n x n.
    for rows in spans(queries, max(32, BLOCK // (8 * key.shape[0] * tokens))):
        seen = visible(rows, queries, tokens, causal, key_mask, query.device)
        k, v = key[:, :, : seen.shape[-1]], value[:, :, : seen.shape[-1]]
        part = scaled_dot_product_attention(
            query[:, :, rows], k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=gqa
        )
        out[:, :, rows] = part.masked_fill(~seen.any(-1)[:, None, :, None], 0)
    return out
