"""A decoding step as one compiled graph: all of the model but attention, which stays with the methods.

Most of what a small model's step costs is the overhead of its many operations. `torch.compile` takes that away where it
sees the whole pass, and what the methods do in a layer is nothing that it could see: choices, packed codes, a cache
that changes its kind. So the graph holds one operator for them, which finds the pass that runs and does, layer by
layer, what an uncompiled step does. It also keeps the KV cache: what the graph never sees, it is never made anew for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lvlm_fix.attention import MethodAttention
from lvlm_fix.cache import BranchedCache, OutOfSight
from lvlm_fix.errors import AttachError, UnsupportedModelError
from lvlm_fix.passes import Pass

IMPLEMENTATION = "lvlm_fix_compiled"
"""What a model's configuration names while a compiled step runs."""

COMPILERS = ("g++", "clang++", "gcc", "clang", "cl")

_ATTENTION: ContextVar[MethodAttention] = ContextVar("lvlm_fix_compiled_attention")


class CompiledStep:
    """`plain_forward` for one new token a row; compiled when it is first called."""

    def __init__(self, plain_forward: Callable, attention: MethodAttention, device: torch.device) -> None:
        """Prepare.

        Raises:
            AttachError: torch has no compiler for the device.
            UnsupportedModelError: the decoder's attention modules are not numbered by layer.
        """
        if device.type == "cpu" and not any(
            shutil.which(name) for name in (os.environ.get("CXX"), *COMPILERS) if name
        ):
            raise AttachError(
                "compile=True found no C++ compiler, which torch needs on a CPU: install g++, set CXX, or leave it out"
            )
        numbers = [getattr(module, "layer_idx", None) for module in attention.modules]
        if numbers != list(range(len(numbers))):
            raise UnsupportedModelError(
                "compile=True cannot tell this decoder's layers apart: lvlm-fix assumes that transformers numbers the "
                "attention modules of layers by layer_idx, and these have other numbers; leave it out"
            )
        # Keys are the operator's, so of all sizes only the number of rows ever changes.
        self.forward = torch.compile(plain_forward, dynamic=True)
        self.attention = attention

    def __call__(self, this: Pass, cache: BranchedCache, inputs: dict[str, Any]) -> Any:
        """What `plain_forward` says to `inputs`, which the pass `this` tells the rest of."""
        with self._standing_in(), self.attention.running(this), cache.attached():
            output = self.forward(**inputs | {cache.name: OutOfSight(), "attention_mask": None})
        output[cache.name] = cache
        return output

    @contextmanager
    def _standing_in(self) -> Any:
        token = _ATTENTION.set(self.attention)
        try:
            with self.attention.interception.replaced_by(IMPLEMENTATION):
                yield
        finally:
            _ATTENTION.reset(token)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    own = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    scale, window = options.get("scaling"), options.get("sliding_window")
    return torch.ops.lvlm_fix.attend_next(query, key, value, module.layer_idx, scale, window, own), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The operator masks by itself."""


def _attend_next(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float | None, window: int | None, own: bool
) -> Tensor:
    return _ATTENTION.get().update_and_attend(
        layer, query, key, value, scaling=scale, sliding_window=window, softcap=own or None
    )


def _like_next(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[-1])


_LIBRARY = torch.library.Library("lvlm_fix", "DEF")
_LIBRARY.define(
    "attend_next(Tensor query, Tensor key, Tensor value, int layer, float? scale, int? window, bool own) -> Tensor"
)
_LIBRARY.impl("attend_next", _attend_next, "CompositeExplicitAutograd")
torch.library.register_fake("lvlm_fix::attend_next", _like_next, lib=_LIBRARY)
AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
