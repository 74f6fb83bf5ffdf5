"""The methods as their reference code has them, restated as a baseline to time against.

Eager attention with every weight at hand, in the tower too; loops over heads in Python; for DAMRO two full passes of
the model for each token. Written for LLaVA-1.5, one picture in each prompt, all prompts of a batch alike in length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lvlm_fix.benchmark import Generate
from lvlm_fix.cache import cache_name
from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.functional import contrast_logits, select_by_cls, sink_tokens
from lvlm_fix.interception import Interception, Proceed
from lvlm_fix.methods import DAMRO, VAR, VTCCLS, Method
from lvlm_fix.models import family_of


@contextmanager
def reference(model: Any, inputs: Mapping[str, Any], methods: tuple[Method, ...]) -> Iterator[Generate]:
    """Greedy answers by the reference formulas of `methods`, with the parameters that they have.

    Raises:
        UnsupportedModelError: a model other than LLaVA-1.5, or ZipVL, whose reference code is not public.
    """
    by_type = {type(method): method.prepare(model) for method in methods}
    if model.config.model_type != "llava" or by_type.keys() - {DAMRO, VAR, VTCCLS}:
        raise UnsupportedModelError(
            "the reference formulas are restated for DAMRO, VAR and VTC-CLS on LLaVA-1.5 only: leave --reference out"
        )
    damro: Any = by_type.get(DAMRO)
    var: Any = by_type.get(VAR)
    vtc_cls: Any = by_type.get(VTCCLS)
    with ExitStack() as stack:
        tower = stack.enter_context(_tower(model)) if damro or vtc_cls else None
        decoder = stack.enter_context(_decoder(model, var)) if var else None

        def generate(new_tokens: int, streamer: Any) -> Any:
            if tower is not None:
                tower.clear()
            branches = _branches(model, inputs, tower, damro, vtc_cls)
            return _decode(model, branches, decoder, damro, new_tokens, streamer)

        yield generate


class _Tower:
    """The weights (B, H, N + 1, N + 1) of every layer of the vision tower, and the feature layer's projections."""

    def __init__(self, model: Any) -> None:
        family = family_of(model)
        layers = family.tower_attention(model)
        self.feature_layer = family.feature_layer(model)
        self.interception = Interception(layers, self._attend)
        self.clear()

    def clear(self) -> None:
        self.weights: list[Tensor] = []
        self.projections: list[tuple[Tensor, Tensor]] = []

    def _attend(
        self,
        proceed: Proceed,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        weights = (query.float() @ key.float().mT * query.shape[-1] ** -0.5).softmax(-1)
        self.weights.append(weights)
        self.projections.append((query, key))
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights

    def outliers(self, k: int) -> Tensor:
        """DAMRO: (B, k) places, in raster order, by the CLS row of the full-width product of the feature layer."""
        query, key = (x.transpose(1, 2).flatten(2).float() for x in self.projections[self.feature_layer])
        rows = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
        return rows.argsort(dim=-1, descending=True, stable=True)[:, :k].sort(-1).values

    def kept(self, method: VTCCLS, patches: int) -> Tensor:
        """VTC-CLS: (B, keep) places, in raster order, by the CLS attention of several layers."""
        scores = torch.stack([weights[:, :, 0, 1:].mean(1) for weights in self.weights])
        return select_by_cls(scores, method.count(patches), method.start_layer)


@contextmanager
def _tower(model: Any) -> Iterator[_Tower]:
    tower = _Tower(model)
    tower.interception.install()
    try:
        yield tower
    finally:
        tower.interception.remove()


class _Branch:
    """A prompt with some of its image tokens: embeddings (R, T, C), which of the T are image, the first after them."""

    def __init__(self, embeddings: Tensor, image: Tensor) -> None:
        self.embeddings, self.image = embeddings, image
        self.first = int(image.nonzero().max()) + 1
        self.cache = DynamicCache()
        self.sinks: dict[int, Tensor] = {}


def _branches(
    model: Any, inputs: Mapping[str, Any], tower: _Tower | None, damro: Any, vtc_cls: Any
) -> list[_Branch]:
    ids, family = inputs["input_ids"], family_of(model)
    found = family.encoder(model).get_image_features(pixel_values=inputs["pixel_values"])
    features = torch.stack(list(family.features(found)))
    is_image = ids[0] == family.image_token_id(model)
    if not bool(((ids == family.image_token_id(model)) == is_image).all()):
        raise UnsupportedModelError(
            "the reference formulas take prompts of one picture each, alike in length"
        )
    columns = is_image.nonzero()[:, 0]
    embeddings = model.get_input_embeddings()(ids)
    rows = torch.arange(len(ids), device=ids.device)[:, None]

    def with_tokens(places: Tensor) -> _Branch:
        chosen = features[rows, places].to(embeddings.dtype)
        low, high = int(columns[0]), int(columns[-1]) + 1
        parts = [embeddings[:, :low], chosen, embeddings[:, high:]]
        image = torch.zeros(sum(part.shape[1] for part in parts), dtype=torch.bool, device=ids.device)
        image[low : low + places.shape[1]] = True
        return _Branch(torch.cat(parts, dim=1), image)

    everything = torch.arange(len(columns), device=ids.device).expand(len(ids), -1)
    if tower is None:
        return [with_tokens(everything)]
    branches = [with_tokens(everything if vtc_cls is None else tower.kept(vtc_cls, len(columns)))]
    return branches + ([with_tokens(tower.outliers(damro.topk))] if damro else [])


class _Decoder:
    """VAR's attention, with every weight at hand and the heads one by one."""

    def __init__(self, model: Any, method: VAR) -> None:
        family = family_of(model)
        modules = family.decoder_attention(model)
        self.method, self.index = method, {id(module): index for index, module in enumerate(modules)}
        self.layers = list(family.decoder(model).layers)
        self.interception = Interception(modules, self._attend)
        self.branch: _Branch | None = None
        self.hidden_states: Tensor | None = None

    def remember(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden_states = args[0] if args else kwargs["hidden_states"]

    def _attend(
        self,
        proceed: Proceed,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        assert self.branch is not None and self.hidden_states is not None
        layer, queries, keys = self.index[id(module)], query.shape[2], key.shape[2]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        later = torch.ones(queries, keys, dtype=torch.bool, device=key.device).triu(keys - queries + 1)
        logits = (query.float() @ key.float().mT) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        if self.method.first_layer <= layer < len(self.index) - 1 and self.method.sink_dims:
            if layer not in self.branch.sinks:
                threshold = self.method.threshold(self.hidden_states.shape[-1])
                self.branch.sinks[layer] = sink_tokens(self.hidden_states, self.method.sink_dims, threshold)
            weights = self._redistribute(weights, self.branch.sinks[layer], self.branch)
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights

    def _redistribute(self, weights: Tensor, sinks: Tensor, branch: _Branch) -> Tensor:
        width, (queries, keys) = len(branch.image), weights.shape[2:]
        start = max(0, branch.first - (keys - queries))
        image = torch.cat([branch.image, branch.image.new_zeros(keys - width)])
        weights = weights.clone()
        for row in range(len(weights)):
            sink = torch.cat([sinks[row], sinks.new_zeros(keys - width)])
            if not bool((sink & image).any()):
                continue
            for head in range(weights.shape[1]):
                own = weights[row, head, start:]
                receiving = own[:, image & ~sink].sum(-1)
                to_image = receiving + own[:, image & sink].sum(-1)
                gate = (to_image >= self.method.min_image_attention) & (
                    receiving >= self.method.rho * to_image
                )
                gate &= receiving > 0
                budget = self.method.p * own[:, sink].sum(-1)
                changed = own.clone()
                changed[:, sink] *= 1 - self.method.p
                share = own[:, image & ~sink] / receiving.clamp_min(1e-30)[:, None]
                changed[:, image & ~sink] += budget[:, None] * share
                weights[row, head, start:] = torch.where(gate[:, None], changed, own)
        return weights


@contextmanager
def _decoder(model: Any, method: VAR) -> Iterator[_Decoder]:
    decoder = _Decoder(model, method)
    decoder.interception.install()
    handles = [
        layer.register_forward_pre_hook(decoder.remember, with_kwargs=True) for layer in decoder.layers
    ]
    try:
        yield decoder
    finally:
        decoder.interception.remove()
        for handle in handles:
            handle.remove()


def _decode(
    model: Any, branches: list[_Branch], decoder: _Decoder | None, damro: Any, new_tokens: int, streamer: Any
) -> Any:
    """Greedy, a full pass of the model for each branch and token; the end is never written, as in the other runs."""
    ends = torch.as_tensor(model.generation_config.eos_token_id, device=model.device).reshape(-1)
    tokens: list[Tensor] = []
    cache = cache_name(model)
    for _ in range(new_tokens):
        logits = []
        for branch in branches:
            if decoder is not None:
                decoder.branch = branch
            given: dict[str, Any]
            given = {"inputs_embeds": branch.embeddings} if not tokens else {"input_ids": tokens[-1][:, None]}
            given |= {cache: branch.cache, "use_cache": True, "logits_to_keep": 1}
            output = model(**given)
            logits.append(output.logits[:, -1].float())
        chosen = (
            logits[0] if damro is None else contrast_logits(logits[0], logits[1], damro.alpha, damro.beta)
        )
        chosen[:, ends] = -torch.inf
        tokens.append(chosen.argmax(-1))
        streamer.put(tokens[-1].cpu())
    layers = [layer for branch in branches for layer in branch.cache.layers]
    return SimpleNamespace(sequences=torch.stack(tokens, dim=1), cache=SimpleNamespace(layers=layers))
