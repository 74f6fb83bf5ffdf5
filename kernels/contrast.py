"""DAMRO's contrast of two branches' logits (arXiv 2410.04514), cut and, if asked for, argmax included.

On CUDA the cut needs the row's maximum before the first token can be written, so the maximum is taken first, by
many programs; what they have read is then in the GPU's cache. See `fused/contrast.py`.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from lvlm_fix._tensors import require, require_unit_range
from lvlm_fix.functional import contrast_logits
from lvlm_fix.kernels.dispatch import note, require_one_device
from lvlm_fix.kernels.fused.launch import fits

__all__ = ["contrast"]


@overload
def contrast(logits: Tensor, negative_logits: Tensor, alpha: float, beta: float) -> Tensor: ...
@overload
def contrast(
    logits: Tensor, negative_logits: Tensor, alpha: float, beta: float, *, argmax: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@torch.no_grad()
def contrast(
    logits: Tensor, negative_logits: Tensor, alpha: float, beta: float, *, argmax: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """(1 + alpha) * logits - alpha * negative_logits, implausible tokens at -inf; as `functional.contrast_logits`.

    No gradient flows.

    Args:
        logits: (..., V), natural-log units; from the whole image.
        negative_logits: (..., V), from the outlier tokens only; finite wherever `logits` is.
        alpha: strength of the contrast, >= 0.
        beta: tokens less likely than `beta` times the most likely are cut, 0..1.
        argmax: also give the most likely token of each row, the first of equals.

    Returns:
        (..., V) in the dtype of `logits`; with `argmax` also (...) long.

    Raises:
        ValueError: shapes differ, there is no token, or `alpha` or `beta` is out of range.

    Source: DAMRO, arXiv 2410.04514, "Contrastive Decoding".

    >>> contrast(torch.tensor([2.0, 1.0, -9.0]), torch.tensor([2.0, 0.0, 0.0]), 2.0, 0.1, argmax=True)
    (tensor([2., 3., -inf]), tensor(1))
    """
    require(
        logits.ndim > 0 and logits.shape == negative_logits.shape and logits.shape[-1] > 0,
        f"logits {tuple(logits.shape)} and negative_logits {tuple(negative_logits.shape)} must share a shape of "
        "at least one token",
    )
    floating = logits.is_floating_point() and negative_logits.is_floating_point()
    found = f"{logits.dtype} and {negative_logits.dtype}"
    require(floating, f"logits and negative_logits must be floating, got {found}")
    require(alpha >= 0, f"alpha must not be negative, got {alpha}")
    require_unit_range(beta=beta)
    require_one_device(logits=logits, negative_logits=negative_logits)
    if fits(logits) and fits(negative_logits):
        from lvlm_fix.kernels.fused.contrast import fused_contrast

        note("contrast", "triton")
        contrasted, most_likely = fused_contrast(logits, negative_logits, alpha, beta, argmax)
    else:
        note("contrast", "torch")
        contrasted = contrast_logits(logits, negative_logits, alpha, beta)
        most_likely = contrasted.argmax(-1) if argmax else None
    return contrasted if most_likely is None else (contrasted, most_likely)
