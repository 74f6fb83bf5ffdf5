"""Attention of the CLS token to the image tokens, averaged over heads (DAMRO 2410.04514, VTC-CLS 2412.05819).

With q the CLS token's query and k_t the keys of a vision layer of H heads,

    out_t = 1/H sum_h exp(a_ht - m_h) / s_h,    a_ht = q_h k_ht / sqrt(D),
    m_h = max_t a_ht,                           s_h = sum_t exp(a_ht - m_h).

The keys are read once, by programs that each take one head and a block of tokens: they write the logits and what
their block adds to m_h and s_h. A second, small kernel brings blocks to one maximum and averages the heads. Nothing
is added up by atomics, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.fused.launch import cdiv, next_power_of_2, with_near_elements
from lvlm_fix.kernels.fused.visual_common import LOG2_E

__all__ = ["cls_row_configuration", "fused_cls_row"]

# Tokens of a program that averages heads.
TOKENS = 128


def cls_row_configuration(width: int) -> tuple[int, int]:
    """Tokens and columns of a tile: 4,096 numbers are 32 registers a thread, and towers give a few hundred tiles."""
    columns = min(128, max(16, next_power_of_2(width)))
    return 4096 // columns, columns


def fused_cls_row(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """Arguments and result of `functional.cls_scores`, inputs unchecked."""
    batch, tokens, width = key.shape
    query, key = with_near_elements(query), with_near_elements(key)
    rows, columns = cls_row_configuration(width // num_heads)
    blocks = cdiv(tokens, rows)
    logits = torch.empty(batch, num_heads, tokens, dtype=torch.float32, device=key.device)
    sums = torch.empty(batch, num_heads, 2, blocks, dtype=torch.float32, device=key.device)
    out = torch.empty(batch, tokens - 1, dtype=torch.float32, device=key.device)
    _cls_logits[(blocks, num_heads, batch)](
        query, key, logits, sums, query.stride(0), key.stride(0), key.stride(1), tokens, blocks,
        WIDTH=width // num_heads, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    _mean_of_heads[(cdiv(tokens - 1, TOKENS), batch)](
        logits, sums, out, num_heads, tokens, blocks,
        BLOCKS=max(2, next_power_of_2(blocks)), ROWS=TOKENS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _cls_logits(
    query, key, logits, sums, query_b, key_b, key_t, tokens, blocks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Logits, to base 2, of one block of tokens in one head, their maximum and their sum relative to it."""
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = block * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    query += item * query_b + head * WIDTH
    key += item * key_b + head * WIDTH
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Full-width scores are one head of a thousand columns and more.
    for begin in range(0, WIDTH, COLUMNS):
        d = begin + tl.arange(0, COLUMNS)
        q = tl.load(query + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        place = key + token[:, None] * key_t + d[None, :]
        k = tl.load(place, mask=real[:, None] & (d < WIDTH)[None, :], other=0.0)
        product += q[None, :] * k.to(tl.float32)
    row = tl.sum(product, 1) * (LOG2_E / tl.sqrt(WIDTH * 1.0))
    line = item * tl.num_programs(1) + head
    tl.store(logits + line * tokens + token, row, mask=real)
    row = tl.where(real, row, float("-inf"))
    highest = tl.max(row, 0)
    tl.store(sums + line * 2 * blocks + block, highest)
    tl.store(sums + (line * 2 + 1) * blocks + block, tl.sum(tl.exp2(row - highest), 0))


@triton.jit
def _mean_of_heads(logits, sums, out, heads, tokens, blocks, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Image tokens' weights, averaged over heads; token 0 is CLS and is left out."""
    item = tl.program_id(1).to(tl.int64)
    image_token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = image_token < tokens - 1
    block = tl.arange(0, BLOCKS)
    mean = tl.zeros((ROWS,), tl.float32)
    for head in range(heads):
        line = item * heads + head
        place = sums + line * 2 * blocks + block
        highest = tl.load(place, mask=block < blocks, other=float("-inf"))
        part = tl.load(place + blocks, mask=block < blocks, other=0.0)
        top = tl.max(highest, 0)
        total = tl.sum(part * tl.exp2(highest - top), 0)
        row = tl.load(logits + line * tokens + 1 + image_token, mask=real, other=float("-inf"))
        mean += tl.exp2(row - top) / total
    tl.store(out + item * (tokens - 1) + image_token, mean / heads, mask=real)
