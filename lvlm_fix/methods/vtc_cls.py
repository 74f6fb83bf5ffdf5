"""VTC-CLS: the [CLS] token tells everything needed for training-free efficient MLLMs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lvlm_fix.functional import select_by_cls
from lvlm_fix.methods.base import Method
from lvlm_fix.vision import VisionEncoding


@dataclass(frozen=True)
class VTCCLS(Method):
    """Keep the image tokens that the tower's CLS token attends to, over several layers (arXiv 2412.05819).

    `keep` is a number of tokens per image, or, as a float up to 1.0, a fraction of them; newline tokens do not count,
    and stay where something of their row does. The paper keeps 64, 128 or 192 of 576 and tunes `start_layer` by model
    and budget; the default here, the three layers before the last, is ours.

    Raises:
        ValueError: `keep` is not positive, or a part of a token.

    >>> VTCCLS(keep=64).stages()
    ('select',)
    """

    keep: float = 1 / 3  # image tokens that stay, of each image
    start_layer: int = -4  # first vision layer of the ensemble; the last layer is always left out

    name: ClassVar[str] = "vtc_cls"
    paper: ClassVar[str] = "arXiv 2412.05819"
    reads_feature_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.keep < math.inf or (self.keep > 1 and self.keep % 1):
            raise ValueError(
                f"{self}: keep must be a positive number of tokens, whole from 1 on, or a fraction up to 1.0"
            )

    def count(self, tokens: int) -> int:
        """How many of an image's tokens stay.

        >>> VTCCLS(keep=1.0).count(576), VTCCLS(keep=1).count(576), VTCCLS(keep=0.25).count(576)
        (576, 1, 144)
        """
        part = isinstance(self.keep, float) and self.keep <= 1
        return min(max(round(self.keep * tokens) if part else int(self.keep), 1), tokens)

    def scored_layers(self, layers: int) -> range:
        return range(layers)[self.start_layer : -1]

    def select(self, vision: VisionEncoding) -> Tensor:
        layer_scores = vision.layer_scores[:, None]
        if vision.crops is None:  # no newlines: nothing need be asked of the device
            return select_by_cls(layer_scores, self.count(layer_scores.shape[-1]), self.start_layer)[0]
        scored = vision.crops >= 0
        own = scored.nonzero()[:, 0]
        best = select_by_cls(layer_scores[..., own], self.count(len(own)), self.start_layer)[0]
        kept = torch.zeros_like(scored).index_fill(0, own[best], True)
        return (kept | _newlines(scored, kept)).nonzero()[:, 0]

    @classmethod
    def for_model(cls, model: str, task: str = "pope") -> VTCCLS:
        """The paper's middle budget, 128 tokens, for `llava-1.5`; its other budgets are 64 and 192."""
        if model != "llava-1.5":
            raise ValueError(f"VTC-CLS has no setting for model {model!r}: the model is llava-1.5")
        return cls(keep=128)


def _newlines(scored: Tensor, kept: Tensor) -> Tensor:
    """Newline tokens (N,) of whose row, all that stands between them and the newline before, something is kept."""
    row = torch.cumsum(~scored, 0) - (~scored).long()
    kept_in_row = torch.zeros(len(scored) + 1, dtype=torch.long, device=row.device).index_add(
        0, row, kept.long()
    )
    return ~scored & (kept_in_row[row] > 0)
