"""DAMRO's contrast (arXiv 2410.04514) on CUDA: one read of the vocabulary from memory, one from the cache.

For a row of logits l and of the negative branch l_neg,

    cutoff = max(l) + log(beta),    out_v = (1 + alpha) l_v - alpha l_neg_v  where l_v >= cutoff,  else -inf.

The cutoff needs the whole row. A row of 32,000 to 150,000 tokens is split over programs: `_block_maxima` leaves a
maximum a block, `_combine` takes the largest of them and writes its block. The first pass read 2 to 4 bytes a token,
which the second finds in the L2 cache. With the argmax, `_combine` leaves the best token of its block as well, and
`_first_best` picks one of them, the first of equals.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.fused.launch import cdiv, next_power_of_2, on_device_of

# Tokens a program: 16 blocks of a 32,000-token vocabulary and 75 of a 150,000-token one. Fewer would leave most of a
# GPU idle at batch size 1; with more, `_combine` would read more maxima than tokens.
BLOCK = 2048
WARPS = 4


@triton.jit
def _block_maxima(logits, maxima, vocabulary, blocks, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocabulary + token, token < vocabulary, float("-inf"))
    tl.store(maxima + row * blocks + block, tl.max(x.to(tl.float32), axis=0))


@triton.jit
def _combine(
    logits,
    negative_logits,
    maxima,
    out,
    best,
    best_token,
    vocabulary,
    blocks,
    alpha,
    log_beta,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ARGMAX: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    every = tl.arange(0, BLOCKS)
    cutoff = tl.max(tl.load(maxima + row * blocks + every, every < blocks, float("-inf")), axis=0) + log_beta
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    # Past the end -inf, which the cut below keeps.
    positive = tl.load(logits + row * vocabulary + token, inside, float("-inf")).to(tl.float32)
    negative = tl.load(negative_logits + row * vocabulary + token, inside, 0.0).to(tl.float32)
    contrasted = (1 + alpha) * positive - alpha * negative
    # The second: -inf - -inf is not a number.
    cut = (positive < cutoff) | (positive == float("-inf"))
    contrasted = tl.where(cut, float("-inf"), contrasted).to(out.dtype.element_ty)
    tl.store(out + row * vocabulary + token, contrasted, inside)
    if ARGMAX:
        # Of what was written, so that tokens made equal by rounding are equals here too.
        contrasted = contrasted.to(tl.float32)
        tl.store(best + row * blocks + block, tl.max(contrasted, axis=0))
        tl.store(best_token + row * blocks + block, block * BLOCK + tl.argmax(contrasted, axis=0))


@triton.jit
def _first_best(best, best_token, most_likely, blocks, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, BLOCKS)
    value = tl.load(best + row * blocks + every, every < blocks, float("-inf"))
    token = tl.load(best_token + row * blocks + every, every < blocks, 2147483647)
    first = tl.min(tl.where(value == tl.max(value, axis=0), token, 2147483647), axis=0)
    tl.store(most_likely + row, first.to(tl.int64))


def fused_contrast(
    logits: Tensor, negative_logits: Tensor, alpha: float, beta: float, argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """`kernels.contrast` by Triton, inputs unchecked; the second result is None without `argmax`."""
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    logits, negative_logits = logits.contiguous(), negative_logits.contiguous()
    rows, blocks = logits.numel() // vocabulary, cdiv(vocabulary, BLOCK)
    every = next_power_of_2(blocks)
    out = torch.empty_like(logits)
    maxima, best = logits.new_empty(2, rows, blocks, dtype=torch.float32).unbind()
    best_token = logits.new_empty(rows if argmax else 0, blocks, dtype=torch.int32)
    most_likely = logits.new_empty(rows if argmax else 0, dtype=torch.long)
    with on_device_of(logits):
        log_beta = math.log(beta) if beta > 0 else -math.inf
        _block_maxima[(rows, blocks)](logits, maxima, vocabulary, blocks, BLOCK=BLOCK, num_warps=WARPS)
        _combine[(rows, blocks)](
            logits,
            negative_logits,
            maxima,
            out,
            best,
            best_token,
            vocabulary,
            blocks,
            float(alpha),
            log_beta,
            BLOCKS=every,
            BLOCK=BLOCK,
            ARGMAX=argmax,
            num_warps=WARPS,
        )
        if argmax:
            _first_best[(rows,)](best, best_token, most_likely, blocks, BLOCKS=every, num_warps=WARPS)
    return out, most_likely.view(shape) if argmax else None
