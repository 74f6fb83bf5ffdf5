"""ZipVL's packing (arXiv 2410.08584) on CUDA: the same codes as `quantize_kv`, bit for bit.

    key_td   -> round((key_td - min_d) / s_d),      s_d = (max_d - min_d) / (2^bits - 1)     over the tokens t,
    value_td -> round((v_td - min_t) / s_t),        v_td = value_td / c_d,  c_d = sqrt(max_t |value_td|),
                                                    s_t = (max_t - min_t) / (2^bits - 1)     over the channels d.

Keys need their channels' range, values their channels' largest size, over all tokens. `_channel_ranges` leaves them
for at most PARTS spans of tokens, `_channel_scales` puts the spans together and rounds to the dtype of the input as
torch does, and `_pack` packs a block of tokens, keys and values at once. Every code is computed from the rounded
numbers that are kept.

A tile is (tokens, bytes, codes in a byte), so a byte is the sum over the last dimension of codes shifted apart.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.fused.launch import cdiv, next_power_of_2
from lvlm_fix.quantization import QuantizedTensor

# Bytes of a tile of keys, and as many of values. Of halves it is 32 registers a thread of 4 warps, once they are
# float32; of float32, where Triton holds what it has read as well, half as many.
TILE = 8192
WARPS = 4
# Spans of tokens at most, so that the work does not grow with the square of the tokens, and those merged at once.
PARTS = 64
PARTS_AT_ONCE = 8


@triton.jit
def _tile(token, tokens, head, WIDTH: tl.constexpr, BYTES: tl.constexpr, PER_BYTE: tl.constexpr):
    """Offsets of a tile's elements in (R * H, K, D), and which of them there are."""
    byte, place = tl.arange(0, BYTES)[None, :, None], tl.arange(0, PER_BYTE)[None, None, :]
    channel = byte * PER_BYTE + place
    inside = (token < tokens)[:, None, None] & (channel < WIDTH)
    return (head * tokens + token)[:, None, None] * WIDTH + channel, inside


