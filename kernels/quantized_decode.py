"""Decode attention straight from a packed KV cache (ZipVL, arXiv 2410.08584).

With a group's key ranges (s_d, z_d) by channel and its values' (s_t, z_t) by token and c_d by channel, and its
codes u_td of the keys and v_td of the values, what `dequantize_kv` would give need not be made:

    q . k_t = sum_d q_d (z_d + s_d u_td)            = (q . z)  +  sum_d (q_d s_d) u_td
    o_d     = sum_t w_t c_d (z_t + s_t v_td)        = c_d ( sum_t w_t z_t  +  sum_t (w_t s_t) v_td )

with v counted from the middle of the codes, so that the two sums do not cancel out over many tokens.
So the scales go into the query and into the weights, which are few, and a code is only unpacked, turned into a
number and multiplied once. A byte's codes are shifted apart in planes, channels i, i + n, i + 2 n, ... of n codes a
byte in plane i, each against the same channels of the query, rather than put side by side.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvlm_fix._tensors import require, require_bool, sizes, wide
from lvlm_fix.kernels.changed_rows import class_columns, redistribute_
from lvlm_fix.kernels.dispatch import (
    Groups,
    note,
    once_for_groups,
    require_heads,
    require_one_device,
    require_one_dtype,
)
from lvlm_fix.kernels.fused.launch import fits_head
from lvlm_fix.kernels.packing import spans
from lvlm_fix.kernels.redistribution import Redistribution
from lvlm_fix.quantization import QuantizedTensor, shifts

__all__ = ["quantized_decode"]

# Codes turned into numbers at once: 2 MiB of float32 stay in the cache.
UNPACKED = 2**19


@torch.no_grad()
def quantized_decode(
    query: Tensor,
    groups: Groups,
    tail_key: Tensor,
    tail_value: Tensor,
    key_mask: Tensor | None = None,
    *,
    redistribution: Redistribution | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over packed groups and an unpacked tail; same arguments and result as `functional.quantized_decode`.

    The S slots are those of the groups in their order, then the tail. The Q queries are the tail's last Q tokens,
    each sees every slot up to its own. Nothing is rounded to the dtype of the cache on the way, as it would be if
    the cache were dequantised. No gradient flows.

    Args:
        query: (R, H, Q, D), float16, bfloat16, float32 or float64.
        groups: (keys, values) as `kernels.pack` packs (R, K, N, D), K dividing H; N differs by group, and may be 0.
        tail_key, tail_value: (R, K, N, D), N at least Q, in the dtype of `query`.
        key_mask: (R, S) bool, True = may be attended to; None for all.
        redistribution: VAR's masks (R, S) and parameters, `first_query` counted in slots; None for plain attention.
        scale: factor on the dot products; None for D^-0.5.

    Returns:
        (R, H, Q, D) in the dtype of `query`; a query that sees nothing gives zeros.

    Raises:
        ValueError: shapes or dtypes differ, the tail is shorter than Q, or masks are not bool.

    Source: ZipVL, arXiv 2410.08584 (mixed-precision KV cache); VAR, arXiv 2503.03321, eq. 3 and 4.

    >>> from lvlm_fix.kernels import pack
    >>> x = torch.tensor([[0.0, 0.0], [4.0, 1.0], [8.0, 0.0], [12.0, 1.0]])[None, None]
    >>> quantized_decode(x[:, :, :1], [pack(x, x, bits=2)], x[:, :, 3:], x[:, :, 3:])
    tensor([[[[7.2000, 0.6000]]]])
    """
    slots = _check(query, groups, tail_key, tail_value)
    masks: dict[str, Tensor | None] = {"key_mask": key_mask}
    if redistribution is not None:
        masks |= {"image_mask": redistribution.image_mask, "sink_mask": redistribution.sink_mask}
    for name, mask in masks.items():
        if mask is not None:
            expected = (query.shape[0], slots)
            found = tuple(mask.shape)
            require(found == expected, f"{name} must have shape (R={expected[0]}, S={slots}), got {found}")
            require_bool(**{name: mask})
    require_one_device(query=query, tail_key=tail_key, tail_value=tail_value, **masks)
    if fits_head(query):
        from lvlm_fix.kernels.fused.quantized_decode import fused_quantized_decode

        note("quantized_decode", "triton")
        return fused_quantized_decode(query, groups, tail_key, tail_value, key_mask, redistribution, scale)
    note("quantized_decode", "torch")
    return _quantized_decode(query, groups, tail_key, tail_value, key_mask, redistribution, scale)


