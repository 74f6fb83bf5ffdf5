"""Attention of the CLS token to the image tokens (DAMRO, arXiv 2410.04514; VTC-CLS, arXiv 2412.05819).

One query row a layer. On torch, the heads' products q_h k_ht of several images are one matrix product: the row of H
heads is laid out as a block-diagonal (C, H) matrix, so that keys (T, C) are read once, where they stand. A product
per head would first copy them into the order of the heads, which takes longer than H times the arithmetic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lvlm_fix._tensors import require, sizes, wide
from lvlm_fix.kernels.dispatch import note, require_one_device, require_one_dtype
from lvlm_fix.kernels.fused.launch import fits, on_device_of

__all__ = ["cls_row", "rows_of_layers"]


@torch.no_grad()
def cls_row(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """Attention of the CLS token to each image token, averaged over heads: (B, N); as `functional.cls_scores`.

    The softmax runs over all N + 1 tokens, then the CLS column is dropped. `num_heads=1` multiplies the full width.
    Layers of one width are stacked along B, to be done in one call. No gradient flows.

    Args:
        query: (B, N + 1, C) unscaled query projections, CLS first; or its CLS row alone, (B, 1, C).
        key: (B, N + 1, C) key projections, CLS first, in the dtype of `query`.
        num_heads: heads that C is split into.

    Returns:
        (B, N), float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes differ, there is no image token, or `num_heads` does not divide C.

    Source: DAMRO, arXiv 2410.04514, "Outlier Tokens Selection"; per head, VTC-CLS, arXiv 2412.05819.

    >>> cls_row(torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), num_heads=2)
    tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    n = sizes(key=(key, "B T C"), query=(query, "B Q C"))
    require(n["T"] > 1, "key must hold the CLS token and at least one image token")
    require(n["Q"] in (1, n["T"]), f"query must have 1 or {n['T']} tokens, got {n['Q']}")
    require(num_heads > 0 and n["C"] % num_heads == 0, f"num_heads={num_heads} must divide width {n['C']}")
    require_one_dtype(query=query, key=key)
    require_one_device(query=query, key=key)
    if fits(key):
        from lvlm_fix.kernels.fused.cls_row import fused_cls_row

        note("cls_row", "triton")
        with on_device_of(key):
            return fused_cls_row(query, key, num_heads)
    note("cls_row", "torch")
    return _cls_row(query, key, num_heads)


def _cls_row(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    query, key = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query[:, :1], key))
    return rows_of_layers([query], [key])[0]


def rows_of_layers(queries: Sequence[Tensor], keys: Sequence[Tensor], whole: int | None = None) -> Tensor:
    """`cls_row` on torch, unchecked: (L, B, N) of layers' queries (B, H, Q, D), CLS first, and keys (B, H, N + 1, D).

    Behind those, if asked for, the row over the full width of layer number `whole` of these: its product is the sum of
    its heads' products. None may require a gradient.
    """
    images, heads, tokens = keys[0].shape[:3]
    logits = wide(keys[0]).new_empty(len(keys) + (whole is not None), images, heads, tokens)
    for query, key, products in zip(queries, keys, logits.unbind(), strict=False):
        _multiply(query, key, products)
    ones = logits.new_ones(1, heads, heads)
    if whole is not None:  # in the place of each head, so that their mean is the row
        heads_of, place = logits[whole], logits[-1]
        torch.baddbmm(place, ones.expand(images, -1, -1), heads_of, beta=0, alpha=heads**-0.5, out=place)
    weights = logits.softmax(-1)
    if images > 1 or heads == 1:
        return weights.mean(2)[..., 1:]
    # Beside a small tower an operation counts by the code that it fetches anew: that of `mean` costs three times what
    # one more product does.
    mean = weights.new_empty(len(weights), 1, tokens)
    ones = ones[:, :1].expand(len(weights), -1, -1)
    return torch.baddbmm(mean, ones, weights[:, 0], beta=0, alpha=1 / heads, out=mean)[..., 1:]


def _multiply(query: Tensor, key: Tensor, products: Tensor) -> None:
    """Write the scaled products (B, H, N + 1) of one layer."""
    if key.shape[0] > 1 and key.shape[1] > 1:
        by_head = torch.diag_embed(wide(query[:, :, 0]).mT * key.shape[-1] ** -0.5, dim1=1, dim2=3)
        products.copy_((wide(key).transpose(1, 2).flatten(2) @ by_head.flatten(1, 2)).mT)
        return
    # Heads, or images, are the one batch dimension, which can be walked without a copy.
    asking, asked = (query[0, :, :1], key[0]) if key.shape[0] == 1 else (query[:, 0, :1], key[:, 0])
    one = products.view(-1, 1, products.shape[-1])
    torch.baddbmm(one, wide(asking), wide(asked).mT, beta=0, alpha=key.shape[-1] ** -0.5, out=one)
