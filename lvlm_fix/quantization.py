"""Packed 2, 4 and 8 bit storage of keys and values (ZipVL, arXiv 2410.08584; ZipCache, arXiv 2405.14256)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvlm_fix._tensors import require, wide

__all__ = ["QuantizedTensor", "dequantize_kv", "quantize_kv"]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor held as packed integer codes; `dequantize_kv` gives back `shape` in `dtype`.

    `packed` is uint8 and packs the last dimension, 8 // `bits` codes a byte, first code in the lowest bits,
    zeros at the end; tokens can still be sliced and gathered. `scale` and `zero_point` (the group's minimum)
    have the input's dtype, and size 1 in every reduced dimension. `channel_scale` (..., 1, D) is None unless
    channels were normalised. `length` is the last dimension before packing.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    length: int
    channel_scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that was quantised."""
        return torch.Size((*self.packed.shape[:-1], self.length))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor that was quantised."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held: packed codes, scales, zero points and, where there are any, channel scales."""
        parts = (self.packed, self.scale, self.zero_point, self.channel_scale)
        return sum(part.nbytes for part in parts if part is not None)


def quantize_kv(
    x: Tensor, bits: int, dim: int | Sequence[int], *, channel_normalize: bool = False
) -> QuantizedTensor:
    """Quantise a float tensor to `bits` bits with one scale and one minimum a group.

    A group is everything that shares its indices outside `dim`: minimum and maximum are taken *over* `dim`,
    which may be several dimensions. For keys and values (B, H, T, D), ZipVL's choices are

    - keys, per channel: `dim=-2`, one group for each (batch item, head, channel);
    - values, per token: `dim=-1, channel_normalize=True`, one group for each (batch item, head, token), or
      `dim=(1, -1)` to share a token's group between the heads.

    `channel_normalize` first divides each channel (last dimension) by the square root of its largest size
    over the tokens (second last dimension): one loud channel then does not set the step of a whole token.

    The round trip is off by at most `scale` / 2, times `channel_scale` if normalised, plus rounding to the
    dtype of `x`. A constant group comes back exactly unless it was normalised.

    Args:
        x: any shape with at least one element; float16, bfloat16, float32 or float64, finite.
        bits: 2, 4 or 8.
        dim: the reduced dimension or dimensions.
        channel_normalize: see above; then `dim` must hold the last dimension and not the one before it.

    Raises:
        ValueError: `x` is empty or not floating, `bits` is none of 2, 4, 8, or `dim` does not fit.

    Source: ZipVL, arXiv 2410.08584 (mixed-precision KV cache); channel normalisation from ZipCache,
    arXiv 2405.14256 (channel-separable tokenwise quantisation).

    >>> x = torch.arange(8.0).view(1, 1, 2, 4)
    >>> q = quantize_kv(x, bits=2, dim=-1)
    >>> q.packed.shape, q.nbytes, torch.allclose(dequantize_kv(q), x)
    (torch.Size([1, 1, 2, 1]), 18, True)
    """
    full = x.is_floating_point() and x.numel() > 0
    require(full, f"x must be a float tensor with elements, got {x.dtype} of shape {tuple(x.shape)}")
    require(bits in (2, 4, 8), f"bits must be 2, 4 or 8, got {bits}")
    dims = _normalise_dims(dim, x.ndim)
    channel_scale = None
    if channel_normalize:
        per_token = x.ndim > 1 and x.ndim - 1 in dims and x.ndim - 2 not in dims
        require(per_token, f"channel_normalize needs per-token groups such as dim=-1, got dim={dim}")
        channel_scale = x.abs().amax(-2, keepdim=True).sqrt()
        channel_scale = channel_scale.masked_fill(channel_scale == 0, 1)
        x = x / channel_scale
    zero_point, top = wide(x).amin(dims, keepdim=True), wide(x).amax(dims, keepdim=True)
    # A GPU multiplies by a number's rounded inverse, and divides by a tensor: codes are the same everywhere.
    scale = _round_up((top - zero_point) / zero_point.new_full((), 2**bits - 1), x.dtype)
    codes = ((wide(x) - zero_point) / wide(scale)).round().to(torch.uint8)
    return QuantizedTensor(
        _pack(codes, bits), scale, zero_point.to(x.dtype), bits, x.shape[-1], channel_scale
    )


def dequantize_kv(q: QuantizedTensor) -> Tensor:
    """Undo `quantize_kv`: a tensor of `q.shape` in `q.dtype`.

    Source: ZipVL, arXiv 2410.08584 (mixed-precision KV cache).

    >>> dequantize_kv(quantize_kv(torch.full((1, 1, 3, 5), 0.1), bits=4, dim=-2))[0, 0, 0]
    tensor([0.1000, 0.1000, 0.1000, 0.1000, 0.1000])
    """
    x = _unpack(q.packed, q.bits, q.length) * wide(q.scale) + wide(q.zero_point)
    if q.channel_scale is not None:
        x = x * wide(q.channel_scale)
    return x.to(q.dtype)


def _normalise_dims(dim: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    fits = dims and all(-ndim <= d < ndim for d in dims) and len({d % ndim for d in dims}) == len(dims)
    require(bool(fits), f"dim must name different dimensions of a {ndim}-dimensional tensor, got {dim}")
    return tuple(d % ndim for d in dims)


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`, never down, so no code passes the top, and never to zero, for constant groups."""
    info = torch.finfo(dtype)
    floor = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)  # float16 lives on its subnormals here
    nearest, above = scale.to(dtype), (scale + (scale * info.eps).clamp_min(floor)).to(dtype)
    return torch.where((wide(nearest) >= scale) & (nearest > 0), nearest, above)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, a byte each, to as many of `bits` as a byte holds, the first lowest."""
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    if sys.byteorder == "big" or per_byte == 1:
        return (codes.unflatten(-1, (-1, per_byte)) << shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)
    # The codes of a byte, read as one wider number, are moved together: its high bits fall off.
    wider = codes.contiguous().view(torch.int16 if per_byte == 2 else torch.int32)
    packed = wider
    for place in range(1, per_byte):
        packed = packed | wider >> place * (8 - bits)
    return packed.to(torch.uint8)


def _unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    codes = (packed.unsqueeze(-1) >> shifts(bits, packed.device)) & (2**bits - 1)
    return codes.flatten(-2)[..., :length]


def shifts(bits: int, device: torch.device) -> Tensor:
    """By how many bits each code of a byte is shifted, the first lowest."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
