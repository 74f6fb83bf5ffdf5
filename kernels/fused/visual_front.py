"""Which kernel runs attention with VAR inside, and with what of the GPU."""

import torch
from torch import Tensor

from lvlm_fix.kernels.fused.launch import capability, is_hopper
from lvlm_fix.kernels.fused.visual_attention import visual_prefill
from lvlm_fix.kernels.fused.visual_decode import visual_decode
from lvlm_fix.kernels.redistribution import Redistribution

__all__ = ["fused_attention"]

# Rows that share keys, up to which splitting the keys beats tiles of rows: half of the highest tile.
FEW = 64


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: Redistribution,
    causal: bool = True,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Arguments and result of `redistributed_attention`, for tensors that `launch.fits_attention` takes."""
    rows = query.shape[2] * query.shape[1] // key.shape[1]
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(query.device):
        if rows <= FEW or query.shape[2] == 1:
            gpu = torch.cuda.get_device_properties(query.device)
            few = gpu.multi_processor_count
            return visual_decode(query, key, value, given, causal, key_mask, scale, multiprocessors=few)
        hopper = is_hopper(capability(query))
        return visual_prefill(query, key, value, given, causal, key_mask, scale, hopper=hopper)
