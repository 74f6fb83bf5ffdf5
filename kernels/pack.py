"""ZipVL's packing of a group's keys and values (arXiv 2410.08584) to 2, 4 or 8 bit codes."""

import torch
from torch import Tensor

from lvlm_fix import packed_attention
from lvlm_fix._tensors import require, sizes
from lvlm_fix.kernels.dispatch import note, require_one_device, require_one_dtype
from lvlm_fix.kernels.fused.launch import fits
from lvlm_fix.quantization import QuantizedTensor

__all__ = ["pack"]


@torch.no_grad()
def pack(keys: Tensor, values: Tensor, bits: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Pack the keys and values of one precision as ZipVL does; the same codes as `functional.pack`.

    Keys are packed per channel (`dim=-2`), values per token with channel normalisation
    (`dim=-1, channel_normalize=True`). No gradient flows.

    Args:
        keys, values: (R, H, K, D), one floating dtype, finite, with at least one element.
        bits: 2, 4 or 8.

    Returns:
        (keys, values) packed, of shape (R, H, K, D) each.

    Raises:
        ValueError: shapes or dtypes differ, a tensor is empty, or `bits` is none of 2, 4, 8.

    Source: ZipVL, arXiv 2410.08584 (mixed-precision KV cache).

    >>> keys, values = pack(torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8), bits=2)
    >>> keys.packed.shape, keys.scale.shape, values.scale.shape, values.channel_scale.shape
    (torch.Size([1, 2, 30, 2]), torch.Size([1, 2, 1, 8]), torch.Size([1, 2, 30, 1]), torch.Size([1, 2, 1, 8]))
    """
    sizes(keys=(keys, "R H K D"), values=(values, "R H K D"))
    require_one_dtype(keys=keys, values=values)
    require(keys.numel() > 0, f"keys and values must hold elements, got shape {tuple(keys.shape)}")
    require(bits in (2, 4, 8), f"bits must be 2, 4 or 8, got {bits}")
    require_one_device(keys=keys, values=values)
    if fits(keys):
        from lvlm_fix.kernels.fused.pack import fused_pack

        note("pack", "triton")
        return fused_pack(keys, values, bits)
    note("pack", "torch")
    return packed_attention.pack(keys, values, bits)
