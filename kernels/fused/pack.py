"""ZipVL's packing (arXiv 2410.08584) on CUDA: the same codes as `quantize_kv`, bit for bit.

    key_td   -> round((key_td - min_d) / s_d),      s_d = (max_d - min_d) / (2^bits - 1)     over the tokens t,
    value_td -> round((v_td - min_t) / s_t),        v_td = value_td / c_d,  c_d = sqrt(max_t |value_td|),
                                                    s_t = (max_t - min_t) / (2^bits - 1)     over the channels d.

Keys need their channels' range, values their channels' largest size, over all tokens: `_channel_ranges` leaves them
for blocks of tokens, `_pack` puts the blocks together, rounds the ranges to the dtype of the input as torch does,
and packs a block of tokens, keys and values at once. Every code is computed from the rounded numbers that are kept.

A tile is (tokens, bytes, codes in a byte), so a byte is the sum over the last dimension of codes shifted apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.quantization import QuantizedTensor

# Elements of a tile: 32 registers a thread of 4 warps for keys, and as many for values.
TILE = 4096
WARPS = 4


@triton.jit
def _tile(token, tokens, head, WIDTH: tl.constexpr, BYTES: tl.constexpr, PER_BYTE: tl.constexpr):
    """Offsets of a tile's elements in (R * H, K, D), and which of them there are."""
    byte, place = tl.arange(0, BYTES)[None, :, None], tl.arange(0, PER_BYTE)[None, None, :]
    channel = byte * PER_BYTE + place
    inside = (token < tokens)[:, None, None] & (channel < WIDTH)
    return (head * tokens + token)[:, None, None] * WIDTH + channel, inside


@triton.jit
def _channel_ranges(
    keys,
    values,
    partial,
    tokens,
    blocks,
    WIDTH: tl.constexpr,
    BYTES: tl.constexpr,
    PER_BYTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial (R * H, blocks, 3, BYTES * PER_BYTE): minimum and maximum of keys, largest size of values."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, inside = _tile(block * BLOCK + tl.arange(0, BLOCK), tokens, head, WIDTH, BYTES, PER_BYTE)
    low = tl.min(tl.load(keys + at, inside, float("inf")).to(tl.float32), axis=0)
    high = tl.max(tl.load(keys + at, inside, float("-inf")).to(tl.float32), axis=0)
    size = tl.max(tl.abs(tl.load(values + at, inside, 0.0).to(tl.float32)), axis=0)
    channel = tl.arange(0, BYTES)[:, None] * PER_BYTE + tl.arange(0, PER_BYTE)[None, :]
    place = partial + (head * blocks + block) * 3 * BYTES * PER_BYTE + channel
    tl.store(place, low)
    tl.store(place + BYTES * PER_BYTE, high)
    tl.store(place + 2 * BYTES * PER_BYTE, size)


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


@triton.jit
def _pack(
    keys,
    values,
    partial,
    key_codes,
    key_scale,
    key_low,
    value_codes,
    value_scale,
    value_low,
    channel_scale,
    tokens,
    blocks,
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
    low = tl.full((BYTES, PER_BYTE), float("inf"), tl.float32)
    high = tl.full((BYTES, PER_BYTE), float("-inf"), tl.float32)
    size = tl.zeros((BYTES, PER_BYTE), tl.float32)
    for other in range(0, blocks):
        place = partial + (head * blocks + other) * 3 * BYTES * PER_BYTE + channel
        low = tl.minimum(low, tl.load(place))
        high = tl.maximum(high, tl.load(place + BYTES * PER_BYTE))
        size = tl.maximum(size, tl.load(place + 2 * BYTES * PER_BYTE))
    there = channel < WIDTH
    low, high = tl.where(there, low, 0.0), tl.where(there, high, 0.0)
    LEVELS: tl.constexpr = 2**BITS - 1
    scale = _round_up(tl.div_rn(high - low, tl.full((BYTES, PER_BYTE), LEVELS, tl.float32)), keys, EPS, FLOOR)
    # Square roots are rounded to the dtype of the input, and so is what they divide.
    channels = tl.sqrt_rn(size).to(values.dtype.element_ty).to(tl.float32)
    channels = tl.where(channels == 0, 1.0, channels)
    if block == 0:
        at = head * WIDTH + channel
        tl.store(key_scale + at, scale, there)
        tl.store(key_low + at, low, there)
        tl.store(channel_scale + at, channels, there)

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


def configuration(width: int, bits: int) -> dict[str, int]:
    """Tile of a head size: bytes and codes a byte, filled up to powers of two, and as many tokens as TILE holds."""
    per_byte = 8 // bits
    byte_count = triton.next_power_of_2(triton.cdiv(width, per_byte))
    return {"BYTES": byte_count, "PER_BYTE": per_byte, "BLOCK": max(1, TILE // (byte_count * per_byte))}


def fused_pack(keys: Tensor, values: Tensor, bits: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    """`kernels.pack` by Triton, inputs unchecked."""
    keys, values = keys.contiguous(), values.contiguous()
    rows, heads, tokens, width = keys.shape
    tile = configuration(width, bits)
    blocks = triton.cdiv(tokens, tile["BLOCK"])
    padded = tile["BYTES"] * tile["PER_BYTE"]
    partial = keys.new_empty(rows * heads, blocks, 3, padded, dtype=torch.float32)
    used = triton.cdiv(width, tile["PER_BYTE"])
    # Each in memory of its own, whose beginning is aligned: decoding reads them as wide words.
    key_codes, value_codes = (keys.new_empty(rows, heads, tokens, used, dtype=torch.uint8) for _ in range(2))
    key_scale, key_low, channel_scale = (keys.new_empty(rows, heads, 1, width) for _ in range(3))
    value_scale, value_low = (keys.new_empty(rows, heads, tokens, 1) for _ in range(2))
    grid = (blocks, rows * heads)
    _channel_ranges[grid](keys, values, partial, tokens, blocks, WIDTH=width, **tile, num_warps=WARPS)
    info = torch.finfo(keys.dtype)
    _pack[grid](
        keys,
        values,
        partial,
        key_codes,
        key_scale,
        key_low,
        value_codes,
        value_scale,
        value_low,
        channel_scale,
        tokens,
        blocks,
        WIDTH=width,
        **tile,
        BITS=bits,
        EPS=info.eps,
        FLOOR=max(info.tiny * info.eps, torch.finfo(torch.float32).tiny),
        num_warps=WARPS,
    )
    return (
        QuantizedTensor(key_codes, key_scale, key_low, bits, width),
        QuantizedTensor(value_codes, value_scale, value_low, bits, width, channel_scale),
    )
