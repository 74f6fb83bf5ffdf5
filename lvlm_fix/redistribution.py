"""Attention sinks give to the image (VAR, arXiv 2503.03321): the equations, and attention with them inside.

Letters: B batch, H heads, K key and value heads, Q queries, T tokens, D width of a head, C width of a layer.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lvlm_fix._tensors import (
    attention_weights,
    masked_sum,
    require,
    require_bool,
    require_unit_range,
    sizes,
    wide,
)

__all__ = ["image_centric_heads", "redistribute", "sink_tokens", "visual_attention"]


def sink_tokens(hidden_states: Tensor, sink_dims: Sequence[int] | Tensor, tau: float) -> Tensor:
    """Tokens (B, T), bool, with |x| / rms(x) above `tau` in at least one sink dimension.

    No epsilon is added to the mean square; a token of zeros is no sink. |x| / rms(x) cannot pass sqrt(C).

    Args:
        hidden_states: (B, T, C), input of a decoder layer before its norm.
        sink_dims: dimensions with massive activations, at least one, each in 0..C-1.
        tau: threshold in multiples of the token's root mean square, > 0; exactly `tau` is not a sink.

    Raises:
        ValueError: `hidden_states` is not (B, T, C), or `sink_dims` or `tau` is out of range.

    Source: VAR, arXiv 2503.03321, sink dimension value and sink tokens.

    >>> sink_tokens(torch.tensor([[[1.0, 9.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]]), sink_dims=[1], tau=1.5)
    tensor([[ True, False]])
    """
    n = sizes(hidden_states=(hidden_states, "B T C"))
    dims = [int(d) for d in sink_dims]
    fits = bool(dims) and all(0 <= d < n["C"] for d in dims)
    require(fits, f"sink_dims must name dimensions in 0..{n['C'] - 1}, got {dims}")
    require(tau > 0, f"tau must be positive, got {tau}")
    kind = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    rms = torch.linalg.vector_norm(hidden_states, dim=-1, dtype=kind) * n["C"] ** -0.5
    largest = hidden_states.index_select(-1, _indices(tuple(dims), hidden_states.device)).abs().amax(-1)
    return largest > tau * rms


@functools.lru_cache(maxsize=64)
def _indices(dims: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, for a list would be copied to the device in every layer."""
    with torch.inference_mode(False):  # where it was made must not matter to who uses it
        return torch.tensor(dims, device=device)


def image_centric_heads(
    attention: Tensor, image_mask: Tensor, sink_mask: Tensor, rho: float, min_image_attention: float
) -> Tensor:
    """The gate of VAR: for each head and query, whether its attention may be redistributed; (B, H, Q), bool.

    True where the image gets at least `min_image_attention` of the row, and image tokens that are no sinks
    get at least `rho` of what the image gets. False where the image gets nothing at all, and False for every
    row of a batch item that has no image sink: there the reference leaves the whole layer alone, text sinks
    included. Which queries and layers count (those after the image, not the last layer) is the caller's part.

    Args:
        attention: (B, H, Q, T) weights after the softmax; rows sum to 1, or are all zero.
        image_mask: (B, T) bool, image tokens.
        sink_mask: (B, T) bool, sink tokens of the image and of the text.
        rho: least non-sink share of the image's attention, 0..1 (the reference code's rho is 1 minus this).
        min_image_attention: least attention to the image, 0..1.

    Raises:
        ValueError: shapes differ, masks are not bool, or a threshold is out of range.

    Source: VAR, arXiv 2503.03321, eq. 3 (visual non-sink ratio).

    >>> attention = torch.tensor([[[[0.4, 0.3, 0.2, 0.1]]]])
    >>> image, sink = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    >>> image_centric_heads(attention, image, sink, rho=0.3, min_image_attention=0.2)
    tensor([[[True]]])
    """
    sizes(attention=(attention, "B H Q T"), image_mask=(image_mask, "B T"), sink_mask=(sink_mask, "B T"))
    require_bool(image_mask=image_mask, sink_mask=sink_mask)
    require_unit_range(rho=rho, min_image_attention=min_image_attention)
    weights = wide(attention)
    to_sinks = masked_sum(weights, image_mask & sink_mask)
    to_others = masked_sum(weights, image_mask & ~sink_mask)
    to_image = to_sinks + to_others  # adding the parts keeps rho=0 and rho=1 free of rounding
    gate = (to_image >= min_image_attention) & (to_others >= rho * to_image) & (to_image > 0)
    return gate & (image_mask & sink_mask).any(-1)[:, None, None]


def redistribute(attention: Tensor, image_mask: Tensor, sink_mask: Tensor, gate: Tensor, p: float) -> Tensor:
    """Move the fraction `p` of every sink's weight to the image tokens that are no sinks; (B, H, Q, T).

    The sum taken from all sinks, image and text, is shared in proportion to the receivers' weights, so rows
    keep their sum. Rows outside `gate` come back bit for bit, and so do rows with nobody to give to (no
    weight on non-sink image tokens) or all zero. The rule on layers without image sinks is in the gate, not
    here: see `image_centric_heads`.

    Args:
        attention: (B, H, Q, T) weights after the softmax.
        image_mask: (B, T) bool, image tokens.
        sink_mask: (B, T) bool, sink tokens.
        gate: (B, H, Q) bool, rows to change.
        p: fraction moved, 0..1 (the reference code's p is the fraction kept, 1 minus this).

    Returns:
        (B, H, Q, T) in the dtype of `attention`; a new tensor.

    Raises:
        ValueError: shapes differ, masks or gate are not bool, or `p` is out of range.

    Source: VAR, arXiv 2503.03321, eq. 4 (redistribution of the attention budget).

    >>> image, sink = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    >>> attention, gate = torch.tensor([[[[0.4, 0.3, 0.2, 0.1]]]]), torch.tensor([[[True]]])
    >>> redistribute(attention, image, sink, gate, p=0.5)
    tensor([[[[0.2000, 0.1500, 0.5500, 0.1000]]]])
    """
    sizes(
        attention=(attention, "B H Q T"),
        image_mask=(image_mask, "B T"),
        sink_mask=(sink_mask, "B T"),
        gate=(gate, "B H Q"),
    )
    require_bool(image_mask=image_mask, sink_mask=sink_mask, gate=gate)
    require_unit_range(p=p)
    weights = wide(attention)
    budget = p * masked_sum(weights, sink_mask)[..., None]
    received = masked_sum(weights, image_mask & ~sink_mask)[..., None]
    share = weights / received.masked_fill(received == 0, 1)  # before the budget: budget / received overflows
    sink, receiver = sink_mask[:, None, None], (image_mask & ~sink_mask)[:, None, None]
    moved = torch.where(sink, (1 - p) * weights, torch.where(receiver, weights + budget * share, weights))
    return torch.where(gate[..., None] & (received > 0), moved, weights).to(attention.dtype)


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
    """Attention with VAR inside, the slow way: weights -> gate -> redistribution -> values; (B, H, Q, D).

    The Q queries are the last Q of the T positions. Key and value heads are repeated to H in blocks. Tokens
    that `key_mask` hides count neither as image nor as sinks. A query with nothing to attend to gives zeros.

    Args:
        query: (B, H, Q, D).
        key, value: (B, K, T, D), K dividing H.
        image_mask, sink_mask: (B, T) bool.
        rho, min_image_attention: see `image_centric_heads`.
        p: see `redistribute`.
        first_query: int or (B,) tensor, position in 0..T of the first query that may be changed (left padding
            counts, so padded items differ); T and beyond change none.
        causal: whether a query sees only positions up to its own.
        key_mask: (B, T) bool, True = may be attended to; None for all.
        scale: factor on the dot products; None for D^-0.5.

    Returns:
        (B, H, Q, D) in the dtype of `query`.

    Raises:
        ValueError: shapes differ, Q > T, masks are not bool, or a parameter is out of range.

    Source: VAR, arXiv 2503.03321, eq. 3 and 4.

    >>> q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    >>> image, sink = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    >>> visual_attention(q, k, v, image, sink, rho=0.5, min_image_attention=0.2, p=0.6, first_query=3)
    tensor([[[[0.1000, 0.1000, 0.5500, 0.2500]]]])
    """
    key_mask = torch.ones_like(image_mask, dtype=torch.bool) if key_mask is None else key_mask
    n = sizes(
        query=(query, "B H Q D"),
        key=(key, "B K T D"),
        value=(value, "B K T D"),
        image_mask=(image_mask, "B T"),
        sink_mask=(sink_mask, "B T"),
        key_mask=(key_mask, "B T"),
    )
    require_bool(image_mask=image_mask, sink_mask=sink_mask, key_mask=key_mask)
    require(n["Q"] <= n["T"], f"there are more queries ({n['Q']}) than positions ({n['T']})")
    start = torch.as_tensor(first_query, device=query.device).reshape(-1, 1, 1)
    require(start.shape[0] in (1, n["B"]), f"first_query must be an int or have {n['B']} elements")
    position = torch.arange(n["T"], device=query.device)
    asking = position[n["T"] - n["Q"] :]
    visible = key_mask[:, None, :].expand(-1, n["Q"], -1)
    if causal:
        visible = visible & (position <= asking[:, None])
    image_mask, sink_mask = image_mask & key_mask, sink_mask & key_mask
    weights = attention_weights(query, key, visible, scale)
    gate = image_centric_heads(weights, image_mask, sink_mask, rho, min_image_attention) & (asking >= start)
    weights = redistribute(weights, image_mask, sink_mask, gate, p)
    return (weights @ wide(value).repeat_interleave(n["H"] // n["K"], dim=1)).to(query.dtype)
