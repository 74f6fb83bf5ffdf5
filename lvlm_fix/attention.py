"""The decoder's attention with methods in it: what a layer's stages are told, and which kernel then runs."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lvlm_fix.cache import BranchedCache
from lvlm_fix.decoding import attend
from lvlm_fix.errors import UnsupportedModelError
from lvlm_fix.interception import Interception, Proceed
from lvlm_fix.kernels import quantized_decode, sparse_prefill, visual_attention
from lvlm_fix.kernels.fused.launch import fits_attention
from lvlm_fix.kernels.visual_attention import plain_attention
from lvlm_fix.methods.base import AttentionStep, Method
from lvlm_fix.models.base import Family
from lvlm_fix.packed_layer import PackedLayer


@dataclass
class Pass:
    """One forward pass of the decoder under the methods: a prefill of one branch, or a step of all of them.

    `real` and `image_mask` (R, L) bool are over the logical columns of the prompt and all that came after;
    `first_query` (R,). `sinks` holds, by layer, what the prefill found; a prefill fills it, a step reads it.
    `unpadded` is True only where `real` is known to hide nothing.
    """

    real: Tensor
    image_mask: Tensor
    first_query: Tensor
    cache: Cache | None
    prefill: bool
    sinks: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    layers_seen: int = 0
    unpadded: bool = False
    told: dict[str, list[tuple[int, dict[str, Tensor]]]] = field(default_factory=dict)


_PASS: ContextVar[Pass | None] = ContextVar("lvlm_fix_pass", default=None)


def made_by_the_pass(*args: Any, **kwargs: Any) -> Any:
    """A mask function: under a pass the masks are its own, so that none of T x T elements is made."""
    return NotImplemented if _PASS.get() is None else None


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
    def running(self, this: Pass) -> Any:
        """Within, the decoder's layers attend as the methods say."""
        token = _PASS.set(this)
        if this.prefill:  # hooks would cost every layer of every step, which has no use for its input
            for layer in self.decoder_layers:
                self.handles.append(layer.register_forward_pre_hook(self._remember_input, with_kwargs=True))
        try:
            yield this
        finally:
            _PASS.reset(token)
            for handle in self.handles:
                handle.remove()
            self.handles.clear()
            self.hidden_states = None
        if this.layers_seen != len(self.modules):
            raise RuntimeError(
                f"{this.layers_seen} of the decoder's {len(self.modules)} layers attended under the methods: lvlm-fix "
                "assumes that each calls transformers' attention interface once in a forward pass"
            )

    def _remember_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _PASS.get() is not None:
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
        this = _PASS.get()
        if this is None:
            return proceed(module, query, key, value, mask, **options)
        # Of all columns: a cache layer that slides holds fewer keys than the masks have columns.
        _refuse_what_is_not_plain_attention(this.real.shape[1], options)
        layer = self.index[id(module)]
        this.layers_seen += 1
        if not this.prefill and query.shape[2] == 1 and isinstance(this.cache, BranchedCache):
            output = self._attend_next(this.cache, this, layer, query, key, value, options.get("scaling"))
            return output.transpose(1, 2).contiguous(), None
        step = self._step(this, layer, query, key, value, options.get("scaling"))
        for method in self.methods:
            step = method.attention(step)
            if step.told:
                this.told.setdefault(method.name, []).append((layer, step.told))
                step = replace(step, told={})
        output = _attention(step, this.unpadded)
        if this.prefill:
            self._keep(this, step)
        return output.transpose(1, 2).contiguous(), None

    def attend_next(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **options: Any
    ) -> Tensor:
        """Attention (R, 1, H, D) of one new token, whose key and value (R, Hkv, 1, D) are cached first.

        For compiled steps, in which the model's own code does not reach the cache.
        """
        this = _PASS.get()
        assert this is not None and isinstance(this.cache, BranchedCache)
        _refuse_what_is_not_plain_attention(this.real.shape[1], options)
        this.layers_seen += 1
        key, value = this.cache.update(key, value, layer)
        output = self._attend_next(this.cache, this, layer, query, key, value, scaling)
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
        if layer in slots.settled:
            return attend(query, key, value, slots, slots.settled[layer], scale)
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
        packed = cache.layers[layer]
        if isinstance(packed, PackedLayer) and packed.groups:
            return quantized_decode(
                step.query,
                packed.packed,
                packed.keys,
                packed.values,
                real if slots.hides else None,
                redistribution=moved,
                scale=step.scale,
            )
        known = moved is None or (
            moved.image_mask is image_mask
            and moved.sink_mask is sinks
            and moved.first_query is before.first_query
            # Elsewhere kernels of their own do it better: halves are not widened, and a device does it in one pass.
            and key.device.type == "cpu"
            and key.dtype in (torch.float32, torch.float64)
        )
        if known:
            untouched = (
                step.query is query and step.key is key and step.value is value and step.scale == scale
            )
            if self.steady and untouched:
                slots.settled[layer] = moved
            return attend(step.query, step.key, step.value, slots, moved, step.scale)
        return _attention(step, unpadded=not slots.hides)

    def _step(
        self, this: Pass, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
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
                mask = _widen(mask, int(packed.get_seq_length())).gather(1, columns.clamp_min(0)) & filled
            masks[name] = _widen(mask, key.shape[2])
        return AttentionStep(
            layer=layer,
            layers=len(self.modules),
            query=query,
            key=key,
            value=value,
            scale=scale,
            first_query=this.first_query.to(key.device),
            hidden_states=self.hidden_states if this.prefill else None,
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


def _attention(step: AttentionStep, unpadded: bool) -> Tensor:
    masked: dict[str, Any] = {"key_mask": None if unpadded else step.real, "scale": step.scale}
    if step.important is not None and step.important is not step.real:
        moved = step.redistribution
        return sparse_prefill(
            step.query, step.key, step.value, step.important, redistribution=moved, **masked
        )
    if step.redistribution is None:
        if masked["key_mask"] is not None and fits_attention(step.query):
            # Nothing is moved: the kernel's tiles are all plain, and no mask of Q x T is made.
            nothing, idle = torch.zeros_like(step.real), {"rho": 0.0, "min_image_attention": 0.0, "p": 0.0}
            masked |= idle | {"first_query": step.key.shape[2]}
            return visual_attention(step.query, step.key, step.value, nothing, nothing, **masked)
        return plain_attention(step.query, step.key, step.value, **masked)
    moved = step.redistribution
    return visual_attention(
        step.query,
        step.key,
        step.value,
        moved.image_mask,
        moved.sink_mask,
        rho=moved.rho,
        min_image_attention=moved.min_image_attention,
        p=moved.p,
        first_query=moved.first_query,
        **masked,
    )


def _widen(mask: Tensor, width: int) -> Tensor:
    """Columns that came after the prompt are neither image nor sinks."""
    missing = width - mask.shape[1]
    return torch.cat([mask, mask.new_zeros(len(mask), missing)], dim=1) if missing > 0 else mask


def _refuse_what_is_not_plain_attention(columns: int, options: dict[str, Any]) -> None:
    window = options.get("sliding_window")
    own = options.get("softcap") is not None or options.get("s_aux") is not None
    if own or (window is not None and columns > window):
        raise UnsupportedModelError(
            "this decoder caps its attention logits, slides a window over its keys or has a sink that is no token: "
            "VAR, ZipVL and compile=True work on plain causal attention; attach methods without the attention stage, "
            "such as VTCCLS or DAMRO"
        )


def first_query(image_mask: Tensor) -> Tensor:
    """Column (R,) after the last image token of each row of (R, T); T where there is none."""
    width = image_mask.shape[1]
    after = torch.arange(1, width + 1, device=image_mask.device) * image_mask
    last = after.amax(1)
    return torch.where(last > 0, last, width)
