"""What the benchmark runs: each front at a real shape, beside what it replaces and what no code could beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvlm_fix import functional
from lvlm_fix.kernels.cls_row import cls_row
from lvlm_fix.kernels.contrast import contrast
from lvlm_fix.kernels.pack import pack
from lvlm_fix.kernels.probe_scores import probe_scores
from lvlm_fix.kernels.quantized_decode import quantized_decode
from lvlm_fix.kernels.sparse_prefill import sparse_prefill
from lvlm_fix.kernels.visual_attention import visual_attention
from lvlm_fix.packed_attention import quantized_decode as slow_quantized_decode

# Prompts by tokens, and how many of them come before the image and after it. LLaVA-1.5: 576 image tokens.
SHAPES = {"llava-1.5": 640, "next": 2_900, "video-16k": 16_384, "video-64k": 65_536}
BEFORE, AFTER = 35, 29
# A 7B decoder: LLaMA-2's heads and vocabulary. Its tower is CLIP-L: 576 patches of 1,024 channels, 16 heads.
HEADS, WIDTH, VOCABULARY = 32, 128, 32_064
PATCHES, CHANNELS, TOWER_HEADS = 576, 1_024, 16
VAR: dict[str, Any] = {"rho": 0.3, "min_image_attention": 0.0, "p": 0.6}
IMPORTANT = 0.3
PROBES = 128
TAIL = 64


@dataclass(frozen=True)
class Size:
    """How much of a shape is run: tokens of the prompt, heads, dtype and device."""

    tokens: int
    heads: int
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def attention_inputs(self, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        key, value = (self.normal(1, self.heads, self.tokens, WIDTH) for _ in range(2))
        return self.normal(1, self.heads, queries, WIDTH), key, value

    def element(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Workload:
    """One case of one kernel. `bytes_moved` and `flops` are the least that any implementation has to do.

    `peer` is torch's own way to the same end, by its name; `reference` the oracle, whose largest temporary takes
    `reference_bytes`. `heads` are those of the attention that the case is about, 0 where there is none.
    """

    case: str
    front: Callable[[], Any]
    peer_name: str
    peer: Callable[[], Any]
    reference: Callable[[], Any]
    reference_bytes: int
    bytes_moved: int
    flops: int
    heads: int


def _visual_attention(size: Size, queries: int) -> Workload:
    query, key, value = size.attention_inputs(queries)
    position = torch.arange(size.tokens, device=size.device)[None]
    image = (position >= BEFORE) & (position < size.tokens - AFTER)
    # The first token, and three of the image.
    sink = (position == 0) | (position % (size.tokens // 3) == BEFORE + 7)
    arguments = (query, key, value, image, sink)
    parameters = VAR | {"first_query": size.tokens - AFTER}
    causal = queries > 1
    pairs = size.tokens * size.tokens // 2 if causal else size.tokens
    return Workload(
        case="prefill" if causal else "decode",
        front=lambda: visual_attention(*arguments, **parameters),
        peer_name="SDPA",
        peer=lambda: scaled_dot_product_attention(query, key, value, is_causal=causal),
        reference=lambda: functional.visual_attention(*arguments, **parameters),
        reference_bytes=4 * size.heads * queries * size.tokens,
        bytes_moved=2 * (query.nbytes + key.nbytes),
        flops=4 * size.heads * WIDTH * pairs,
        heads=size.heads,
    )


def visual_attention_prefill(size: Size) -> Workload:
    return _visual_attention(size, size.tokens)


def visual_attention_decode(size: Size) -> Workload:
    return _visual_attention(size, 1)


def sparse_prefill_case(size: Size) -> Workload:
    query, key, value = size.attention_inputs(size.tokens)
    important = torch.rand(1, size.tokens, device=size.device) < IMPORTANT
    nothing = torch.zeros(1, int(important.sum()), dtype=torch.bool, device=size.device)
    kept = nothing.shape[1]

    def reference() -> Tensor:
        q, k, v = (x[:, :, important[0]] for x in (query, key, value))
        out = torch.zeros_like(query)
        out[:, :, important[0]] = functional.visual_attention(q, k, v, nothing, nothing, first_query=0, **VAR)
        return out

    return Workload(
        case=f"prefill, {kept / size.tokens:.0%} important",
        front=lambda: sparse_prefill(query, key, value, important),
        peer_name="SDPA over all tokens",
        peer=lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        reference=reference,
        reference_bytes=4 * size.heads * kept * kept,
        # Important rows are read; the output is written whole.
        bytes_moved=query.nbytes + 3 * size.element() * size.heads * WIDTH * kept,
        flops=2 * size.heads * WIDTH * kept * kept,
        heads=size.heads,
    )


def probe_scores_case(size: Size) -> Workload:
    probes = min(PROBES, size.tokens)
    query, key, _ = size.attention_inputs(probes)
    older = torch.randperm(size.tokens - probes // 2, device=size.device)[: probes - probes // 2]
    recent = torch.arange(size.tokens - probes // 2, size.tokens, device=size.device)
    positions = torch.cat([older.sort().values, recent])
    hidden = torch.arange(size.tokens, device=size.device) > positions[:, None]

    def peer() -> Tensor:
        weights = (query @ key.mT * WIDTH**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return weights.sum((1, 2))

    return Workload(
        case=f"{probes} probes",
        front=lambda: probe_scores(query, key, positions),
        peer_name="matmul, softmax, sum",
        peer=peer,
        reference=lambda: functional.probe_importance(query, key, positions),
        reference_bytes=4 * size.heads * probes * size.tokens,
        bytes_moved=query.nbytes + key.nbytes,
        flops=2 * size.heads * WIDTH * probes * size.tokens,
        heads=size.heads,
    )


def quantized_decode_case(size: Size) -> Workload:
    query, key, value = size.attention_inputs(1)
    packed = size.tokens - TAIL
    kept = int(IMPORTANT * packed)
    parts = [(slice(0, kept), 4), (slice(kept, packed), 2)]
    groups = [pack(key[:, :, part], value[:, :, part], bits) for part, bits in parts]
    tail = key[:, :, packed:].clone(), value[:, :, packed:].clone()
    held = sum(keys.nbytes + values.nbytes for keys, values in groups) + 2 * tail[0].nbytes
    return Workload(
        case="decode, 30% in 4 bits, rest in 2",
        front=lambda: quantized_decode(query, groups, *tail),
        peer_name="SDPA, cache not packed",
        peer=lambda: scaled_dot_product_attention(query, key, value),
        reference=lambda: slow_quantized_decode(query, groups, *tail),
        reference_bytes=8 * key.numel(),
        bytes_moved=2 * query.nbytes + held,
        flops=4 * size.heads * WIDTH * size.tokens,
        heads=size.heads,
    )


def pack_case(size: Size) -> Workload:
    _, key, value = size.attention_inputs(1)
    whole = [x.nbytes for x in pack(key, value, 4)]
    return Workload(
        case="4 bits",
        front=lambda: pack(key, value, 4),
        peer_name="copy",
        peer=lambda: (key.clone(), value.clone()),
        reference=lambda: (
            functional.quantize_kv(key, 4, dim=-2),
            functional.quantize_kv(value, 4, dim=-1, channel_normalize=True),
        ),
        reference_bytes=8 * key.numel(),
        bytes_moved=2 * key.nbytes + sum(whole),
        flops=0,
        heads=size.heads,
    )


def contrast_case(size: Size) -> Workload:
    logits, negative = size.normal(1, VOCABULARY), size.normal(1, VOCABULARY)
    cutoff = torch.tensor(0.1).log().item()

    def peer() -> Tensor:
        plausible = logits >= logits.amax(-1, keepdim=True) + cutoff
        return torch.where(plausible, 1.5 * logits - 0.5 * negative, -torch.inf)

    return Workload(
        case=f"{VOCABULARY:,} tokens",
        front=lambda: contrast(logits, negative, 0.5, 0.1),
        peer_name="elementwise",
        peer=peer,
        reference=lambda: functional.contrast_logits(logits, negative, 0.5, 0.1),
        reference_bytes=8 * VOCABULARY,
        bytes_moved=3 * logits.nbytes,
        flops=0,
        heads=0,
    )


def cls_row_case(size: Size) -> Workload:
    crops = max(1, size.tokens // PATCHES)
    query, key = size.normal(crops, 1, CHANNELS), size.normal(crops, PATCHES + 1, CHANNELS)

    def peer() -> Tensor:
        q, k = (x.unflatten(-1, (TOWER_HEADS, -1)).transpose(1, 2) for x in (query, key))
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0, 1:]

    return Workload(
        case=f"{crops} crops",
        front=lambda: cls_row(query, key, TOWER_HEADS),
        peer_name="matmul, softmax, mean",
        peer=peer,
        reference=lambda: functional.cls_scores(query, key, TOWER_HEADS),
        reference_bytes=4 * key.numel(),
        bytes_moved=key.nbytes,
        flops=2 * key.numel(),
        heads=TOWER_HEADS,
    )


# By front; how the arithmetic of a case grows says how many heads fit in the benchmark's time.
CASES: dict[str, list[Callable[[Size], Workload]]] = {
    "visual_attention": [visual_attention_prefill, visual_attention_decode],
    "sparse_prefill": [sparse_prefill_case],
    "probe_scores": [probe_scores_case],
    "quantized_decode": [quantized_decode_case],
    "pack": [pack_case],
    "contrast": [contrast_case],
    "cls_row": [cls_row_case],
}
# These run torch's attention over all pairs of tokens beside them.
QUADRATIC = (visual_attention_prefill, sparse_prefill_case)
# These take nothing from the prompt's length.
SAME_FOR_ALL_SHAPES = (contrast_case,)


def heads_within(case: Callable[[Size], Workload], tokens: int, budget: float) -> int:
    """The most heads, a power of two up to 32, whose attention takes `budget` FLOPs; 0 where one takes ten times."""
    flops = 2 * WIDTH * tokens * (tokens if case in QUADRATIC else PROBES)
    heads = HEADS
    while heads > 1 and heads * flops > budget:
        heads //= 2
    return heads if heads * flops <= 10 * budget else 0