def _check(query: Tensor, groups: Groups, tail_key: Tensor, tail_value: Tensor) -> int:
    """Raise where the inputs do not fit together; the number of slots."""
    n = sizes(query=(query, "R H Q D"), tail_key=(tail_key, "R K N D"), tail_value=(tail_value, "R K N D"))
    require_heads(query, tail_key)
    require_one_dtype(query=query, tail_key=tail_key, tail_value=tail_value)
    require(n["Q"] <= n["N"], f"the tail holds {n['N']} tokens and must hold the {n['Q']} queries' own")
    wanted = n["R"], n["K"], n["D"], query.dtype, query.device
    kinds, tokens = _facts(groups)
    if kinds <= {wanted}:
        return n["N"] + tokens
    # Words cost more than the check, and there are many groups.
    for index, (keys, values) in enumerate(groups):
        *kind, device = _kind(keys, values)
        if tuple(kind) != wanted[:-1]:
            raise ValueError(
                f"groups[{index}] must hold keys packed per channel and values packed per token, as kernels.pack does, "
                f"of shape (R={n['R']}, K={n['K']}, N, D={n['D']}), {query.dtype} and one number of bits; "
                f"got {tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}"
            )
        if device != query.device:
            raise ValueError(f"groups[{index}] is on {device}, and query on {query.device}")
    raise AssertionError("groups of other kinds than wanted, and each of the one wanted")


Kind = tuple[int, int, int, torch.dtype, torch.device]


@once_for_groups
def _facts(groups: Groups) -> tuple[frozenset[Kind], int]:
    """What kinds of groups there are, and their tokens in all."""
    kinds = frozenset(_kind(keys, values) for keys, values in groups)
    return kinds, sum(keys.packed.shape[2] for keys, _ in groups)


def _kind(keys: QuantizedTensor, values: QuantizedTensor) -> Kind:
    """R, K, D, dtype and device of a group as `kernels.pack` makes them; -1 and the like of anything else.

    A kernel is given addresses, so each tensor's shape is looked at, and that all of them are on one device.
    """
    shape = tuple(keys.shape)
    tokens = shape[2] if len(shape) == 4 else -1
    held = [
        x for q in (keys, values) for x in (q.packed, q.scale, q.zero_point, q.channel_scale) if x is not None
    ]
    fits = (
        len(shape) == 4
        and tuple(values.shape) == shape
        and keys.dtype == values.dtype
        and keys.bits == values.bits
        # An empty group has no ranges to speak of.
        and (tokens == 0 or _packed_by_channel_and_token(keys, values))
    )
    devices = {x.device for x in held}
    if not fits or len(devices) > 1:
        return -1, -1, -1, keys.dtype, keys.packed.device
    rows, heads, _, width = shape
    return rows, heads, width, keys.dtype, keys.packed.device


