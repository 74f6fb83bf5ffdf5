"""What the launchers share: sizes that Triton can take."""

import torch
from torch import Tensor

WIDEST_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fits(query: Tensor) -> bool:
    """Whether the Triton kernels take a query (..., D): on CUDA, not float64, and no head wider than 256."""
    return query.is_cuda and query.dtype in DTYPES and query.shape[-1] <= WIDEST_HEAD


def padded_width(width: int) -> int:
    """The power of two that a head of `width` is filled up to; tensor cores multiply no fewer than 16 numbers."""
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: plain tf32 keeps 10 bits of a float32, three such products nearly all of them."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def capability(x: Tensor) -> int:
    """Compute capability of the device of x, 90 for sm_90; that of an H100 in Triton's interpreter."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def within_reach(x: Tensor) -> Tensor:
    """x (B, H, T, D), or a copy: the kernels read its rows as wide words, and count a head's elements in 32 bits."""
    near = x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31
    return x if near else x.contiguous()
