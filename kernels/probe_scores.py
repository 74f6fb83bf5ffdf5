"""Attention that each token gets from a few probe queries (ZipVL, arXiv 2410.08584).

Only sums over probes and heads are kept, so torch makes the probes' weights a few heads at a time. A probe that
counts for nothing has weight 0 in the sum: the sum is one product with a row of ones and zeros. On CUDA, Triton
makes no weights at all: see `lvlm_fix.kernels.fused.probe_scores`.
"""

import torch
from torch import Tensor

from lvlm_fix._tensors import require, require_bool, sizes, wide
from lvlm_fix.kernels.dispatch import note, require_heads, require_one_device, require_one_dtype
from lvlm_fix.kernels.fused.launch import fits_head
from lvlm_fix.kernels.packing import spans

__all__ = ["probe_scores"]

# Elements of the largest temporary; see visual_attention.
BLOCK = 2**22


@torch.no_grad()
def probe_scores(
    query: Tensor, key: Tensor, positions: Tensor, scale: float | None = None, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention that each token gets, as a sum and per probe; same result as `functional.probe_importance`.

    `scores` is summed over probes and averaged over heads, so a row adds up to its number of probes.
    `normalised` is `scores` divided by the number of probes that can see the token, 0 where none can.
    No gradient flows.

    Args:
        query: (B, H, P, D), the query rows of P probe tokens.
        key: (B, K, T, D), K dividing H, in the dtype of `query`.
        positions: (P,) or (B, P) integers, where the probes stand in 0..T-1; each sees up to its own.
        scale: factor on the dot products; None for D^-0.5.
        key_mask: (B, T) bool, True = a real token; probes that stand on a hidden token count for nothing.

    Returns:
        (scores, normalised), two (B, T) tensors, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes differ, a position is out of range, or `key_mask` is not bool.

    Source: ZipVL, arXiv 2410.08584, accumulated and normalised attention scores over probe tokens.

    >>> zeros = torch.zeros(1, 1, 3, 4)
    >>> probe_scores(zeros[:, :, 1:], zeros, torch.tensor([1, 2]))
    (tensor([[0.8333, 0.8333, 0.3333]]), tensor([[0.4167, 0.4167, 0.3333]]))
    """
    if positions.ndim == 1:
        positions = positions.expand(query.shape[0], -1)
    n = sizes(query=(query, "B H P D"), key=(key, "B K T D"), positions=(positions, "B P"))
    require_heads(query, key)
    require_one_dtype(query=query, key=key)
    require_one_device(query=query, key=key, positions=positions, key_mask=key_mask)
    in_range = not positions.is_floating_point() and bool(((positions >= 0) & (positions < n["T"])).all())
    require(in_range, f"positions must be integers in 0..{n['T'] - 1}")
    if key_mask is not None:
        sizes(key=(key, "B K T D"), key_mask=(key_mask, "B T"))
        require_bool(key_mask=key_mask)
    return scores_of_probes(query, key, positions, scale, key_mask)


@torch.no_grad()
def scores_of_probes(
    query: Tensor, key: Tensor, positions: Tensor, scale: float | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`probe_scores`, inputs unchecked: whether positions are in range, only the device could say. (B, P) they are."""
    if fits_head(query):
        from lvlm_fix.kernels.fused.probe_scores import fused_probe_scores

        note("probe_scores", "triton")
        return fused_probe_scores(query, key, positions, scale, key_mask)
    note("probe_scores", "torch")
    return _probe_scores(query, key, positions.long(), scale, key_mask)


def _probe_scores(
    query: Tensor, key: Tensor, positions: Tensor, scale: float | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, probes, width = query.shape
    shared, tokens = key.shape[1:3]
    group = heads // shared
    scale = width**-0.5 if scale is None else scale
    visible = torch.arange(tokens, device=query.device) <= positions[..., None]
    counted = torch.ones_like(positions, dtype=torch.bool)
    if key_mask is not None:
        visible &= key_mask[:, None]
        counted = key_mask.gather(1, positions)
    # A probe that does not count may see nothing at all; showing it one token keeps its row a number.
    hidden = ~(visible | ~counted[..., None])[:, None, None]
    row = wide(counted.to(query.dtype))[:, None, None].expand(-1, 1, group, -1).flatten(2)
    grouped = query.unflatten(1, (shared, group))
    scores = wide(query[:0]).new_zeros(batch, tokens)
    # Whichever is larger, the weights of a head's probes or the head's widened keys.
    largest = batch * tokens * max(group * probes, width)
    for few in spans(shared, max(1, BLOCK // max(1, largest))):
        logits = (wide(grouped[:, few]) * scale).flatten(2, 3) @ wide(key[:, few]).mT
        logits.unflatten(2, (group, probes)).masked_fill_(hidden, -torch.inf)
        weights = logits.softmax(-1).flatten(1, 2)
        scores += (row.expand(-1, few.stop - few.start, -1).flatten(1)[:, None] @ weights)[:, 0]
    scores /= heads
    return scores, scores / (visible & counted[..., None]).sum(1).clamp_min(1)