def _packed_by_channel_and_token(keys: QuantizedTensor, values: QuantizedTensor) -> bool:
    rows, heads, tokens, width = keys.shape
    by_channel, by_token = (rows, heads, 1, width), (rows, heads, tokens, 1)
    codes = (rows, heads, tokens, -(-width * keys.bits // 8))
    ranges = [(keys.scale, by_channel), (keys.zero_point, by_channel)]
    ranges += [(values.scale, by_token), (values.zero_point, by_token)]
    if values.channel_scale is not None:
        ranges.append((values.channel_scale, by_channel))
    return (
        keys.channel_scale is None
        and keys.bits in (2, 4, 8)
        and all(tuple(x.shape) == codes and x.dtype == torch.uint8 for x in (keys.packed, values.packed))
        and all(tuple(x.shape) == shape and x.dtype == keys.dtype for x, shape in ranges)
    )


def _quantized_decode(
    query: Tensor,
    groups: Groups,
    tail_key: Tensor,
    tail_value: Tensor,
    key_mask: Tensor | None,
    given: Redistribution | None,
    scale: float | None,
) -> Tensor:
    """`quantized_decode` on torch alone, inputs unchecked. The weights are few, and held: one row a query and head."""
    queries, width = query.shape[2:]
    shared = tail_key.shape[1]
    groups = [group for group in groups if group[0].packed.shape[2]]
    # Heads that share keys become rows of one head, so that each key is unpacked once.
    rows = (wide(query) * (width**-0.5 if scale is None else scale)).unflatten(1, (shared, -1)).flatten(2, 3)
    logits = torch.cat([*(_logits(rows, keys) for keys, _ in groups), rows @ wide(tail_key).mT], dim=-1)
    slots = logits.shape[-1]
    hidden = None if key_mask is None else ~key_mask[:, None, None, None]
    if queries > 1:
        position = torch.arange(slots, device=query.device)
        later = position > position[-queries:, None]
        hidden = later if hidden is None else hidden | later
    if hidden is not None:
        logits.unflatten(2, (-1, queries)).masked_fill_(hidden, -torch.inf)
    weights = logits.softmax(-1)
    if hidden is not None:
        weights.unflatten(2, (-1, queries)).masked_fill_(hidden.all(-1, keepdim=True), 0)
    if given is not None:
        _move_(weights, key_mask, given, queries)
    parts = weights.split([*(keys.shape[2] for keys, _ in groups), tail_key.shape[2]], dim=-1)
    out = parts[-1] @ wide(tail_value)
    for part, (_, values) in zip(parts, groups, strict=False):
        out += _weighted(part, values)
    return out.unflatten(2, (-1, queries)).flatten(1, 2).to(query.dtype)


def _move_(weights: Tensor, key_mask: Tensor | None, given: Redistribution, queries: int) -> None:
    """VAR's redistribution, in place, of weights (R, K, rows, S); the last of the row's dimensions are the queries."""
    batch, slots = weights.shape[0], weights.shape[-1]
    image, sink = given.image_mask, given.sink_mask
    if key_mask is not None:
        image, sink = image & key_mask, sink & key_mask
    start = torch.where((image & sink).any(-1), given.first_queries(), slots)
    position = torch.arange(slots - queries, slots, device=weights.device)
    flat = weights.flatten(1, 2)
    may = (position >= start[:, None]).repeat(1, flat.shape[1] // queries)
    redistribute_(flat, class_columns(image, sink, weights.dtype), may.expand(batch, -1), given)


def _codes(q: QuantizedTensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Tokens and codes (planes, R, K, tokens, bytes) of each span of tokens; a last byte that is not full ends in 0."""
    step = max(1, UNPACKED // max(1, q.packed[:, :, :1].numel() * (8 // q.bits)))
    places = shifts(q.bits, q.packed.device).view(-1, 1, 1, 1, 1)
    for tokens in spans(q.packed.shape[2], step):
        # All planes at once: few operations, each over what is contiguous.
        codes = q.packed[:, :, tokens] >> places
        codes &= 2**q.bits - 1
        yield tokens, codes.to(dtype)


def _logits(rows: Tensor, keys: QuantizedTensor) -> Tensor:
    """rows (R, K, M, D) times the keys: (R, K, M, N)."""
    base, count, scaled = rows @ wide(keys.zero_point).mT, 8 // keys.bits, rows * wide(keys.scale)
    if keys.length % count:
        scaled = pad(scaled, (0, -keys.length % count))
    planes = scaled.view(*scaled.shape[:-1], -1, count).permute(4, 0, 1, 2, 3)
    parts = [(planes @ codes.mT).sum(0) for _, codes in _codes(keys, rows.dtype)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).add_(base)


def _weighted(weights: Tensor, values: QuantizedTensor) -> Tensor:
    """weights (R, K, M, N) times the values: (R, K, M, D)."""
    scaled = weights * wide(values.scale).mT
    # Codes count from the middle: the mean of thousands of values is near zero, and it would be the difference of two
    # large sums if they counted from the minimum.
    middle = (2**values.bits - 1) / 2
    base = weights @ (wide(values.zero_point) + middle * wide(values.scale))
    parts = [scaled[..., tokens] @ codes.sub_(middle) for tokens, codes in _codes(values, weights.dtype)]
    planes = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    out = base + planes.permute(1, 2, 3, 4, 0).flatten(-2)[..., : values.length]
    return out if values.channel_scale is None else out * wide(values.channel_scale)
