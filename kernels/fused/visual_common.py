"""What attention with VAR inside needs whether there are many queries or one: loads, classes of keys, the gate."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.fused import launch
from lvlm_fix.kernels.fused.launch import with_near_elements
from lvlm_fix.kernels.redistribution import Redistribution

# Weights are rounded to the values' dtype before they meet them. Receivers' weights may be far below the row's
# maximum and are scaled up at the end: 2^12 keeps them out of float16's subnormal numbers.
BOOST = tl.constexpr(4096.0)
# Base-2 exponents are what the hardware has.
LOG2_E = tl.constexpr(launch.LOG2_E)
# The smallest normal float32: below it there is nobody to give to, and budget / received would overflow.
TINY = tl.constexpr(1.1754943508222875e-38)
# Sinks read at a time: they are few.
SINKS = tl.constexpr(16)
# For float32 alone: three tensor-core products of the halves of each number keep about 21 of its 24 bits. Without
# tensor cores ("ieee") the tiles do not fit in the registers.
DOT = tl.constexpr("tf32x3")


class Launch(NamedTuple):
    """Tile sizes of one kernel: rows of a plain and of a changed tile, keys of a block, warps, pipeline stages."""

    rows: int
    changed: int
    keys: int
    warps: int
    stages: int


def numbers_of(given: Redistribution, width: int, scale: float | None) -> tuple[float, float, float, float]:
    """scale, rho, min_image_attention and p as floats: an int would be a kernel of its own, to be compiled."""
    scale = width**-0.5 if scale is None else scale
    return float(scale), float(given.rho), float(given.min_image_attention), float(given.p)


def as_bytes(mask: Tensor) -> Tensor:
    """A (B, T) bool mask as bytes, tokens side by side; a mask of one row for all items stays one row."""
    return with_near_elements(mask).view(torch.uint8)


@triton.jit
def load_rows(
    base, stride, begin, limit,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Rows begin..begin + ROWS of a matrix, (ROWS, BLOCK_D); zero past `limit` and past WIDTH."""
    at, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    # Only the block's first row needs 64 bits, and it is one number.
    place = base + tl.cast(begin, tl.int64) * stride + (at[:, None] * stride + d[None, :])
    if CHECKED:
        return tl.load(place, mask=(begin + at < limit)[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH != BLOCK_D:
        return tl.load(place, mask=(d < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def logits_of(q, k, scale):
    """Logits to base 2, float32."""
    return tl.dot(q, tl.trans(k), input_precision=DOT) * (scale * LOG2_E)


@triton.jit
def kinds(image, sink, seen, token, limit, MASKED: tl.constexpr):
    """Whether each token may be seen, is of the image, is a sink; hidden ones are neither."""
    visible = token < limit
    if MASKED:
        visible &= tl.load(seen + token, mask=visible, other=0) != 0
    is_image = tl.load(image + token, mask=visible, other=0) != 0
    is_sink = tl.load(sink + token, mask=visible, other=0) != 0
    return visible, is_image, is_sink


@triton.jit
def changes(may_change, total, to_receivers, to_image_sinks, to_sinks, rho, min_image_attention, p):
    """What is left of each sink's weight, and what each receiver gains, as factors; sums need no common scale."""
    to_image = to_receivers + to_image_sinks
    gate = may_change & (to_image >= min_image_attention * total) & (to_receivers >= rho * to_image)
    gate &= (to_receivers >= total * TINY) & (to_receivers > 0)
    gain = tl.where(gate, p * to_sinks / tl.where(gate, to_receivers, 1), 0)
    return tl.where(gate, 1 - p, 1.0), gain
