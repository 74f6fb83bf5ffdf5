"""The papers' equations, one pure torch function each: the oracle that every kernel is held to.

Import them all from here. What the CLS token tells (DAMRO, VTC-CLS) is written out below; VAR is in
`redistribution`, ZipVL in `importance`, `sparse_attention`, `quantization` and `packed_attention`.

Letters: B batch, H heads, K key and value heads, P probes, Q queries, T tokens, N image tokens, L layers,
D width of a head, C width of a layer, V vocabulary. Sums and softmaxes run in float32, or in float64 for
float64 inputs. Masks are bool, True where the thing named is. What does not fit raises a ValueError.
"""

import math

import torch
from torch import Tensor

from lvlm_fix._tensors import require, require_unit_range, sizes, wide
from lvlm_fix.importance import important_tokens, probe_importance
from lvlm_fix.packed_attention import pack, quantized_decode
from lvlm_fix.quantization import QuantizedTensor, dequantize_kv, quantize_kv
from lvlm_fix.redistribution import image_centric_heads, redistribute, sink_tokens, visual_attention
from lvlm_fix.sparse_attention import sparse_prefill

__all__ = [
    "QuantizedTensor",
    "cls_scores",
    "contrast_logits",
    "dequantize_kv",
    "image_centric_heads",
    "important_tokens",
    "outlier_tokens",
    "pack",
    "probe_importance",
    "quantize_kv",
    "quantized_decode",
    "redistribute",
    "select_by_cls",
    "sink_tokens",
    "sparse_prefill",
    "visual_attention",
]


def cls_scores(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """Attention of the CLS token to each image token, averaged over heads: (B, N).

    Only the CLS row is computed. The softmax runs over all N + 1 tokens, then the CLS column is dropped, so
    rows sum to less than 1. `num_heads=1` multiplies the full width (scale C^-0.5), as DAMRO's code does.

    Args:
        query: (B, N + 1, C) unscaled query projections, CLS first; or its CLS row alone, (B, 1, C).
        key: (B, N + 1, C) key projections, CLS first.
        num_heads: heads that C is split into.

    Returns:
        (B, N), float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes differ, there is no image token, or `num_heads` does not divide C.

    Source: DAMRO, arXiv 2410.04514, "Outlier Tokens Selection"; per head, VTC-CLS, arXiv 2412.05819.

    >>> cls_scores(torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), num_heads=2)
    tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    n = sizes(key=(key, "B T C"), query=(query, "B Q C"))
    require(n["T"] > 1, "key must hold the CLS token and at least one image token")
    require(n["Q"] in (1, n["T"]), f"query must have 1 or {n['T']} tokens, got {n['Q']}")
    require(num_heads > 0 and n["C"] % num_heads == 0, f"num_heads={num_heads} must divide width {n['C']}")
    rows = wide(query[:, 0]).unflatten(-1, (num_heads, -1))
    columns = wide(key).unflatten(-1, (num_heads, -1))
    logits = torch.einsum("bhd,bthd->bht", rows, columns) * rows.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)[:, 1:]


def outlier_tokens(scores: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k highest-scoring image tokens, highest first; of equals, the earlier one first.

    Args:
        scores: (B, N), as `cls_scores` gives them.
        k: number of outliers, 1..N.

    Raises:
        ValueError: `scores` is not (B, N) or `k` is out of range.

    Source: DAMRO, arXiv 2410.04514, "Outlier Tokens Selection".

    >>> outlier_tokens(torch.tensor([[0.1, 0.5, 0.4]]), k=2)
    tensor([[1, 2]])
    """
    n = sizes(scores=(scores, "B N"))
    require(1 <= k <= n["N"], f"k must lie in 1..{n['N']}, got {k}")
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k]  # topk leaves the order of equals open


def contrast_logits(logits: Tensor, negative_logits: Tensor, alpha: float, beta: float) -> Tensor:
    """Next-token logits with the negative branch subtracted: (1 + alpha) * logits - alpha * negative_logits.

    Tokens less likely than `beta` times the most likely one, by `logits` alone, are cut to -inf. A token
    already at -inf in `logits` stays there; `negative_logits` must be finite wherever `logits` is.

    Args:
        logits: (..., V), natural-log units; from the whole image.
        negative_logits: (..., V), from the outlier tokens only.
        alpha: strength of the contrast, >= 0; at 0 the cut alone is left.
        beta: plausibility threshold, 0..1; at 0 nothing is cut.

    Returns:
        (..., V) in the dtype of `logits`.

    Raises:
        ValueError: shapes differ or `alpha` or `beta` is out of range.

    Source: DAMRO, arXiv 2410.04514, "Contrastive Decoding".

    >>> positive, negative = torch.tensor([[2.0, 1.0, -9.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    >>> contrast_logits(positive, negative, alpha=1.0, beta=0.1)
    tensor([[2., 2., -inf]])
    """
    require(
        logits.ndim > 0 and logits.shape == negative_logits.shape,
        f"logits {tuple(logits.shape)} and negative_logits {tuple(negative_logits.shape)} must share a shape",
    )
    require(alpha >= 0, f"alpha must not be negative, got {alpha}")
    require_unit_range(beta=beta)
    positive, negative = wide(logits), wide(negative_logits)
    cutoff = positive.amax(-1, keepdim=True) + (math.log(beta) if beta > 0 else -math.inf)
    cut = (positive < cutoff) | positive.isneginf()  # the second: -inf - -inf is not a number
    contrasted = (1 + alpha) * positive - alpha * negative
    return contrasted.masked_fill(cut, -math.inf).to(logits.dtype)


def select_by_cls(layer_scores: Tensor, keep: int, start_layer: int) -> Tensor:
    """Indices (B, keep) of the image tokens to keep, in raster order.

    A token's score is the sum of its CLS attention over the vision layers `start_layer`..L-2: the last layer
    is left out. Of equal scores the earlier token is kept.

    Args:
        layer_scores: (L, B, N), CLS-to-patch attention of every vision layer, averaged over heads.
        keep: number of tokens to keep, 1..N.
        start_layer: first layer that counts; negative counts from the end, -1 being the last layer.

    Raises:
        ValueError: `layer_scores` is not (L, B, N), or `keep` or `start_layer` is out of range.

    Source: VTC-CLS, arXiv 2412.05819, ensemble of the [CLS] attention over layers.

    >>> layers = torch.tensor([[[0.1, 0.2, 0.6]], [[0.5, 0.2, 0.1]], [[0.0, 0.9, 0.0]]])
    >>> select_by_cls(layers, keep=2, start_layer=0)
    tensor([[0, 2]])
    """
    n = sizes(layer_scores=(layer_scores, "L B N"))
    first = start_layer + n["L"] if start_layer < 0 else start_layer
    in_range = 0 <= first < n["L"] - 1
    require(in_range, f"start_layer must name a layer before the last of {n['L']}, got {start_layer}")
    require(1 <= keep <= n["N"], f"keep must lie in 1..{n['N']}, got {keep}")
    scores = wide(layer_scores[first:-1]).sum(0)
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(-1).values