@triton.jit(do_not_specialize=["tokens", "span"])
def _channel_ranges(
    keys,
    values,
    partial,
    tokens,
    span,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial (R * H, parts, 3, PADDED): minimum and maximum of keys, largest size of values, over a span of tokens."""
    part, head, channel = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, PADDED)
    low = tl.full((PADDED,), float("inf"), tl.float32)
    high = tl.full((PADDED,), float("-inf"), tl.float32)
    size = tl.zeros((PADDED,), tl.float32)
    for begin in range(part * span, tl.minimum((part + 1) * span, tokens), BLOCK):
        token = begin + tl.arange(0, BLOCK)
        at = (head * tokens + token)[:, None] * WIDTH + channel[None, :]
        inside = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
        x = tl.load(keys + at, inside, float("inf")).to(tl.float32)
        low = tl.minimum(low, tl.min(x, axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, x, float("-inf")), axis=0))
        size = tl.maximum(size, tl.max(tl.abs(tl.load(values + at, inside, 0.0).to(tl.float32)), axis=0))
    place = partial + (head * tl.num_programs(0) + part) * 3 * PADDED + channel
    tl.store(place, low)
    tl.store(place + PADDED, high)
    tl.store(place + 2 * PADDED, size)


@triton.jit(do_not_specialize=["parts"])
def _channel_scales(
    partial,
    key_scale,
    key_low,
    channel_scale,
    parts,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LEVELS: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Of one head: its channels' ranges over all tokens, rounded as they are kept."""
    head, channel = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    low = tl.full((PADDED,), float("inf"), tl.float32)
    high = tl.full((PADDED,), float("-inf"), tl.float32)
    size = tl.zeros((PADDED,), tl.float32)
    for begin in range(0, parts, AT_ONCE):
        part = begin + tl.arange(0, AT_ONCE)
        place = partial + ((head * parts + part) * 3 * PADDED)[:, None] + channel[None, :]
        inside = (part < parts)[:, None]
        low = tl.minimum(low, tl.min(tl.load(place, inside, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.load(place + PADDED, inside, float("-inf")), axis=0))
        size = tl.maximum(size, tl.max(tl.load(place + 2 * PADDED, inside, 0.0), axis=0))
    there = channel < WIDTH
    low, high = tl.where(there, low, 0.0), tl.where(there, high, 0.0)
    step = tl.div_rn(high - low, tl.full((PADDED,), LEVELS, tl.float32))
    # Square roots are rounded to the dtype of the input, and so is what they divide.
    root = tl.sqrt_rn(size).to(channel_scale.dtype.element_ty).to(tl.float32)
    at = head * WIDTH + channel
    tl.store(key_scale + at, _round_up(step, key_scale, EPS, FLOOR), there)
    tl.store(key_low + at, low, there)
    tl.store(channel_scale + at, tl.where(root == 0, 1.0, root), there)


@triton.jit
def _round_up(x, like, EPS: tl.constexpr, FLOOR: tl.constexpr):
    """x rounded to the dtype of `like`, never down and never to zero, as float32."""
    nearest = x.to(like.dtype.element_ty).to(tl.float32)
    above = (x + tl.maximum(x * EPS, FLOOR)).to(like.dtype.element_ty).to(tl.float32)
    return tl.where((nearest >= x) & (nearest > 0), nearest, above)


@triton.jit
def _codes(x, low, scale, inside, BITS: tl.constexpr, PER_BYTE: tl.constexpr):
    """(tokens, bytes) uint8 of x (tokens, bytes, codes in a byte)."""
    # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, halves to the even one.
    code = (tl.div_rn(x - low, scale) + 12582912.0) - 12582912.0
    code = tl.where(inside, code, 0.0).to(tl.int32)
    return tl.sum(code << (tl.arange(0, PER_BYTE) * BITS)[None, None, :], axis=2).to(tl.uint8)


@triton.jit(do_not_specialize=["tokens"])
def _pack(
    keys,
    values,
    key_codes,
    key_scale,
    key_low,
    value_codes,
    value_scale,
    value_low,
    channel_scale,
    tokens,
    WIDTH: tl.constexpr,
    BYTES: tl.constexpr,
    PER_BYTE: tl.constexpr,
    BITS: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BYTES)[:, None] * PER_BYTE + tl.arange(0, PER_BYTE)[None, :]
    there = channel < WIDTH
    scale = tl.load(key_scale + head * WIDTH + channel, there, 1.0).to(tl.float32)
    low = tl.load(key_low + head * WIDTH + channel, there, 0.0).to(tl.float32)
    channels = tl.load(channel_scale + head * WIDTH + channel, there, 1.0).to(tl.float32)
    LEVELS: tl.constexpr = 2**BITS - 1

    token = block * BLOCK + tl.arange(0, BLOCK)
    at, inside = _tile(token, tokens, head, WIDTH, BYTES, PER_BYTE)
    USED: tl.constexpr = (WIDTH + PER_BYTE - 1) // PER_BYTE
    byte = tl.arange(0, BYTES)[None, :]
    place = (head * tokens + token)[:, None] * USED + byte
    kept = (token < tokens)[:, None] & (byte < USED)
    x = tl.load(keys + at, inside, 0.0).to(tl.float32)
    tl.store(key_codes + place, _codes(x, low[None], scale[None], inside, BITS, PER_BYTE), kept)

    x = tl.div_rn(tl.load(values + at, inside, 0.0).to(tl.float32), tl.broadcast_to(channels[None], at.shape))
    x = x.to(values.dtype.element_ty).to(tl.float32)
    low = tl.min(tl.min(tl.where(inside, x, float("inf")), axis=2), axis=1)
    high = tl.max(tl.max(tl.where(inside, x, float("-inf")), axis=2), axis=1)
    # Tokens past the end have neither.
    low, high = tl.where(token < tokens, low, 0.0), tl.where(token < tokens, high, 0.0)
    scale = _round_up(tl.div_rn(high - low, tl.full((BLOCK,), LEVELS, tl.float32)), values, EPS, FLOOR)
    codes = _codes(x, low[:, None, None], scale[:, None, None], inside, BITS, PER_BYTE)
    tl.store(value_codes + place, codes, kept)
    tl.store(value_scale + head * tokens + token, scale, token < tokens)
    tl.store(value_low + head * tokens + token, low, token < tokens)


def configuration(width: int, bits: int, itemsize: int) -> dict[str, int]:
    """Tile of a head size: bytes and codes a byte, filled up to powers of two, and as many tokens as TILE holds."""
    per_byte = 8 // bits
    byte_count = next_power_of_2(cdiv(width, per_byte))
    return {
        "BYTES": byte_count,
        "PER_BYTE": per_byte,
        "BLOCK": max(1, TILE // itemsize // (byte_count * per_byte)),
    }


def fused_pack(keys: Tensor, values: Tensor, bits: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    """`kernels.pack` by Triton, inputs unchecked."""
    keys, values = keys.contiguous(), values.contiguous()
    rows, heads, tokens, width = keys.shape
    tile = configuration(width, bits, keys.element_size())
    blocks = cdiv(tokens, tile["BLOCK"])
    span = cdiv(blocks, PARTS) * tile["BLOCK"]
    parts = cdiv(tokens, span)
    padded = tile["BYTES"] * tile["PER_BYTE"]
    partial = keys.new_empty(rows * heads, parts, 3, padded, dtype=torch.float32)
    used = cdiv(width, tile["PER_BYTE"])
    key_codes, value_codes = _alike(2, keys, (rows, heads, tokens, used), torch.uint8)
    key_scale, key_low, channel_scale = _alike(3, keys, (rows, heads, 1, width))
    value_scale, value_low = _alike(2, keys, (rows, heads, tokens, 1))
    info = torch.finfo(keys.dtype)
    rounding = {"EPS": info.eps, "FLOOR": max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)}
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(keys):
        _channel_ranges[(parts, rows * heads)](
            keys,
            values,
            partial,
            tokens,
            span,
            WIDTH=width,
            PADDED=padded,
            BLOCK=tile["BLOCK"],
            num_warps=WARPS,
        )
        _channel_scales[(rows * heads,)](
            partial, key_scale, key_low, channel_scale, parts,
            WIDTH=width, PADDED=padded, LEVELS=2**bits - 1, AT_ONCE=PARTS_AT_ONCE, **rounding, num_warps=1,
        )  # fmt: skip
        _pack[(blocks, rows * heads)](
            keys, values, key_codes, key_scale, key_low, value_codes, value_scale, value_low, channel_scale,
            tokens, WIDTH=width, BITS=bits, **tile, **rounding, num_warps=WARPS,
        )  # fmt: skip
    return (
        QuantizedTensor(key_codes, key_scale, key_low, bits, width),
        QuantizedTensor(value_codes, value_scale, value_low, bits, width, channel_scale),
    )


def _alike(
    count: int, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Tensors whose beginnings are aligned, as decoding reads them as wide words: where they can be, made at once."""
    dtype = like.dtype if dtype is None else dtype
    if math.prod(shape) * dtype.itemsize % 16 == 0:
        return like.new_empty(count, *shape, dtype=dtype).unbind()
    return tuple(like.new_empty(shape, dtype=dtype) for _ in range(count))
