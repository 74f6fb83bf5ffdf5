"""What the vision tower says about one image, as the methods see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisionEncoding:
    """Attention that each of an image's N tokens gets in a tower of L layers, read in its normal forward pass.

    Attributes:
        layer_scores: (L, N) attention of CLS to each image token in every layer, mean over heads (VTC-CLS);
            NaN in layers that no attached method reads.
        feature_scores: (N,) the same for the layer whose output the projector takes, as one softmax over the
            full width (DAMRO); NaN where no attached method reads it.
        grid: rows and columns of the image tokens, in raster order; (1, N) where they form no single grid.
        crops: (N,) which crop of the image a token comes from, -1 for newline tokens; None where there is one crop.
        source: where the scores come from: `cls`, or what stands in for it in a tower without a CLS token.
    """

    layer_scores: Tensor
    feature_scores: Tensor
    grid: tuple[int, int]
    crops: Tensor | None = None
    source: str = "cls"

    @classmethod
    def unread(cls, tokens: int) -> VisionEncoding:
        """Of an image whose scores no method asks for."""
        nothing = torch.zeros(1, tokens)
        return cls(nothing[:0], nothing[0], (1, tokens), source="not read")
