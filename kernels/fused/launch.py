"""What the fronts and launchers share: which tensors Triton takes, and how they must lie in memory."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LOG2_E",
    "capability",
    "cdiv",
    "fits",
    "fits_attention",
    "fits_head",
    "is_hopper",
    "multiprocessors",
    "next_power_of_2",
    "on_device_of",
    "padded_width",
    "precision",
    "with_near_elements",
    "within_reach",
]

WIDEST_HEAD = 256
# In float32, attention over tiles of rows has no registers left beyond this: a product is three of split halves, and
# every warp holds 16 whole rows of the query.
WIDEST_FLOAT32 = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Base-2 exponents are what the hardware has. Kernels read it as `visual_common.LOG2_E`, their own kind of constant.
LOG2_E = 1.4426950408889634
# Ampere: before it there is no bfloat16, and no copy from memory to shared memory beside the arithmetic.
OLDEST_CAPABILITY = 80


def fits(x: Tensor) -> bool:
    """Whether Triton's kernels take x: not empty, not float64, on a GPU they are made for, with Triton installed."""
    return x.is_cuda and x.dtype in DTYPES and x.numel() > 0 and _has_kernels(x.device)


def fits_head(query: Tensor) -> bool:
    """Whether kernels that hold few query rows take a query (..., D): heads up to 256 wide."""
    return fits(query) and query.shape[-1] <= WIDEST_HEAD


def fits_attention(query: Tensor) -> bool:
    """Whether `visual_attention` and `sparse_prefill` take a query (..., D): up to 256 wide, 128 in float32."""
    widest = WIDEST_FLOAT32 if query.dtype == torch.float32 else WIDEST_HEAD
    return fits(query) and query.shape[-1] <= widest


@lru_cache(maxsize=64)
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton is here for a GPU of NVIDIA's, Ampere or newer; ROCm calls its devices CUDA too."""
    if torch.version.hip is not None or find_spec("triton") is None:
        return False
    return _capability(device) >= OLDEST_CAPABILITY


# Triton has both, but made for kernels: to the host a call of them is half a launch.


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is no less than `size`."""
    return 1 << (size - 1).bit_length()


def padded_width(width: int) -> int:
    """The power of two that a head of `width` is filled up to; tensor cores multiply no fewer than 16 numbers."""
    return max(16, next_power_of_2(width))


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of `x`."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: plain tf32 keeps 10 bits of a float32, three such products nearly all of them."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def capability(x: Tensor) -> int:
    """Compute capability of the device of x, 90 for sm_90; that of an H100 in Triton's interpreter."""
    if not x.is_cuda:
        return 90
    return _capability(x.device)


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(capability: int) -> bool:
    """Whether a GPU has 227 KiB of shared memory and products that read it: Hopper, and Blackwell for data centres."""
    return capability // 10 in (9, 10)


def with_near_elements(x: Tensor) -> Tensor:
    """x, or a copy of it, with the last dimension's elements side by side: the kernels read rows as wide words."""
    return x if x.stride(-1) == 1 else x.contiguous()


def within_reach(x: Tensor) -> Tensor:
    """x (B, H, T, D) with near elements, or a copy: these kernels count a head's elements in 32 bits."""
    x = with_near_elements(x)
    return x if x.shape[2] * x.stride(2) < 2**31 else x.contiguous()
