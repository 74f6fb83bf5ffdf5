"""Reads which patches a vision tower attends to, as the tower runs: one query row a layer, or a few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lvlm_fix.interception import Interception, Proceed
from lvlm_fix.kernels.cls_row import cls_row, rows_of_layers
from lvlm_fix.kernels.fused.launch import fits
from lvlm_fix.methods.base import Method
from lvlm_fix.models.base import Family

WAITING_ON_GPU = 2**26
"""Bytes of queries and keys that may wait: a launch for many layers costs what one for one does."""

WAITING = 2**20
"""The same elsewhere: after the tower's products, code is read from far off, so that the first row costs three times
the next. Of what is larger, the layers to come have more use: they would have to do without its memory.
"""

PROBES = 64
"""Query rows whose mean stands for the attention that a patch receives, in towers without a CLS token."""


class TowerRecorder:
    """Stands beside the tower's attention, which runs as configured; no attention matrix is made.

    With a CLS token its row is read. Without, the row of the tower's pooling query stands for all layers, and where
    nothing is pooled either, the mean over `PROBES` evenly spaced query rows.
    """

    def __init__(self, model: nn.Module, family: Family, scoring: Sequence[Method]) -> None:
        self.pooling = None if family.has_cls else family.pooling_attention(model)
        without_cls = (
            f"received attention, mean over {PROBES} query rows"
            if self.pooling is None
            else "pooling attention"
        )
        self.source = "cls" if family.has_cls else without_cls
        self.has_cls = family.has_cls
        layers = family.tower_attention(model)
        self.count, self.feature_layer = len(layers), family.feature_layer(model)
        # What no method asks for is not read: a row costs little, but there are as many as layers.
        self.by_head = {layer for method in scoring for layer in method.scored_layers(self.count)}
        asked = not self.by_head or any(method.reads_feature_scores for method in scoring)
        self.full_width = asked and family.has_cls and family.full_width
        self.by_head |= {self.feature_layer} if asked and not self.full_width else set()
        self.read = self.by_head | ({self.count} if self.full_width else set())
        self.feature_row = (self.count if self.full_width else self.feature_layer) if asked else None
        watched = self.by_head | ({self.feature_layer} if self.full_width else set())
        self.index = {id(layers[layer]): layer for layer in watched}
        self.interception = Interception([layers[layer] for layer in self.index.values()], self._attend)
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
        self.waiting: list[tuple[int, Tensor, Tensor]] = []
        # Rows (B, N) by layer, `count` standing for the one over the full width; one for each call of the tower.
        self.rows: defaultdict[int, list[Tensor]] = defaultdict(list)

    def _attend(
        self, proceed: Proceed, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layer = self.index[id(module)]
        if self.has_cls:
            self._wait(layer, query, key)
        else:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            self.rows[layer].append(_received(query, key, mask))
        return proceed(module, query, key, *args, **kwargs)

    def _wait(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Keep a layer's query and key (B, H, N + 1, D) until several are read together."""
        if self.waiting:
            first = self.waiting[0][-1]
            if (first.shape, first.device) != (key.shape, key.device):
                self._read()
        self.waiting.append((layer, query, key))
        if 2 * (len(self.waiting) + 1) * key.nbytes > (WAITING_ON_GPU if key.is_cuda else WAITING):
            self._read()

    def _read(self) -> None:
        """The CLS rows of the layers that wait."""
        waiting = [(layer, query[:, :, :1], key) for layer, query, key in self.waiting]
        self.waiting.clear()
        by_head = [one for one in waiting if one[0] in self.by_head]
        feature = [one for one in waiting if self.full_width and one[0] == self.feature_layer]
        numbers, whole = [layer for layer, *_ in by_head], None
        if feature and self.feature_layer in numbers and not fits(feature[0][2]):
            whole = numbers.index(self.feature_layer)
            numbers.append(self.count)
            feature.clear()
        if by_head:
            self._note(numbers, [one[1:] for one in by_head], whole)
        if feature:
            self._note([self.count], [tuple(map(_as_one_head, one[1:])) for one in feature])

    def _note(self, numbers: list[int], layers: list[tuple[Tensor, ...]], whole: int | None = None) -> None:
        """Keep the rows of layers of queries and keys, see `rows_of_layers`, under their numbers."""
        queries, keys = zip(*layers, strict=True)
        rows = _in_one_launch(queries, keys) if fits(keys[0]) else rows_of_layers(queries, keys, whole)
        for number, row in zip(numbers, rows, strict=True):
            self.rows[number].append(row)

    def _pool(self, module: nn.MultiheadAttention, args: tuple[Tensor, ...]) -> None:
        self.pooled.extend(_pooled(module, *args[:2]))

    def crops(self) -> list[Tensor]:
        """Of each crop that went through the tower since `clear`: (L + 1, N) scores, the feature layer's row last.

        What no method reads is NaN.
        """
        if self.pooled:
            found = [row.expand(self.count + 1, -1) for row in self.pooled]
            self.clear()
            return found
        self._read()
        calls = {len(rows) for rows in self.rows.values()}
        if self.rows.keys() != self.read or len(calls) > 1:
            raise RuntimeError(
                "the vision tower's layers were not all seen: lvlm-fix assumes that each calls transformers' attention "
                "interface once for each crop"
            )
        tables: list[Tensor] = []
        for call in range(calls.pop()):
            rows = {index: rows[call] for index, rows in self.rows.items()}
            unread = torch.full_like(next(iter(rows.values())), torch.nan)
            table = [rows.get(layer, unread) for layer in (*range(self.count), self.feature_row)]
            # To iterate over a tensor costs ten times its `unbind`.
            tables += torch.stack(table, 1).detach().unbind()
        self.clear()
        return tables


def _as_one_head(x: Tensor) -> Tensor:
    """(B, H, T, D) as (B, 1, T, C)."""
    if x.shape[2] == 1:
        return x.reshape(len(x), 1, 1, -1)
    return x.transpose(1, 2).reshape(len(x), 1, x.shape[2], -1)


def _in_one_launch(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Sequence[Tensor]:
    """CLS rows (B, N) of queries (B, H, 1, D) and keys (B, H, N + 1, D)."""
    by_token = ([x.transpose(1, 2) for x in of] for of in (queries, keys))
    query, key = ((torch.cat(of) if len(of) > 1 else of[0]).flatten(2) for of in by_token)
    return cls_row(query, key, keys[0].shape[1]).split(len(keys[0]))


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
