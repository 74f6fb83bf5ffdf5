"""The decoder on a GPU as CUDA graphs that stop at each layer's attention: decoding steps, and short prefills."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from lvlm_fix.attention import MethodAttention
from lvlm_fix.cache import BranchedCache, Collecting, OutOfSight
from lvlm_fix.growing_layer import fill
from lvlm_fix.kernels.fused.launch import on_device_of
from lvlm_fix.passes import Pass
from lvlm_fix.recording import Attend, Recording, Recordings, asked_of, may_record, own

IMPLEMENTATION = "lvlm_fix_replayed"
"""What a model's configuration names while a pass of its decoder is recorded."""

LONGEST = 1024
"""Tokens of a prefill, all rows together, up to which it is recorded: more take the device longer than the host."""

OPTIONS = ("scaling", "sliding_window", "softcap", "s_aux")
"""Of what a layer passes to attention, what a pass here must know."""


class ReplayedPasses:
    """`plain_forward` of a model on one GPU."""

    def __init__(
        self, plain_forward: Callable, attention: MethodAttention, what: str, sharing: bool = False
    ) -> None:
        self.forward, self.attention = plain_forward, attention
        self.recordings = Recordings(what, sharing)

    def run(self, passes: Sequence[Pass], inputs: dict[str, Any], cache_name: str, caching: bool) -> Any:
        """What `plain_forward` says to `inputs`, which the passes tell the rest of; it stops at each attention."""
        forward = partial(self.forward, **{cache_name: OutOfSight() if caching else None})
        with _where(inputs):
            asked, recording = self._next(inputs)
            replays = recording is not None and bool(recording.graphs)
            with self._attending(recording), self.attention.running(*passes, watching=not replays):
                return self._say(asked, recording, forward, inputs)

    def _next(self, inputs: dict[str, Any], *how: str) -> tuple[Any, Recording | None]:
        first, *others = {value.device for value in inputs.values() if isinstance(value, Tensor)}
        modules = (module for layer in self.attention.decoder_layers for module in layer.modules())
        asked = *how, *asked_of(inputs, first)
        # What is read elsewhere is no part of a graph.
        return asked, self.recordings.next(
            asked, lambda: not others and may_record(modules, first, known="lvlm_fix.attention")
        )

    @torch.no_grad()
    def _say(self, asked: Any, recording: Recording | None, forward: Callable, inputs: dict[str, Any]) -> Any:
        if recording is None:
            return forward(**inputs)
        return own(self.recordings.output(recording, asked, forward, inputs))

    @contextmanager
    def _attending(self, recording: Recording | None) -> Iterator[None]:
        """Within, the decoder's layers attend by `_attention`."""
        token = _RUNNING.set((self.attention, recording))
        try:
            with self.attention.interception.replaced_by(IMPLEMENTATION):
                yield
        finally:
            _RUNNING.reset(token)


class ReplayedStep(ReplayedPasses):
    """One new token a row."""

    def __init__(self, plain_forward: Callable, attention: MethodAttention) -> None:
        super().__init__(plain_forward, attention, "decoding step")

    def __call__(self, this: Pass, cache: BranchedCache, inputs: dict[str, Any]) -> Any:
        """What is said to `inputs`, which the pass `this` tells the rest of."""
        with cache.attached():
            output = self.run([this], _without(cache.name, inputs), cache.name, caching=True)
        output[cache.name] = cache
        return output


class ReplayedPrefill(ReplayedPasses):
    """Short prompts, which take the host as long to queue as long ones: many, once image tokens are pruned.

    Where no method attends and rows are padded, transformers' own prefill hides the padding in another kernel: there
    logits are the same but for rounding, else bit by bit.
    """

    def __init__(self, plain_forward: Callable, attention: MethodAttention) -> None:
        super().__init__(plain_forward, attention, "prefill", sharing=True)

    def takes(self, passes: Sequence[Pass]) -> bool:
        """Whether these are few enough tokens, and nobody takes gradients, which a graph does not hand on."""
        if torch.is_grad_enabled():
            return False
        return len(passes[0].real) * sum(this.computed for this in passes) <= LONGEST

    def __call__(self, passes: Sequence[Pass], inputs: dict[str, Any], cache_name: str) -> Any:
        """What is said to `inputs`, which the passes, one for each branch, tell the rest of."""
        inputs = _without(cache_name, inputs)
        this, *others = passes
        if others or self.attention.methods or not (this.unpadded and _is_empty(this.cache)):
            return self.run(passes, inputs, cache_name, caching=this.cache is not None)
        # All prompts of this size are attended to alike, so that nothing need stop.
        whole = partial(self._whole, this, cache_name)
        with _where(inputs), self._attending(None):
            asked, recording = self._next(inputs, "whole")
            output, keys, values = self._say(asked, recording, whole, inputs)
        assert this.cache is not None
        for layer, key, value in zip(this.cache.layers, keys, values, strict=True):
            fill(layer, key, value)
        output[cache_name] = this.cache
        return output

    def _whole(self, this: Pass, cache_name: str, **inputs: Any) -> tuple[Any, Tensor, Tensor]:
        """A prefill with its attention, and the keys and values (L, R, H, T, D) of all layers."""
        cache = Collecting()
        with self.attention.running(replace(this, cache=None)):
            output = self.forward(**inputs | {cache_name: cache})
        return output, torch.stack(cache.keys), torch.stack(cache.values)


def _where(inputs: dict[str, Any]) -> AbstractContextManager[Any]:
    """Within, streams and graphs are those of the device that the inputs are on."""
    return on_device_of(next(value for value in inputs.values() if isinstance(value, Tensor)))


def _without(cache_name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a pass is asked, but for what attention knows by itself: the KV cache and the mask."""
    return {name: value for name, value in inputs.items() if name != cache_name} | {"attention_mask": None}


def _is_empty(cache: Cache | None) -> bool:
    """Whether all of a KV cache's layers are there to be filled."""
    layers = [] if cache is None else cache.layers
    return bool(layers) and all(
        type(layer) is DynamicLayer and not layer.get_seq_length() for layer in layers
    )


_RUNNING: ContextVar[tuple[MethodAttention, Recording | None]] = ContextVar("lvlm_fix_replayed_attention")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    attention, recording = _RUNNING.get()
    known: dict[str, Any] = {name: options.get(name) for name in OPTIONS}
    attend: Attend = partial(attention.update_and_attend, attention.index[id(module)], **known)
    if recording is not None:
        attend = partial(recording.stop, attend)
    return attend(query, key, value, attention.hidden_states), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Attention masks by itself."""


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
