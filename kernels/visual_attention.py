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

from lvlm_fix._tensors import sizes, wide
from lvlm_fix.kernels.dispatch import attention_sizes, note
from lvlm_fix.kernels.packing import spans, take
from lvlm_fix.kernels.redistribution import Redistribution

__all__ = ["Redistribution", "visual_attention"]

# Elements of the largest temporary: 16 MiB of float32 stay in the allocator's pool and near the cache. Larger
# blocks are fresh pages on every call, which on CPU cost more than the arithmetic.
BLOCK = 2**22
# Elements of keys or values widened to float32 at once: 4 MiB stay in a cache.
WIDENED = 2**20
# Tokens that cost less to gather than a call of the fused attention does.
SHORT = 64
HALVES = (torch.float16, torch.bfloat16)


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

    Source: VAR, arXiv 2503.03321, eq. 3 and 4.

    >>> q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    >>> image, sink = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    >>> visual_attention(q, k, v, image, sink, rho=0.5, min_image_attention=0.2, p=0.6, first_query=3)
    tensor([[[[0.1000, 0.1000, 0.5500, 0.2500]]]])
    """
    attention_sizes(query, key, value, key_mask)
    sizes(key=(key, "B K T D"), image_mask=(image_mask, "B T"), sink_mask=(sink_mask, "B T"))
    given = Redistribution(image_mask, sink_mask, first_query, rho, min_image_attention, p)
    if query.is_cuda:
        from lvlm_fix.kernels.fused.visual_front import fused_attention, takes

        if takes(query):
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
        changed = _decode_in_runs(rows, key, value, image, sink, start, given, key_mask, scale)
    else:
        changed = _changed_rows(rows, key, value, image, sink, start, given, causal, key_mask, scale)
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
        seen = _visible(rows, queries, tokens, causal, key_mask, query.device)
        k, v = key[:, :, : seen.shape[-1]], value[:, :, : seen.shape[-1]]
        part = scaled_dot_product_attention(
            query[:, :, rows], k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=gqa
        )
        out[:, :, rows] = part.masked_fill(~seen.any(-1)[:, None, :, None], 0)
    return out


def _visible(
    rows: slice, queries: int, tokens: int, causal: bool, key_mask: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys the queries `rows` see, (B or 1, rows, keys), up to the last key that any of them sees."""
    before = tokens - queries
    end = before + rows.stop if causal else tokens
    seen = torch.ones(1, rows.stop - rows.start, end, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(before + rows.start)
    return seen if key_mask is None else seen & key_mask[:, None, :end]


def _changed_rows(
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
    columns = _columns(image, sink, wide(query[:0]).dtype)
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
            hidden = ~_visible(rows, queries, tokens, causal, key_mask, query.device)[:, None, None]
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
            _redistribute_(weights.flatten(1, 2), columns[..., :end], may_change, given)
            out_grouped[:, few, :, rows] = (weights @ v).unflatten(2, (group, count)).to(query.dtype)
    return out


def _room(x: Tensor) -> Tensor:
    """Memory for x in float32, or nothing where it is wide already."""
    return torch.empty(x.shape if x.dtype in HALVES else 0, dtype=torch.float32, device=x.device)


def _widen(x: Tensor, room: Tensor) -> Tensor:
    """x in float32 at least, written to `room` (B, heads, T, D) where it is half."""
    return room[:, : x.shape[1], : x.shape[2]].copy_(x) if x.dtype in HALVES else x


def _columns(image: Tensor, sink: Tensor, dtype: torch.dtype) -> Tensor:
    """Sinks, image tokens that are no sinks, image sinks: (B, 3, T) of 0 and 1, to sum weights with."""
    return torch.stack([sink, image & ~sink, image & sink], dim=1).to(dtype)


def _redistribute_(weights: Tensor, columns: Tensor, may: Tensor, given: Redistribution) -> None:
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


def _decode_in_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image: Tensor,
    sink: Tensor,
    start: Tensor,
    given: Redistribution,
    key_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """One query row in half precision on CPU: no key is widened but the sinks'; (B, H, 1, D).

    Widening keys takes twice the time of the attention itself. So the tokens are split in runs of one class
    (the image, what is before it, what is after it), torch's fused attention gives each run's output and the
    log of its weight, and the run then stands for one token with that value and that logit. Sinks, text
    between two images, and runs too short to be worth a call are gathered instead: they are few.
    """
    batch, heads, _, width = query.shape
    shared, tokens = key.shape[1:3]
    columns = image.any(0).nonzero()
    low, high = int(columns[0]), int(columns[-1]) + 1
    runs = [slice(low, high)]
    apart = sink.clone()
    apart[:, low:high] |= ~image[:, low:high]
    for run in (slice(0, low), slice(high, tokens)):
        if run.stop - run.start > SHORT:
            runs.append(run)
        else:
            apart[:, run] = True
    hidden = apart
    if key_mask is not None:
        apart, hidden = apart & key_mask, apart | ~key_mask
    count = int(apart.sum(-1).max())
    if count > SHORT + tokens // 8:
        return _changed_rows(query, key, value, image, sink, start, given, False, key_mask, scale)

    folded = query.unflatten(1, (shared, -1)).flatten(2, 3)
    bias = torch.zeros(batch, 1, 1, tokens).masked_fill_(hidden[:, None, None], -torch.inf)
    values, logits = [], []
    for run in runs:
        # The public function keeps the log of the weights' sum to itself.
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, key[:, :, run], value[:, :, run], attn_mask=bias[..., run], scale=scale
        )
        empty = hidden[:, run].all(-1)[:, None, None]
        values.append(output)
        logits.append(log_sum.masked_fill_(empty, -torch.inf))

    # Not `packed`: raster order does not matter here, and this is a third of its time.
    filled, index = apart.to(torch.int8).topk(count)
    filled = filled.bool()
    k, v = wide(take(key, index)), wide(take(value, index))
    gathered = (wide(folded) * (width**-0.5 if scale is None else scale)) @ k.mT
    gathered.masked_fill_(~filled[:, None, None], -torch.inf)
    weights = torch.cat([torch.stack(logits, dim=-1), gathered], dim=-1).softmax(-1)
    if key_mask is not None:
        weights.masked_fill_(~key_mask.any(-1)[:, None, None, None], 0)

    # The image's run holds receivers and nothing else, the other runs neither image nor sinks.
    is_image = (torch.arange(len(runs)) == 0).expand(batch, -1)
    image = torch.cat([is_image, image.gather(1, index) & filled], dim=1)
    sink = torch.cat([torch.zeros_like(is_image), sink.gather(1, index) & filled], dim=1)
    may = (tokens - 1 >= start)[:, None].expand(batch, heads)
    _redistribute_(weights.flatten(1, 2), _columns(image, sink, weights.dtype), may, given)
    by_run, by_token = weights.split([len(runs), count], dim=-1)
    out = by_token @ v
    for weight, output in zip(by_run.split(1, dim=-1), values, strict=True):
        out += weight * output
    return out.flatten(1, 2)[:, :, None].to(query.dtype)
