"""DAMRO: dive into the attention mechanism of the LVLM to reduce object hallucination."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lvlm_fix.functional import outlier_tokens
from lvlm_fix.kernels import contrast
from lvlm_fix.methods.base import Method
from lvlm_fix.vision import VisionEncoding


@dataclass(frozen=True)
class DAMRO(Method):
    """Contrast the image against its own outlier tokens (Gong et al., arXiv 2410.04514, EMNLP 2024).

    A second, negative branch sees only the `topk` image tokens that the tower's CLS token attends to most, which
    in large towers lie in the background. What that branch believes as firmly as the whole image does is taken for
    hallucination.

    `gate`, which is ours, spares the negative branch where the most likely token has at least that probability. From
    1 / (1 + beta) on it changes no answer: the plausibility cut leaves no other token there, whatever that branch says.

    Raises:
        ValueError: `alpha` is negative, `beta` or `gate` is outside 0..1, or `topk` is below 1.

    >>> DAMRO.for_model("llava-1.5", task="captions")
    DAMRO(alpha=2.0, beta=0.1, topk=10, gate=None)
    """

    alpha: float = 0.5  # strength of the contrast
    beta: float = 0.1  # plausibility cut-off, relative to the most likely token
    topk: int = 10  # outlier tokens of each crop of an image in the negative branch
    gate: float | None = None  # probability from which on nothing is contrasted; None: always contrast

    name: ClassVar[str] = "damro"
    paper: ClassVar[str] = "arXiv 2410.04514"
    conflicts: ClassVar[dict[str, str]] = {
        "vtc_cls": "VTC-CLS keeps the tokens of highest CLS attention, which DAMRO takes for outliers; "
        "DAMRO takes its outliers from the unpruned image"
    }

    def __post_init__(self) -> None:
        whole = self.topk >= 1 and self.topk % 1 == 0
        shares = 0 <= self.beta <= 1 and (self.gate is None or 0 <= self.gate <= 1)
        if not (0 <= self.alpha < math.inf and shares and whole):
            raise ValueError(
                f"{self}: alpha must be at least 0, beta and gate in 0..1 and topk a whole number from 1"
            )

    def scored_layers(self, layers: int) -> range:
        return range(0)

    def negative_tokens(self, vision: VisionEncoding) -> Tensor:
        scores = vision.feature_scores
        crops = torch.zeros_like(scores, dtype=torch.long) if vision.crops is None else vision.crops
        tokens = []
        for crop in crops[crops >= 0].unique().tolist():
            own = (crops == crop).nonzero()[:, 0]
            tokens.append(own[outlier_tokens(scores[own][None], min(self.topk, len(own)))[0]])
        tokens.append((crops < 0).nonzero()[-1:, 0])  # a picture cut in crops ends with a newline token
        return torch.cat(tokens).sort().values  # in raster order, as in the prompt

    def unsure(self, logits: Tensor) -> Tensor | None:
        return None if self.gate is None else logits.float().softmax(-1).amax(-1) < self.gate

    def logits(self, logits: Tensor, negative: Tensor) -> Tensor:
        return contrast(logits.to(torch.float32), negative.to(torch.float32), self.alpha, self.beta)

    @classmethod
    def for_model(cls, model: str, task: str = "pope") -> DAMRO:
        """The paper's setting for `llava-1.5`, `llava-next` or `instructblip`, and `pope` or `captions`."""
        topk = {"llava-1.5": 10, "llava-next": 10, "instructblip": 4}
        alpha = {"pope": 0.5, "captions": 1.5 if model == "instructblip" else 2.0}
        if model not in topk or task not in alpha:
            raise ValueError(
                f"DAMRO has no setting for model {model!r} and task {task!r}: models are {', '.join(topk)}; "
                f"tasks are {', '.join(alpha)}"
            )
        return cls(alpha=alpha[task], topk=topk[model])
