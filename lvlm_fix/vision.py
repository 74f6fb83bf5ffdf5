"""What the vision tower says about one image, as the methods see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VisionEncoding:
    """CLS attention of one image with N image tokens, read from a tower of L layers in its normal forward pass.

    Attributes:
        layer_scores: (L, N) attention of CLS to each image token in every layer, mean over heads (VTC-CLS).
        feature_scores: (N,) the same for the layer whose output the projector takes, as one softmax over the
            full width (DAMRO).
        grid: rows and columns of the image tokens, in raster order.
    """

    layer_scores: Tensor
    feature_scores: Tensor
    grid: tuple[int, int]
