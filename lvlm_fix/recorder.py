"""Reads which patches a vision tower attends to, as the tower runs: one query row a layer, or a few."""

from __future__ import annotations

from collections import Counter
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
        # Where no row over the full width is read, the feature layer's mean over heads stands in its place too.
        self.doubled = {self.feature_layer} if asked and not self.full_width else set()
        self.by_head |= self.doubled
        self.read = self.by_head | ({self.count} if self.full_width else set())
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
        # Of each call of the tower, (B, L + 1, N): `count` is the number of the row over the full width.
        self.tables: list[Tensor] = []
        self.noted: Counter[int] = Counter()  # how many of the calls a layer's row is there of

    def take(self) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """What was read since `clear`, which is done: tables, pooled rows, and which layers' rows are in the tables."""
        self._read()
        taken = self.tables, self.pooled, list(self.noted.elements())
        self.clear()
        return taken

    def give(self, taken: tuple[list[Tensor], list[Tensor], list[int]]) -> None:
        """Go on as if this had been read here, after all else."""
        tables, pooled, noted = taken
        self.tables += tables
        self.pooled += pooled
        self.noted.update(noted)

    def _attend(
        self, proceed: Proceed, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layer = self.index[id(module)]
        if self.has_cls:
            self._wait(layer, query, key)
        else:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            self._note([layer], _received(query, key, mask)[None])
        return proceed(module, query, key, *args, **kwargs)

    def _wait(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Keep a layer's query and key (B, H, N + 1, D) until several are read together."""
        if query.requires_grad or key.requires_grad:  # no gradient flows through scores
            query, key = query.detach(), key.detach()
        if self.waiting:
            first = self.waiting[0][-1]
            if first.shape != key.shape or first.device != key.device:
                self._read()
        self.waiting.append((layer, query, key))
        if 2 * (len(self.waiting) + 1) * key.nbytes > (WAITING_ON_GPU if key.is_cuda else WAITING):
            self._read()

    def _read(self) -> None:
        """The CLS rows of the layers that wait."""
        waiting, self.waiting = self.waiting, []
        by_head = [one for one in waiting if one[0] in self.by_head]
        feature = [one for one in waiting if self.full_width and one[0] == self.feature_layer]
        numbers, whole = [layer for layer, *_ in by_head], None
        if len(feature) == 1 and self.feature_layer in numbers and not fits(feature[0][2]):
            whole = numbers.index(self.feature_layer)
            numbers.append(self.count)
            feature.clear()
        if by_head:
            self._note(numbers, _rows([one[1] for one in by_head], [one[2] for one in by_head], whole))
        if feature:
            queries = [_as_one_head(query[:, :, :1]) for _, query, _ in feature]
            self._note(
                [self.count] * len(feature), _rows(queries, [_as_one_head(key) for *_, key in feature])
            )

    def _note(self, layers: list[int], rows: Tensor) -> None:
        """Put rows (R, B, N) of layers where they belong, in the tables of the calls of the tower."""
        start = 0
        for stop, layer in enumerate(layers, 1):
            if stop < len(layers) and layers[stop] == layer + 1:
                continue
            first = layers[start]  # of those that follow each other, which one copy moves
            if self.noted[first] == len(self.tables):
                self.tables.append(rows.new_full((rows.shape[1], self.count + 1, rows.shape[2]), torch.nan))
            self.tables[self.noted[first]][:, first : layer + 1] = rows[start:stop].transpose(0, 1)
            self.noted.update(layers[start:stop])
            start = stop

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
        if not self.tables or any(self.noted[layer] != len(self.tables) for layer in self.read):
            raise RuntimeError(
                "the vision tower's layers were not all seen: lvlm-fix assumes that each calls transformers' attention "
                "interface once for each crop"
            )
        for table in self.tables:
            for layer in self.doubled:
                table[:, self.count] = table[:, layer]
        # To iterate over a tensor costs ten times its `unbind`.
        found = [crop for table in self.tables for crop in table.unbind()]
        self.clear()
        return found


def _as_one_head(x: Tensor) -> Tensor:
    """(B, H, T, D) as (B, 1, T, C)."""
    if x.shape[2] == 1:
        return x.reshape(len(x), 1, 1, -1)
    return x.transpose(1, 2).reshape(len(x), 1, x.shape[2], -1)


def _rows(queries: Sequence[Tensor], keys: Sequence[Tensor], whole: int | None = None) -> Tensor:
    """See `rows_of_layers`; on a GPU in one launch, without the row of a whole layer."""
    if not fits(keys[0]):
        return rows_of_layers(queries, keys, whole)
    by_token = ([x[:, :, :1].transpose(1, 2) for x in queries], [x.transpose(1, 2) for x in keys])
    query, key = ((torch.cat(of) if len(of) > 1 else of[0]).flatten(2) for of in by_token)
    return cls_row(query, key, keys[0].shape[1]).unflatten(0, (len(keys), -1))


@torch.no_grad()
def _received(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, N) that each patch gets, as the mean over heads and evenly spaced query rows."""
    patches = query.shape[2]
    rows = torch.linspace(0, patches - 1, min(PROBES, patches), device=query.device).round().long()
    logits = query[:, :, rows].float() @ key.float().mT * query.shape[-1] ** -0.5
    if mask is not None:
        shown = mask[:, :, rows] if mask.shape[2] > 1 else mask
        logits = logits.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else logits + shown
    return logits.softmax(-1).nan_to_num().mean((1, 2))


@torch.no_grad()
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
