"""Which tokens matter, by the attention of a few probe queries (ZipVL, arXiv 2410.08584).

Letters: B batch, H heads, K key heads, P probes, T tokens, D width of a head.
"""

import torch
from torch import Tensor

from lvlm_fix._tensors import attention_weights, require, require_bool, sizes, wide

__all__ = ["important_tokens", "probe_importance"]


def probe_importance(
    query: Tensor, key: Tensor, positions: Tensor, scale: float | None = None, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention that each token gets from the probe queries, as a sum and per probe: two (B, T) tensors.

    `scores` is summed over probes and averaged over heads, so a row adds up to its number of probes.
    `normalised` is `scores` divided by the number of probes that can see the token, 0 where none can.

    Args:
        query: (B, H, P, D), the query rows of P probe tokens.
        key: (B, K, T, D), K dividing H.
        positions: (P,) or (B, P) integers, where the probes stand in 0..T-1; each sees up to its own.
        scale: factor on the dot products; None for D^-0.5.
        key_mask: (B, T) bool, True = a real token; probes that stand on a hidden token count for nothing.

    Returns:
        (scores, normalised), float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes differ, a position is out of range, or `key_mask` is not bool.

    Source: ZipVL, arXiv 2410.08584, accumulated and normalised attention scores over probe tokens.

    >>> zeros = torch.zeros(1, 1, 3, 4)
    >>> probe_importance(zeros[:, :, 1:], zeros, torch.tensor([1, 2]))
    (tensor([[0.8333, 0.8333, 0.3333]]), tensor([[0.4167, 0.4167, 0.3333]]))
    """
    if positions.ndim == 1:
        positions = positions.expand(query.shape[0], -1)
    n = sizes(query=(query, "B H P D"), key=(key, "B K T D"), positions=(positions, "B P"))
    in_range = not positions.is_floating_point() and bool(((positions >= 0) & (positions < n["T"])).all())
    require(in_range, f"positions must be integers in 0..{n['T'] - 1}")
    visible = torch.arange(n["T"], device=query.device) <= positions[..., None]
    if key_mask is not None:
        sizes(key=(key, "B K T D"), key_mask=(key_mask, "B T"))
        require_bool(key_mask=key_mask)
        visible = visible & key_mask[:, None] & key_mask.gather(1, positions.long())[..., None]
    scores = attention_weights(query, key, visible, scale).mean(1).sum(1)
    return scores, scores / visible.sum(1).clamp_min(1)


def important_tokens(scores: Tensor, normalised: Tensor, tau: float) -> Tensor:
    """The important tokens (B, T), bool: as many as `scores` asks for, chosen by `normalised`.

    Their number is the smallest whose highest scores add up to at least `tau` of the row's total, at least
    one. The tokens are then those with the highest normalised score; of equals, the earlier ones. At tau = 1,
    and in a row whose scores are all zero, every token is kept, also those with no score.

    Args:
        scores: (B, T), >= 0, as `probe_importance` gives them.
        normalised: (B, T), the same per probe.
        tau: share of the attention to keep, above 0 and up to 1.

    Raises:
        ValueError: shapes differ or `tau` is out of range.

    Source: ZipVL, arXiv 2410.08584, layer-wise adaptive ratio assignment.

    >>> important_tokens(torch.tensor([[6.0, 3.0, 1.0]]), torch.tensor([[0.2, 0.3, 0.5]]), tau=0.85)
    tensor([[False,  True,  True]])
    """
    n = sizes(scores=(scores, "B T"), normalised=(normalised, "B T"))
    require(0 < tau <= 1, f"tau must lie above 0 and not above 1, got {tau}")
    if tau == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    # Summed from the smallest up: the tail that may go is small, so rounding cannot swallow it as it would
    # where small scores are added to a sum near the total.
    tail = wide(scores).sort(-1).values.cumsum(-1)
    total = tail[:, -1:]
    # The largest is not asked for: one token stays.
    dropped = ((tail[:, :-1] <= (1 - tau) * total) & (total > 0)).sum(-1, keepdim=True)
    chosen = torch.arange(n["T"], 0, -1, device=scores.device) > dropped
    order = normalised.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(chosen).scatter_(1, order, chosen)
