"""Reads the CLS row of the vision tower's attention as the tower runs, one query row a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_fix.functional import cls_scores
from lvlm_fix.models.base import Family
from lvlm_fix.vision import VisionEncoding


class CLSRecorder:
    """Forward hooks on the tower's query and key projections; they see what the tower computes anyway.

    No attention matrix is made and the tower's attention implementation is not touched.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.layers: list[Any] = family.tower_attention(model)
        self.feature_layer = family.feature_layer(model)
        self.query: Tensor | None = None
        self.layer_scores: list[Tensor] = []
        self.feature_scores: Tensor | None = None
        self.handles: list[Any] = []

    def install(self) -> None:
        for index, attention in enumerate(self.layers):
            self.handles.append(attention.q_proj.register_forward_hook(self._keep_query))
            self.handles.append(attention.k_proj.register_forward_hook(self._score(index, attention)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _keep_query(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.query = output[:, :1]

    def _score(self, index: int, attention: Any) -> Callable[[nn.Module, Any, Tensor], None]:
        heads = attention.num_heads

        def hook(module: nn.Module, inputs: Any, key: Tensor) -> None:
            if index == 0:
                self.layer_scores, self.feature_scores = [], None
            assert self.query is not None, (
                "the tower computes keys before queries: lvlm-fix assumes the opposite"
            )
            self.layer_scores.append(cls_scores(self.query, key, heads))
            if index == self.feature_layer:
                self.feature_scores = cls_scores(self.query, key, 1)

        return hook

    def encodings(self) -> list[VisionEncoding]:
        """One encoding an image of the last batch that went through the tower."""
        assert self.feature_scores is not None, "the vision tower has not run since the methods were attached"
        layers = torch.stack(self.layer_scores)
        grid = self.family.grid(self.model, layers.shape[-1])
        encodings = [
            VisionEncoding(layers[:, image], self.feature_scores[image], grid)
            for image in range(layers.shape[1])
        ]
        self.layer_scores, self.feature_scores, self.query = [], None, None
        return encodings
