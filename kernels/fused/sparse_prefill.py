"""Causal attention among the important tokens (ZipVL, arXiv 2410.08584), read from where they stand.

With i_0 < i_1 < ... the positions of an item's important tokens, token i_a attends to i_0..i_a:

    out[i_a] = sum_{b <= a} w_ab v[i_b],    w_ab = softmax_b (q[i_a] k[i_b] / sqrt(D)),

which is flash attention over places a, b in the list: a block of keys is read through the list instead of in a
row, so no q, k, v is copied and m of n tokens cost m^2 / n^2. Rows of other tokens stay zero. How many tokens are
important only the device knows: programs are launched for all n, those past the end of the list return at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvlm_fix.kernels.fused.launch import (
    LOG2_E,
    capability,
    cdiv,
    is_hopper,
    padded_width,
    precision,
    within_reach,
)


@triton.jit
def _attend(
    q,
    m,
    l,  # noqa: E741
    acc,
    key,
    value,
    index,
    asking,
    first,
    stop,
    count,
    key_t,
    value_t,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the list's places first..stop into the running maximum m, sum l and weighted values acc."""
    dim = tl.arange(0, PADDED)
    for start in range(first, stop, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        # Before the diagonal every place is in the list; beyond the list's end nothing is read.
        if DIAGONAL:
            listed = place < count
            position = tl.load(index + place, listed, 0)
            k = tl.load(
                key + position[None, :] * key_t + dim[:, None], listed[None, :] & (dim[:, None] < WIDTH), 0.0
            )
        else:
            position = tl.load(index + place)
            k = tl.load(key + position[None, :] * key_t + dim[:, None], dim[:, None] < WIDTH, 0.0)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale
        if DIAGONAL:
            logits = tl.where((place[None, :] <= asking[:, None]) & listed[None, :], logits, float("-inf"))
        # Never -inf: the first block of a row holds the list's first place, which every row sees.
        larger = tl.maximum(m, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(m - larger)
        l = l * shrink + tl.sum(weights, 1)  # noqa: E741
        if DIAGONAL:
            v = tl.load(
                value + position[:, None] * value_t + dim[None, :],
                listed[:, None] & (dim[None, :] < WIDTH),
                0.0,
            )
        else:
            v = tl.load(value + position[:, None] * value_t + dim[None, :], dim[None, :] < WIDTH, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        m = larger
    return m, l, acc


@triton.jit(do_not_specialize=["index_b"])
def _sparse_prefill(
    query,
    key,
    value,
    out,
    index,
    places,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    key_t,
    value_b,
    value_h,
    value_t,
    out_b,
    out_h,
    out_t,
    index_b,
    scale,
    heads,
    group,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last blocks have the most keys: started first, they leave no long tail. Blocks of a head run side by side
    # and so share its keys in the cache.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    item = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    count = tl.load(places + (item + 1) * (index_b - 1) - 1).to(tl.int32)
    begin = block * BLOCK_Q
    if begin >= count:
        return
    index += item * index_b + 1
    asking = begin + tl.arange(0, BLOCK_Q)
    position = tl.load(index + asking, asking < count, 0).to(tl.int64)
    dim = tl.arange(0, PADDED)
    there = (asking[:, None] < count) & (dim[None, :] < WIDTH)
    q = tl.load(
        query + item * query_b + head * query_h + position[:, None] * query_t + dim[None, :], there, 0.0
    )
    key += item * key_b + head // group * key_h
    value += item * value_b + head // group * value_h
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_Q, PADDED], tl.float32)
    diagonal = begin // BLOCK_K * BLOCK_K
    m, l, acc = _attend(  # noqa: E741
        q, m, l, acc, key, value, index, asking, 0, diagonal, count, key_t, value_t, scale,
        WIDTH, PADDED, BLOCK_K, False, PRECISION,
    )  # fmt: skip
    end = tl.minimum(begin + BLOCK_Q, count)
    m, l, acc = _attend(  # noqa: E741
        q, m, l, acc, key, value, index, asking, diagonal, end, count, key_t, value_t, scale,
        WIDTH, PADDED, BLOCK_K, True, PRECISION,
    )  # fmt: skip
    rows = out + item * out_b + head * out_h + position[:, None] * out_t + dim[None, :]
    tl.store(rows, (acc / l[:, None]).to(out.dtype.element_ty), there)


def configuration(padded: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Block sizes, warps and stages, by head size filled up, dtype and compute capability (80 for sm_80).

    A block of 128 queries reads each key 1/128 times. Its accumulator takes 64 registers of each of 256 threads at
    a head size of 128; at 256 it would take 128, so there 64 queries. sm_80 holds the operands of its products in
    registers too, which sm_90 reads from shared memory: half the keys at a time, and one block ahead instead of
    two, keep it from spilling. float32 is multiplied as three products of its split halves, whose parts fill the
    registers at 16 queries; small heads leave eight warps too little to share.
    """
    if dtype == torch.float32:
        return {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": 4 if padded <= 32 else 8, "num_stages": 2}
    if padded > 128:
        return {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    if padded == 128 and not is_hopper(capability):
        return {"BLOCK_Q": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def fused_sparse_prefill(
    query: Tensor, key: Tensor, value: Tensor, important: Tensor, *, scale: float | None = None
) -> Tensor:
    """`lvlm_fix.kernels.sparse_prefill` by Triton, without redistribution, inputs unchecked.

    Takes float16, bfloat16 and float32, and heads up to 256 wide. `important` (B, T) names real tokens only.
    """
    batch, heads, tokens, width = query.shape
    query, key, value = (within_reach(x) for x in (query, key, value))
    index, places = listed(important)
    out = query.new_zeros(batch, tokens, heads, width).transpose(1, 2)
    padded = padded_width(width)
    chosen = configuration(padded, query.dtype, capability(query))
    strides = [stride for x in (query, key, value, out) for stride in x.stride()[:3]]
    grid = cdiv(tokens, chosen["BLOCK_Q"]), batch * heads
    with torch.cuda.device_of(query):
        _sparse_prefill[grid](
            query,
            key,
            value,
            out,
            index,
            places,
            *strides,
            index.stride(0),
            LOG2_E * (width**-0.5 if scale is None else scale),
            heads,
            heads // key.shape[1],
            WIDTH=width,
            PADDED=padded,
            PRECISION=precision(query.dtype),
            **chosen,
        )
    return out


def listed(important: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the important tokens in raster order, (B, 1 + T), from the second slot on, and a running count.

    Made by that count, (B, T): no sort, and no wait for the device to say how many there are.
    """
    batch, tokens = important.shape
    places = important.cumsum(-1)
    position = torch.arange(tokens, dtype=torch.int32, device=important.device).expand(batch, -1)
    index = torch.empty(batch, 1 + tokens, dtype=torch.int32, device=important.device)
    # The others all write to the slot in front, which nothing reads.
    return index.scatter_(1, places * important, position), places
