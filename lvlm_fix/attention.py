"""The decoder's attention with methods in it: what a layer's stages are told, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lvlm_fix.cache import BranchedCache
from lvlm_fix.decoding import attend, attend_packed
from lvlm_fix.dispatch import attend_by, refuse_what_is_not_plain_attention, widen
from lvlm_fix.interception import Interception, Proceed
from lvlm_fix.kernels import quantized_decode
from lvlm_fix.methods.base import AttentionStep, Method
from lvlm_fix.models.base import Family
from lvlm_fix.packed_layer import PackedLayer
from lvlm_fix.passes import RUNNING, Pass, made_by_the_pass


class MethodAttention:
    """Stands in for the self-attention of a model's decoder while a `Pass` runs, and for nothing else."""

    def __init__(self, model: Any, family: Family, methods: tuple[Method, ...]) -> None:
        self.methods = tuple(method for method in methods if {"attention", "cache"} & set(method.stages()))
        self.steady = all(method.steady for method in self.methods)
        self.modules = family.decoder_attention(model)
        self.decoder_layers = list(family.decoder(model).layers)
        self.index = {id(module): index for index, module in enumerate(self.modules)}
        self.interception = Interception(self.modules, self._attend, own_mask=made_by_the_pass)
        self.hidden_states: Tensor | None = None
        self.handles: list[Any] = []

    def install(self) -> None:
        self.interception.install()

    def remove(self) -> None:
        self.interception.remove()

    @contextmanager
    def installed(self) -> Iterator[None]:
        self.install()
        try:
            yield
        finally:
            self.remove()

    @contextmanager
    def running(self, *passes: Pass, watching: bool = True) -> Iterator[None]:
        """Within, the decoder's layers attend as the methods say: in one pass, or in prefills of several branches.

        Without `watching`, nobody looks at what goes into the layers: who calls `update_and_attend` knows it.
        """
        token = RUNNING.set(passes[0] if len(passes) == 1 else passes)
        # Hooks would cost every layer of every step, which has no use for its input.
        if watching and self.methods and passes[0].prefill:
            for layer in self.decoder_layers:
                self.handles.append(layer.register_forward_pre_hook(self._remember_input, with_kwargs=True))
        try:
            yield
        finally:
            RUNNING.reset(token)
            for handle in self.handles:
                handle.remove()
            self.handles.clear()
            self.hidden_states = None
        for this in passes:
            if this.layers_seen != len(self.modules):
                raise RuntimeError(
                    f"{this.layers_seen} of the decoder's {len(self.modules)} layers attended under the methods: "
                    "lvlm-fix assumes that each calls transformers' attention interface once in a forward pass"
                )

    def _remember_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if RUNNING.get() is not None:
            self.hidden_states = args[0] if args else kwargs["hidden_states"]

    def _attend(
        self,
        proceed: Proceed,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        this = RUNNING.get()
        if this is None:
            return proceed(module, query, key, value, mask, **options)
        layer = self.index[id(module)]
        if isinstance(this, Pass):
            output = self._attend_in(this, layer, query, key, value, self.hidden_states, options)
        else:
            output = self._attend_in_each(this, layer, query, key, value, self.hidden_states, options)
        return output.transpose(1, 2).contiguous(), None

    def _attend_in_each(
        self,
        passes: Sequence[Pass],
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention in prefills whose columns stand one after the other, each within its own, which it caches."""
        widths = [this.computed for this in passes]
        parts = list(zip(*(x.split(widths, dim=2) for x in (query, key, value)), strict=True))
        states = [None] * len(passes) if hidden_states is None else hidden_states.split(widths, dim=1)
        outputs = []
        for this, (own, keys, values), state in zip(passes, parts, states, strict=True):
            if this.prefix is not None:
                columns = this.prefix[:, None, :, None].to(keys.device)
                # Queries of nothing in front: with as many queries as keys, flash attention needs no mask.
                own = pad(own, (0, 0, columns.shape[2], 0))
                keys, values = (
                    torch.cat([first.take_along_dim(columns, dim=2), x], dim=2)
                    for first, x in zip(parts[0][1:], (keys, values), strict=True)
                )
            if this.cache is not None:
                keys, values = this.cache.update(keys, values, layer)
            output = self._attend_in(this, layer, own, keys, values, state, options)
            outputs.append(output[:, :, -this.computed :])
        return torch.cat(outputs, dim=2)

    def _attend_in(
        self,
        this: Pass,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        # Of all columns: a cache layer that slides holds fewer keys than the masks have columns.
        refuse_what_is_not_plain_attention(this.real.shape[1], options)
        this.layers_seen += 1
        scale = options.get("scaling")
        if not this.prefill and query.shape[2] == 1 and isinstance(this.cache, BranchedCache):
            return self._attend_next(this.cache, this, layer, query, key, value, scale)
        step = self._step(this, layer, query, key, value, hidden_states, scale)
        for method in self.methods:
            step = method.attention(step)
            if step.told:
                this.told.setdefault(method.name, []).append((layer, step.told))
                step = replace(step, told={})
        output = attend_by(step, this.unpadded)
        if this.prefill:
            self._keep(this, step)
        return output

    def update_and_attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention (R, Q, H, D) of new tokens, whose keys and values (R, Hkv, Q, D) are cached first.

        For compiled and recorded passes, in which the model's own code does not reach the cache.
        """
        this = RUNNING.get()
        assert this is not None
        if isinstance(this, Pass):
            if this.cache is not None:
                key, value = this.cache.update(key, value, layer)
            output = self._attend_in(this, layer, query, key, value, hidden_states, options)
        else:
            output = self._attend_in_each(this, layer, query, key, value, hidden_states, options)
        return output.transpose(1, 2).contiguous()

    def _attend_next(
        self,
        cache: BranchedCache,
        this: Pass,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
    ) -> Tensor:
        """Attention of one new token, by what the cache remembers of the keys."""
        slots = cache.slots(layer, key, this.sinks.get(layer))
        held = cache.layers[layer]
        packed = held if isinstance(held, PackedLayer) and held.groups else None
        if layer in slots.settled:
            moved = slots.settled[layer]
            if packed is not None:
                return attend_packed(query, packed, slots, moved, scale)
            return attend(query, key, value, slots, moved, scale)
        real, image_mask, sinks = slots.cut(key.shape[2])
        step = AttentionStep(
            layer=layer,
            layers=len(self.modules),
            query=query,
            key=key,
            value=value,
            scale=scale,
            real=real,
            image_mask=image_mask,
            first_query=this.first_query.to(key.device),
            sinks=sinks,
            shared=this.shared,
        )
        before = step
        for method in self.methods:
            step = method.attention(step)
        moved = step.redistribution
        known = moved is None or (
            moved.image_mask is image_mask
            and moved.sink_mask is sinks
            and moved.first_query is before.first_query
        )
        if known:
            untouched = (
                step.query is query and step.key is key and step.value is value and step.scale == scale
            )
            if self.steady and untouched:
                slots.settled[layer] = moved
            if packed is not None:
                return attend_packed(step.query, packed, slots, moved, step.scale)
            return attend(step.query, step.key, step.value, slots, moved, step.scale)
        if packed is not None:
            return quantized_decode(
                step.query,
                packed.packed,
                packed.keys,
                packed.values,
                real if slots.hides else None,
                redistribution=moved,
                scale=step.scale,
            )
        return attend_by(step, unpadded=not slots.hides)

    def _step(
        self,
        this: Pass,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None,
        scale: float | None,
    ) -> AttentionStep:
        masks = {"real": this.real, "image_mask": this.image_mask, "sinks": this.sinks.get(layer)}
        packed = this.cache.layers[layer] if this.cache is not None else None
        for name, mask in masks.items():
            if mask is None:
                continue
            mask = mask.to(key.device)
            if isinstance(packed, PackedLayer):
                columns = packed.columns
                filled = columns >= 0
                mask = widen(mask, int(packed.get_seq_length())).gather(1, columns.clamp_min(0)) & filled
            masks[name] = widen(mask, key.shape[2])
        return AttentionStep(
            layer=layer,
            layers=len(self.modules),
            query=query,
            key=key,
            value=value,
            scale=scale,
            first_query=this.first_query.to(key.device),
            hidden_states=hidden_states if this.prefill else None,
            shared=this.shared,
            **masks,  # type: ignore[arg-type]
        )

    def _keep(self, this: Pass, step: AttentionStep) -> None:
        """What later steps need of this layer's prefill: its sinks, and the cache that a method wants."""
        if step.sinks is not None:
            this.sinks[step.layer] = step.sinks
        if this.cache is None:
            return
        for method in self.methods:
            layer = method.cache(step)
            if layer is not None:
                this.cache.layers[step.layer] = layer
