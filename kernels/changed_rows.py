"""VAR's redistribution (arXiv 2503.03321) on torch: the few rows it changes, with their weights at hand.

The derivation is in `visual_attention`, which runs all other rows through torch's fused attention.
"""

import torch
from torch import Tensor

from lvlm_fix._tensors import wide
from lvlm_fix.kernels.packing import spans
from lvlm_fix.kernels.redistribution import Redistribution

# Elements of the largest temporary: 16 MiB of float32 stay in the allocator's pool and near the cache. Larger
# blocks are fresh pages on every call, which on CPU cost more than the arithmetic.
BLOCK = 2**22
# Elements of keys or values widened to float32 at once: 4 MiB stay in a cache.
WIDENED = 2**20
HALVES = (torch.float16, torch.bfloat16)


def visible(
    rows: slice, queries: int, tokens: int, causal: bool, key_mask: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys the queries `rows` see, (B or 1, rows, keys), up to the last key that any of them sees."""
    before = tokens - queries
    end = before + rows.stop if causal else tokens
    seen = torch.ones(1, rows.stop - rows.start, end, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(before + rows.start)
    return seen if key_mask is None else seen & key_mask[:, None, :end]


def changed_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image: Tensor,
    sink: Tensor,
    start: Tensor,
    given: Redistribution,
    causal: bool,
    key_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention with the redistribution, weights in hand, for the last rows; (B, H, Q, D)."""
    batch, heads, queries, width = query.shape
    shared, tokens = key.shape[1:3]
    group = heads // shared
    scale = width**-0.5 if scale is None else scale
    columns = class_columns(image, sink, wide(query[:0]).dtype)
    position = torch.arange(tokens - queries, tokens, device=query.device)
    grouped = query.unflatten(1, (shared, group))
    out = torch.empty_like(query)
    out_grouped = out.unflatten(1, (shared, group))
    # A logit rounded to half precision would be wrong by more than the result may be, so keys are widened. A few
    # heads at a time and always into the same memory: fresh pages would cost more than the arithmetic.
    at_once = max(1, WIDENED // (batch * tokens * width)) if query.dtype in HALVES else shared
    wide_key, wide_value = (_room(x[:, :at_once]) for x in (key, value))
    for rows in spans(queries, max(1, BLOCK // (batch * min(at_once, shared) * group * tokens))):
        count = rows.stop - rows.start
        end = tokens - queries + rows.stop if causal else tokens
        may = (position[rows] >= start[:, None]).expand(batch, count)[:, None, None]
        hidden = None
        if key_mask is not None or (causal and count > 1):
            hidden = ~visible(rows, queries, tokens, causal, key_mask, query.device)[:, None, None]
        for few in spans(shared, at_once):
            k, v = _widen(key[:, few, :end], wide_key), _widen(value[:, few, :end], wide_value)
            logits = (wide(grouped[:, few, :, rows]) * scale).flatten(2, 3) @ k.mT
            if hidden is not None:
                logits.unflatten(2, (group, count)).masked_fill_(hidden, -torch.inf)
            weights = logits.softmax(-1)
            if key_mask is not None and hidden is not None:
                blind = hidden.all(-1, keepdim=True)
                weights.unflatten(2, (group, count)).masked_fill_(blind, 0)
            may_change = may.expand(-1, k.shape[1], group, -1).reshape(batch, -1)
            redistribute_(weights.flatten(1, 2), columns[..., :end], may_change, given)
            out_grouped[:, few, :, rows] = (weights @ v).unflatten(2, (group, count)).to(query.dtype)
    return out


def _room(x: Tensor) -> Tensor:
    """Memory for x in float32, or nothing where it is wide already."""
    return torch.empty(x.shape if x.dtype in HALVES else 0, dtype=torch.float32, device=x.device)


def _widen(x: Tensor, room: Tensor) -> Tensor:
    """x in float32 at least, written to `room` (B, heads, T, D) where it is half."""
    return room[:, : x.shape[1], : x.shape[2]].copy_(x) if x.dtype in HALVES else x


def class_columns(image: Tensor, sink: Tensor, dtype: torch.dtype) -> Tensor:
    """Sinks, image tokens that are no sinks, image sinks: (B, 3, T) of 0 and 1, to sum weights with."""
    return torch.stack([sink, image & ~sink, image & sink], dim=1).to(dtype)


def redistribute_(weights: Tensor, columns: Tensor, may: Tensor, given: Redistribution) -> None:
    """Rescale weights (B, N, T) in place where `may` (B, N) and VAR's gate allow it."""
    to_sinks, to_receivers, to_image_sinks = (weights @ columns.mT).unbind(-1)
    to_image = to_image_sinks + to_receivers
    gate = may & (to_image >= given.min_image_attention) & (to_receivers >= given.rho * to_image)
    # Below the smallest normal number there is nobody to give to: budget / received would overflow.
    gate &= to_receivers >= torch.finfo(weights.dtype).tiny
    gain = (given.p * to_sinks / to_receivers).masked_fill(~gate, 0)
    loss = torch.full_like(gain, -given.p).masked_fill(~gate, 0)
    # 1 + 0 leaves rows and columns that nothing happens to bit for bit.
    weights.mul_((torch.stack([loss, gain], dim=-1) @ columns[:, :2]).add_(1))
