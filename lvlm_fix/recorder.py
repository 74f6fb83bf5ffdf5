"""Reads which patches a vision tower attends to, as the tower runs: one query row a layer, or a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lvlm_fix.interception import Interception, Proceed
from lvlm_fix.kernels import cls_row
from lvlm_fix.methods.base import Method
from lvlm_fix.models.base import Family

TOGETHER = 2**26
"""Bytes of queries and keys that may wait to be scored together: a call for many layers costs what one for one does."""

PROBES = 64
"""Query rows whose mean stands for the attention that a patch receives, in towers without a CLS token."""


class TowerRecorder:
    """Stands beside the tower's attention, which runs as configured; no attention matrix is made.

    With a CLS token its row is read, of as many layers at once as fit. Without, the row of the tower's pooling query
    stands for all layers, and where nothing is pooled either, the mean over `PROBES` evenly spaced query rows.
    """

    def __init__(self, model: nn.Module, family: Family, scoring: Sequence[Method]) -> None:
        self.pooling = None if family.has_cls else family.pooling_attention(model)
        without_cls = (
            f"received attention, mean over {PROBES} query rows"
            if self.pooling is None
            else "pooling attention"
        )
        self.source = "cls" if family.has_cls else without_cls
        self.has_cls, self.full_width = family.has_cls, family.full_width
        layers = family.tower_attention(model)
        self.count, self.feature_layer = len(layers), family.feature_layer(model)
        wanted = {layer for method in scoring for layer in method.scored_layers(self.count)}
        # What no method asks for is not read: a row costs little, but there are as many as layers.
        self.read = wanted | {self.feature_layer}
        self.index = {id(layer): index for index, layer in enumerate(layers)}
        self.interception = Interception(layers, self._attend)
        self.hook: RemovableHandle | None = None
        self.clear()

    def install(self) -> None:
        if self.pooling is None:
            self.interception.install()
        else:
            self.hook = self.pooling.register_forward_pre_hook(self._pool)

    def remove(self) -> None:
        self.interception.remove()
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def clear(self) -> None:
        self.pooled: list[Tensor] = []
        self.rows: list[list[Tensor]] = [[] for _ in range(self.count)]
        self.feature_rows: list[Tensor] = []
        self.waiting: list[tuple[int, Tensor, Tensor]] = []

    def _attend(
        self, proceed: Proceed, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        index, mask = self.index[id(module)], args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if index not in self.read:
            return proceed(module, query, key, *args, **kwargs)
        if self.has_cls:
            self._wait(index, query, key)
        else:
            row = _received(query, key, mask)
            self.rows[index].extend(row)
            if index == self.feature_layer:
                self.feature_rows.extend(row)
        return proceed(module, query, key, *args, **kwargs)

    def _wait(self, index: int, query: Tensor, key: Tensor) -> None:
        """Keep a layer's queries and keys (B, H, N + 1, D) until several layers are scored together."""
        if self.waiting:
            first = self.waiting[0][-1]
            alike = (first.shape, first.device) == (key.shape, key.device)
            if not alike or 2 * (len(self.waiting) + 1) * key.nbytes > TOGETHER:
                self._score()
        self.waiting.append((index, query, key))

    def _score(self) -> None:
        """The CLS rows of the layers that wait."""
        if not self.waiting:
            return
        indices, queries, keys = zip(*self.waiting, strict=True)
        heads, crops = keys[0].shape[1], len(keys[0])
        asking = torch.cat([query[:, :, 0] for query in queries]).flatten(1)[:, None]
        asked = torch.cat([key.transpose(1, 2) for key in keys]).flatten(2)
        rows = cls_row(asking, asked, heads).split(crops)
        for layer, index in enumerate(indices):
            self.rows[index].extend(rows[layer])
            if index == self.feature_layer:
                own = slice(layer * crops, (layer + 1) * crops)
                full_width = cls_row(asking[own], asked[own], 1) if self.full_width else rows[layer]
                self.feature_rows.extend(full_width)
        self.waiting.clear()

    def _pool(self, module: nn.MultiheadAttention, args: tuple[Tensor, ...]) -> None:
        self.pooled.extend(_pooled(module, *args[:2]))

    def crops(self) -> list[Tensor]:
        """Of each crop that went through the tower since `clear`: (L + 1, N) scores, the feature layer's row last.

        Layers that no method reads are NaN.
        """
        if self.pooled:
            found = [row.expand(self.count + 1, -1) for row in self.pooled]
            self.clear()
            return found
        self._score()
        if not self.feature_rows or len({len(self.rows[layer]) for layer in self.read}) != 1:
            raise RuntimeError(
                "the vision tower's layers were not all seen: lvlm-fix assumes that each calls transformers' attention "
                "interface once for each crop"
            )
        found = []
        for crop, feature in enumerate(self.feature_rows):
            unread = torch.full_like(feature, torch.nan)
            rows = [self.rows[layer][crop] if layer in self.read else unread for layer in range(self.count)]
            found.append(torch.stack([*rows, feature]))
        self.clear()
        return found


def _received(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, N) that each patch gets, as the mean over heads and evenly spaced query rows."""
    patches = query.shape[2]
    rows = torch.linspace(0, patches - 1, min(PROBES, patches), device=query.device).round().long()
    logits = query[:, :, rows].float() @ key.float().mT * query.shape[-1] ** -0.5
    if mask is not None:
        shown = mask[:, :, rows] if mask.shape[2] > 1 else mask
        logits = logits.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else logits + shown
    return logits.softmax(-1).nan_to_num().mean((1, 2))


def _pooled(module: nn.MultiheadAttention, query: Tensor, patches: Tensor) -> Tensor:
    """Attention (B, N) that one query (B, 1, C) gives each of the patches (B, N, C), mean over heads."""
    width = module.embed_dim
    biases = (None, None) if module.in_proj_bias is None else module.in_proj_bias.split(width)[:2]
    parts = zip((query, patches), module.in_proj_weight.split(width)[:2], biases, strict=True)
    asking, asked = (
        nn.functional.linear(x, weight, bias).float().unflatten(-1, (module.num_heads, -1))
        for x, weight, bias in parts
    )
    logits = torch.einsum("bqhd,bnhd->bhn", asking, asked) * asked.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)
