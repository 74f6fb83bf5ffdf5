"""Which kernel runs attention with VAR inside, and with what of the GPU."""

from torch import Tensor

from lvlm_fix.kernels.fused.launch import capability, is_hopper, multiprocessors, on_device_of
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
    with on_device_of(query):
        if rows <= FEW or query.shape[2] == 1:
            count = multiprocessors(query.device)
            return visual_decode(query, key, value, given, causal, key_mask, scale, multiprocessors=count)
        hopper = is_hopper(capability(query))
        return visual_prefill(query, key, value, given, causal, key_mask, scale, hopper=hopper)
