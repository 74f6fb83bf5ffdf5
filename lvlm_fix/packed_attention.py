"""A KV cache that is held packed, and attention over it (ZipVL, arXiv 2410.08584), the slow way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvlm_fix._tensors import sizes
from lvlm_fix.quantization import QuantizedTensor, dequantize_kv, quantize_kv
from lvlm_fix.redistribution import visual_attention

if TYPE_CHECKING:
    from lvlm_fix.kernels import Redistribution

__all__ = ["pack", "quantized_decode"]


def pack(keys: Tensor, values: Tensor, bits: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Keys and values of one precision as ZipVL packs them: keys per channel, values per token, channels normalised.

    Args:
        keys, values: (R, H, K, D), floating, finite, with at least one element.
        bits: 2, 4 or 8.

    Raises:
        ValueError: shapes differ, a tensor is empty or not floating, or `bits` is none of 2, 4, 8.

    Source: ZipVL, arXiv 2410.08584 (mixed-precision KV cache).

    >>> [packed.scale.shape for packed in pack(torch.zeros(1, 2, 30, 8), torch.zeros(1, 2, 30, 8), bits=2)]
    [torch.Size([1, 2, 1, 8]), torch.Size([1, 2, 30, 1])]
    """
    sizes(keys=(keys, "R H K D"), values=(values, "R H K D"))
    return quantize_kv(keys, bits, dim=-2), quantize_kv(values, bits, dim=-1, channel_normalize=True)


def quantized_decode(
    query: Tensor,
    groups: Sequence[tuple[QuantizedTensor, QuantizedTensor]],
    tail_key: Tensor,
    tail_value: Tensor,
    key_mask: Tensor | None = None,
    *,
    redistribution: Redistribution | None = None,
    scale: float | None = None,
) -> Tensor:
    """Dequantise the groups, put the tail behind them, attend; (R, H, Q, D).

    The S slots are those of the groups in their order, then the tail. The Q queries are the tail's last Q tokens,
    each sees every slot up to its own.

    Args:
        query: (R, H, Q, D).
        groups: (keys, values) as `quantize_kv` packs (R, K, N, D), K dividing H; N differs by group, and may be 0.
        tail_key, tail_value: (R, K, N, D), N at least Q: the newest tokens, not packed.
        key_mask: (R, S) bool, True = may be attended to; None for all.
        redistribution: VAR's masks (R, S) and parameters, `first_query` counted in slots; None for plain attention.
        scale: factor on the dot products; None for D^-0.5.

    Returns:
        (R, H, Q, D) in the dtype of `query`; a query that sees nothing gives zeros.

    Raises:
        ValueError: shapes do not fit, Q > S, masks are not bool, or a parameter is out of range.

    Source: ZipVL, arXiv 2410.08584 (mixed-precision KV cache); VAR, arXiv 2503.03321, eq. 3 and 4.

    >>> from lvlm_fix.functional import quantize_kv
    >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 4, 1)
    >>> group = quantize_kv(x, bits=2, dim=-2), quantize_kv(x, bits=2, dim=-1)
    >>> quantized_decode(x[:, :, :1], [group], x[:, :, :1], 4 + x[:, :, :1])
    tensor([[[[2.]]]])
    """
    key = torch.cat([*(dequantize_kv(keys) for keys, _ in groups), tail_key], dim=2)
    value = torch.cat([*(dequantize_kv(values) for _, values in groups), tail_value], dim=2)
    if redistribution is None:
        nothing = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        image_mask, sink_mask, first_query = nothing, nothing, 0
        rho = min_image_attention = p = 0.0
    else:
        moved = redistribution
        image_mask, sink_mask, first_query = moved.image_mask, moved.sink_mask, moved.first_query
        rho, min_image_attention, p = moved.rho, moved.min_image_attention, moved.p
    return visual_attention(
        query,
        key,
        value,
        image_mask,
        sink_mask,
        rho=rho,
        min_image_attention=min_image_attention,
        p=p,
        first_query=first_query,
        key_mask=key_mask,
        scale=scale,
    )
